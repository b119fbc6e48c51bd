"""One routing decision: five targets with three variants each, beside the sorting of fifteen ready-made scores.

The policy alone is what the aim is about: everything known, the ranking wanted. Beside it, for who reads on: with the
reason in words, which the daemon puts together after the target was asked; with fewer candidates; and the router's
whole decision, which gathers availability, breakers, limits and estimates first.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from agent.config import RoutingSection
from agent.core.clock import ManualClock
from agent.core.component import Reading
from agent.core.types import Complexity, InferenceRequest, LatencyClass, TargetAnswer, Tier
from agent.registry.catalog import Catalog, Family, Variant, load_catalog
from agent.registry.locate import catalog_path
from agent.routing.decision import Candidate, Play, Question
from agent.routing.estimate import Estimate
from agent.routing.policy import Policy
from agent.routing.router import Router
from agent.targets.base import AVAILABLE, Availability, TargetTraits
from hil.bench.report import Aim, Line
from hil.bench.stats import Sampler, alternate
from hil.bench.wire import batches

AIM_US = 20.0
VARIANTS = 3
LEFT_S = 0.0995
TARGETS = (
    (Tier.EDGE_MCU, 0, 0.0),
    (Tier.EDGE_GPU, 10, 0.0),
    (Tier.CLOUD_GPU, 20, 0.001),
    (Tier.CLOUD_GPU, 21, 0.002),
    (Tier.CLOUD_SERVERLESS, 30, 0.004),
)
FLOOR = "sorting 15 scores"


def measure(seconds: float) -> list[Line]:
    policy, question = Policy(RoutingSection()), _question()
    comfortable, tight = _candidates(0.2), _candidates(1.6)
    three = [candidate for candidate in comfortable if candidate.variant == "v2"][:3]
    scores = [(0, -candidate.estimate.accuracy, candidate.order, candidate.variant) for candidate in comfortable]
    if len(policy.decide(question, comfortable).ranked) != len(comfortable):
        raise AssertionError("a candidate was ruled out that is not meant to be")
    router = _router()
    sides: dict[str, Sampler] = {
        "policy": batches(lambda: policy.decide(question, comfortable)),
        "tight": batches(lambda: policy.decide(question, tight)),
        "reasons": batches(lambda: policy.decide(question, comfortable).reasons),
        "three": batches(lambda: policy.decide(question, three)),
        "router": batches(router),
        "floor": batches(lambda: sorted(scores)),
    }
    found = {name: side.scaled(1e6) for name, side in alternate(sides, seconds).items()}
    floor, aim = found["floor"], Aim(AIM_US, "figure")
    return [
        Line("decide", "5 targets x 3 variants", "us", found["policy"], FLOOR, floor, aim),
        Line(
            "decide",
            "5 x 3, deadline tight",
            "us",
            found["tight"],
            FLOOR,
            floor,
            aim,
            "some may be late, some are ruled out",
        ),
        Line("decide", "5 x 3, with the reason in words", "us", found["reasons"], FLOOR, floor),
        Line("decide", "3 targets x 1 variant", "us", found["three"]),
        Line("decide", "5 x 3, router: facts gathered too", "us", found["router"], FLOOR, floor),
    ]


def _question() -> Question:
    return Question(LatencyClass.NEAR, Complexity.SIMPLE, 5, LEFT_S, previous=Play("t1", "v2"))


def _candidates(slowness: float) -> list[Candidate]:
    """At 0.2 all of them are sure to be in time; at 1.6 the slowest are ruled out, and others may be late."""
    found = []
    for number, (tier, order, cost_usd) in enumerate(TARGETS):
        for variant in range(VARIANTS):
            p50_s = 0.004 * (number + 1) * (variant + 1) * slowness
            accuracy = 0.93 + 0.01 * variant + 0.01 * number
            size = 600 if cost_usd else 0
            estimate = Estimate(p50_s, 2 * p50_s, True, 0.99, cost_usd, size, accuracy, age_s=1.0)
            play = Play(f"t{number}", f"v{variant}")
            found.append(
                Candidate(
                    *(play.target, tier, order, play.variant),
                    in_flight=number % 3,
                    limit=8,
                    estimate=estimate,
                    model_bytes=1000,
                    max_bytes=1e9,
                    metered=cost_usd > 0,
                    made=play,
                )
            )
    return found


class _Idle:
    """A target that is there and is never asked."""

    def __init__(self, traits: TargetTraits, variants: Sequence[Variant]) -> None:
        self.traits = traits
        self._variants = variants

    def availability(self) -> Availability:
        return AVAILABLE

    def parts(self) -> Mapping[str, Reading]:
        return {}

    def alive(self) -> bool:
        return True

    def variant_for(self, family: Family, pinned: str | None) -> Variant | None:
        return self._variants[0]

    def variants_for(self, family: Family, pinned: str | None) -> Sequence[Variant]:
        return self._variants

    async def infer(self, request: InferenceRequest, family: Family, variant: Variant, deadline: float) -> TargetAnswer:
        raise AssertionError("never asked")

    async def start(self) -> None: ...

    async def stop(self) -> None: ...

    def status(self) -> Mapping[str, Any]:
        return {}


def _router() -> Callable[[], object]:
    """A call that decides for one request among five targets, each with the three variants of `digits`."""
    catalog: Catalog = load_catalog(catalog_path(None))
    family = catalog.family("digits")
    clock = ManualClock()
    targets = [
        _Idle(TargetTraits(f"t{number}", tier, order, 8, 5.0, 1e9, cost_usd), tuple(family.variants.values()))
        for number, (tier, order, cost_usd) in enumerate(TARGETS)
    ]
    router = Router(targets, RoutingSection(), clock)
    inputs = {spec.name: np.zeros(spec.shape, spec.dtype) for spec in family.inputs}
    request = InferenceRequest("bench", family.name, inputs, LatencyClass.NEAR, 0.0, 1e9)
    began = time.perf_counter()

    return lambda: router.decide(request, family, time.perf_counter() - began)
