"""The durable MQTT door: requests and readings that are on the disk before the broker gets its PUBACK.

A connection of its own, in a session that the broker keeps: what was published while the daemon was away comes when it
is back. Topics and payloads are in docs/mqtt.md, what is promised in docs/durability.md.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from pydantic_core import to_json

from agent.config import MqttSection, SensorSection
from agent.core.errors import Forbidden, InferenceError, InvalidRequest, LinkError, Overloaded
from agent.core.types import InferenceRequest
from agent.durable.desk import Desk
from agent.durable.records import Return, arrival_key
from agent.ingress.base import Core
from agent.ingress.mqtt import MAX_PRODUCER, asker, check_producer
from agent.ingress.payload import TooLarge, check_model, decode_json, named_producer
from agent.ingress.sensors import Sensor
from agent.link.mqtt import Message, MessageProperties
from agent.security.access import Guard
from agent.telemetry.metrics import Metrics
from agent.wire.mqtt_properties import usable_topic

log = logging.getLogger(__name__)

DOOR = "durable"
JSON = "application/json"
STOP_S = 2.0


@dataclass(slots=True)
class _Counters:
    accepted: int = 0
    duplicates: int = 0
    refused: int = 0
    replayed: int = 0


@dataclass(frozen=True, slots=True)
class _From:
    """Whom a message came from, as far as is known, and where its answer goes. `tell`: also that it was accepted."""

    who: str
    topic: str
    sensor: str | None = None
    tell: bool = False


class Acknowledgements:
    """PUBACKs in the order of their messages, as MQTT asks for, in whatever order they are ready."""

    def __init__(self) -> None:
        self._owed: deque[tuple[Message, list[bool]]] = deque()

    def owe(self, message: Message) -> list[bool]:
        """The first message's turn comes first. Give what is returned to `ready`."""
        ready = [False]
        if message.acknowledge is not None:
            self._owed.append((message, ready))
        return ready

    def ready(self, ready: list[bool]) -> None:
        ready[0] = True
        while self._owed and self._owed[0][1][0]:
            message, _ = self._owed.popleft()
            assert message.acknowledge is not None
            message.acknowledge()


