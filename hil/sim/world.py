"""The tiers of a simulation: fake targets with the measured times, the real models' answers, and whatever goes wrong.

Each tier is a first-in, first-out queue before one or more servers. A board is one server for its own model, and its
line is part of it: the next request is served when the answer to the one before is out. The gateway's runtime has
`workers` servers; a cloud worker's machine has `CLOUD_SERVERS`, and its link holds any number. Since nothing overtakes,
an attempt's whole course is known when it begins: `plan` works it out, `infer` lives through it. What was given up
keeps its server busy all the same.

Times of a request on a variant are fixed by the seed and the request's number, whoever asks and whenever: two policies
that send a request to one place see the same time, and an oracle can know what other places would have taken.
"""

from __future__ import annotations

import asyncio
import heapq
import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from agent.build import build_targets
from agent.config import Config
from agent.core.clock import Clock
from agent.core.component import Reading
from agent.core.errors import TargetTimeout, TargetUnavailable
from agent.core.types import InferenceRequest, LatencyClass, TargetAnswer, Tier
from agent.registry.catalog import Catalog, Family, TargetKind, Variant
from agent.targets.base import AVAILABLE, Availability, TargetTraits
from agent.wire import oip
from hil.sim.answers import Samples
from hil.sim.faults import Fault, Weather
from hil.sim.tiers import Floats, Times

GONE = Availability(False, "taken away by the simulation")
CLOUD_SERVERS = 2
KINDS: Mapping[Tier, TargetKind] = {
    Tier.EDGE_MCU: "edge_mcu",
    Tier.EDGE_GPU: "edge_gpu",
    Tier.CLOUD_GPU: "cloud",
    Tier.CLOUD_SERVERLESS: "cloud",
}


@dataclass(frozen=True, slots=True)
class Place:
    """One simulated target. `serial`: one server for each family, which is held during the link time too."""

    traits: TargetTraits
    servers: int
    serial: bool = False


def places_of(config: Config, catalog: Catalog, clock: Clock) -> tuple[Place, ...]:
    """A place for each target that the daemon would build of a configuration, with the traits it would have."""
    servers = {Tier.EDGE_MCU: 1, Tier.EDGE_GPU: config.edge_gpu.workers}
    places = []
    for target in build_targets(config, catalog, clock):
        tier = target.traits.tier
        places.append(Place(target.traits, servers.get(tier, CLOUD_SERVERS), serial=tier is Tier.EDGE_MCU))
    return tuple(places)


class Plan(NamedTuple):
    """The course of one attempt, from now. `lost_s`: when it fails; infinity if it does not."""

    queue_s: float
    service_s: float
    link_s: float
    lost_s: float

    @property
    def took_s(self) -> float:
        return self.queue_s + self.service_s + self.link_s


class Known(NamedTuple):
    """An attempt on record: its times, or after how many seconds it failed."""

    service_s: float
    link_s: float
    lost_s: float = math.inf


@dataclass(slots=True)
class _Queue:
    """When each server will be free, as a heap."""

    free_at: list[float]

    def wait_s(self, arrives: float) -> float:
        return max(0.0, self.free_at[0] - arrives)

    def take(self, until: float) -> None:
        heapq.heapreplace(self.free_at, until)


@dataclass(slots=True)
class Draws:
    """Seconds for each request of the run, on one variant of one target."""

    service: Floats
    link: Floats


class SimTarget:
    """A `Target`."""

    def __init__(self, place: Place, world: World) -> None:
        self.place = place
        self._traits = place.traits
        self._kind = KINDS[place.traits.tier]
        self._world = world
        self._queues: dict[str, _Queue] = {}
        self._variants: dict[tuple[str, str | None], tuple[Variant, ...]] = {}
        self.weather = world.weather.get(place.traits.name) or Weather.of(place.traits.tier, world.faults)
        self.sent = 0

    @property
    def traits(self) -> TargetTraits:
        return self._traits

    def parts(self) -> Mapping[str, Reading]:
        return {}

    def alive(self) -> bool:
        return True

    def availability(self) -> Availability:
        return GONE if self.weather.gone(self._world.clock.monotonic()) else AVAILABLE

    def variant_for(self, family: Family, pinned: str | None) -> Variant | None:
        return family.variant_for(self._kind, pinned)

    def variants_for(self, family: Family, pinned: str | None) -> Sequence[Variant]:
        found = self._variants.get((family.name, pinned))
        if found is None:
            found = self._variants[family.name, pinned] = tuple(
                variant
                for variant in family.variants.values()
                if self._kind in variant.targets and pinned in (None, variant.id)
            )
        return found

    def plan(self, number: int, variant: Variant, now: float) -> Plan:
        """What would become of an attempt that began now; nothing changes."""
        draws = self._world.draws(self._traits.name, variant)
        factor = self.weather.factor(now)
        service_s, link_s = float(draws.service[number]) * factor, float(draws.link[number]) * factor
        out_s = 0.0 if self.place.serial else link_s / 2
        queue_s = self._queue(variant).wait_s(now + out_s)
        lost_s = 0.0 if self.weather.gone(now) or self.weather.silent(now) else self.weather.lost_at(now) - now
        known = self._world.known_of(self._traits.name, variant, number)
        if known is not None and known.lost_s < math.inf:
            lost_s = min(lost_s, known.lost_s)
            link_s += known.lost_s  # no answer before that
        return Plan(queue_s, service_s, link_s, lost_s)

    async def infer(self, request: InferenceRequest, family: Family, variant: Variant, deadline: float) -> TargetAnswer:
        now = self._world.clock.monotonic()
        if self.weather.gone(now):
            raise TargetUnavailable(GONE.reason)
        self.sent += 1
        number = self._world.number(request)
        sent, received = self._world.bytes(self._traits.tier, family.name)
        self._world.spent_bytes[number] += sent
        silent = self.weather.silent(now)
        plan = self.plan(number, variant, now)
        if not silent:
            held_s = plan.service_s + (plan.link_s if self.place.serial else 0.0)
            out_s = 0.0 if self.place.serial else plan.link_s / 2
            self._queue(variant).take(now + out_s + plan.queue_s + held_s)
        left_s = max(0.0, deadline - now)
        if silent or plan.took_s > left_s:
            if plan.lost_s < left_s and not silent:
                await asyncio.sleep(plan.lost_s)
                raise TargetUnavailable("was lost while it worked")
            await asyncio.sleep(left_s)
            raise TargetTimeout(f"no answer within {left_s * 1e3:.0f} ms")
        if plan.lost_s < plan.took_s:
            await asyncio.sleep(plan.lost_s)
            raise TargetUnavailable("was lost while it worked")
        await asyncio.sleep(plan.took_s)
        self._world.spent_bytes[number] += received
        return TargetAnswer(
            self._world.outputs(request, family, variant),
            "simulated",
            plan.queue_s,
            plan.link_s,
            plan.service_s,
            sent,
            received,
        )

    async def start(self) -> None: ...

    async def stop(self) -> None: ...

    def status(self) -> Mapping[str, Any]:
        return {"sent": self.sent}

    def _queue(self, variant: Variant) -> _Queue:
        name = variant.model if self.place.serial else ""
        queue = self._queues.get(name)
        if queue is None:
            queue = self._queues[name] = _Queue([0.0] * self.place.servers)
        return queue


