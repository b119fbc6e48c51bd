"""Makes a world of a trace: its requests, its targets, the times it saw, and when targets were not there.

What a trace does not hold is filled in, and `Rebuilt.filled` says what: an input that was not recorded is stood in for
by a held-out sample of the same family that the same variant answered as rightly and about as surely; times of a target
and variant that never answered are the daemon's estimates of that time, or else those that ship with the simulator.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np

from agent.config import Config
from agent.core.types import LatencyClass, Tensor, Tier
from agent.registry.catalog import Catalog, Family
from agent.registry.confidence import classified
from agent.targets.base import TargetTraits
from hil.sim.answers import Samples
from hil.sim.faults import Spells, Weather
from hil.sim.load import Ask
from hil.sim.tiers import Spread, Times, VariantTimes, kind_of
from hil.sim.trace import OK, Record, Trace
from hil.sim.world import CLOUD_SERVERS, Known, Place

LANE_MS = 5000.0
"""What a lane is waited for that the configuration does not have."""
AWAY = ("unavailable", "breaker")
"""Constraints that say that a target was not there."""
Play = tuple[str, str]
"""Target, and `family/variant`."""


@dataclass(frozen=True, slots=True)
class Rebuilt:
    """What a replay needs. `filled` says in words what the trace did not hold."""

    samples: Mapping[str, Samples]
    times: Times
    asks: Sequence[Ask]
    places: Sequence[Place]
    weather: Mapping[str, Weather]
    known: Mapping[Play, Mapping[int, Known]]
    filled: Sequence[str]


def rebuild(trace: Trace, catalog: Catalog, heldout: Mapping[str, Samples], shipped: Times, config: Config) -> Rebuilt:
    stand_ins = {name: _StandIns(catalog.families[name], heldout[name]) for name in catalog.families}
    chosen: dict[str, list[tuple[Record, int]]] = defaultdict(list)
    asks = []
    for record in trace.records:
        family = record.request["model"]
        asks.append(Ask(record.number, record.at_s, record.kind, 0, len(chosen[family])))
        chosen[family].append((record, stand_ins[family].index(record)))
    times, known, estimated = _times(trace, shipped)
    filled = [f"times of {play} are the daemon's estimates: it never answered" for play in sorted(estimated)]
    if any("inputs" not in record.request for record in trace.records):
        filled.append("inputs are not in the trace: held-out samples, answered as rightly and as surely, stand in")
    return Rebuilt(
        {name: _played(heldout[name], found) for name, found in chosen.items()},
        times,
        asks,
        places_of_trace(trace, config),
        {name: _weather(trace, name) for name in trace.targets},
        known,
        filled,
    )


def places_of_trace(trace: Trace, config: Config) -> tuple[Place, ...]:
    """The targets of the trace, with the limits that the configuration sets for their tier."""
    sizes = config.routing.model_size_thresholds
    lanes_ms = {lane.target: lane.timeout_ms for lane in config.cloud.lanes}
    of_tier = {
        Tier.EDGE_MCU: (config.edge_mcu.timeout_ms, sizes.edge_mcu, 1),
        Tier.EDGE_GPU: (config.edge_gpu.timeout_ms, sizes.edge_gpu, config.edge_gpu.workers),
    }
    places = []
    for name, about in trace.targets.items():
        tier = Tier(about["tier"])
        timeout_ms, megabytes, servers = of_tier.get(tier, (lanes_ms.get(name, LANE_MS), sizes.cloud, CLOUD_SERVERS))
        gateway = config.edge_gpu if tier is Tier.EDGE_GPU else None
        first = _first_guess(trace, name)
        traits = TargetTraits(
            name,
            tier,
            about["order"],
            about["max_concurrent"] if gateway is None else gateway.max_concurrent,
            timeout_ms / 1e3,
            megabytes * 1e6,
            cost_usd=about["cost_usd"],
            region=about["region"],
            backup=about["backup"],
            parallel=about["parallel"] if gateway is None else gateway.workers,
            prior_s=first.get("p50_ms", 5.0) / 1e3,
            prior_link_s=first.get("link_ms", 0.0) / 1e3,
            metered=tier.is_cloud,
        )
        places.append(Place(traits, servers, serial=tier is Tier.EDGE_MCU))
    return tuple(places)


def allowed(places: Sequence[Place], config: Config) -> tuple[Place, ...]:
    """Those of them that the configuration has not switched off."""
    off = {
        tier
        for tier, section in ((Tier.EDGE_MCU, config.edge_mcu), (Tier.EDGE_GPU, config.edge_gpu))
        if not section.enabled
    }
    return tuple(place for place in places if place.traits.tier not in off)


def _first_guess(trace: Trace, target: str) -> Mapping[str, float]:
    """The estimate with which the trace begins: what the daemon knew of the target then."""
    of_target = (one for record in trace.records for one in record.candidates() if one["target"] == target)
    return next((one["estimate"] for one in of_target if one["variant"]), {})


class _StandIns:
    """The held-out samples of one family, looked through for one that fits a record."""

    def __init__(self, family: Family, samples: Samples) -> None:
        self._samples = samples
        self._truth = np.array(samples.truth)
        self._sureness = {}
        self._sure = {}
        for id_, outputs in samples.outputs.items():
            found = [classified(output, family, family.variants[id_]) for output in outputs]
            self._sureness[id_] = np.array([one.confidence for one in found])
            self._sure[id_] = np.array([one.sure for one in found])

    def index(self, record: Record) -> int:
        """The sample whose answer is most like the recorded one; ties and unknowns by the input's digest."""
        outcome, fits = record.outcome, np.ones(len(self._truth), bool)
        variant, confidence = outcome.get("variant"), outcome.get("confidence")
        if variant in self._samples.right and outcome.get("correct") is not None:
            fits &= self._samples.right[variant] == outcome["correct"]
        if record.truth is not None and (fits & (self._truth == record.truth)).any():
            fits &= self._truth == record.truth
        first = next((one["variant"] for one in record.attempts() if one["outcome"] == OK), None)
        if outcome.get("escalation") and first in self._sure and (fits & ~self._sure[first]).any():
            fits &= ~self._sure[first]
        possible = np.flatnonzero(fits) if fits.any() else np.arange(len(self._truth))
        turn = int(record.request["input"]["digest"], 16) % len(possible)
        possible = np.roll(possible, turn)
        if variant in self._sureness and confidence is not None:
            return int(possible[np.argmin(np.abs(self._sureness[variant][possible] - confidence))])
        return int(possible[0])


