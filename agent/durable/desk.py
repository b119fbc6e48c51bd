"""The counter of durable delivery: takes requests in, and runs what has them answered and delivered."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Protocol

from agent.config import Config
from agent.core.clock import Clock
from agent.core.errors import InferenceError, InvalidRequest
from agent.core.types import InferenceRequest, InferenceResult
from agent.durable.asker import Asker, Regions, put
from agent.durable.records import ASK, LOCAL, UPLINK, Return, request_item, uplink_item
from agent.durable.sender import Sender
from agent.link.mqtt import MqttLink, link_options
from agent.registry.catalog import Catalog
from agent.security.audit import Audit
from agent.store.outbox import Outbox, Receipt
from agent.store.outbox_file import Step
from agent.supervisor import Component, ComponentState, Reading, Supervisor

log = logging.getLogger(__name__)

WATCH_S = 1.0
STALL_S = 30.0
"""The longest that a task may not go round its loop: reading a page from a slow disk is part of that."""


class Door(Protocol):
    """Where durable requests come in by MQTT; it uses the desk's link."""

    async def start(self) -> None: ...

    async def close(self) -> None: ...

    def status(self) -> dict[str, Any]: ...


class Desk:
    """One for each daemon that has an outbox. `audit` records what is accepted; `askable` names the targets that can
    be asked now; `regions` is as in `Asker`; `step` is told each step of an item's life."""

    def __init__(
        self,
        config: Config,
        folder: Path,
        infer: Callable[[InferenceRequest], Awaitable[InferenceResult]],
        catalog: Catalog,
        clock: Clock,
        *,
        audit: Audit | None = None,
        askable: Callable[[], frozenset[str]] = frozenset,
        regions: Regions = lambda producer, asked: asked,
        step: Step = lambda name: None,
        events: Counter[str] | None = None,
    ) -> None:
        settings = config.outbox
        self._clock = clock
        self._audit = audit
        self._askable = askable
        self._prefix = f"edge/{config.gateway.id}"
        self.outbox = Outbox(folder / "outbox.sqlite", settings, clock, deliver=self._deliver, step=step, events=events)
        self.outbox.stored = self._stored
        self._loop: asyncio.AbstractEventLoop | None = None
        self.door: Door | None = None
        self.alarm: Callable[[str], None] = lambda trouble: None
        """Called with what is wrong with the outbox, and with nothing when it is well."""
        self.link = MqttLink(
            link_options(
                config.mqtt,
                f"edge-agent-{config.gateway.id}-durable",
                keepalive_s=config.mqtt.keepalive_s,
                receive_maximum=config.mqtt.max_in_flight,
                max_packet_bytes=2 * config.mqtt.max_payload_bytes + 65_536,
                max_unacknowledged=settings.max_in_flight,
                session_expiry_s=settings.session_expiry_s,
                manual_acknowledgement=True,
            ),
            clock,
            name="durable",
        )
        self.senders = {LOCAL: Sender(LOCAL, self.outbox, self.link, settings, clock, step=step)}
        self._uplink: tuple[str, str | None] | None = None
        lane = next((lane for lane in config.cloud.lanes if lane.name == config.uplink.lane), None)
        if lane is not None:
            self._uplink = f"{config.uplink.topic}/{config.gateway.id}", lane.region
            client = f"edge-agent-{config.gateway.id}-uplink"
            options = link_options(lane, client, max_unacknowledged=settings.max_in_flight)
            expiry_s = config.uplink.message_expiry_s
            self.senders[UPLINK] = Sender(
                UPLINK,
                self.outbox,
                MqttLink(options, clock, name="uplink"),
                settings,
                clock,
                expiry_s=None if expiry_s is None else lambda age_s: expiry_s,
                step=step,
            )
        self.asker = Asker(
            self.outbox, infer, catalog, settings, clock, uplink_topic=self.uplink_topic, regions=regions
        )

    # --- taking in -----------------------------------------------------------------------------------------------

    def result_topic(self, request: InferenceRequest) -> str:
        """Where the answer of a request goes that names no topic of its own."""
        return f"{self._prefix}/results/durable/{request.model}"

    def uplink_topic(self, request: InferenceRequest) -> str | None:
        """Where its answer is passed on to. None: nowhere, also where its regions do not allow the uplink's."""
        if not request.uplink or self._uplink is None:
            return None
        topic, region = self._uplink
        return None if request.allowed_regions and region not in request.allowed_regions else topic

    async def accept(
        self, request: InferenceRequest, back: Return | None = None, key: str | None = None, *, repeat: bool = True
    ) -> Receipt:
        """Return when the request is on the disk, or was before under the same idempotency key. `key` is for one that
        has none of its own. Raises `OutboxFull`, `NotStored`, `InvalidRequest` and `AuditUnavailable`."""
        if request.idempotency_key is not None:
            key, repeat = f"key:{request.idempotency_key}", True
        item = request_item(request, back or Return(self.result_topic(request)), key, repeat=repeat)
        try:
            if self._audit is not None:
                self._audit.require()
            receipt = await put(self.outbox, [item])
        except InferenceError as error:
            error.request_id = request.id
            raise
        if self._audit is not None:
            self._audit.accepted(request, duplicate=receipt.duplicate)
        return receipt

    async def accept_told(self, request: InferenceRequest) -> dict[str, Any]:
        """As `accept`; returns what a caller over HTTP is told."""
        receipt = await self.accept(request)
        return {
            "request_id": request.id,
            "state": "accepted",
            "id": receipt.id,
            "duplicate": receipt.duplicate,
            "result_topic": self.result_topic(request),
        }

    def forward(self, request: InferenceRequest, outcome: InferenceResult | InferenceError) -> None:
        """Pass a sensor's answer on to the cloud, if its configuration says so. A durable request's answer is passed
        on where it is stored."""
        topic = self.uplink_topic(request)
        if topic is None or request.durable or isinstance(outcome, InferenceError):
            return
        item = uplink_item(request, outcome, topic, self._clock.wall())

        def done(result: Receipt | InferenceError) -> None:
            if isinstance(result, InferenceError):
                extra = {"request_id": request.id, "error": result.message}
                log.warning("an answer is not passed on to the cloud", extra=extra)

        self.outbox.put([item], done)

    # --- life ----------------------------------------------------------------------------------------------------

    async def start(self, supervisor: Supervisor) -> None:
        """Begin to open the outbox, which may take a while, and to connect; returns at once."""
        self._loop = asyncio.get_running_loop()
        self.outbox.start()
        if self.door is not None:
            await self.door.start()
        supervisor.spawn("outbox", self._watch, stall_s=STALL_S)
        supervisor.spawn("outbox asker", self._run(self.asker.work), stall_s=STALL_S)
        for route, sender in self.senders.items():
            supervisor.spawn(f"outbox {route}", self._run(sender.work), stall_s=STALL_S)
            supervisor.watch(f"link {sender.link.name}", lambda sender=sender: sender.link.alive)  # type: ignore[misc]
            await sender.link.start()

    def parts(self) -> dict[str, Reading]:
        """The links that what is stored goes out by."""
        return {f"link {sender.link.name}": sender.link.reading() for sender in self.senders.values()}

    async def close_door(self) -> None:
        """Take no more, and begin with no more requests."""
        self.asker.pause()
        if self.door is not None:
            await self.door.close()

    async def stop(self, timeout_s: float) -> None:
        """Let what is being asked end and what is on its way be acknowledged; write it all down."""
        await self.asker.close(timeout_s)
        self.outbox.flush()
        await asyncio.gather(*(sender.close(timeout_s) for sender in self.senders.values()))
        await asyncio.to_thread(self.outbox.close)
        await asyncio.gather(*(sender.link.stop() for sender in self.senders.values()))

    def status(self) -> dict[str, Any]:
        """For `/status`: plain JSON types."""
        routes: dict[str, Any] = {ASK: self.asker.status()}
        routes |= {route: {**sender.link.status(), **sender.status()} for route, sender in self.senders.items()}
        door = None if self.door is None else self.door.status()
        return {**self.outbox.stats(), "routes": routes, "door": door}

    async def _watch(self, component: Component) -> None:
        """What `/status`, the metrics and the retained status say of the outbox; and whether a target is back, that
        requests may wait for."""
        shown: str | None = None
        known: frozenset[str] = frozenset()
        while True:
            before, known = known, self._askable()
            if known - before:
                self.asker.nudge()
            trouble = self.outbox.problem()
            if self.outbox.checking:
                component.set(ComponentState.STARTING, trouble)
            else:
                component.set(ComponentState.DEGRADED if trouble else ComponentState.UP, trouble)
                if trouble != shown:
                    self.alarm(trouble)
                    shown = trouble
            await asyncio.sleep(WATCH_S)

    @staticmethod
    def _run(work: Callable[[Callable[[], None]], Awaitable[None]]) -> Callable[[Component], Awaitable[None]]:
        def run(component: Component) -> Awaitable[None]:
            component.set(ComponentState.UP)
            return work(component.beat)

        return run

    def _deliver(self, call: Callable[[], None]) -> None:
        """The outbox's thread has something for the loop. None, or a closed one: the daemon has stopped."""
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(call)

    def _stored(self, fresh: Any) -> None:
        if fresh is None:
            self.asker.stored(None)
            for sender in self.senders.values():
                sender.wake()
            return
        for route, producer in fresh:
            if route == ASK:
                self.asker.stored(producer)
            elif route in self.senders:
                self.senders[route].wake()


def no_outbox() -> InvalidRequest:
    """What a durable request is told where there is no outbox."""
    return InvalidRequest("delivery: durable needs outbox.enabled: true on this gateway", field="delivery")
