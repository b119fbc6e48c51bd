"""A run: the daemon's own pipeline in a simulated world, asked by simulated sensors, in virtual time."""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from agent.config import AccuracySection, Config, LatencyThresholds
from agent.core.errors import InferenceError
from agent.core.types import AccuracyMode, InferenceRequest, InferenceResult, LatencyClass
from agent.pipeline import Pipeline
from agent.registry.catalog import Catalog
from agent.store.cache import CacheKey, Hit, ResultCache
from agent.targets.base import Target
from agent.telemetry.metrics import Metrics
from hil.sim.answers import Samples
from hil.sim.faults import Fault, Weather
from hil.sim.hindsight import Hindsight
from hil.sim.load import Ask, Load
from hil.sim.loop import VirtualClock, VirtualLoop, run_virtual
from hil.sim.strategies import OURS, Strategy
from hil.sim.tiers import Times
from hil.sim.world import Known, Place, World, places_of

LOOK_EVERY = 100
PATIENCE_S = 10.0
"""What a strategy that has only one tier is given beyond the deadline: it answers late rather than not at all."""


@dataclass(frozen=True, slots=True)
class Stage:
    """What stays the same from run to run: models, their answers, the measured times."""

    catalog: Catalog
    samples: Mapping[str, Samples]
    times: Times


@dataclass(frozen=True, slots=True)
class Scenario:
    """One run's load and misfortunes. Equal scenarios give equal runs. `load` may also be the requests themselves."""

    load: Load | Sequence[Ask]
    faults: Sequence[Fault] = ()
    seed: int = 1
    places: Sequence[Place] = ()
    """Empty: those of the configuration."""
    weather: Mapping[str, Weather] = field(default_factory=dict)
    known: Mapping[tuple[str, str], Mapping[int, Known]] = field(default_factory=dict)
    fresh_only: bool = True
    """The cache never knows an input again."""
    one_by_one: bool = True
    """The daemon reads one request after the other, as its event loop does. False: what it takes includes that wait."""

    def asks(self, samples: Mapping[str, Samples]) -> Sequence[Ask]:
        if not isinstance(self.load, Load):
            return self.load
        sizes = {name: len(found) for name, found in samples.items()}
        return self.load.asks(sizes, np.random.default_rng([self.seed, 0]))


class Course(NamedTuple):
    """What became of one request, which had `budget_s` and took `took_s`. `right` is None where nobody answered;
    `bytes` went over a metered link; `got` is the utility of what happened, and `best` that of the best single play
    there was when it came, both in hindsight."""

    ask: Ask
    budget_s: float
    took_s: float
    outcome: InferenceResult | InferenceError
    right: bool | None
    bytes: int
    got: float
    best: float

    @property
    def in_time(self) -> bool:
        return self.right is not None and self.took_s <= self.budget_s

    @property
    def cost_usd(self) -> float:
        return self.outcome.cost_usd


@dataclass(slots=True)
class Run:
    """Everything that came of a scenario."""

    courses: list[Course] = field(default_factory=list)
    most_in_flight: int = 0
    most_waiting: int = 0
    most_bytes: int = 0
    """Resident memory of the process, looked at each time another `LOOK_EVERY` requests are in it."""


def play(stage: Stage, scenario: Scenario, config: Config, strategy: Strategy = OURS) -> Run:
    """Run it to the end of its last request."""
    before = random.getstate()
    random.seed(scenario.seed)  # of the breakers' back-off, which is shortened at random
    try:
        return run_virtual(_play(stage, scenario, config, strategy))
    finally:
        random.setstate(before)


async def _play(stage: Stage, scenario: Scenario, config: Config, strategy: Strategy) -> Run:
    loop = asyncio.get_running_loop()
    assert isinstance(loop, VirtualLoop)
    clock = VirtualClock(loop)
    asks = scenario.asks(stage.samples)
    world = World(
        stage.catalog,
        stage.samples,
        stage.times,
        clock,
        requests=max(1, len(asks)),
        seed=scenario.seed,
        places=scenario.places or places_of(config, stage.catalog, clock),
        faults=scenario.faults,
        weather=scenario.weather,
        known=scenario.known,
    )
    player = _Player(world, config, strategy, fresh_only=scenario.fresh_only, one_by_one=scenario.one_by_one)
    running: set[asyncio.Task[None]] = set()
    failed: list[BaseException] = []

    def ended(task: asyncio.Task[None]) -> None:
        running.discard(task)
        error = asyncio.CancelledError() if task.cancelled() else task.exception()
        if error is not None:
            failed.append(error)

    for ask in asks:
        await asyncio.sleep(ask.at_s - loop.time())
        task = asyncio.create_task(player.ask(ask))
        running.add(task)
        task.add_done_callback(ended)
    if running:
        await asyncio.wait(running)
        await asyncio.sleep(0)  # until the last one's end is noted
    if failed:
        raise RuntimeError(f"{len(failed)} of {len(asks)} requests were neither answered nor refused") from failed[0]
    return player.run


