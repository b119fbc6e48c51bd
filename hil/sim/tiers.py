"""Times of every tier and variant: measured on the real daemon, kept as quantiles, drawn from by the simulator.

`edge-agent bench tiers --json FILE` measures them; the file that ships beside this module is what `edge-agent
simulate` and `edge-agent bench routing` use. Everything is asked in the way it is used afterwards: mixed at random, and
at the pace of a calm workload, since a process that slept for 30 ms takes longer over a request than one that is kept
busy. One request follows the other, so that nothing waits: what waiting adds is the simulator's part.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from agent.core.types import LatencyClass, Tier
from agent.registry.catalog import Catalog, Family, load_catalog
from agent.registry.locate import catalog_path
from hil.bench import machine
from hil.bench.report import CannotMeasure
from hil.demo.players import heldout
from hil.processes import Stage
from hil.sim import stack
from hil.sim.load import STANDARD

SCHEMA = 1
MEASURED = Path(__file__).with_name("tiers.json")
QUANTILES = 201
"""Points of each distribution: every half per cent, and both ends."""
PAUSE_S = 0.025
"""Between an answer and the next request, on average; exponentially distributed."""
WARM_UP = 2
"""So many answers to each question do not count."""
MISSES = 10
"""So many times, and once for as many answers, the tier of a variant may have none."""
MIX = 20
"""Requests of the standard mix in each round, in which every variant is asked once."""
TIERS: Mapping[str, Tier] = {"edge_mcu": Tier.EDGE_MCU, "edge_gpu": Tier.EDGE_GPU, "cloud": Tier.CLOUD_GPU}

Floats = npt.NDArray[np.float64]


class Spread:
    """A distribution as its quantiles at 0, 0.5, ... 100 per cent, drawn from by inversion."""

    __slots__ = ("points", "shares")

    def __init__(self, points: Sequence[float]) -> None:
        self.points = np.asarray(points, np.float64)
        self.shares = np.linspace(0.0, 1.0, len(self.points))

    @classmethod
    def of(cls, samples: Sequence[float]) -> Spread:
        """Raises `ValueError` if there is no sample."""
        if not len(samples):
            raise ValueError("no samples")
        return cls(np.quantile(np.asarray(samples, np.float64), np.linspace(0.0, 1.0, QUANTILES)).tolist())

    def at(self, share: float) -> float:
        return float(np.interp(share, self.shares, self.points))

    def draw(self, uniform: Floats) -> Floats:
        """One value for each number in 0 .. 1."""
        return np.interp(uniform, self.shares, self.points)

    @property
    def mean(self) -> float:
        return float(self.points.mean())


@dataclass(frozen=True, slots=True)
class VariantTimes:
    """Seconds: computing, and whatever else an attempt takes."""

    service: Spread
    link: Spread


@dataclass(frozen=True, slots=True)
class Times:
    """What was measured, where. `daemon` is what a request takes besides its attempts; `own` the same for each model
    and latency class that was measured (`family class`): a larger input takes longer to read, a class that is hedged
    longer to answer."""

    machine: Mapping[str, Any]
    network: Mapping[str, Any]
    daemon: Spread
    variants: Mapping[str, VariantTimes]
    own: Mapping[str, Spread] = field(default_factory=dict)

    def own_of(self, family: str, latency_class: LatencyClass) -> Spread:
        return self.own.get(kind_of(family, latency_class), self.daemon)

    def to_dict(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "machine": dict(self.machine),
            "network": dict(self.network),
            "unit": "ms at 0 %, 0.5 %, ... 100 %",
            "daemon": _milliseconds(self.daemon),
            "own": {name: _milliseconds(spread) for name, spread in self.own.items()},
            "variants": {
                name: {"service": _milliseconds(times.service), "link": _milliseconds(times.link)}
                for name, times in self.variants.items()
            },
        }


def load(path: Path = MEASURED) -> Times:
    """Raises `CannotMeasure` if the file is not one of ours, `OSError` if it cannot be read."""
    try:
        document = json.loads(path.read_text())
        if document["schema"] != SCHEMA:
            raise ValueError(f"schema {document['schema']}, expected {SCHEMA}")
        return Times(
            document["machine"],
            document["network"],
            _seconds(document["daemon"]),
            {
                name: VariantTimes(_seconds(times["service"]), _seconds(times["link"]))
                for name, times in document["variants"].items()
            },
            {name: _seconds(points) for name, points in document.get("own", {}).items()},
        )
    except (ValueError, KeyError, TypeError) as error:
        raise CannotMeasure(f"{path}: no measured times: {error}") from None


def measure(samples: int) -> Times:
    """Ask each variant `samples` times. Raises `CannotMeasure` and `StartError`."""
    catalog = load_catalog(catalog_path(None))
    with Stage() as stage:
        return asyncio.run(_measure(stack.start(stage, catalog), catalog, samples))


async def _measure(port: int, catalog: Catalog, samples: int) -> Times:
    survey = Survey(port, catalog)
    for _ in range((samples + WARM_UP) * len(survey.round)):
        await survey.ask_next()
    survey.close()
    return survey.times()


@dataclass(slots=True)
class Question:
    """Something that is asked again and again. `tier`: who must answer, if the variant is pinned."""

    about: Mapping[str, Any]
    family: Family
    inputs: npt.NDArray[Any]
    tier: str = ""
    replies: list[Mapping[str, Any]] = field(default_factory=list)
    missed: int = 0
    """Times that the tier did not answer: a board that overran its time is away for a moment."""


class Survey:
    """Asks a daemon every variant of the catalogue on its own tier, and what the sensors of the standard mix ask,
    whoever answers that: of those replies only what the daemon itself took is looked at."""

    def __init__(self, port: int, catalog: Catalog, seed: int = 1) -> None:
        self._client = stack.Client(port)
        self._rng = np.random.default_rng([seed, 1])
        self._deck: list[Question] = []
        inputs = {name: heldout(catalog.root / family.data.heldout)[0] for name, family in catalog.families.items()}
        self._variants = {
            variant.name: Question(
                {"model": name, "variant": variant.id, "latency_class": "batch"},
                family,
                inputs[name],
                TIERS[variant.targets[0]].value,
            )
            for name, family in catalog.families.items()
            for variant in family.variants.values()
        }
        mix = [kind for kind in STANDARD if kind.family in catalog.families]
        self._kinds = {
            kind_of(kind.family, kind.latency_class): Question(
                {"model": kind.family, "latency_class": kind.latency_class.value, "accuracy": kind.accuracy.value},
                catalog.family(kind.family),
                inputs[kind.family],
            )
            for kind in mix
        }
        self.round = list(self._variants.values())
        for question, kind in zip(self._kinds.values(), mix, strict=True):
            self.round += [question] * max(1, round(kind.share * MIX))

    async def ask_next(self) -> None:
        """After a pause, the next question: a round in random order, then the next one. Raises
        `CannotMeasure` if a variant's own tier does not answer again and again."""
        if not self._deck:
            self._deck = [self.round[index] for index in self._rng.permutation(len(self.round))]
        question = self._deck.pop()
        sample = question.inputs[int(self._rng.integers(len(question.inputs)))]
        payload = stack.body(question.about, question.family.inputs[0].name, sample)
        await asyncio.sleep(self._rng.exponential(PAUSE_S))
        reply = (await self._client.infer(payload)).document
        if question.tier and reply.get("tier") != question.tier:
            question.missed += 1
            if question.missed > MISSES + len(question.replies) // MISSES:
                wanted = f"{question.family.name}/{question.about['variant']}"
                raise CannotMeasure(f"{wanted}: answered by {reply.get('tier')}: {reply.get('error')}")
            return
        question.replies.append(reply)

    def times(self) -> Times:
        """What came of it. Raises `CannotMeasure` if something was not asked often enough."""
        variants = {name: _times_of(question.replies[WARM_UP:]) for name, question in self._variants.items()}
        own = {name: _own_s(question.replies[WARM_UP:]) for name, question in self._kinds.items()}
        if not all(own.values()):
            raise CannotMeasure("some of the daemon's own times were not measured: ask for more samples")
        network = {"delay_ms": stack.CLOUD_DELAY_MS, "jitter_ms": stack.CLOUD_JITTER_MS, "baud": stack.BAUD}
        every = [value for found in own.values() for value in found]
        return Times(
            _described(machine.facts()),
            network,
            Spread.of(every),
            variants,
            {name: Spread.of(found) for name, found in own.items()},
        )

    def close(self) -> None:
        self._client.close()


