"""What a run came to, in figures."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from agent.core.errors import InferenceError
from agent.core.types import LatencyClass, Tier
from hil.sim.hindsight import CLOSE
from hil.sim.play import Course, Run

EDGE = (Tier.EDGE_MCU, Tier.EDGE_GPU)


@dataclass(frozen=True, slots=True)
class Figures:
    """Of a set of requests. Shares are of all requests; latency and accuracy are of those that were answered.

    `accuracy` counts fallback answers as answers; `useful` is the share of all requests that got a right answer in
    time. `edge` is the part of the computed answers that the edge tiers gave, `fallback` the part of the requests for
    which an earlier answer had to do. `mean_ms` to `p99_ms` are from receipt to answer, and 0 where nobody answered.
    `bytes` went over metered links. `close` is the share of requests for which what was done was worth as much as the
    best play in hindsight, or within 2 % of it; `regret` is what was missed on average.
    """

    requests: int
    refused: int
    accuracy: float
    useful: float
    in_time: float
    fallback: float
    edge: float
    mean_ms: float
    p50_ms: float
    p95_ms: float
    p99_ms: float
    cost_usd: float
    bytes: int
    close: float
    regret: float

    def to_dict(self) -> dict[str, Any]:
        return {field.name: _rounded(getattr(self, field.name)) for field in fields(self)}


def of_courses(courses: Iterable[Course]) -> Figures:
    """Figures of some requests of a run."""
    courses = list(courses)
    answered = [course for course in courses if course.right is not None]
    tiers = Counter(tier_of(course) for course in answered)
    computed = sum(count for tier, count in tiers.items() if tier is not Tier.FALLBACK)
    took_ms = np.array([course.took_s * 1e3 for course in answered]) if answered else np.zeros(1)
    count = max(1, len(courses))
    return Figures(
        requests=len(courses),
        refused=len(courses) - len(answered),
        accuracy=sum(bool(course.right) for course in answered) / max(1, len(answered)),
        useful=sum(bool(course.right) and course.in_time for course in courses) / count,
        in_time=sum(course.in_time for course in courses) / count,
        fallback=tiers[Tier.FALLBACK] / count,
        edge=sum(tiers[tier] for tier in EDGE) / max(1, computed),
        mean_ms=float(took_ms.mean()),
        p50_ms=_quantile(took_ms, 0.5),
        p95_ms=_quantile(took_ms, 0.95),
        p99_ms=_quantile(took_ms, 0.99),
        cost_usd=sum(course.cost_usd for course in courses),
        bytes=sum(course.bytes for course in courses),
        close=sum(course.got >= course.best - CLOSE * abs(course.best) for course in courses) / count,
        regret=sum(course.best - course.got for course in courses) / count,
    )


def by_class(run: Run) -> Mapping[str, Figures]:
    """Figures of each latency class that asked."""
    found: dict[LatencyClass, list[Course]] = {kind: [] for kind in LatencyClass}
    for course in run.courses:
        found[course.ask.kind.latency_class].append(course)
    return {kind.value: of_courses(courses) for kind, courses in found.items() if courses}


def by_tier(courses: Sequence[Course]) -> dict[str, int]:
    """Answers of each tier."""
    tiers = Counter(tier_of(course) for course in courses if course.right is not None)
    return {str(tier): count for tier, count in sorted(tiers.items(), key=str)}


def refusals(courses: Sequence[Course]) -> dict[str, int]:
    """Refusals by their code."""
    return dict(Counter(course.outcome.code for course in courses if isinstance(course.outcome, InferenceError)))


def tier_of(course: Course) -> Tier | None:
    """Of its answer; None if it was refused."""
    return None if isinstance(course.outcome, InferenceError) else course.outcome.tier


def _quantile(values: np.ndarray[Any, Any], share: float) -> float:
    """Nearest rank, from above."""
    return float(np.quantile(values, share, method="higher"))


def _rounded(value: float) -> float:
    return float(f"{value:.6g}") if isinstance(value, float) else value