class DurableDoor:
    """Reads what comes on the link of durable delivery; `desk` puts it on the disk."""

    def __init__(
        self,
        core: Core,
        desk: Desk,
        section: MqttSection,
        sensors: Mapping[str, SensorSection],
        gateway_id: str,
        metrics: Metrics,
        guard: Guard,
    ) -> None:
        """`sensors`: those that are durable."""
        self._core = core
        self._desk = desk
        self.link = link = desk.link
        self._limit = section.max_in_flight
        self._max_payload = section.max_payload_bytes
        self._prefix = f"edge/{gateway_id}"
        self._metrics = metrics
        self._guard = guard
        self._shared = section.shared_requests
        self._sensors = [Sensor(topic_filter, sensor) for topic_filter, sensor in sensors.items()]
        self._owed = Acknowledgements()
        self._tasks: set[asyncio.Task[None]] = set()
        self.counters = _Counters()
        link.on_state(lambda state: None if state.connected else self._lost())
        link.unrouted = self._on_nobodys

    async def start(self) -> None:
        """To be called before the link is started: what the broker kept comes as soon as it is connected."""
        # Also where it is closed: the broker may have kept the subscription, and what comes by it must be refused.
        await self.link.subscribe(f"{self._prefix}/durable/+", self._on_request, no_local=True)
        await self.link.subscribe(f"{self._prefix}/durable/+/+", self._on_request, no_local=True)
        for sensor in self._sensors:
            await self.link.subscribe(sensor.topic_filter, partial(self._on_reading, sensor), no_local=True)

    async def close(self) -> None:
        """Take no more, without unsubscribing: the broker keeps what comes meanwhile. What is here is finished."""
        self._limit = 0
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=STOP_S)

    def status(self) -> dict[str, Any]:
        """For `/status`: plain JSON types."""
        counters = {key: getattr(self.counters, key) for key in _Counters.__slots__}
        return {"being_stored": len(self._tasks), **counters}

    # --- what comes ----------------------------------------------------------------------------------------------

    def _on_nobodys(self, message: Message) -> None:
        """By a subscription that a former daemon left: it has its turn among the PUBACKs like any other."""
        if self._limit:
            self._owed.ready(self._owed.owe(message))

    def _on_request(self, message: Message) -> None:
        model, _, producer = message.topic.removeprefix(f"{self._prefix}/durable/").partition("/")
        who = asker(producer[:MAX_PRODUCER])
        asked = message.properties.response_topic
        topic = asked if asked is not None and usable_topic(asked) else f"{self._prefix}/results/durable/{model}"

        def read() -> InferenceRequest:
            if not producer and not self._shared:
                raise Forbidden("mqtt.shared_requests is false: the topic must end with the producer", field="producer")
            check_producer(producer)
            self._guard.count(who.name)
            self._check_size(message)
            document = decode_json(message.payload)
            check_model(document, model)
            if not isinstance(document, Mapping):
                raise InvalidRequest("(body): must be a JSON object", field="(body)")
            request = self._core.admission.from_document(
                {**document, "delivery": "durable"},
                model=model,
                producer=who.as_producer(named_producer(document)),
                received=message.received,
                asked_by=who.name,
            )
            self._guard.count_producer(request.producer)
            return request

        self._take(message, _From(who.name, topic, tell=asked is not None), read)

    def _on_reading(self, sensor: Sensor, message: Message) -> None:
        name = sensor.name(message.topic)

        def read() -> InferenceRequest:
            self._guard.count_producer(name)
            self._check_size(message)
            return sensor.request(self._core.admission, message.payload, name, message.received)

        self._take(message, _From(f"sensor:{name}", f"{self._prefix}/results/{name}", name), read)

    def _check_size(self, message: Message) -> None:
        if len(message.payload) > self._max_payload:
            found = f"{len(message.payload)} bytes"
            raise TooLarge(f"(payload): must be at most {self._max_payload} bytes, found {found}", field="(payload)")

    def _take(self, message: Message, source: _From, read: Callable[[], InferenceRequest]) -> None:
        if self._limit == 0:  # Closed: the broker gets no PUBACK, and sends it again when the daemon is back.
            return
        ready = self._owed.owe(message)
        if message.retain:
            self.counters.replayed += 1
            self._owed.ready(ready)
            return
        try:
            # What is to be acknowledged is bounded by the broker's window, and by `outbox.max_waiting` where what was
            # taken from a lost connection waits as well. A refusal would be acknowledged, and let the next one come.
            if message.acknowledge is None and len(self._tasks) >= self._limit:
                raise Overloaded(f"{self._limit} requests wait for the disk already", retry_after_s=1.0)
            request = read()
        except Exception as error:
            self._refuse(error, message, source)
            self._owed.ready(ready)
            return
        task = asyncio.get_running_loop().create_task(self._store(request, message, source, ready))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _store(self, request: InferenceRequest, message: Message, source: _From, ready: list[bool]) -> None:
        try:
            correlation = message.properties.correlation_data
            key = arrival_key(message.topic, message.payload, correlation, message.mid) if message.mid else None
            back = Return(source.topic, correlation, source.sensor)
            receipt = await self._desk.accept(request, back, key, repeat=message.again)
        except Exception as error:
            self._refuse(error, message, source)
        else:
            self.counters.accepted += 1
            self.counters.duplicates += receipt.duplicate
            if source.tell:
                document = {"request_id": request.id, "state": "accepted", "id": receipt.id}
                self._send(source.topic, document, "accepted", message)
        self._owed.ready(ready)

    def _refuse(self, error: Exception, message: Message, source: _From) -> None:
        if not isinstance(error, InferenceError):
            log.exception("a durable request could not be taken", exc_info=error, extra={"topic": message.topic})
            error = InferenceError("the daemon has a fault; its log has the details")
        self.counters.refused += 1
        self._metrics.malformed(DOOR, error.code)
        self._guard.refused(DOOR, error, who=source.who)
        document = error.to_dict() if source.sensor is None else {"sensor": source.sensor, **error.to_dict()}
        self._send(source.topic, document, error.code, message)

    def _send(self, topic: str, document: dict[str, Any], status: str, message: Message) -> None:
        correlation = message.properties.correlation_data
        properties = MessageProperties(JSON, correlation_data=correlation, user=(("status", status),))
        with contextlib.suppress(LinkError, ValueError):
            self.link.publish(topic, to_json(document, inf_nan_mode="null"), properties=properties)

    def _lost(self) -> None:
        """What was not acknowledged on this connection comes again on the next."""
        self._owed = Acknowledgements()