def _times_of(replies: Sequence[Mapping[str, Any]]) -> VariantTimes:
    if not replies:
        raise CannotMeasure("a variant was not asked often enough: ask for more samples")
    service = [reply["timing_ms"]["compute"] / 1e3 for reply in replies]
    elapsed = [reply["attempts"][-1]["elapsed_ms"] / 1e3 for reply in replies]
    link = [max(0.0, took - busy) for took, busy in zip(elapsed, service, strict=True)]
    return VariantTimes(Spread.of(service), Spread.of(link))


def _own_s(replies: Sequence[Mapping[str, Any]]) -> list[float]:
    """Of those with one attempt, or with none because no time was left: what overlapped cannot be told apart."""
    return [
        max(0.0, reply["timing_ms"]["total"] - sum(one["elapsed_ms"] for one in reply["attempts"])) / 1e3
        for reply in replies
        if "timing_ms" in reply and len(reply["attempts"]) <= 1
    ]


def kind_of(family: str, latency_class: LatencyClass) -> str:
    """The key of `Times.own`."""
    return f"{family} {latency_class.value}"


def _described(facts: Mapping[str, Any]) -> dict[str, Any]:
    return {**machine.generic(facts), "versions": facts["versions"]}


def _milliseconds(spread: Spread) -> list[float]:
    return [float(f"{value * 1e3:.4g}") for value in spread.points]


def _seconds(points: Sequence[float]) -> Spread:
    if len(points) < 2:
        raise ValueError("a distribution needs two points at least")
    return Spread([value / 1e3 for value in points])
