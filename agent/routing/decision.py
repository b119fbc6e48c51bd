"""What a decision is made of: the question, the candidates, what was thought of each, and the ranking. Plain data."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, NamedTuple, Protocol

from agent.core.types import AccuracyMode, Complexity, LatencyClass, Tier
from agent.routing.estimate import Estimate

HIGH_PRIORITY = 8
"""From here on money is no argument."""


class Play(NamedTuple):
    """One target running one variant (its id, without the family)."""

    target: str
    variant: str

    def __str__(self) -> str:
        return f"{self.target}/{self.variant}"


class Constraint(StrEnum):
    """The hard constraints, in the order in which they are looked at."""

    UNAVAILABLE = "unavailable"
    NO_VARIANT = "no_variant"
    SIZE = "size"
    REGION = "region"
    BREAKER = "breaker"
    BUSY = "busy"
    BUDGET = "budget"
    DEADLINE = "deadline"


@dataclass(slots=True)
class Question:
    """What policy needs of a request. `previous` is the play that was chosen last for such a request."""

    latency_class: LatencyClass
    complexity: Complexity
    priority: int
    time_left_s: float
    allowed_regions: frozenset[str] = frozenset()
    accuracy: AccuracyMode = AccuracyMode.ADAPTIVE
    accuracy_floor: float = 0.0
    """What `acceptable` asks for."""
    previous: Play | None = None

    def to_dict(self) -> dict[str, Any]:
        return {
            "latency_class": self.latency_class.value,
            "complexity": self.complexity.value,
            "priority": self.priority,
            "time_left_ms": _ms(self.time_left_s),
            "allowed_regions": sorted(self.allowed_regions),
            "accuracy": self.accuracy.value,
            "accuracy_floor": self.accuracy_floor,
            "previous": None if self.previous is None else list(self.previous),
        }


@dataclass(slots=True)
class Candidate:
    """A target and a variant it could run now. `unavailable`, `breaker` and `budget` hold a reason, or are empty."""

    target: str
    tier: Tier
    order: int
    variant: str
    """Empty: the target has no variant of this model."""
    in_flight: int
    limit: int
    estimate: Estimate
    model_bytes: int = 0
    max_bytes: float = math.inf
    region: str | None = None
    backup: bool = False
    metered: bool = False
    unavailable: str = ""
    breaker: str = ""
    budget: str = ""
    passed_over: int = 0
    """Requests that could have asked it since it was asked last."""
    made: Play | None = None
    """Target and variant together, where they are known already."""

    @property
    def play(self) -> Play:
        return self.made or Play(self.target, self.variant)


class Judged(NamedTuple):
    """What was thought of one candidate. `excluded` says which constraint ruled it out, `text` how; then `utility` is
    None. `terms` are what the utility is the sum of."""

    target: str
    tier: Tier
    variant: str
    estimate: Estimate
    in_flight: int
    limit: int
    excluded: Constraint | None
    text: str
    at_risk: bool
    utility: float | None
    terms: Mapping[str, float]

    def to_dict(self) -> dict[str, Any]:
        return {
            "target": self.target,
            "tier": self.tier.value,
            "variant": self.variant,
            "estimate": self.estimate.to_dict(),
            "in_flight": self.in_flight,
            "limit": self.limit,
            "excluded": None if self.excluded is None else self.excluded.value,
            "text": self.text,
            "at_risk": self.at_risk,
            "utility": None if self.utility is None else round(self.utility, 6),
            "terms": {term: round(value, 6) for term, value in self.terms.items()},
        }


class Decision:
    """`ranked` are the plays in the order in which they are to be tried; `weights` is what the terms were weighed with.
    What is only told is put together when somebody asks for it: the target need not wait for that."""

    __slots__ = ("_judged", "_reasons", "policy", "ranked", "weights")

    def __init__(
        self,
        policy: str,
        ranked: tuple[Play, ...],
        reasons: tuple[str, ...] | Callable[[], tuple[str, ...]],
        judged: tuple[Judged, ...] | Callable[[], tuple[Judged, ...]] = (),
        weights: Mapping[str, float] | None = None,
    ) -> None:
        self.policy = policy
        self.ranked = ranked
        self.weights = weights or {}
        self._reasons = reasons
        self._judged = judged

    @property
    def reasons(self) -> tuple[str, ...]:
        """For a person: who was not asked, and why; then why the first one is the first."""
        if not isinstance(self._reasons, tuple):
            self._reasons = self._reasons()
        return self._reasons

    @property
    def judged(self) -> tuple[Judged, ...]:
        """Every candidate, those that a constraint ruled out first."""
        if not isinstance(self._judged, tuple):
            self._judged = self._judged()
        return self._judged

    @property
    def excluded(self) -> dict[Play, Constraint]:
        """Which constraint ruled out each of those that are not ranked."""
        return {Play(one.target, one.variant): one.excluded for one in self.judged if one.excluded is not None}

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, times in milliseconds."""
        return {
            "policy": self.policy,
            "ranked": [{"target": play.target, "variant": play.variant} for play in self.ranked],
            "reasons": list(self.reasons),
            "candidates": [one.to_dict() for one in self.judged],
            "weights": dict(self.weights),
        }


