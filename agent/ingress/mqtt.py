"""The MQTT door on the gateway's own broker: request/response topics, sensor topics and a retained status.

A message is read in the link's callback, where its deadline starts to count; only the answer takes a task. What cannot
be read gets an error that names the field. Topics and payloads are in docs/mqtt.md.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import Counter
from collections.abc import Coroutine, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from pydantic_core import to_json

from agent.config import MqttSection, SecuritySection, SensorSection
from agent.core.clock import Clock
from agent.core.errors import InferenceError, InvalidRequest, LinkError, Overloaded
from agent.core.types import InferenceRequest
from agent.ingress.base import Core, NotRemembered
from agent.ingress.payload import TooLarge, check_model, decode_json, named_producer, read_options
from agent.ingress.sensors import Sensor
from agent.link.mqtt import LinkFull, LinkState, Message, MessageProperties, MqttLink, Will, link_options
from agent.security.access import Guard
from agent.security.identity import Identity
from agent.telemetry.metrics import Metrics
from agent.wire.mqtt_properties import usable_topic

log = logging.getLogger(__name__)

DOOR = "mqtt"
JSON = "application/json"
RAW = "application/octet-stream"
STATUS_CHECK_S = 1.0
"""How soon a change shows in the retained status."""
SENSOR_SHARE = 4
"""One sensor may have this part of `max_in_flight` at once, so that a fast one leaves room for the others."""
MAX_PRODUCER = 128
"""Characters of a producer's name in a topic."""
STOP_S = 2.0
MAX_ID_BYTES = 512
"""Of a request's id, in whatever characters."""


@dataclass(frozen=True, slots=True)
class _Return:
    """Where an answer goes. `sensor` is added to it; `who` asked, for the record."""

    topic: str
    qos: int
    correlation: bytes | None = None
    sensor: str | None = None
    who: str = DOOR


@dataclass(slots=True)
class _Counters:
    requests: int = 0
    readings: int = 0
    malformed: int = 0
    overloaded: int = 0
    replayed: int = 0
    """Retained messages that the broker sent again after a reconnect: old, so not answered."""
    undelivered: int = 0
    """Answers that could not be handed to the broker."""


