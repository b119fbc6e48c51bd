"""The published scoring table of the first version: `routing.policy: scorecard`. Pure.

Each candidate that no hard constraint rules out gets a score, the sum of the points below; then three rules pick the
first target: an edge target is kept while its score is at least `edge_preference` of the best cloud score; a cloud lane
dearer than `max_cloud_cost` waits until no edge target is left; a request of priority 8 or more takes the best score,
whatever it costs. The targets behind the first follow the fallback chain
`edge_mcu -> edge_gpu -> cloud_gpu -> cloud_serverless -> backup cloud`. Of each target only the most accurate variant
is a candidate. `docs/routing.md` works an example by hand.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from agent.config import RoutingSection
from agent.core.types import Complexity, LatencyClass, Tier
from agent.routing.decision import (
    HIGH_PRIORITY,
    Candidate,
    Decision,
    Judged,
    Question,
    at_risk,
    in_order,
    judged_of,
    not_asked,
    objection,
    place,
)

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


def decide(question: Question, candidates: Sequence[Candidate], settings: RoutingSection) -> Decision:
    """Rank the candidates."""
    chosen = _one_for_each_target(candidates)
    found = [(candidate, objection(question, candidate)) for candidate in chosen]
    refused = [(candidate, why) for candidate, why in found if why is not None]
    possible = [candidate for candidate, why in found if why is None]

    def judge() -> tuple[Judged, ...]:
        out = [judged_of(candidate, why) for candidate, why in refused]
        return (*out, *(_judged(question, candidate, points[candidate.target]) for candidate in possible))

    points: dict[str, dict[str, float]] = {}
    if not possible:
        return Decision("scorecard", (), lambda: (*not_asked(refused), "no target can be asked"), judge, WEIGHTS)
    best_accuracy = max(candidate.estimate.accuracy for candidate in possible)
    points |= {c.target: points_of(question, c, best_accuracy, settings) for c in possible}
    scores = {target: sum(each.values()) for target, each in points.items()}
    first, why = _first(question, possible, scores, settings)
    rest = sorted(
        (candidate for candidate in possible if candidate is not first),
        key=lambda other: (at_risk(question, other), _too_dear(question, other, settings), *place(other)),
    )
    ranked = (first.play, *(candidate.play for candidate in rest))
    return Decision("scorecard", ranked, lambda: (*not_asked(refused), f"{first.target}: {why}"), judge, WEIGHTS)


WEIGHTS = {"headroom": HEADROOM_POINTS, "accuracy": ACCURACY_POINTS, "cost": COST_POINTS}


def points_of(
    question: Question, candidate: Candidate, best_accuracy: float, settings: RoutingSection
) -> dict[str, float]:
    """The points of one candidate by kind; their sum is 0 to 200."""
    column = _COLUMN[candidate.tier]
    behind = (best_accuracy - candidate.estimate.accuracy) / ACCURACY_SPREAD
    cost = 0.0
    if question.priority < HIGH_PRIORITY:
        limit, price = settings.max_cloud_cost, candidate.estimate.cost_usd
        share = price / limit if limit > 0 else float(price > 0)
        cost = COST_POINTS * max(0.0, 1.0 - share)
    return {
        "class": CLASS_POINTS[question.latency_class][column],
        "complexity": COMPLEXITY_POINTS[question.complexity][column],
        "headroom": HEADROOM_POINTS * (1.0 - candidate.in_flight / candidate.limit),
        "accuracy": ACCURACY_POINTS * max(0.0, 1.0 - behind),
        "cost": cost,
    }


def _judged(question: Question, candidate: Candidate, points: Mapping[str, float]) -> Judged:
    risky = at_risk(question, candidate)
    return judged_of(candidate, None, risky=risky, utility=sum(points.values()), terms=points)


def _one_for_each_target(candidates: Sequence[Candidate]) -> list[Candidate]:
    chosen: dict[str, Candidate] = {}
    for candidate in in_order(candidates):
        chosen.setdefault(candidate.target, candidate)
    return list(chosen.values())


def _first(
    question: Question, possible: Sequence[Candidate], scores: Mapping[str, float], settings: RoutingSection
) -> tuple[Candidate, str]:
    """The target to ask first, and the rule that chose it."""

    def best(group: Sequence[Candidate]) -> Candidate:
        return min(group, key=lambda candidate: (-scores[candidate.target], *place(candidate)))

    in_time = [candidate for candidate in possible if not at_risk(question, candidate)] or list(possible)
    group = [candidate for candidate in in_time if not candidate.backup] or in_time
    if question.priority >= HIGH_PRIORITY:
        chosen = best(group)
        return chosen, f"best score {scores[chosen.target]:.0f}, whatever the cost (priority {question.priority})"
    edges = [candidate for candidate in group if not candidate.tier.is_cloud]
    clouds = [candidate for candidate in group if candidate.tier.is_cloud]
    affordable = [candidate for candidate in clouds if not _too_dear(question, candidate, settings)]
    if not edges:
        chosen = best(affordable or clouds)
        risky = any(not candidate.tier.is_cloud for candidate in possible)
        why = "is sure to be in time" if risky else "can answer"
        return chosen, f"score {scores[chosen.target]:.0f}; no edge tier {why}"
    edge = best(edges)
    if not affordable:
        why = "no cloud lane can answer in time"
        if clouds:
            why = f"cloud costs more than {settings.max_cloud_cost:g} USD"
        elif any(candidate.tier.is_cloud for candidate in possible):
            why = "the only cloud lanes are backups or not sure to be in time"
        return edge, f"score {scores[edge.target]:.0f}; {why}"
    cloud = best(affordable)
    threshold = settings.edge_preference * scores[cloud.target]
    if scores[edge.target] >= threshold:
        return (
            edge,
            f"score {scores[edge.target]:.0f} >= {settings.edge_preference:g} x {cloud.target}"
            f" {scores[cloud.target]:.0f}",
        )
    return cloud, f"score {scores[cloud.target]:.0f}; {edge.target} {scores[edge.target]:.0f} is below {threshold:.0f}"


def _too_dear(question: Question, candidate: Candidate, settings: RoutingSection) -> bool:
    return question.priority < HIGH_PRIORITY and candidate.estimate.cost_usd > settings.max_cloud_cost
