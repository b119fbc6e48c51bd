"""Which target answers, with which variant, and why. Pure: same arguments, same ranking; no I/O, no clock.

First hard constraints rule plays out (`decision.objection`). What is left is ordered by group, and within a group by
utility:

    at risk     in time at the median only, not at the 95th percentile: after everything that is safe
    too dear    over `max_cloud_cost`, unless priority makes money no argument
    backup      a lane that is asked after the others
    less right  below what the request's `accuracy` asks for

Within a group each target's best play comes before any target's second one. What was chosen last for such a request
stays first while it is in the best group, nothing is worth `hysteresis` more, and it is as good in accuracy and money;
and a play that was not asked for long
may be put first as a probe. `docs/routing.md` works an example by hand.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import inf
from typing import Literal, TypeAlias

from agent.config import RoutingSection, UtilityWeights
from agent.core.types import AccuracyMode, LatencyClass
from agent.routing import scorecard
from agent.routing.decision import (
    HIGH_PRIORITY,
    Budgets,
    Candidate,
    Constraint,
    Decision,
    Fixed,
    Judged,
    Limit,
    Play,
    Question,
    judged_of,
    not_asked,
    objection,
)
from agent.routing.utility import BYTES_UNIT, FREE_LIMIT_SHARE, MIN_SPREAD, late, terms

__all__ = [
    "HIGH_PRIORITY",
    "Budgets",
    "Candidate",
    "Constraint",
    "Decision",
    "Fixed",
    "Judged",
    "Limit",
    "Play",
    "Policy",
    "Question",
    "decide",
]

SURE = MIN_SPREAD**3
"""Times the median: with less spread than `MIN_SPREAD`, what takes that long is not late (`utility.late`)."""
AT_RISK, TOO_DEAR, BACKUP, LESS_RIGHT = 8, 4, 2, 1
"""What a group is the sum of; the lower the better."""
STEADY = 0.001
"""Utility from accuracy and money that hysteresis may give away."""
SLOWER = 2.0
"""Times the median of the best play that one which hysteresis keeps may take: in time is not soon."""
_WHY = {
    AT_RISK: "is not sure to be in time",
    TOO_DEAR: "costs too much",
    BACKUP: "is a backup",
    LESS_RIGHT: "is less accurate than asked for",
}

Rule: TypeAlias = Literal["alone", "probe", "kept", "best"]
_Ranked: TypeAlias = tuple[int, float, int, str, float, str, Candidate]
"""Group, utility (negative), and the place in the chain: sorts as it is ranked. The last but one is unique."""


def decide(question: Question, candidates: Sequence[Candidate], settings: RoutingSection) -> Decision:
    """Rank the candidates by the policy of `settings`. Who decides often keeps a `Policy`."""
    return Policy(settings).decide(question, candidates)


class Policy:
    """The policy of some settings, with what follows from them worked out once."""

    __slots__ = ("_max_cost", "_probe_every", "_rows", "_settings", "_told", "_weights")

    def __init__(self, settings: RoutingSection) -> None:
        self._settings = settings
        self._max_cost = settings.max_cloud_cost
        self._weights: dict[LatencyClass, UtilityWeights] = {
            LatencyClass.REALTIME: settings.weights.realtime,
            LatencyClass.NEAR: settings.weights.near,
            LatencyClass.INTERACTIVE: settings.weights.interactive,
            LatencyClass.BATCH: settings.weights.batch,
        }
        self._told = {latency_class: dict(weights) for latency_class, weights in self._weights.items()}
        self._rows = {latency_class: self._row(weights) for latency_class, weights in self._weights.items()}
        self._probe_every = 1.0 / settings.probe_share if settings.probe_share > 0 else inf

    def _row(self, weights: UtilityWeights) -> tuple[float, float, float, float, float]:
        """Accuracy, miss, USD, bytes and load: what one unit of each is worth."""
        price = weights.cost / self._max_cost if self._max_cost > 0 else 0.0
        return weights.accuracy, weights.lateness, price, weights.bytes / BYTES_UNIT, weights.load

    def decide(self, question: Question, candidates: Sequence[Candidate]) -> Decision:
        """Rank the candidates."""
        if self._settings.policy == "scorecard":
            return scorecard.decide(question, candidates, self._settings)
        possible, out = self._weighed(question, candidates)
        weights = self._told[question.latency_class]

        def judge() -> tuple[Judged, ...]:
            return self._judged(question, _refused(question, out), possible)

        if not possible:
            return Decision(
                "utility", (), lambda: (*_not_asked(question, out), "no target can be asked"), judge, weights
            )
        if question.accuracy is not AccuracyMode.ADAPTIVE:
            possible = self._by_accuracy(question, possible)
        possible.sort()
        first, other, rule = self._first(question, possible)
        return Decision(
            "utility",
            _chain(first, possible),
            lambda: (*_not_asked(question, out), self._why(first, other, rule)),
            judge,
            weights,
        )

    def _weighed(self, question: Question, candidates: Sequence[Candidate]) -> tuple[list[_Ranked], list[Candidate]]:
        """Group and utility of every candidate that no hard constraint rules out, and those that one does.

        `decision.objection` and `utility.utility`, written out: this is done for every candidate of every request.
        """
        left_s = question.time_left_s
        regions = question.allowed_regions
        accuracy, lateness, price, byte, load = self._rows[question.latency_class]
        max_cost, fee = self._max_cost, 0.0
        if question.priority >= HIGH_PRIORITY:
            price, max_cost = 0.0, inf
        elif max_cost <= 0:
            fee = FREE_LIMIT_SHARE * self._weights[question.latency_class].cost
        possible: list[_Ranked] = []
        out: list[Candidate] = []
        for candidate in candidates:
            estimate = candidate.estimate
            p50_s, in_flight = estimate.p50_s, candidate.in_flight
            if (
                p50_s > left_s
                or candidate.unavailable
                or in_flight >= candidate.limit
                or candidate.breaker
                or candidate.budget
                or candidate.model_bytes > candidate.max_bytes
                or not candidate.variant
                or (regions and candidate.tier.is_cloud and candidate.region not in regions)
            ):
                out.append(candidate)
                continue
            p95_s, right = estimate.p95_s, estimate.accuracy
            group = BACKUP if candidate.backup else 0
            miss = 1.0 - estimate.success
            if left_s * p50_s * p50_s < p95_s * p95_s * p95_s or left_s < SURE * p50_s:
                miss = 1.0 - estimate.success * (1.0 - late(p50_s, p95_s, left_s))
                if p95_s > left_s:
                    group += AT_RISK
            worth = accuracy * right - lateness * miss - byte * estimate.bytes
            if in_flight:
                worth -= load * in_flight / candidate.limit
            cost = estimate.cost_usd
            if cost:
                worth -= price * cost + fee
                if cost > max_cost:
                    group += TOO_DEAR
            possible.append((group, -worth, candidate.order, candidate.target, -right, candidate.variant, candidate))
        return possible, out

    def _by_accuracy(self, question: Question, possible: list[_Ranked]) -> list[_Ranked]:
        """With those that are less accurate than asked for in a group of their own."""
        if question.accuracy is AccuracyMode.ACCEPTABLE:
            least = question.accuracy_floor
        else:
            best_group = min(ranked[0] for ranked in possible)
            best = max(-ranked[4] for ranked in possible if ranked[0] == best_group)
            least = best - self._settings.high_tolerance
        return [
            (group + LESS_RIGHT * (-accuracy < least), worth, order, target, accuracy, variant, candidate)
            for group, worth, order, target, accuracy, variant, candidate in possible
        ]

    def _first(self, question: Question, possible: Sequence[_Ranked]) -> tuple[_Ranked, _Ranked, Rule]:
        """The play to ask first, the one it was preferred to, and by which rule (`possible` is sorted)."""
        best = possible[0]
        if len(possible) == 1:
            return best, best, "alone"
        probe = self._probe(question, possible)
        if probe is not None:
            return probe, best, "probe"
        kept = self._kept(question, possible)
        if kept is not None:
            return kept, best, "kept"
        return best, possible[1] if possible[-1][0] == best[0] else min(possible[1:], key=_by_worth), "best"

    def _why(self, first: _Ranked, other: _Ranked, rule: Rule) -> str:
        """For a person: the numbers that decided."""
        if rule == "alone":
            return f"{_told(first)}; nothing else can be asked"
        rival = f"{other[3]} with {other[5]} {_facts(other)}"
        if rule == "probe":
            age_s = first[6].estimate.age_s
            since = f"for {age_s:.0f} s" if age_s < inf else "yet"
            return f"{first[3]}: {first[5]} was not tried {since}: a probe, before {rival}"
        if rule == "kept":
            return f"{_told(first)}, as before; {rival} is not better by {self._settings.hysteresis:g}"
        behind = "" if other[1] >= first[1] else f" {_behind(other[0], first[0])}"
        return f"{_told(first)}; {rival}{behind}"

    def _kept(self, question: Question, possible: Sequence[_Ranked]) -> _Ranked | None:
        """What was chosen last, if the best is not better by enough, and only by what comes and goes: nobody pays, or
        takes worse answers, for the sake of not changing."""
        best, previous = possible[0], question.previous
        if previous is None or previous == (best[3], best[5]):
            return None
        for ranked in possible:
            if ranked[5] == previous.variant and ranked[3] == previous.target:
                near = ranked[0] == best[0] and ranked[1] - best[1] < self._settings.hysteresis
                soon = ranked[6].estimate.p50_s <= SLOWER * best[6].estimate.p50_s
                return ranked if near and soon and self._as_good(question, ranked[6], best[6]) else None
        return None

    def _as_good(self, question: Question, kept: Candidate, best: Candidate) -> bool:
        """In accuracy and money, which do not come and go."""
        ours, theirs = self._terms(question, kept), self._terms(question, best)
        return ours["accuracy"] + ours["cost"] >= theirs["accuracy"] + theirs["cost"] - STEADY

    def _probe(self, question: Question, possible: Sequence[_Ranked]) -> _Ranked | None:
        """The play of the best group that is to be tried because nothing is known of it any more: passed over often
        enough, worth more than the best if it were sure to answer in time, and with time left for the best one after
        it."""
        if question.latency_class is LatencyClass.REALTIME:
            return None
        best = possible[0]
        settings, every = self._settings, self._probe_every
        room_s = question.time_left_s - 2.0 * best[6].estimate.p95_s
        lateness = self._weights[question.latency_class].lateness
        due: _Ranked | None = None
        for ranked in possible:
            candidate = ranked[6]
            if candidate.passed_over < every or ranked[0] != best[0] or ranked is best:
                continue
            estimate = candidate.estimate
            if estimate.age_s < settings.probe_after_s or estimate.p95_s > room_s:
                continue
            if candidate.metered and not settings.probe_metered:
                continue
            missing = 1.0 - estimate.success * (1.0 - late(estimate.p50_s, estimate.p95_s, question.time_left_s))
            if -ranked[1] + lateness * missing <= -best[1]:
                continue
            if due is None or candidate.passed_over > due[6].passed_over:
                due = ranked
        return due

    def _judged(
        self,
        question: Question,
        refused: Sequence[tuple[Candidate, tuple[Constraint, str]]],
        possible: Sequence[_Ranked],
    ) -> tuple[Judged, ...]:
        judged = [judged_of(candidate, found) for candidate, found in refused]
        for _, negative, *_, candidate in possible:
            parts = self._terms(question, candidate)
            risky = candidate.estimate.p95_s > question.time_left_s
            judged.append(judged_of(candidate, None, risky=risky, utility=-negative, terms=parts))
        return tuple(judged)

    def _terms(self, question: Question, candidate: Candidate) -> dict[str, float]:
        estimate = candidate.estimate
        return terms(
            self._weights[question.latency_class],
            accuracy=estimate.accuracy,
            late=late(estimate.p50_s, estimate.p95_s, question.time_left_s),
            success=estimate.success,
            cost_usd=0.0 if question.priority >= HIGH_PRIORITY else estimate.cost_usd,
            max_cost_usd=self._max_cost,
            bytes=estimate.bytes,
            load=candidate.in_flight / candidate.limit,
        )


def _not_asked(question: Question, out: Sequence[Candidate]) -> list[str]:
    return not_asked(_refused(question, out)) if out else []


def _refused(question: Question, candidates: Sequence[Candidate]) -> list[tuple[Candidate, tuple[Constraint, str]]]:
    found = ((candidate, objection(question, candidate)) for candidate in candidates)
    return [(candidate, why) for candidate, why in found if why is not None]


def _chain(first: _Ranked, possible: Sequence[_Ranked]) -> tuple[Play, ...]:
    """`first`; then group by group the best play of each target that was not named yet, and what is left of them."""
    chain = [first[6].play]
    second: list[Play] = []
    seen, group = {first[3]}, first[0]
    for ranked in possible:
        if ranked[0] != group:
            chain += second
            second, group = [], ranked[0]
        target = ranked[3]
        if target not in seen:
            seen.add(target)
            chain.append(ranked[6].play)
        elif ranked is not first:
            second.append(ranked[6].play)
    return (*chain, *second)


def _behind(group: int, best: int) -> str:
    """Why a play of this group comes after one of a better group."""
    return next(text for reason, text in _WHY.items() if group & reason > best & reason)


def _by_worth(ranked: _Ranked) -> tuple[float, int, str, float, str]:
    return ranked[1:6]


def _told(ranked: _Ranked) -> str:
    return f"{ranked[3]}: {ranked[5]} is worth {_facts(ranked)}"


def _facts(ranked: _Ranked) -> str:
    """What a play is worth, and what a person needs to see why."""
    estimate = ranked[6].estimate
    return (
        f"{-ranked[1]:.3f} ({100 * estimate.accuracy:.1f} % right,"
        f" {estimate.p50_s * 1e3:.1f} to {estimate.p95_s * 1e3:.1f} ms, {estimate.cost_usd:g} USD)"
    )