@dataclass
class World:
    """Everything outside of the daemon. `requests`: how many the run will have at most."""

    catalog: Catalog
    samples: Mapping[str, Samples]
    times: Times
    clock: Clock
    requests: int
    seed: int
    places: Sequence[Place]
    faults: Sequence[Fault] = ()
    weather: Mapping[str, Weather] = field(default_factory=dict)
    """Of targets, by name, where it does not come of `faults`."""
    known: Mapping[tuple[str, str], Mapping[int, Known]] = field(default_factory=dict)
    """By target and variant: what is known to have become of requests there, by their number."""
    targets: dict[str, SimTarget] = field(init=False)

    def __post_init__(self) -> None:
        self.targets = {place.traits.name: SimTarget(place, self) for place in self.places}
        self._draws: dict[tuple[str, str], Draws] = {}
        self._bytes: dict[tuple[Tier, str], tuple[int, int]] = {}
        self._sample_of = {
            id(value): index for samples in self.samples.values() for index, value in enumerate(samples.inputs)
        }
        self.spent_bytes = [0] * self.requests
        """On metered links, for each request."""
        self._own = self._uniform("daemon")

    def number(self, request: InferenceRequest) -> int:
        """Of the request in the run. One that is not of the run's own (a shadow) gets a number by its id."""
        number = int(request.id) if request.id.isdecimal() else self.requests
        return number if number < self.requests else zlib.crc32(request.id.encode()) % self.requests

    def own_s(self, number: int, family: str, latency_class: LatencyClass) -> float:
        """What the daemon itself takes for a request."""
        return self.times.own_of(family, latency_class).at(float(self._own[number]))

    def draws(self, target: str, variant: Variant) -> Draws:
        found = self._draws.get((target, variant.name))
        if found is None:
            place = f"{target} {variant.name}"
            times = self.times.variants.get(place) or self.times.variants[variant.name]
            found = self._draws[target, variant.name] = Draws(
                times.service.draw(self._uniform(f"{place} service")), times.link.draw(self._uniform(f"{place} link"))
            )
            for number, known in self.known.get((target, variant.name), {}).items():
                if known.lost_s == math.inf:
                    found.service[number], found.link[number] = known.service_s, known.link_s
        return found

    def known_of(self, target: str, variant: Variant, number: int) -> Known | None:
        known = self.known.get((target, variant.name))
        return None if known is None else known.get(number)

    def outputs(self, request: InferenceRequest, family: Family, variant: Variant) -> Mapping[str, Any]:
        """The real model's answer to the sample that the request holds."""
        return self.samples[family.name].outputs[variant.id][self.sample(request, family)]

    def sample(self, request: InferenceRequest, family: Family) -> int:
        return self._sample_of[id(request.inputs[family.inputs[0].name])]

    def bytes(self, tier: Tier, model: str) -> tuple[int, int]:
        """On a metered line, sent and received: those of the lane's own encoding. Nothing at the edge is metered."""
        if not tier.is_cloud:
            return 0, 0
        found = self._bytes.get((tier, model))
        if found is None:
            family, samples = self.catalog.family(model), self.samples[model]
            payload, _ = oip.encode_request({family.inputs[0].name: samples.inputs[0]})
            outputs = next(iter(samples.outputs.values()))[0]
            reply = sum(value.nbytes for value in outputs.values())
            found = self._bytes[tier, model] = len(payload), reply + len(payload) - samples.inputs[0].nbytes
        return found

    def _uniform(self, name: str) -> Floats:
        """Numbers in 0 .. 1, one for each request, that depend on the seed and the name only."""
        return np.random.default_rng([self.seed, zlib.crc32(name.encode())]).random(self.requests)