def _played(heldout: Samples, chosen: Sequence[tuple[Record, int]]) -> Samples:
    """One sample for each record: the stand-in's answers, and inputs that are equal where the recorded ones were."""
    family = heldout.family
    shape = family.inputs[0].shape
    indices = [index for _, index in chosen]

    def tensor(record: Record) -> Tensor:
        seed = int(record.request["input"]["digest"], 16)
        return np.random.default_rng(seed).random(shape).astype(np.float32)

    return Samples(
        family,
        tuple(tensor(record) for record, _ in chosen),
        tuple(heldout.truth[index] for index in indices),
        {id_: tuple(outputs[index] for index in indices) for id_, outputs in heldout.outputs.items()},
        {id_: right[indices] for id_, right in heldout.right.items()},
    )


def _times(trace: Trace, shipped: Times) -> tuple[Times, dict[Play, dict[int, Known]], set[str]]:
    """Distributions by target and variant, what is known of single attempts, and what was estimated only."""
    known: dict[Play, dict[int, Known]] = defaultdict(dict)
    answered: dict[Play, list[tuple[float, float]]] = defaultdict(list)
    estimates: dict[Play, list[tuple[float, float]]] = defaultdict(list)
    own: dict[str, list[float]] = defaultdict(list)
    for record in trace.records:
        model, outcome = record.request["model"], record.outcome
        tried = list(record.attempts())
        for attempt in tried:
            if attempt["outcome"] != OK:
                play = (attempt["target"], f"{model}/{attempt['variant']}")
                known[play][record.number] = Known(0.0, 0.0, attempt["elapsed_ms"] / 1e3)
        if outcome["status"] == "computed":
            play = (outcome["target"], f"{model}/{outcome['variant']}")
            compute_s, link_s = outcome["compute_ms"] / 1e3, outcome["link_ms"] / 1e3
            answered[play].append((compute_s, link_s))
            known[play][record.number] = Known(compute_s, link_s)
            if len(tried) == 1:
                kind = kind_of(model, LatencyClass(record.request["latency_class"]))
                own[kind].append(max(0.0, outcome["total_ms"] - tried[0]["elapsed_ms"]) / 1e3)
        for candidate in record.candidates():
            estimate = candidate["estimate"]
            if candidate["variant"] and estimate["measured"]:
                estimates[candidate["target"], f"{model}/{candidate['variant']}"].append(
                    (estimate["service_ms"] / 1e3, estimate["link_ms"] / 1e3)
                )
    variants = dict(shipped.variants)
    for (target, name), pairs in estimates.items():
        service, link = (median(pair[side] for pair in pairs) for side in (0, 1))
        variants[f"{target} {name}"] = VariantTimes(Spread([service, service]), Spread([link, link]))
    for (target, name), pairs in answered.items():
        variants[f"{target} {name}"] = VariantTimes(
            Spread.of([compute for compute, _ in pairs]), Spread.of([link for _, link in pairs])
        )
    estimated = {f"{target} {name}" for target, name in estimates.keys() - answered.keys()}
    every = [value for found in own.values() for value in found]
    daemon = Spread.of(every) if every else shipped.daemon
    by_kind = {kind: Spread.of(found) for kind, found in own.items()}
    return Times({}, {}, daemon, variants, by_kind), known, estimated


def _weather(trace: Trace, target: str) -> Weather:
    """Away from the first request that was told so until the first that was not."""
    spans: list[tuple[float, float]] = []
    since: float | None = None
    for record in trace.records:
        seen = [one["excluded"] for one in record.candidates() if one["target"] == target]
        if not seen:
            continue
        if any(excluded in AWAY for excluded in seen):
            since = record.at_s if since is None else since
        elif since is not None:
            spans.append((since, record.at_s))
            since = None
    if since is not None:
        spans.append((since, math.inf))
    return Weather(Spells(spans))
