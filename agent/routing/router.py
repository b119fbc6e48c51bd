"""Who could answer, and who is asked: holds what is known of every target, decides, and has the ranking walked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

from agent.config import RoutingSection
from agent.core.clock import Clock
from agent.core.types import AccuracyMode, Attempt, Complexity, InferenceRequest, LatencyClass
from agent.registry.catalog import Family, Variant, complexity
from agent.routing.attempt import AccuracyOf, Asking, TargetState
from agent.routing.breaker import Breaker, BreakerState
from agent.routing.decision import Budgets, Candidate, Constraint, Decision, Limit, Play, Question
from agent.routing.estimate import FRESH_S, Estimate, Habit, TrackRecord
from agent.routing.policy import Policy
from agent.routing.retry_budget import RetryBudget
from agent.routing.walk import MARGIN_S, NoAnswer, Routed, Variants, Walk, breaker_reason
from agent.targets.base import Availability, Target, TargetTraits

__all__ = ["Among", "NoAnswer", "Routed", "Router", "Variants", "of_the_catalogue"]

Among: TypeAlias = Callable[[TargetTraits, Variant], bool]
"""Says of a play whether it may be asked at all."""
LimitFor: TypeAlias = Callable[[TargetTraits], Limit]
FloorOf: TypeAlias = Callable[[Family], float]
Watcher: TypeAlias = Callable[[InferenceRequest, Decision, Sequence[Attempt]], None]
"""Told of every decision of `run`, before its first attempt; the attempts are filled in as they end."""


def of_the_catalogue(variant: Variant) -> float:
    """The share of held-out samples that the variant got right."""
    return variant.accuracy.value


class Router:
    """Holds the breaker, the estimates, the limit and the in-flight count of every target.

    `accuracy_of` says what share of a variant's answers is right, `floor_of` which share `accuracy: acceptable` asks of
    a family's; `limit_for` makes the limit of a target's attempts in flight (default: its `max_concurrent`).
    """

    def __init__(
        self,
        targets: Sequence[Target],
        settings: RoutingSection,
        clock: Clock,
        *,
        budgets: Budgets | None = None,
        accuracy_of: AccuracyOf = of_the_catalogue,
        floor_of: FloorOf | None = None,
        limit_for: LimitFor | None = None,
        watcher: Watcher | None = None,
    ) -> None:
        self._settings = settings
        self._policy = Policy(settings)
        self._clock = clock
        self._budgets = budgets
        self._watcher = watcher
        self.retries = RetryBudget(settings.overload.retries)
        self._floor_of = floor_of
        self._decisions = 0
        self._states = {
            target.traits.name: TargetState.of(
                target,
                Breaker(settings.breaker),
                None if limit_for is None else limit_for(target.traits),
                accuracy_of,
            )
            for target in sorted(targets, key=lambda target: target.traits.order)
        }
        if len(self._states) != len(targets):
            raise ValueError("two targets have the same name")
        sizes, parameters = settings.model_size_thresholds, settings.parameter_thresholds
        self._simple = (sizes.edge_mcu * 1e6, parameters.simple)
        self._medium = (sizes.edge_gpu * 1e6, parameters.medium)
        self._complexities: dict[str, Complexity] = {}

    def complexity_of(self, family: Family) -> Complexity:
        """Of the family's smallest variant: the least a target must be able to run to answer at all."""
        grade = self._complexities.get(family.name)
        if grade is None:
            grade = complexity(family.smallest, simple=self._simple, medium=self._medium)
            self._complexities[family.name] = grade
        return grade

    def lanes(self, latency_class: LatencyClass) -> list[tuple[TargetTraits, int, int]]:
        """Cloud targets that can be asked now: what they are, attempts in flight, and how many leave room for one of
        that class."""
        now = self._clock.monotonic()
        return [
            (state.traits, state.in_flight, state.limit.limit(now, latency_class))
            for state in self._states.values()
            if state.traits.tier.is_cloud and state.target.availability().available
        ]

    def available(self) -> bool:
        """Whether any target can be asked now."""
        return any(state.target.availability().available for state in self._states.values())

    def on_free(self, told: Callable[[], None]) -> None:
        """Be told whenever an attempt has ended, so that some target may have room."""
        for state in self._states.values():
            state.on_free = told

    def full(self, request: InferenceRequest, family: Family) -> bool:
        """Whether nothing but full targets stands in the way of an answer now."""
        decision, _ = self.decide(request, family, self._clock.monotonic())
        return not decision.ranked and Constraint.BUSY in decision.excluded.values()

    def quickest_s(self, request: InferenceRequest, family: Family) -> float:
        """The least that an answer usually takes, of whatever target can be asked at all; 0 if none can."""
        now = self._clock.monotonic()
        return min(
            (
                state.estimate(variant, now).idle_s
                for state in self._states.values()
                if state.target.availability().available
                for variant in state.target.variants_for(family, request.variant)
            ),
            default=0.0,
        )

    def decide(
        self,
        request: InferenceRequest,
        family: Family,
        now: float,
        *,
        among: Among | None = None,
        deadline: float | None = None,
    ) -> tuple[Decision, Variants]:
        """Rank the plays for a request; also the variant of each."""
        grade = (
            complexity(family.variants[request.variant], simple=self._simple, medium=self._medium)
            if request.variant
            else self.complexity_of(family)
        )
        end = request.deadline if deadline is None else min(deadline, request.deadline)
        asking = Asking(request, family, end, self._clock, self._budgets)
        variants: dict[Play, Variant] = {}
        candidates: list[Candidate] = []
        latest, previous, kind = 0, None, _habit(request, among)
        cascade = (
            request.accuracy is AccuracyMode.ADAPTIVE
            and request.variant is None
            and self._settings.policy == "utility"
            and self._can_ask_again(request, family, end - MARGIN_S, now)
        )
        for state in self._states.values():
            avoided = state.traits.tier in request.avoid
            able = () if avoided else state.target.variants_for(family, request.variant)
            if among is not None:
                able = [variant for variant in able if among(state.traits, variant)]
                if not able:
                    continue
            facts = _facts(state, request.latency_class, now)
            for variant in able:
                play, record = state.play(variant), state.record(variant)
                variants[play] = variant
                candidates.append(_candidate(state, variant, play, record, facts, asking, now, cascade=cascade))
                chosen = record.chosen.get(kind, 0)
                if chosen > latest:
                    latest, previous = chosen, play
            if not able:
                candidates.append(_without_variant(state, facts))
        question = Question(
            request.latency_class,
            grade,
            request.priority,
            end - MARGIN_S - now,
            request.allowed_regions,
            request.accuracy,
            self._floor(request, family),
            previous,
        )
        return self._policy.decide(question, candidates), variants

    def _can_ask_again(self, request: InferenceRequest, family: Family, end: float, now: float) -> bool:
        """Whether the family's most accurate variant could answer in time: only then does a cascade gain anything."""
        regions = request.allowed_regions
        for state in self._states.values():
            traits = state.traits
            if traits.tier in request.avoid or (regions and traits.tier.is_cloud and traits.region not in regions):
                continue
            if not state.target.availability().available or not state.breaker.allows(now):
                continue
            for variant in state.target.variants_for(family, None):
                if variant.asked_last and now + state.estimate(variant, now).p50_s <= end:
                    return True
        return False

    def _floor(self, request: InferenceRequest, family: Family) -> float:
        if request.accuracy is not AccuracyMode.ACCEPTABLE or self._floor_of is None:
            return 0.0
        return self._floor_of(family)

    async def run(
        self,
        request: InferenceRequest,
        family: Family,
        *,
        among: Among | None = None,
        deadline: float | None = None,
        further: bool = False,
    ) -> Routed:
        """Ask until one answers, by `deadline` if that is sooner than the request's; only plays that `among` lets pass.
        `further`: a further look at a request that was counted.

        Raises `NoAnswer`.
        """
        end = request.deadline if deadline is None else min(deadline, request.deadline)
        decision, variants = self.decide(request, family, self._clock.monotonic(), among=among, deadline=end)
        self._remember(request, decision, variants, _habit(request, among))
        asking = Asking(request, family, end, self._clock, self._budgets)
        if not further:
            self.retries.requested(self._clock.monotonic())
        walk = Walk(asking, decision, variants, self._states, self._settings, self.retries)
        if self._watcher is not None:
            self._watcher(request, decision, walk.attempts)
        return await walk.run()

    def _remember(self, request: InferenceRequest, decision: Decision, variants: Variants, habit: Habit) -> None:
        """What was chosen, for hysteresis; what was passed over, for probes."""
        self._decisions += 1
        for position, play in enumerate(decision.ranked):
            record = self._states[play.target].record(variants[play])
            if position == 0:
                record.passed_over = 0
                record.chosen[habit] = self._decisions
            elif request.latency_class is not LatencyClass.REALTIME:
                record.passed_over += 1

    def standings(self) -> dict[str, tuple[bool, str]]:
        """Of every target whether it is asked now, and if not, why."""
        now = self._clock.monotonic()
        return {name: _asked(state, now) for name, state in self._states.items()}

    def status(self) -> list[dict[str, Any]]:
        """Every target for `/status`, in the order of the chain."""
        now = self._clock.monotonic()
        return [target_status(state, now) for state in self._states.values()]