class MqttDoor:
    """Calls the one core. Owns its link to the gateway's broker."""

    def __init__(
        self,
        core: Core,
        section: MqttSection,
        sensors: Mapping[str, SensorSection],
        gateway_id: str,
        metrics: Metrics,
        clock: Clock,
        *,
        status_interval_s: float = 10.0,
        guard: Guard | None = None,
    ) -> None:
        """`guard` None: as without a section `security`."""
        self._core = core
        self._guard = guard or Guard(SecuritySection(), clock)
        self._metrics = metrics
        self._limit = section.max_in_flight
        self._sensor_limit = max(1, section.max_in_flight // SENSOR_SHARE)
        self._max_payload = section.max_payload_bytes
        self._status_interval_s = status_interval_s
        self._prefix = f"edge/{gateway_id}"
        self._gateway_id = gateway_id
        self._requests = [f"{self._prefix}/infer/+/+"]
        if section.shared_requests:
            self._requests.append(f"{self._prefix}/infer/+")
        # Whoever asks there may ask of everybody's requests.
        self._explains = f"{self._prefix}/explain" if section.shared_requests else None
        self._sensors = [Sensor(topic_filter, sensor) for topic_filter, sensor in sensors.items()]
        self._status_topic = f"{self._prefix}/status"
        self._offline = to_json({"gateway": gateway_id, "state": "offline", "ready": False, "reason": "offline"})
        options = link_options(
            section,
            f"edge-agent-{gateway_id}",
            keepalive_s=section.keepalive_s,
            receive_maximum=section.max_in_flight,
            # Room to receive what is somewhat too large, so that it can be refused by name; the broker drops the rest.
            max_packet_bytes=2 * section.max_payload_bytes + 65_536,
        )
        self.link = MqttLink(replace(options, will=Will(self._status_topic, self._offline)), clock, name="door")
        self.link.on_state(self._on_link)
        self.counters = _Counters()
        self._tasks: set[asyncio.Task[None]] = set()
        self._busy_sensors: Counter[str] = Counter()
        self._shown: Any = None
        self._kept: dict[str, dict[str, Any]] = {}
        self._untold: set[str] = set()
        self._status_task: asyncio.Task[None] | None = None

    @property
    def alive(self) -> bool:
        """Whether its background work still runs."""
        return self.link.alive and self._status_task is not None and not self._status_task.done()

    @property
    def in_flight(self) -> int:
        return len(self._tasks)

    async def start(self) -> None:
        """Begin to connect; returns at once."""
        # Own replies do not come back as requests, whatever response topic a caller names: no_local.
        for requests in self._requests:
            await self.link.subscribe(requests, self._on_request, no_local=True)
        if self._explains is not None:
            await self.link.subscribe(self._explains, self._on_explain, no_local=True)
        for sensor in self._sensors:
            callback = partial(self._on_reading, sensor)
            await self.link.subscribe(sensor.topic_filter, callback, qos=sensor.section.qos, no_local=True)
        await self.link.start()
        self._status_task = asyncio.create_task(self._keep_status(), name="mqtt status")

    async def close_door(self) -> None:
        """Take no more; what is here is still answered."""
        filters = [*self._requests, *(sensor.topic_filter for sensor in self._sensors)]
        filters += [self._explains] if self._explains is not None else []
        with contextlib.suppress(TimeoutError):  # a broker that hangs must not use up the time to stop in
            async with asyncio.timeout(STOP_S):
                await asyncio.gather(*(self.link.unsubscribe(topic_filter) for topic_filter in filters))
        self._publish_status()

    async def stop(self) -> None:
        """Wait a moment for the last answers, leave `offline` behind and disconnect."""
        if self._status_task is not None:
            self._status_task.cancel()
        if self._tasks:
            _, late = await asyncio.wait(self._tasks, timeout=STOP_S)
            for task in late:
                task.cancel()
        with contextlib.suppress(LinkError, TimeoutError):
            async with asyncio.timeout(STOP_S):
                await self.link.publish_acknowledged(self._status_topic, self._offline, retain=True)
        await self.link.stop()

    def status(self) -> dict[str, Any]:
        """For `/status`: plain JSON types."""
        counters = {key: getattr(self.counters, key) for key in _Counters.__slots__}
        return {**self.link.status(), "in_flight": self.in_flight, **counters}

    # --- questions -----------------------------------------------------------------------------------------------

    def _on_request(self, message: Message) -> None:
        if message.retain:
            self.counters.replayed += 1
            return
        self.counters.requests += 1
        model, _, producer = message.topic.removeprefix(f"{self._prefix}/infer/").partition("/")
        who = asker(producer[:MAX_PRODUCER])
        asked = message.properties.response_topic
        topic = asked if asked is not None and usable_topic(asked) else f"{self._prefix}/results/infer/{model}"
        back = _Return(topic, message.qos, message.properties.correlation_data, who=who.name)
        if self.in_flight >= self._limit:
            self._overloaded(back, f"{self._limit} requests are being answered already")
            return
        try:
            check_producer(producer)
            self._guard.count(who.name)
            request = self._request(message, model, who)
            self._guard.count_producer(request.producer)
            if request.durable:
                elsewhere = f"durable requests go to {self._prefix}/durable/{model}"
                raise InvalidRequest(f"delivery: {elsewhere}", field="delivery")
        except InferenceError as error:
            self._refuse(back, error)
        except Exception:
            log.exception("a request could not be read", extra={"topic": message.topic})
            self._refuse(back, _fault())
        else:
            self._spawn(self._answer(request, back))

    def _on_explain(self, message: Message) -> None:
        """The payload is the id of a request, or a document with `request_id`."""
        if message.retain:
            self.counters.replayed += 1
            return
        asked = message.properties.response_topic
        topic = asked if asked is not None and usable_topic(asked) else f"{self._prefix}/results/explain"
        back = _Return(topic, message.qos, message.properties.correlation_data)
        try:
            self._guard.count(DOOR)
            request_id = _request_id(message.payload)
            explanation = self._core.explain(request_id)
            if explanation is None:
                raise NotRemembered(request_id)
        except InferenceError as error:
            self._refuse(back, error)
        else:
            self._send(back, dict(explanation), "ok")

    def _request(self, message: Message, model: str, who: Identity) -> InferenceRequest:
        """Raises `InferenceError`."""
        self._check_size(message)
        admission = self._core.admission
        kind = (message.properties.content_type or JSON).partition(";")[0].strip().lower()
        if kind == JSON:
            document = decode_json(message.payload)
            check_model(document, model)
            return admission.from_document(
                document,
                model=model,
                producer=who.as_producer(named_producer(document)),
                received=message.received,
                asked_by=who.name,
            )
        if kind != RAW:
            raise InvalidRequest(f"content-type: must be {JSON} or {RAW}, found {kind[:64]!r}", field="content-type")
        raw = read_options(message.properties.user)
        check_model(raw.options, model)
        return admission.from_bytes(
            message.payload,
            model=model,
            options=raw.options,
            dtype=raw.dtype,
            scale=raw.scale,
            producer=who.as_producer(named_producer(raw.options)),
            received=message.received,
            asked_by=who.name,
        )

    def _on_reading(self, sensor: Sensor, message: Message) -> None:
        if message.retain:
            self.counters.replayed += 1
            return
        self.counters.readings += 1
        name = sensor.name(message.topic)
        correlation = message.properties.correlation_data
        back = _Return(f"{self._prefix}/results/{name}", message.qos, correlation, sensor=name, who=f"sensor:{name}")
        if self.in_flight >= self._limit or self._busy_sensors[name] >= self._sensor_limit:
            self._overloaded(back, "earlier readings are being answered still")
            return
        try:
            self._guard.count_producer(name)
            self._check_size(message)
            request = sensor.request(self._core.admission, message.payload, name, message.received)
        except InferenceError as error:
            self._refuse(back, error)
        except Exception:
            log.exception("a reading could not be read", extra={"topic": message.topic})
            self._refuse(back, _fault())
        else:
            self._busy_sensors[name] += 1
            self._spawn(self._answer(request, back)).add_done_callback(lambda _: self._sensor_done(name))

    def _sensor_done(self, name: str) -> None:
        self._busy_sensors[name] -= 1
        if not self._busy_sensors[name]:
            del self._busy_sensors[name]

    def _check_size(self, message: Message) -> None:
        if len(message.payload) > self._max_payload:
            found = f"{len(message.payload)} bytes"
            raise TooLarge(f"(payload): must be at most {self._max_payload} bytes, found {found}", field="(payload)")

    # --- answers -------------------------------------------------------------------------------------------------

    def _spawn(self, answer: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(answer)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _answer(self, request: InferenceRequest, back: _Return) -> None:
        try:
            result = await self._core.infer(request)
        except InferenceError as error:
            self._send(back, error.to_dict(), error.code)
        except Exception:
            log.exception("a request could not be answered", extra={"request_id": request.id})
            self._send(back, _fault().to_dict(), InferenceError.code)
        else:
            self._send(back, result.to_dict(), "ok")

    def publish_result(self, name: str, document: Mapping[str, Any]) -> None:
        """An answer that no message asked for: what a board sampled itself."""
        self._send(_Return(f"{self._prefix}/results/{name}", 1), dict(document), "ok")

    def _overloaded(self, back: _Return, message: str) -> None:
        self.counters.overloaded += 1
        self._metrics.malformed(DOOR, Overloaded.code)
        error = Overloaded(message, retry_after_s=1.0)
        self._guard.refused(DOOR, error, who=back.who)
        self._send(back, error.to_dict(), error.code)

    def _refuse(self, back: _Return, error: InferenceError) -> None:
        self.counters.malformed += 1
        self._metrics.malformed(DOOR, error.code)
        self._guard.refused(DOOR, error, who=back.who)
        self._send(back, error.to_dict(), error.code)

    def _send(self, back: _Return, document: dict[str, Any], status: str) -> None:
        if back.sensor is not None:
            document = {"sensor": back.sensor, **document}
        properties = MessageProperties(JSON, correlation_data=back.correlation, user=(("status", status),))
        try:
            payload = to_json(document, inf_nan_mode="null")
            try:
                self.link.publish(back.topic, payload, qos=back.qos, properties=properties)
            except LinkFull:  # the broker's window for QoS 1 is full: better without an acknowledgement than late
                self.link.publish(back.topic, payload, properties=properties)
        except (LinkError, ValueError) as error:
            self.counters.undelivered += 1
            log.warning("answer could not be delivered", extra={"topic": back.topic, "error": str(error)})

    # --- status --------------------------------------------------------------------------------------------------

    def _on_link(self, state: LinkState) -> None:
        self._shown = None
        if state.connected:
            self._publish_status()
            for below in self._kept:
                self._publish_kept(below)

    def keep(self, below: str, document: dict[str, Any]) -> None:
        """Publish retained on `edge/{gateway}/{below}`, now and after every reconnect, until replaced."""
        self._kept[below] = document
        if self.link.connected:
            self._publish_kept(below)

    def _publish_kept(self, below: str) -> None:
        payload = to_json({"gateway": self._gateway_id, **self._kept[below]})
        self._untold.add(below)
        with contextlib.suppress(LinkError):  # it is published again when the link is, or has room
            topic = f"{self._prefix}/{below}"
            self.link.publish(topic, payload, qos=1, retain=True, properties=MessageProperties(JSON))
            self._untold.discard(below)

    async def _keep_status(self) -> None:
        """Publish on change, and every `status_interval_s` even without one."""
        loop = asyncio.get_running_loop()
        due = loop.time() + self._status_interval_s
        while True:
            await asyncio.sleep(min(STATUS_CHECK_S, self._status_interval_s))
            try:
                self._publish_status(only_if_changed=loop.time() < due)
                for below in tuple(self._untold) if self.link.connected else ():
                    self._publish_kept(below)
            except Exception:
                log.exception("the status could not be published")
            if loop.time() >= due:
                due = loop.time() + self._status_interval_s

    def _publish_status(self, *, only_if_changed: bool = False) -> None:
        if not self.link.connected:
            return
        ready, reason = self._core.ready()
        status = self._core.status()
        targets = [
            {key: target.get(key) for key in ("name", "tier", "available", "reason")}
            for target in status.get("targets", ())
        ]
        components = [
            {key: one.get(key) for key in ("name", "state", "reason", "since")} for one in status.get("components", ())
        ]
        shown = (ready, reason, targets, [(one["name"], one["state"]) for one in components])
        if only_if_changed and shown == self._shown:
            return
        document = {"gateway": self._gateway_id, "state": "online", "ready": ready, "reason": reason}
        audit = status.get("security", {}).get("audit")
        if audit is not None:  # an anchor that leaves the gateway: it shows when the end of the trail is cut off
            document["audit_head"] = audit["head"]
        try:
            payload = to_json({**document, "targets": targets, "components": components}, fallback=str)
            self.link.publish(self._status_topic, payload, qos=1, retain=True, properties=MessageProperties(JSON))
        except LinkError:
            return
        self._shown = shown


def asker(producer: str) -> Identity:
    """Who asks on a topic: the producer in it, for whom the broker answers, or somebody."""
    if producer:
        return Identity(f"mqtt:{producer}", frozenset(("infer",)), producer, producer)
    return Identity(DOOR, frozenset(("infer",)))


def check_producer(producer: str) -> None:
    """Raises `InvalidRequest` for the last level of a topic that cannot be a producer's name."""
    if len(producer) > MAX_PRODUCER or not producer.isprintable():
        text = f"must be at most {MAX_PRODUCER} printable characters"
        raise InvalidRequest(f"producer: the last level of the topic {text}", field="producer")


def _fault() -> InferenceError:
    return InferenceError("the daemon has a fault; its log has the details")


def _request_id(payload: bytes) -> str:
    """Raises `InvalidRequest`."""
    if not payload.lstrip().startswith(b"{"):
        return payload[:MAX_ID_BYTES].decode("utf-8", "replace").strip()
    document = decode_json(payload[: 8 * MAX_ID_BYTES])
    request_id = document.get("request_id") if isinstance(document, dict) else None
    if not isinstance(request_id, str):
        raise InvalidRequest("request_id: must be the id of a request", field="request_id")
    return request_id
