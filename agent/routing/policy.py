"""Which target is asked first, which next, and why. Pure: same arguments, same ranking; no I/O, no clock.

First hard constraints rule targets out; then each that is left gets a score, the sum of the points below; then three
rules pick the first target: an edge target is kept while its score is at least `edge_preference` of the best cloud
score; a cloud lane dearer than `max_cloud_cost` waits until no edge target is left; a request of priority 8 or more
takes the best score, whatever it costs. The targets behind the first follow the fallback chain
`edge_mcu -> edge_gpu -> cloud_gpu -> cloud_serverless -> backup cloud`. `docs/routing.md` works an example by hand.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from agent.config import RoutingSection
from agent.core.types import Complexity, LatencyClass, Tier
from agent.routing.estimate import Estimate

HIGH_PRIORITY = 8
"""From here on money is no argument."""

Row = tuple[float, float, float]
"""Points for (edge_mcu, edge_gpu, cloud)."""

CLASS_POINTS: Mapping[LatencyClass, Row] = {
    LatencyClass.REALTIME: (60, 40, 0),
    LatencyClass.NEAR: (25, 50, 15),
    LatencyClass.INTERACTIVE: (25, 45, 30),
    LatencyClass.BATCH: (0, 0, 60),
}
COMPLEXITY_POINTS: Mapping[Complexity, Row] = {
    Complexity.SIMPLE: (30, 25, 10),
    Complexity.MEDIUM: (0, 40, 25),
    Complexity.COMPLEX: (0, 0, 100),
}
HEADROOM_POINTS = 20.0
"""For an idle target; none for a full one."""
COST_POINTS = 10.0
"""For a free target; none at `max_cloud_cost`."""
ACCURACY_POINTS = 10.0
"""For the most accurate candidate; none for one that is `ACCURACY_SPREAD` behind it."""
ACCURACY_SPREAD = 0.1

_COLUMN = {Tier.EDGE_MCU: 0, Tier.EDGE_GPU: 1, Tier.CLOUD_GPU: 2, Tier.CLOUD_SERVERLESS: 2}


@dataclass(slots=True)
class Question:
    """What policy needs of a request."""

    latency_class: LatencyClass
    complexity: Complexity
    priority: int
    time_left_s: float
    allowed_regions: frozenset[str] = frozenset()


@dataclass(slots=True)
class Candidate:
    """What policy needs of a target now. `unavailable` and `breaker` hold a reason, or are empty."""

    name: str
    tier: Tier
    order: int
    in_flight: int
    max_concurrent: int
    estimate: Estimate
    accuracy: float | None
    """Of the variant it would run; None: it has no variant of this model."""
    model_bytes: int = 0
    max_bytes: float = float("inf")
    cost_usd: float = 0.0
    region: str | None = None
    backup: bool = False
    unavailable: str = ""
    breaker: str = ""


class Constraint(StrEnum):
    """The hard constraints, in the order in which they are looked at."""

    UNAVAILABLE = "unavailable"
    NO_VARIANT = "no_variant"
    SIZE = "size"
    REGION = "region"
    BREAKER = "breaker"
    BUSY = "busy"
    DEADLINE = "deadline"


@dataclass(slots=True)
class Decision:
    """`ranked` are names of targets in the order in which they are to be tried; `excluded` says which constraint ruled
    each of the others out."""

    ranked: tuple[str, ...]
    scores: Mapping[str, float]
    reasons: tuple[str, ...]
    excluded: Mapping[str, Constraint] = field(default_factory=dict)


def decide(question: Question, candidates: Sequence[Candidate], settings: RoutingSection) -> Decision:
    """Rank the candidates."""
    reasons: list[str] = []
    excluded: dict[str, Constraint] = {}
    possible: list[Candidate] = []
    for candidate in sorted(candidates, key=_place):
        objection = _objection(question, candidate)
        if objection is None:
            possible.append(candidate)
        else:
            excluded[candidate.name], text = objection
            reasons.append(f"{candidate.name}: not asked: {text}")
    if not possible:
        return Decision((), {}, (*reasons, "no target can be asked"), excluded)

    best_accuracy = max(candidate.accuracy or 0.0 for candidate in possible)
    scores = {candidate.name: score(question, candidate, best_accuracy, settings) for candidate in possible}
    first, why = _first(question, possible, scores, settings)
    rest = sorted(
        (candidate for candidate in possible if candidate is not first),
        key=lambda other: (_at_risk(question, other), _too_dear(question, other, settings), *_place(other)),
    )
    reasons.append(f"{first.name}: {why}")
    return Decision((first.name, *(candidate.name for candidate in rest)), scores, tuple(reasons), excluded)


def score(question: Question, candidate: Candidate, best_accuracy: float, settings: RoutingSection) -> float:
    """Sum of the points of one candidate, 0 to 200."""
    column = _COLUMN[candidate.tier]
    points = CLASS_POINTS[question.latency_class][column] + COMPLEXITY_POINTS[question.complexity][column]
    points += HEADROOM_POINTS * (1.0 - candidate.in_flight / candidate.max_concurrent)
    behind = (best_accuracy - (candidate.accuracy or 0.0)) / ACCURACY_SPREAD
    points += ACCURACY_POINTS * max(0.0, 1.0 - behind)
    if question.priority < HIGH_PRIORITY:
        limit = settings.max_cloud_cost
        share = candidate.cost_usd / limit if limit > 0 else float(candidate.cost_usd > 0)
        points += COST_POINTS * max(0.0, 1.0 - share)
    return points


def _objection(question: Question, candidate: Candidate) -> tuple[Constraint, str] | None:
    """The first hard constraint that rules the candidate out, in words."""
    if candidate.unavailable:
        return Constraint.UNAVAILABLE, candidate.unavailable
    if candidate.accuracy is None:
        return Constraint.NO_VARIANT, "has no variant of this model"
    if candidate.model_bytes > candidate.max_bytes:
        return Constraint.SIZE, f"model of {candidate.model_bytes} bytes is over its limit of {candidate.max_bytes:.0f}"
    if question.allowed_regions and candidate.tier.is_cloud and candidate.region not in question.allowed_regions:
        return Constraint.REGION, f"region {candidate.region or 'unknown'} is not allowed"
    if candidate.breaker:
        return Constraint.BREAKER, candidate.breaker
    if candidate.in_flight >= candidate.max_concurrent:
        return Constraint.BUSY, f"busy: {candidate.in_flight} of {candidate.max_concurrent} in flight"
    if candidate.estimate.p50_s > question.time_left_s:
        needed, left = candidate.estimate.p50_s * 1e3, max(0.0, question.time_left_s * 1e3)
        return Constraint.DEADLINE, f"would take {needed:.1f} ms, {left:.1f} ms of the deadline left"
    return None


def _first(
    question: Question, possible: Sequence[Candidate], scores: Mapping[str, float], settings: RoutingSection
) -> tuple[Candidate, str]:
    """The target to ask first, and the rule that chose it."""

    def best(group: Sequence[Candidate]) -> Candidate:
        return min(group, key=lambda candidate: (-scores[candidate.name], *_place(candidate)))

    in_time = [candidate for candidate in possible if not _at_risk(question, candidate)] or list(possible)
    group = [candidate for candidate in in_time if not candidate.backup] or in_time
    if question.priority >= HIGH_PRIORITY:
        chosen = best(group)
        return chosen, f"best score {scores[chosen.name]:.0f}, whatever the cost (priority {question.priority})"
    edges = [candidate for candidate in group if not candidate.tier.is_cloud]
    clouds = [candidate for candidate in group if candidate.tier.is_cloud]
    affordable = [candidate for candidate in clouds if not _too_dear(question, candidate, settings)]
    if not edges:
        chosen = best(affordable or clouds)
        risky = any(not candidate.tier.is_cloud for candidate in possible)
        why = "is sure to be in time" if risky else "can answer"
        return chosen, f"score {scores[chosen.name]:.0f}; no edge tier {why}"
    edge = best(edges)
    if not affordable:
        why = "no cloud lane can answer in time"
        if clouds:
            why = f"cloud costs more than {settings.max_cloud_cost:g} USD"
        elif any(candidate.tier.is_cloud for candidate in possible):
            why = "the only cloud lanes are backups or not sure to be in time"
        return edge, f"score {scores[edge.name]:.0f}; {why}"
    cloud = best(affordable)
    threshold = settings.edge_preference * scores[cloud.name]
    if scores[edge.name] >= threshold:
        return (
            edge,
            f"score {scores[edge.name]:.0f} >= {settings.edge_preference:g} x {cloud.name} {scores[cloud.name]:.0f}",
        )
    return cloud, f"score {scores[cloud.name]:.0f}; {edge.name} {scores[edge.name]:.0f} is below {threshold:.0f}"


def _place(candidate: Candidate) -> tuple[int, str]:
    """In the fallback chain; lanes of one kind by name."""
    return candidate.order, candidate.name


def _at_risk(question: Question, candidate: Candidate) -> bool:
    """In time at the median, too late at the 95th percentile: tried only after the safe ones."""
    return candidate.estimate.p95_s > question.time_left_s


def _too_dear(question: Question, candidate: Candidate, settings: RoutingSection) -> bool:
    return question.priority < HIGH_PRIORITY and candidate.cost_usd > settings.max_cloud_cost