def _habit(request: InferenceRequest, among: Among | None) -> Habit:
    """What a choice counts as a precedent for. A pinned variant and the second step of a cascade leave less to choose
    from: what they take says nothing about what a free choice should stay with."""
    return request.latency_class, request.accuracy, request.variant is not None, among is not None


def target_status(state: TargetState, now: float) -> dict[str, Any]:
    """One target for `/status`."""
    traits, breaker = state.traits, state.breaker
    available, reason = _asked(state, now)
    service, ages_s = {}, {}
    for name, record in state.records.items():
        estimate = record.estimate(now, 0, traits.parallel)
        if estimate.measured:
            service[name] = {"p50": round(estimate.p50_s * 1e3, 3), "p95": round(estimate.p95_s * 1e3, 3)}
            ages_s[name] = estimate.age_s
    slowest = max(service, key=lambda name: service[name]["p95"], default=None)
    return {
        "name": traits.name,
        "tier": traits.tier.value,
        "order": traits.order,
        "available": available,
        "reason": reason,
        "in_flight": state.in_flight,
        "max_concurrent": traits.max_concurrent,
        "limit": state.limit.limit(now, LatencyClass.REALTIME),
        "breaker": {
            "state": breaker.state.value,
            "failures": breaker.consecutive_failures,
            "retry_in_s": round(max(0.0, breaker.retry_at - now), 3) if breaker.state is BreakerState.OPEN else 0.0,
        },
        "cost_usd": traits.cost_usd,
        "region": traits.region,
        "service_ms": None if slowest is None else service[slowest],
        "service_aged": slowest is not None and ages_s[slowest] > FRESH_S,
        "service_ms_by_variant": service,
        "requests": state.requests,
        "failures": state.failures,
        "detail": dict(state.target.status()),
    }


