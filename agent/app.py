"""The only wiring: builds every part of the daemon, starts them in order, and stops them in reverse."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from agent import __version__
from agent.build import build_targets, build_trace
from agent.core.clock import Clock
from agent.core.errors import ConfigError, InferenceError
from agent.core.types import AccuracyMode, InferenceRequest, InferenceResult
from agent.durable.desk import Desk, no_outbox
from agent.ingress.durable import DurableDoor
from agent.ingress.http import create_app
from agent.ingress.http_server import HttpServer
from agent.ingress.mqtt import MqttDoor
from agent.ingress.streams import StreamDoor
from agent.parts import read_parts
from agent.pipeline import Memory, Pipeline
from agent.registry.accuracy import Accuracies, Alarm
from agent.registry.signing import SigningError
from agent.registry.trust import keep_counter
from agent.routing.admission import Admission
from agent.routing.budget import budget_of
from agent.routing.limits import limits_of
from agent.routing.router import Router
from agent.routing.shadow import Shadow
from agent.runtimes.base import RuntimeUnavailable
from agent.security.access import Guard
from agent.security.audit import Audit
from agent.security.certificates import LOOK_S, Watch, certificate_files
from agent.settings import Reloads, Settings
from agent.store.budget_file import BudgetFile
from agent.store.cache import ResultCache
from agent.supervisor import Component, ComponentState, Reading, Supervisor
from agent.telemetry.load import LoadSampler
from agent.telemetry.loop_watch import LoopWatch
from agent.telemetry.metrics import Metrics
from agent.telemetry.story import Stories

log = logging.getLogger(__name__)

KEEP_S = 1.0
"""How often what budgets have used is written."""
LOOK_AT_PARTS_S = 1.0
"""How exact `since` of a component is."""
STALL_S = 10.0
"""A supervised task that has not gone round its loop for this long keeps the watchdog from being fed."""


class Heritage(NamedTuple):
    """What outlives a reload. `started` is monotonic."""

    metrics: Metrics
    started: float
    reloads: Reloads
    memory: Memory
    refused: Counter[str]
    outbox_events: Counter[str]


class App:
    """The daemon, with one configuration. `ingress.base.Core` for its doors."""

    def __init__(self, settings: Settings, clock: Clock, heritage: Heritage | None = None) -> None:
        config, catalog, trust = settings
        heritage = heritage or Heritage(Metrics(), clock.monotonic(), Reloads(clock), Memory(), Counter(), Counter())
        self._settings = settings
        self._config, self._catalog = config, catalog
        self._clock = clock
        self.heritage = heritage
        self.metrics, self.reloads = heritage.metrics, heritage.reloads
        self.supervisor = Supervisor(clock)
        self.supervisor.reads(self._parts)
        self.load = LoadSampler()
        self.targets = build_targets(config, catalog, clock, lambda sample: self.streams.take(sample), trust)
        self.accuracies = Accuracies(catalog, config.drift, config.gateway.state_dir / "accuracy.json")
        self.budget_file = BudgetFile(config.gateway.state_dir / "budgets.json")
        self.budget = budget_of(config.budgets, config.cloud.lanes, self.budget_file)
        self.trace = build_trace(config, catalog, self.targets, clock)
        self.stories = Stories(config.routing.explain_last, clock, self.trace)
        self.router = Router(
            self.targets,
            config.routing,
            clock,
            budgets=self.budget,
            accuracy_of=self.accuracies.accuracy_of,
            floor_of=lambda _: config.accuracy.floor,
            limit_for=limits_of(config.routing.overload),
            watcher=self.stories.routed,
        )
        self.shadow = Shadow(self.router, self.accuracies, config.shadow, clock)
        self.cache = ResultCache(config.fallback, config.gateway.state_dir / "cache.sqlite", catalog, clock)
        self.pipeline = Pipeline(
            catalog,
            self.router,
            self.cache,
            self.metrics,
            clock,
            config.routing,
            self.stories,
            accuracy=config.accuracy,
            accuracy_of=self.accuracies.accuracy_of,
            shadow=self.shadow,
            memory=heritage.memory,
        )
        slowest_ms = max((lane.timeout_ms for lane in config.cloud.lanes), default=config.edge_gpu.timeout_ms)
        mode = AccuracyMode(config.accuracy.mode)
        self.admission = Admission(catalog, config.routing, clock, slowest_ms / 1e3, mode, producers=config.producers)
        regions = {target.traits.name: target.traits.region for target in self.targets}
        audit = config.security.audit
        self.audit = Audit(audit, config.gateway.state_dir, clock, regions) if audit.enabled else None
        self.guard = Guard(config.security, clock, config.producers, self.audit, heritage.refused)
        self.certificates = Watch(certificate_files(config), config.security.certificate_warn_days)
        application = create_app(self, self.metrics, config.http, self.recent, clock, self.guard)
        self.http = HttpServer(
            application, config.http, lambda error, address: self.guard.refused("http", error, address=address)
        )
        self.mqtt = self._mqtt_door() if config.mqtt.enabled else None
        self.desk = self._desk() if config.outbox.enabled else None
        publish = self.mqtt.publish_result if self.mqtt else lambda name, document: None
        self.streams = StreamDoor(self, config.edge_mcu.streams, publish, self.pipeline.observed, clock)
        self.metrics.watch(self.status)
        self.accuracies.listeners.append(self._show_drift)
        self.loop_watch = LoopWatch()
        self._stopping = asyncio.Event()

    def _mqtt_door(self) -> MqttDoor:
        config = self._config
        return MqttDoor(
            self,
            config.mqtt,
            {topic: sensor for topic, sensor in config.sensors.items() if not sensor.durable},
            config.gateway.id,
            self.metrics,
            self._clock,
            status_interval_s=config.monitoring.status_interval_s,
            guard=self.guard,
        )

    def _desk(self) -> Desk:
        """Durable delivery, with its door."""
        config = self._config
        folder = config.gateway.state_dir / "outbox"
        desk = Desk(
            config,
            folder,
            self.infer,
            self._catalog,
            self._clock,
            audit=self.audit,
            askable=self._askable,
            regions=self.admission.allowed_regions,
            events=self.heritage.outbox_events,
        )
        durable = {topic: sensor for topic, sensor in config.sensors.items() if sensor.durable}
        desk.door = DurableDoor(self, desk, config.mqtt, durable, config.gateway.id, self.metrics, self.guard)
        self.pipeline.listeners.append(desk.forward)
        if self.mqtt:
            keep = self.mqtt.keep
            desk.alarm = lambda why: keep("alarms/outbox", {"alarm": "outbox", "active": bool(why), "reason": why})
        return desk

    # What the doors need: ingress.base.Core.

    async def infer(self, request: InferenceRequest) -> InferenceResult:
        audit = self.audit
        if audit is None:
            return await self.pipeline.infer(request)
        try:
            audit.require()
        except InferenceError as error:
            error.request_id = request.id
            self.guard.refused("daemon", error, who=request.asked_by)
            raise
        try:
            result = await self.pipeline.infer(request)
        except InferenceError as error:
            audit.request(request, error)
            raise
        except asyncio.CancelledError:  # whoever asked has gone, or the daemon stops
            audit.request(request, None)
            raise
        audit.request(request, result)
        return result

    async def accept(self, request: InferenceRequest) -> Mapping[str, Any]:
        try:
            if self.desk is None:
                raise no_outbox()
            return await self.desk.accept_told(request)
        except InferenceError as error:
            self.guard.refused("daemon", error, who=request.asked_by)
            raise

    def _askable(self) -> frozenset[str]:
        return frozenset(target.traits.name for target in self.targets if target.availability().available)

    def ready(self) -> tuple[bool, str]:
        if self._stopping.is_set():
            return False, "stopping"
        return (True, "") if self._askable() else (False, "no target can be asked")

    def status(self) -> Mapping[str, Any]:
        ready, reason = self.ready()
        return {
            "gateway": self._config.gateway.id,
            "version": __version__,
            "uptime_s": round(self._clock.monotonic() - self.heritage.started, 3),
            "settings": self.reloads.status(),
            "ready": ready,
            "reason": reason,
            "targets": self.router.status(),
            "models": self._models(),
            "shadow": self.shadow.status(),
            "budgets": [] if self.budget is None else self.budget.left(self._clock.monotonic()),
            "overload": self.pipeline.queue.status() | {"retries": self.router.retries.status(self._clock.monotonic())},
            "cache": self.cache.stats(),
            "outbox": None if self.desk is None else self.desk.status(),
            "counters": self.metrics.counters(),
            "recorder": None if self.trace is None else self.trace.status(),
            "doors": {
                "http": self.http.status() if self._config.http.enabled else None,
                "mqtt": self.mqtt.status() if self.mqtt else None,
                "streams": self.streams.status(),
            },
            "security": {**self.guard.status(), "audit": self.audit.status() if self.audit else None},
            "certificates": self.certificates.status(),
            "components": [*self.supervisor.status(), self.reloads.component()],
            "load": {**self.load.latest, **self.loop_watch.status()},
        }

    def _models(self) -> dict[str, dict[str, Any]]:
        """By `family/variant`: what it answered, how sure it was, and whether the cloud agrees."""
        shown: dict[str, dict[str, Any]] = self.metrics.quality.status()
        for name, drift in self.accuracies.status().items():
            shown.setdefault(name, {})["drift"] = drift
        return shown

    def explain(self, request_id: str) -> Mapping[str, Any] | None:
        return self.stories.explain(request_id)

    def _parts(self) -> dict[str, Reading]:
        return read_parts(
            self.router.standings(),
            self.targets,
            self.mqtt,
            self.desk,
            cache=self.cache,
            audit=self.audit,
            trace=self.trace,
            accuracies=self.accuracies if self._config.shadow.rate else None,
        )

    def recent(self) -> list[dict[str, Any]]:
        """The last answers and refusals, newest first."""
        return [_recent(at, outcome) for at, outcome in reversed(self.pipeline.recent)]

    # Life.

    async def start(self, open_door: socket.socket | None = None) -> None:
        """Open the store, connect the targets, then open the doors; `open_door` listens already. Raises `ConfigError`
        or `LinkError` if that is impossible."""
        self.cache.open()
        if self.audit:
            self.audit.open()
            self.supervisor.watch("audit", lambda: self.audit is None or self.audit.alive)
            self.audit.act("start", version=__version__, configuration=self._settings.digest())
        self.accuracies.load()
        if self.trace is not None:
            self.trace.start()
        if self.budget is not None:
            self.budget_file.open(self.budget, self._clock.monotonic(), self._clock.wall())
            self.supervisor.spawn("budgets", self._keep_budget, stall_s=STALL_S)
        try:
            await asyncio.gather(*(target.start() for target in self.targets))
        except RuntimeUnavailable as error:
            raise ConfigError([f"edge_gpu: {error}"]) from None
        self._warm_up()
        self.supervisor.spawn("load", self._sample_load, stall_s=STALL_S + self._config.monitoring.sample_interval_s)
        self.supervisor.spawn("loop", self._heartbeat, stall_s=STALL_S)
        self.supervisor.spawn("parts", self._look_at_parts, stall_s=STALL_S)
        self.supervisor.spawn("certificates", self._watch_certificates, stall_s=LOOK_S + STALL_S)
        if self._config.shadow.rate:
            self.supervisor.spawn("shadow", self._ask_shadows)
            for state in self.accuracies.states():
                self._show_drift(state)
        try:
            keep_counter(self._settings.trust, self._config.gateway.state_dir)
        except SigningError as error:  # a disk that is full must not keep the daemon from starting
            log.warning("the catalogue's counter cannot be kept", extra={"reason": str(error)})
        await self._open_doors(open_door)
        for target in self.targets:
            self.supervisor.watch(target.traits.name, target.alive)

    async def _open_doors(self, open_door: socket.socket | None) -> None:
        if self._config.http.enabled:
            port = await self.http.start(open_door)
            log.info("http door open", extra={"host": self._config.http.host, "port": port})
            self.supervisor.spawn("http door", self._keep_http, core=True)
        if self.mqtt:
            await self.mqtt.start()
            self.supervisor.watch("mqtt", lambda: self.mqtt is not None and self.mqtt.alive)
        if self.desk:
            await self.desk.start(self.supervisor)

    def acted(self, act: str, **what: Any) -> None:
        """Put an administrative act on record."""
        if self.audit:
            self.audit.act(act, **what)

    async def stop(self) -> None:
        """Doors first, then what is in flight, then the targets, then the store."""
        self._stopping.set()
        drain_s = self._config.gateway.drain_timeout_s
        closing = [self.http.stop(drain_s)] if self._config.http.enabled else []
        if self.mqtt:
            closing.append(self.mqtt.close_door())
        if self.desk:
            closing.append(self.desk.close_door())
        closed = asyncio.gather(*closing)
        if not await self.pipeline.drained(drain_s):
            log.warning("stopped with requests in flight", extra={"in_flight": self.pipeline.in_flight})
        await closed
        await self.streams.stop(drain_s)
        if self.desk:
            await self.desk.stop(drain_s)
        if self.mqtt:
            await self.mqtt.stop()
        await self.supervisor.stop()
        await asyncio.gather(*(target.stop() for target in self.targets))
        if self.budget is not None:
            await asyncio.to_thread(self.budget_file.close, self.budget.document(self._clock.monotonic()))
        if self.trace is not None:
            await asyncio.to_thread(self.trace.close)
        await asyncio.to_thread(self.cache.close)
        if self.audit:
            self.audit.act("stop")
            await asyncio.to_thread(self.audit.close)

    def _warm_up(self) -> None:
        """Admit and rank one request for each model, and run none: code that runs for the first time takes
        milliseconds, which the first realtime request does not have."""
        for family in self._catalog.families.values():
            inputs = {spec.name: np.zeros(spec.shape).tolist() for spec in family.inputs}
            request = self.admission.from_document({"inputs": inputs}, model=family.name)
            self.router.decide(request, family, self._clock.monotonic())

    async def _sample_load(self, component: Component) -> None:
        while True:
            self.load.sample()
            component.set(ComponentState.UP)
            await asyncio.sleep(self._config.monitoring.sample_interval_s)

    async def _look_at_parts(self, component: Component) -> None:
        while True:
            self.supervisor.look()
            component.set(ComponentState.UP)
            await asyncio.sleep(LOOK_AT_PARTS_S)

    async def _keep_http(self, component: Component) -> None:
        await self.http.keep(lambda: component.set(ComponentState.UP))

    async def _watch_certificates(self, component: Component) -> None:
        """Those in files and those of brokers; a renewed one of the HTTP door is taken."""
        links = {target.traits.name: getattr(target, "link", None) for target in self.targets}
        links["mqtt"] = self.mqtt.link if self.mqtt else None
        async for alarms in self.certificates.keep(links, self.http.renew_certificate, self._clock):
            component.set(ComponentState.DEGRADED if alarms else ComponentState.UP, "; ".join(alarms))
            self.guard.flush()

    def _show_drift(self, alarm: Alarm) -> None:
        if self.mqtt:
            self.mqtt.keep(f"alarms/drift/{alarm.variant.name}", alarm.to_dict())

    async def _ask_shadows(self, component: Component) -> None:
        component.set(ComponentState.UP)
        await self.shadow.work()

    async def _keep_budget(self, component: Component) -> None:
        """Writes what is used now and then, and says when that does not work."""
        assert self.budget is not None
        while True:
            self.budget.keep(self._clock.monotonic(), self._clock.wall())
            trouble = "; ".join(filter(None, (self.budget.problem, self.budget_file.alarm)))
            component.set(ComponentState.DEGRADED if trouble else ComponentState.UP, trouble)
            await asyncio.sleep(KEEP_S)

    async def _heartbeat(self, component: Component) -> None:
        component.set(ComponentState.UP)
        await self.loop_watch.run(component.beat)


def _recent(at: float, outcome: InferenceResult | InferenceError) -> dict[str, Any]:
    shown = outcome.to_dict(with_outputs=False) if isinstance(outcome, InferenceResult) else outcome.to_dict()
    return {"at": at, **shown}