class Budgets(Protocol):
    """What may be spent on a lane: told of every attempt before it begins, and after it of what it took."""

    def objection(self, lane: str, cost_usd: float, bytes: int, priority: int, now: float) -> str:
        """Why the lane may not be asked now; empty: it may."""
        ...

    def spend(self, lane: str, cost_usd: float, bytes: int, now: float) -> Any:
        """An attempt on the lane begins. Returns what `settle` takes."""
        ...

    def settle(self, receipt: Any, cost_usd: float, bytes: int, now: float) -> None:
        """The attempt is over, and this is what it took. Not called where nobody knows."""
        ...


class Limit(Protocol):
    """How many attempts may run on one target at once. `routing.limits` adapts it; `Fixed` does not."""

    def limit(self, now: float, latency_class: LatencyClass) -> int:
        """For requests of a class: the looser ones may be given a part only."""
        ...

    def observe(self, now: float, *, latency_s: float, usual_s: float, in_flight: int, ok: bool) -> None:
        """An attempt that began with `in_flight` others under way ended after `latency_s`, where such attempts on an
        idle target usually take `usual_s`. `ok` is False for what says that the target is overloaded: a full queue, or
        no answer within the time that is usual."""
        ...


@dataclass(slots=True)
class Fixed:
    """Always the same limit."""

    most: int

    def limit(self, now: float, latency_class: LatencyClass) -> int:
        return self.most

    def observe(self, now: float, *, latency_s: float, usual_s: float, in_flight: int, ok: bool) -> None:
        return None


def objection(question: Question, candidate: Candidate) -> tuple[Constraint, str] | None:
    """The first hard constraint that rules the candidate out, in words."""
    if candidate.unavailable:
        return Constraint.UNAVAILABLE, candidate.unavailable
    if not candidate.variant:
        return Constraint.NO_VARIANT, "has no variant of this model"
    if candidate.model_bytes > candidate.max_bytes:
        return Constraint.SIZE, f"model of {candidate.model_bytes} bytes is over its limit of {candidate.max_bytes:.0f}"
    if question.allowed_regions and candidate.tier.is_cloud and candidate.region not in question.allowed_regions:
        return Constraint.REGION, f"region {candidate.region or 'unknown'} is not allowed"
    if candidate.breaker:
        return Constraint.BREAKER, candidate.breaker
    if candidate.in_flight >= candidate.limit:
        return Constraint.BUSY, f"busy: {candidate.in_flight} of {candidate.limit} in flight"
    if candidate.budget:
        return Constraint.BUDGET, candidate.budget
    if candidate.estimate.p50_s > question.time_left_s:
        needed, left = candidate.estimate.p50_s * 1e3, max(0.0, question.time_left_s * 1e3)
        return Constraint.DEADLINE, f"would take {needed:.1f} ms, {left:.1f} ms of the deadline left"
    return None


def at_risk(question: Question, candidate: Candidate) -> bool:
    """In time at the median, too late at the 95th percentile: tried only after the safe ones."""
    return candidate.estimate.p95_s > question.time_left_s


def place(candidate: Candidate) -> tuple[int, str, float, str]:
    """In the fallback chain; lanes of one kind by name; variants of one target from the most accurate down."""
    return candidate.order, candidate.target, -candidate.estimate.accuracy, candidate.variant


def judged_of(
    candidate: Candidate,
    found: tuple[Constraint, str] | None,
    *,
    risky: bool = False,
    utility: float | None = None,
    terms: Mapping[str, float] | None = None,
) -> Judged:
    """A candidate with what was thought of it."""
    constraint, text = found or (None, "")
    return Judged(
        candidate.target,
        candidate.tier,
        candidate.variant,
        candidate.estimate,
        candidate.in_flight,
        candidate.limit,
        constraint,
        text,
        risky,
        utility,
        terms or {},
    )


def in_order(candidates: Sequence[Candidate]) -> list[Candidate]:
    """So that the order in which candidates are given changes nothing."""
    return sorted(candidates, key=place)


def not_asked(refused: Sequence[tuple[Candidate, tuple[Constraint, str]]]) -> list[str]:
    """One line for each target and reason, in order of the fallback chain."""
    refused = sorted(refused, key=lambda one: place(one[0]))
    return list(dict.fromkeys(f"{candidate.target}: not asked: {text}" for candidate, (_, text) in refused))


def _ms(seconds: float) -> float | None:
    return round(seconds * 1e3, 3) if math.isfinite(seconds) else None