class _Player:
    """The daemon without its doors, and the book of what became of each request."""

    def __init__(self, world: World, config: Config, strategy: Strategy, *, fresh_only: bool, one_by_one: bool) -> None:
        self._world = world
        self._strategy = strategy
        self._hindsight = Hindsight(world, config.routing)
        self._clock = world.clock
        targets: list[Target] = list(world.targets.values())
        router = strategy.router(targets, config, world)
        kind = _Forgetful if fresh_only else ResultCache
        cache = kind(config.fallback, None, world.catalog, world.clock)
        accuracy = config.accuracy if strategy.cascades else AccuracySection(floor=0.0)
        self._pipeline = Pipeline(
            world.catalog, router, cache, Metrics(), world.clock, config.routing, accuracy=accuracy
        )
        self._budgets_s = class_budgets(config.routing.latency_thresholds)
        self._one_by_one = one_by_one
        self._busy_until = 0.0
        self.run = Run()

    async def ask(self, ask: Ask) -> None:
        kind, received = ask.kind, self._clock.monotonic()
        family = self._world.catalog.family(kind.family)
        budget_s = self._budgets_s[kind.latency_class] if kind.deadline_ms is None else kind.deadline_ms / 1e3
        request = InferenceRequest(
            id=str(ask.number),
            model=kind.family,
            inputs={family.inputs[0].name: self._world.samples[kind.family].inputs[ask.sample]},
            latency_class=kind.latency_class,
            received=received,
            deadline=received + budget_s + (0.0 if self._strategy.keeps_deadlines else PATIENCE_S),
            priority=kind.priority,
            producer=f"{kind.name}-{ask.sensor}",
            allowed_regions=kind.allowed_regions,
            max_retries=kind.max_retries,
            variant=kind.variant,
            use_cache=kind.use_cache,
            accuracy=kind.accuracy if self._strategy.cascades else AccuracyMode.ACCEPTABLE,
        )
        own_s = self._world.own_s(ask.number, kind.family, kind.latency_class)
        self._busy_until = max(received, self._busy_until if self._one_by_one else 0.0) + own_s
        await asyncio.sleep(self._busy_until - received)
        best = self._hindsight.best(request, received + budget_s)
        outcome: InferenceResult | InferenceError
        right = None
        if self._pipeline.in_flight >= self.run.most_in_flight:
            self.run.most_in_flight = self._pipeline.in_flight + 1
            if self.run.most_in_flight % LOOK_EVERY == 0:
                self.run.most_bytes = max(self.run.most_bytes, resident_bytes())
        self.run.most_waiting = max(self.run.most_waiting, self._pipeline.queue.waiting)
        try:
            outcome = await self._pipeline.infer(request)
            right = outcome.label == self._world.samples[kind.family].truth[ask.sample]
        except InferenceError as refusal:
            outcome = refusal
        took_s = self._clock.monotonic() - received
        spent = self._world.spent_bytes[ask.number]
        late = right is None or took_s > budget_s
        got = self._hindsight.worth(kind.latency_class, bool(right), late, outcome.cost_usd, spent)
        self.run.courses.append(Course(ask, budget_s, took_s, outcome, right, spent, got, best))


class _Forgetful(ResultCache):
    """Never knows the same input again: held-out samples are played over and over, which no sensor's readings are.
    What a producer was last told it knows."""

    def get(self, key: CacheKey) -> Hit | None:
        return None


def resident_bytes() -> int:
    """Of this process, now (proc(5), statm)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def class_budgets(limits: LatencyThresholds) -> dict[LatencyClass, float]:
    """Seconds that each class has by itself."""
    return {
        LatencyClass.REALTIME: limits.realtime / 1e3,
        LatencyClass.NEAR: limits.near_realtime / 1e3,
        LatencyClass.INTERACTIVE: limits.interactive / 1e3,
        LatencyClass.BATCH: limits.batch / 1e3,
    }
