"""What must hold under load: ten thousand requests at once, and faults elsewhere.

`crowd`: all of them arrive at the same moment. With the daemon's own bounds most are refused, each with a reason; with
a line that holds them all and time enough, all are answered. No class may be left without its part.

`disturbed`: a slow cloud, boards that flap, a dead runtime, each alone and all together. The tiers that are well must
answer the realtime class as fast as ever: 99th percentile within 1.5 times of what the same tier does undisturbed,
under the same load.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from agent.config import Config
from agent.core.types import InferenceResult, LatencyClass, Tier
from hil.sim import faults
from hil.sim.judge import Verdict, at_least, at_most
from hil.sim.load import STANDARD, Ask, Load
from hil.sim.play import Course, Run, Scenario, Stage, play, resident_bytes
from hil.sim.strategies import ALWAYS_GATEWAY, ALWAYS_MCU, OURS

CROWD = 10_000
PATIENT_MS = 120_000.0
"""Deadline of every request where all of them are to be answered."""
MOST_KB = 64.0
"""Memory that a request may take while it waits: with it 10,000 of them stay below 640 MB."""
TOLERANCE = 1.5
FEWEST = 50
"""Answers of a tier below which its 99th percentile says nothing."""
CASES = ("cloud-slow", "mcu-flap", "runtime-dead", "cloud-slow,mcu-flap,runtime-dead")
ILL: Mapping[str, Tier] = {
    "cloud-slow": Tier.CLOUD_GPU,
    "cloud-outage": Tier.CLOUD_GPU,
    "mcu-flap": Tier.EDGE_MCU,
    "runtime-dead": Tier.EDGE_GPU,
}


@dataclass(frozen=True, slots=True)
class Crowd:
    """What came of it. `peak_kb` is by how much the process grew while all of them were in it, for each of them."""

    asked: int
    answered: Mapping[str, int]
    refused: Mapping[str, int]
    unexplained: int
    most_waiting: int
    peak_kb: float
    longest_s: Mapping[str, float]

    def verdicts(self, name: str) -> list[Verdict]:
        """What must hold of it."""
        settled = sum(self.answered.values()) + sum(self.refused.values()) - self.unexplained
        starved = [kind.value for kind in LatencyClass if not self.answered.get(kind.value)]
        return [
            at_least(f"{name}: answered, or refused with a reason", settled / max(1, self.asked), 1.0),
            at_most(f"{name}: classes without an answer", len(starved), 0, "classes", ", ".join(starved)),
            at_most(f"{name}: memory", self.peak_kb, MOST_KB, "kB for each request"),
        ]

    def to_dict(self) -> dict[str, Any]:
        return {
            "asked": self.asked,
            "answered": dict(self.answered),
            "refused": dict(self.refused),
            "unexplained": self.unexplained,
            "most_waiting": self.most_waiting,
            "peak_kb_each": round(self.peak_kb, 2),
            "longest_s": {name: round(value, 3) for name, value in self.longest_s.items()},
        }


def crowd(stage: Stage, config: Config, requests: int = CROWD, *, patient: bool = False, seed: int = 1) -> Crowd:
    """`requests` at one moment. `patient`: with room and time for all of them."""
    kinds = STANDARD
    if patient:
        kinds = tuple(replace(kind, deadline_ms=PATIENT_MS) for kind in STANDARD)
        config = roomy(config, requests)
    rng = np.random.default_rng([seed, 0])
    chosen = rng.choice(len(kinds), requests, p=[kind.share for kind in kinds])
    asks = []
    for number, index in enumerate(chosen):
        kind = kinds[int(index)]
        asks.append(Ask(number, 0.0, kind, number, int(rng.integers(len(stage.samples[kind.family])))))
    before = resident_bytes()
    run = play(stage, Scenario(asks, seed=seed, one_by_one=False), config)  # all are read, at once
    return _told(run, run.most_bytes - before)


def roomy(config: Config, requests: int) -> Config:
    """The same configuration with a line that holds so many."""
    waiting = config.routing.overload.waiting.model_copy(
        update={kind.value: requests for kind in LatencyClass} | {"total": requests}
    )
    overload = config.routing.overload.model_copy(update={"waiting": waiting})
    return config.model_copy(update={"routing": config.routing.model_copy(update={"overload": overload})})


def _told(run: Run, peak: int) -> Crowd:
    answered: Counter[str] = Counter()
    refused: Counter[str] = Counter()
    longest: dict[str, float] = {}
    unexplained = 0
    for course in run.courses:
        name = course.ask.kind.latency_class.value
        if isinstance(course.outcome, InferenceResult):
            answered[name] += 1
            longest[name] = max(longest.get(name, 0.0), course.took_s)
        else:
            refused[course.outcome.code] += 1
            unexplained += not (course.outcome.message and course.outcome.reasons)
    asked = len(run.courses)
    return Crowd(asked, answered, refused, unexplained, run.most_waiting, max(0, peak) / 1024 / max(1, asked), longest)


@dataclass(frozen=True, slots=True)
class Healthy:
    """The realtime class on one tier that is well: its 99th percentile undisturbed and disturbed, ms."""

    case: str
    tier: Tier
    calm_ms: float
    disturbed_ms: float
    answers: int

    @property
    def ratio(self) -> float:
        return self.disturbed_ms / self.calm_ms

    def verdict(self) -> Verdict:
        what = f"{self.case}: realtime p99 of {self.tier.value} beside undisturbed"
        beside = f"{self.disturbed_ms:.2f} ms against {self.calm_ms:.2f} ms; {self.answers} answers while disturbed"
        return at_most(what, self.ratio, TOLERANCE, "times", beside)


def disturbed(stage: Stage, config: Config, seconds: float, seed: int = 1) -> list[Healthy]:
    """Each case, and each tier that is well in it and was asked."""
    load = Load(100, 0.5, seconds)
    start, end = (share * seconds for share in faults.DEFAULT_SPAN)
    calm = {
        strategy: _realtime(play(stage, Scenario(load, seed=seed), config, strategy).courses, start, end)
        for strategy in (OURS, ALWAYS_GATEWAY, ALWAYS_MCU)
    }
    found = []
    for case in CASES:
        scenario = Scenario(load, faults.parse(case, seconds), seed)
        during = _realtime(play(stage, scenario, config).courses, start, end)
        ill = {ILL[name] for name in case.split(",")}
        for tier, alone in ((Tier.EDGE_GPU, ALWAYS_GATEWAY), (Tier.EDGE_MCU, ALWAYS_MCU)):
            answers = _of_tier(during, tier)
            # Where every edge tier is ill, the boards are well between two resets.
            if (tier in ill and not (tier is Tier.EDGE_MCU and Tier.EDGE_GPU in ill)) or len(answers) < FEWEST:
                continue
            usual = _of_tier(calm[OURS], tier)
            usual = usual if len(usual) >= FEWEST else _of_tier(calm[alone], tier)
            found.append(Healthy(case, tier, _p99_ms(usual), _p99_ms(answers), len(answers)))
    return found


def _realtime(courses: Sequence[Course], start_s: float, end_s: float) -> list[Course]:
    return [
        course
        for course in courses
        if course.ask.kind.latency_class is LatencyClass.REALTIME and start_s <= course.ask.at_s < end_s
    ]


def _of_tier(courses: Sequence[Course], tier: Tier) -> list[Course]:
    return [c for c in courses if isinstance(c.outcome, InferenceResult) and c.outcome.tier is tier]


def _p99_ms(courses: Sequence[Course]) -> float:
    return float(np.quantile([course.took_s * 1e3 for course in courses], 0.99, method="higher"))
