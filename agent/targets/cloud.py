"""One lane into the cloud: MQTT 5 request/response with whatever workers are present on it.

Only canonical tensors travel; a worker runs its own variant of the model. The protocol is `wire.lane`, in words in
docs/mqtt.md. Requests go at QoS 1, because only then does the broker say that nobody listens; replies come at QoS 0,
because an acknowledgement of an answer that is of no use later buys nothing.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

import numpy as np

from agent.config import LaneSection
from agent.core.clock import Clock
from agent.core.component import Reading
from agent.core.errors import (
    LinkError,
    ProtocolError,
    TargetBusy,
    TargetError,
    TargetFailed,
    TargetTimeout,
    TargetUnavailable,
)
from agent.core.types import InferenceRequest, TargetAnswer, Tensor, Tier
from agent.link.mqtt import (
    LinkFull,
    LinkState,
    Message,
    MessageProperties,
    MessageTooLarge,
    MqttLink,
    link_options,
)
from agent.registry.catalog import Catalog, Family, Variant
from agent.targets.base import AVAILABLE, Availability, TargetTraits
from agent.wire import lane as protocol
from agent.wire import oip

log = logging.getLogger(__name__)

NO_MATCHING_SUBSCRIBERS = 0x10
REPLY_ROOM = 4 << 20
"""Bytes: the largest reply that the broker may pass on."""
MAX_WORKERS = 256
PRIOR_S = 0.05
PRIOR_LINK_S = 0.045
"""What a request is taken to need until one was measured, in all and for the way there and back: a round trip to a data
centre on the same continent."""
PRIOR_BYTES_PER_S = 1e6
OVERHEAD_BYTES = 500
"""JSON headers of request and reply; what MQTT adds is not counted, here or when it is measured."""


@dataclass(slots=True)
class _Present:
    presence: protocol.Presence
    until: float
    """Monotonic; presence that is not refreshed ends by itself."""


@dataclass(slots=True)
class _Counters:
    requests: int = 0
    answers: int = 0
    timeouts: int = 0
    late: int = 0
    """Replies to a request that nobody waits for any more."""
    unserved: int = 0
    """Requests that the broker had no subscriber for."""
    malformed: int = 0


class CloudLane:
    """A `Target`. `max_bytes` is the largest model file that this tier takes."""

    def __init__(self, lane: LaneSection, gateway_id: str, catalog: Catalog, clock: Clock, *, max_bytes: float) -> None:
        serverless = lane.kind == "serverless"
        self.lane = lane
        self._clock = clock
        self._usable = {
            variant.sha256
            for family in catalog.families.values()
            for variant in family.variants.values()
            if "cloud" in variant.targets
        }
        self._traits = TargetTraits(
            name=lane.target,
            tier=Tier.CLOUD_SERVERLESS if serverless else Tier.CLOUD_GPU,
            order=20 + 10 * serverless + 20 * lane.backup,
            max_concurrent=lane.max_concurrent,
            timeout_s=lane.timeout_ms / 1e3,
            parallel=lane.max_concurrent,
            prior_s=PRIOR_S,
            prior_link_s=PRIOR_LINK_S,
            bytes_per_s=PRIOR_BYTES_PER_S,
            overhead_bytes=OVERHEAD_BYTES,
            max_bytes=max_bytes,
            cost_usd=lane.cost_per_request,
            region=lane.region,
            backup=lane.backup,
            metered=lane.cost_per_request > 0 if lane.metered is None else lane.metered,
            link=lane.broker,
        )
        instance = os.urandom(4).hex()  # two daemons of one name must not read each other's replies
        self._reply_topic = protocol.reply_topic(lane.topic, gateway_id, instance)
        self._presence_prefix = protocol.presence_topic(lane.topic, "")
        options = link_options(
            lane,
            f"edge-agent-{gateway_id}-{lane.name}-{instance}",
            max_unacknowledged=max(lane.max_concurrent, 16),
            max_packet_bytes=REPLY_ROOM,
        )
        self.link = MqttLink(options, clock, name=self._traits.name)
        self.link.on_state(self._on_link)
        self.counters = _Counters()
        self._prefix = os.urandom(8)
        self._numbers = count()
        self._waiting: dict[bytes, asyncio.Future[Message]] = {}
        self._workers: dict[str, _Present] = {}
        self._next_expiry = math.inf
        self._choices: dict[tuple[str, str | None], tuple[Variant, ...]] = {}

    @property
    def traits(self) -> TargetTraits:
        return self._traits

    async def start(self) -> None:
        await self.link.subscribe(self._reply_topic, self._on_reply, qos=0)
        await self.link.subscribe(protocol.presence_topic(self.lane.topic, "+"), self._on_presence)
        await self.link.start()

    async def stop(self) -> None:
        await self.link.stop()

    # --- what routing asks ---------------------------------------------------------------------------------------

    def alive(self) -> bool:
        return self.link.alive

    def parts(self) -> Mapping[str, Reading]:
        return {f"link {self._traits.name}": self.link.reading()}

    def availability(self) -> Availability:
        if not self.link.connected:
            return Availability(False, f"lane {self.lane.name} is not connected: {self.link.state.reason}")
        if self.link.refused_filters:
            return Availability(False, f"the broker of lane {self.lane.name} does not let this gateway subscribe")
        self._expire()
        return AVAILABLE if self._workers else Availability(False, f"no worker on lane {self.lane.name}")

    def variant_for(self, family: Family, pinned: str | None) -> Variant | None:
        """The most accurate cloud variant that a present worker has, or the pinned one if some worker has it."""
        return max(self.variants_for(family, pinned), key=lambda variant: variant.accuracy.value, default=None)

    def variants_for(self, family: Family, pinned: str | None) -> Sequence[Variant]:
        """Every cloud variant that a present worker has."""
        self._expire()
        choice = (family.name, pinned)
        if choice not in self._choices:
            served = {model.sha256 for present in self._workers.values() for model in present.presence.models}
            served &= self._usable
            self._choices[choice] = tuple(
                variant
                for variant in family.variants.values()
                if variant.sha256 in served and pinned in (None, variant.id)
            )
        return self._choices[choice]

    async def infer(self, request: InferenceRequest, family: Family, variant: Variant, deadline: float) -> TargetAnswer:
        began = self._clock.monotonic()
        remaining_s = deadline - began
        if remaining_s <= 0:
            raise TargetTimeout("the deadline had passed before the request could be sent")
        correlation = self._prefix + next(self._numbers).to_bytes(8, "big")
        payload, header_length = oip.encode_request(request.inputs)
        properties = MessageProperties(
            content_type=oip.CONTENT_TYPE,
            response_topic=self._reply_topic,
            correlation_data=correlation,
            message_expiry_s=math.ceil(remaining_s),
            user=(
                (protocol.BUDGET_MS, f"{remaining_s * 1e3:.3f}"),
                (protocol.IDEMPOTENCY_KEY, request.idempotency_key or request.id),
                (oip.HEADER_LENGTH, str(header_length)),
            ),
        )
        reply: asyncio.Future[Message] = asyncio.get_running_loop().create_future()
        self._waiting[correlation] = reply
        try:
            self._send(protocol.request_topic(self.lane.topic, family.name, variant.sha256), payload, properties, reply)
            async with asyncio.timeout(remaining_s):
                message = await reply
        except TimeoutError:
            self.counters.timeouts += 1
            raise TargetTimeout(f"no reply from lane {self.lane.name} within {remaining_s * 1e3:.0f} ms") from None
        finally:
            del self._waiting[correlation]
        outputs, execution = self._opened(message, family, variant)
        self.counters.answers += 1
        link_s = message.received - began - execution.queue_s - execution.compute_s
        return TargetAnswer(
            outputs=outputs,
            provider=execution.provider,
            queue_s=execution.queue_s,
            link_s=max(0.0, link_s),
            compute_s=execution.compute_s,
            bytes_sent=len(payload),
            bytes_received=len(message.payload),
        )

    def status(self) -> Mapping[str, Any]:
        return {
            **self.link.status(),
            "topic": self.lane.topic,
            "waiting": len(self._waiting),
            "workers": {
                worker: {
                    "max_concurrent": present.presence.max_concurrent,
                    "models": [f"{model.model}/{model.variant}" for model in present.presence.models],
                    "providers": sorted({model.provider for model in present.presence.models}),
                }
                for worker, present in self._workers.items()
            },
            **{key: getattr(self.counters, key) for key in _Counters.__slots__},
        }

    # --- one attempt ---------------------------------------------------------------------------------------------

    def _send(self, topic: str, payload: bytes, properties: MessageProperties, reply: asyncio.Future[Message]) -> None:
        def acknowledged(result: int | LinkError) -> None:
            if reply.done():
                return
            if isinstance(result, LinkError):
                reply.set_exception(TargetUnavailable(str(result)))
            elif result == NO_MATCHING_SUBSCRIBERS:
                self.counters.unserved += 1
                reply.set_exception(TargetUnavailable(f"no worker on lane {self.lane.name} takes requests"))
            elif result >= 0x80:
                reply.set_exception(TargetUnavailable(f"the broker refused the request (reason {result:#04x})"))

        try:
            try:
                self.link.publish(topic, payload, qos=1, properties=properties, acknowledged=acknowledged)
            except LinkFull:  # mosquitto allows 20 at once: QoS 0 needs no place among them
                self.link.publish(topic, payload, properties=properties)
        except LinkFull as error:
            raise TargetBusy(str(error)) from None
        except MessageTooLarge as error:
            refused = TargetFailed(f"lane {self.lane.name}: {error}")
            refused.counts = False  # the request is at fault: others can be asked there
            raise refused from None
        except LinkError as error:
            raise TargetUnavailable(str(error), permanent=error.permanent) from None
        self.counters.requests += 1

    def _opened(
        self, message: Message, family: Family, variant: Variant
    ) -> tuple[dict[str, Tensor], protocol.Execution]:
        """Canonical outputs of a reply. Raises `TargetError`."""
        status = message.properties.get(protocol.STATUS)
        if status != protocol.OK:
            raise _error(status, protocol.decode_error(message.payload))
        try:
            response = oip.decode_response(
                message.payload, oip.header_length(message.properties.get(oip.HEADER_LENGTH))
            )
            execution = protocol.Execution.from_parameters(response.parameters)
            if execution.model_sha256 != variant.sha256:
                raise ProtocolError(f"it ran the model {execution.model_sha256[:12]}, not {variant.sha256[:12]}")
            return {spec.name: _output(response.outputs, spec.name, spec.shape) for spec in family.outputs}, execution
        except ProtocolError as error:
            self.counters.malformed += 1
            raise TargetFailed(f"a worker on lane {self.lane.name} sent an unusable reply: {error}") from None

    # --- callbacks of the link -----------------------------------------------------------------------------------

    def _on_reply(self, message: Message) -> None:
        correlation = message.properties.correlation_data
        reply = None if correlation is None else self._waiting.get(correlation)
        if reply is None or reply.done():
            self.counters.late += 1
        else:
            reply.set_result(message)

    def _on_link(self, state: LinkState) -> None:
        if state.connected:
            return
        for reply in self._waiting.values():
            if not reply.done():
                reply.set_exception(TargetUnavailable(f"lane {self.lane.name} lost its link: {state.reason}"))
        # The next connection tells who is there: presence is retained.
        self._workers.clear()
        self._changed()

    def _on_presence(self, message: Message) -> None:
        worker = message.topic[len(self._presence_prefix) :]
        if not message.payload:
            if self._workers.pop(worker, None) is not None:
                # Its own goodbye, or the broker's in its name when the connection broke: no telling which.
                extra = {"lane": self.lane.name, "worker": worker, "workers": len(self._workers)}
                log.warning("worker left", extra=extra)
        elif worker in self._workers or len(self._workers) < MAX_WORKERS:
            try:
                presence = protocol.Presence.from_bytes(message.payload)
            except ProtocolError as error:
                self.counters.malformed += 1
                log.warning("unusable presence", extra={"lane": self.lane.name, "worker": worker, "error": str(error)})
                return
            if worker not in self._workers:
                log.info("worker present", extra={"lane": self.lane.name, "worker": worker})
            expiry_s = message.properties.message_expiry_s
            self._workers[worker] = _Present(presence, math.inf if expiry_s is None else message.received + expiry_s)
        self._changed()

    def _changed(self) -> None:
        self._choices.clear()
        self._next_expiry = min((present.until for present in self._workers.values()), default=math.inf)

    def _expire(self) -> None:
        now = self._clock.monotonic()
        if now < self._next_expiry:
            return
        for worker in [worker for worker, present in self._workers.items() if present.until <= now]:
            del self._workers[worker]
            extra = {"lane": self.lane.name, "worker": worker, "workers": len(self._workers)}
            log.warning("worker no longer says it is there", extra=extra)
        self._changed()


def _output(outputs: Mapping[str, Tensor], name: str, shape: tuple[int, ...]) -> Tensor:
    value = outputs.get(name)
    if value is None or value.shape != shape or value.dtype.kind != "f":
        raise ProtocolError(f"output {name!r} is missing or not float {list(shape)}")
    if not np.isfinite(value).all():
        raise ProtocolError(f"output {name!r} holds NaN or infinity")
    return value


def _error(status: str | None, message: str) -> TargetError:
    if status == protocol.BUSY:
        return TargetBusy(message)
    if status == protocol.EXPIRED:
        return TargetTimeout(message)
    return TargetFailed(f"{(status or 'no status')[:32]}: {message}")