def _looked(state: TargetState, now: float) -> Availability:
    """Whether it can be asked; and if it was away until now, it begins anew."""
    availability = state.target.availability()
    if availability.available and not state.was_available:
        state.breaker.came_back(now)
        for record in state.records.values():
            record.came_back()
    state.was_available = availability.available
    return availability


def _asked(state: TargetState, now: float) -> tuple[bool, str]:
    availability = _looked(state, now)
    passes = state.breaker.allows(now)
    reason = availability.reason or ("" if passes else breaker_reason(state.breaker, now))
    return availability.available and passes, reason


class _Facts(NamedTuple):
    """What is so of a target now, whichever variant it is to run: why it cannot be asked, and its limit."""

    unavailable: str
    broken: str
    limit: int


def _facts(state: TargetState, latency_class: LatencyClass, now: float) -> _Facts:
    availability, breaker = _looked(state, now), state.breaker
    return _Facts(
        "" if availability.available else availability.reason or "unavailable",
        "" if breaker.allows(now) else breaker_reason(breaker, now),
        state.limit.limit(now, latency_class),
    )


def _candidate(
    state: TargetState,
    variant: Variant,
    play: Play,
    record: TrackRecord,
    facts: _Facts,
    asking: Asking,
    now: float,
    *,
    cascade: bool,
) -> Candidate:
    traits, in_flight = state.traits, state.in_flight
    accuracy = min(1.0, state.accuracy_of(variant) + (variant.cascade_gain if cascade else 0.0))
    estimate = record.estimate(now, in_flight, traits.parallel, traits.cost_usd, accuracy)
    unavailable, broken, limit = facts
    return Candidate(
        traits.name,
        traits.tier,
        traits.order,
        variant.id,
        in_flight,
        limit,
        estimate,
        variant.bytes,
        traits.max_bytes,
        traits.region,
        traits.backup,
        traits.metered,
        unavailable,
        broken,
        asking.over_budget(state, estimate, now) if asking.budgets is not None else "",
        record.passed_over,
        play,
    )


def _without_variant(state: TargetState, facts: _Facts) -> Candidate:
    """A target that has no variant of the model: it is told of, not asked."""
    traits = state.traits
    return Candidate(
        traits.name,
        traits.tier,
        traits.order,
        "",
        state.in_flight,
        facts.limit,
        Estimate(traits.prior_s, traits.prior_s, measured=False, cost_usd=traits.cost_usd),
        max_bytes=traits.max_bytes,
        region=traits.region,
        backup=traits.backup,
        metered=traits.metered,
        unavailable=facts.unavailable,
        breaker=facts.broken,
    )
