"""Tries the ranked plays one after the other until one answers or the deadline leaves no room for another."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from agent.config import RoutingSection
from agent.core.clock import Clock
from agent.core.errors import TargetBusy
from agent.core.types import AccuracyMode, Attempt, Complexity, InferenceRequest, TargetAnswer
from agent.registry.catalog import Family, Variant, complexity
from agent.routing.attempt import GRACE_S, Asking, TargetState
from agent.routing.breaker import Breaker, BreakerState
from agent.routing.decision import Budgets, Candidate, Constraint, Decision, Limit, Play, Question
from agent.routing.estimate import Estimate
from agent.routing.policy import decide
from agent.targets.base import Target, TargetTraits

MARGIN_S = 0.0005
"""Kept back from every deadline to build and send the answer, or to find a stale one."""
RESERVE_FACTOR = 2.0
RESERVE_SHARE = 0.1
"""An attempt leaves the next target this multiple of its 95th percentile, and at least this share of what is left."""

Among: TypeAlias = Callable[[TargetTraits, Variant], bool]
"""Says of a play whether it may be asked at all."""
Order: TypeAlias = Callable[[TargetTraits, Variant], float]
"""Puts plays before others, whatever their rank: lower first. Among equals the ranking stands."""
Variants: TypeAlias = Mapping[Play, Variant]
AccuracyOf: TypeAlias = Callable[[Variant], float]
LimitFor: TypeAlias = Callable[[TargetTraits], Limit]


@dataclass(slots=True)
class Routed:
    """A fresh answer, by whom, and how it came about."""

    answer: TargetAnswer
    traits: TargetTraits
    variant: Variant
    attempts: tuple[Attempt, ...]
    reasons: tuple[str, ...]
    cost_usd: float
    decision: Decision


class NoAnswer(Exception):
    """No target answered. `late`: because the deadline left no room, not because all failed."""

    def __init__(
        self,
        attempts: Sequence[Attempt],
        reasons: Sequence[str],
        *,
        late: bool,
        busy: bool,
        cost_usd: float,
        decision: Decision,
    ) -> None:
        super().__init__("no target answered")
        self.attempts = tuple(attempts)
        self.reasons = tuple(reasons)
        self.late = late
        self.busy = busy
        self.cost_usd = cost_usd
        self.decision = decision


def of_the_catalogue(variant: Variant) -> float:
    """The share of held-out samples that the variant got right."""
    return variant.accuracy.value


class Router:
    """Holds the breaker, the estimates, the limit and the in-flight count of every target.

    `accuracy_of` says what share of a variant's answers is right; `limit_for` makes the limit of a target's attempts in
    flight (default: its `max_concurrent`).
    """

    def __init__(
        self,
        targets: Sequence[Target],
        settings: RoutingSection,
        clock: Clock,
        *,
        budgets: Budgets | None = None,
        accuracy_of: AccuracyOf = of_the_catalogue,
        limit_for: LimitFor | None = None,
    ) -> None:
        self._settings = settings
        self._clock = clock
        self._budgets = budgets
        self._accuracy_of = accuracy_of
        self._states = {
            target.traits.name: TargetState.of(
                target, Breaker(settings.breaker), None if limit_for is None else limit_for(target.traits)
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

    def lanes(self) -> list[tuple[TargetTraits, int, int]]:
        """Cloud targets that can be asked now: what they are, attempts in flight, and how many they may have."""
        now = self._clock.monotonic()
        return [
            (state.traits, state.in_flight, state.limit.limit(now))
            for state in self._states.values()
            if state.traits.tier.is_cloud and state.target.availability().available
        ]

    def available(self) -> bool:
        """Whether any target can be asked now."""
        return any(state.target.availability().available for state in self._states.values())

    def decide(
        self,
        request: InferenceRequest,
        family: Family,
        now: float,
        *,
        among: Among | None = None,
        order: Order | None = None,
        deadline: float | None = None,
    ) -> tuple[Decision, Variants]:
        """Rank the plays for a request; also the variant of each. With `order`, plays that are sure to be in time come
        in that order first."""
        grade = (
            complexity(family.variants[request.variant], simple=self._simple, medium=self._medium)
            if request.variant
            else self.complexity_of(family)
        )
        end = request.deadline if deadline is None else min(deadline, request.deadline)
        question = Question(
            latency_class=request.latency_class,
            complexity=grade,
            priority=request.priority,
            time_left_s=end - MARGIN_S - now,
            allowed_regions=request.allowed_regions,
            accuracy=request.accuracy,
        )
        variants: dict[Play, Variant] = {}
        candidates = []
        for name, state in self._states.items():
            able = state.target.variants_for(family, request.variant)
            for variant in able:
                if among is None or among(state.traits, variant):
                    variants[Play(name, variant.id)] = variant
                    candidates.append(self._candidate(state, variant, request, now))
            if not able and among is None:
                candidates.append(self._candidate(state, None, request, now))
        decision = decide(question, candidates, self._settings)
        if order is not None and len(decision.ranked) > 1:
            risky = {Play(judged.target, judged.variant) for judged in decision.judged if judged.at_risk}
            first = decision.ranked[0]
            decision.ranked = tuple(
                sorted(
                    decision.ranked,
                    key=lambda play: (play in risky, order(self._states[play.target].traits, variants[play])),
                )
            )
            if decision.ranked[0] != first:
                decision.reasons += (f"{decision.ranked[0].target}: before {first.target}: more accurate",)
        return decision, variants

    async def run(
        self,
        request: InferenceRequest,
        family: Family,
        *,
        among: Among | None = None,
        order: Order | None = None,
        deadline: float | None = None,
    ) -> Routed:
        """Ask until one answers, by `deadline` if that is sooner than the request's; only plays that `among` lets pass.

        Raises `NoAnswer`.
        """
        end = request.deadline if deadline is None else min(deadline, request.deadline)
        decision, variants = self.decide(
            request, family, self._clock.monotonic(), among=among, order=order, deadline=end
        )
        asking = Asking(request, family, end, self._clock, self._budgets)
        attempts: list[Attempt] = []
        reasons = list(decision.reasons)
        cost_usd = 0.0
        late = False
        for position, play in enumerate(decision.ranked):
            tries_left = request.max_retries - len(attempts) + 1
            if not tries_left:
                break
            state, variant = self._states[play.target], variants[play]
            now = self._clock.monotonic()
            following = decision.ranked[position + 1 :] if tries_left > 1 else ()
            until = self._attempt_deadline(asking, following, variants, state, variant, now)
            if position > 0:
                objection = self._objection(state, variant, request, until, now)
                if objection:
                    constraint, text = objection
                    reasons.append(f"{play.target}: skipped: {text}")
                    late = late or constraint is Constraint.DEADLINE
                    continue
                reasons.append(f"{play.target}: next in the chain")
            answer, attempt = await asking.attempt(state, variant, until)
            attempts.append(attempt)
            if attempt.outcome != TargetBusy.code:
                cost_usd += state.traits.cost_usd
            if answer is not None:
                return Routed(answer, state.traits, variant, tuple(attempts), tuple(reasons), cost_usd, decision)
            reasons.append(f"{play.target}: {attempt.outcome} after {attempt.elapsed_s * 1e3:.1f} ms: {attempt.error}")
        excluded = set(decision.excluded.values())
        late = late or Constraint.DEADLINE in excluded or self._clock.monotonic() >= end - MARGIN_S
        busy = bool(attempts or Constraint.BUSY in excluded) and all(
            attempt.outcome == TargetBusy.code for attempt in attempts
        )
        raise NoAnswer(attempts, reasons, late=late, busy=busy, cost_usd=cost_usd, decision=decision)

    def _candidate(
        self, state: TargetState, variant: Variant | None, request: InferenceRequest, now: float
    ) -> Candidate:
        availability = state.target.availability()
        if availability.available and not state.was_available:
            state.breaker.came_back(now)
        state.was_available = availability.available
        traits = state.traits
        if variant is None:
            estimate = Estimate(traits.prior_s, traits.prior_s, measured=False, cost_usd=traits.cost_usd)
        else:
            estimate = state.estimate(variant, now)
            estimate.cost_usd = traits.cost_usd
            estimate.accuracy = self._accuracy_of(variant)
            if request.accuracy is AccuracyMode.ADAPTIVE and request.variant is None:
                estimate.accuracy = min(1.0, estimate.accuracy + variant.cascade_gain)
        return Candidate(
            target=traits.name,
            tier=traits.tier,
            order=traits.order,
            variant="" if variant is None else variant.id,
            in_flight=state.in_flight,
            limit=state.limit.limit(now),
            estimate=estimate,
            model_bytes=variant.bytes if variant is not None else 0,
            max_bytes=traits.max_bytes,
            region=traits.region,
            backup=traits.backup,
            metered=traits.metered,
            unavailable="" if availability.available else availability.reason or "unavailable",
            breaker="" if state.breaker.allows(now) else _breaker_reason(state.breaker, now),
            budget=self._over_budget(state, estimate, request, now),
        )

    def _over_budget(self, state: TargetState, estimate: Estimate, request: InferenceRequest, now: float) -> str:
        if self._budgets is None or not state.traits.tier.is_cloud:
            return ""
        return self._budgets.objection(state.traits.name, state.traits.cost_usd, estimate.bytes, request.priority, now)

    def _objection(
        self, state: TargetState, variant: Variant, request: InferenceRequest, until: float, now: float
    ) -> tuple[Constraint, str] | None:
        """What has changed since the ranking: time has passed, others may have taken the place."""
        availability = state.target.availability()
        if not availability.available:
            return Constraint.UNAVAILABLE, availability.reason or "unavailable"
        if not state.breaker.allows(now):
            return Constraint.BREAKER, _breaker_reason(state.breaker, now)
        if state.in_flight >= state.limit.limit(now):
            return Constraint.BUSY, "busy"
        estimate = state.estimate(variant, now)
        over = self._over_budget(state, estimate, request, now)
        if over:
            return Constraint.BUDGET, over
        if now + estimate.p50_s > until:
            left = max(0.0, until - now)
            return (
                Constraint.DEADLINE,
                f"would take {estimate.p50_s * 1e3:.1f} ms, {left * 1e3:.1f} ms are left for it",
            )
        return None

    def _attempt_deadline(
        self,
        asking: Asking,
        following: Sequence[Play],
        variants: Variants,
        state: TargetState,
        variant: Variant,
        now: float,
    ) -> float:
        """When an attempt must end: early enough for the quickest of the following targets to be tried as well, unless
        that would leave this one less than it usually takes."""
        end = asking.deadline - MARGIN_S
        until = end
        others = [
            other.estimate(variants[play], now).p95_s
            for play in following
            if (other := self._states[play.target]).breaker.allows(now) and other.target.availability().available
        ]
        if others:
            own = state.estimate(variant, now).p95_s
            share = RESERVE_SHARE * (end - now)
            reserve = max(RESERVE_FACTOR * min(others), share) + min(GRACE_S, share)
            until = min(end, max(end - reserve, now + own))
        until = min(until, now + state.traits.timeout_s)
        if asking.request.timeout_ms is not None:
            until = min(until, now + asking.request.timeout_ms / 1e3)
        return until

    def status(self) -> list[dict[str, Any]]:
        """Every target for `/status`, in the order of the chain."""
        now = self._clock.monotonic()
        return [target_status(state, now) for state in self._states.values()]


def target_status(state: TargetState, now: float) -> dict[str, Any]:
    """One target for `/status`."""
    availability, traits, breaker = state.target.availability(), state.traits, state.breaker
    service = {}
    for name, times in state.times.items():
        estimate = times.estimate(now, 0, traits.parallel)
        if estimate.measured:
            service[name] = {"p50": round(estimate.p50_s * 1e3, 3), "p95": round(estimate.p95_s * 1e3, 3)}
    return {
        "name": traits.name,
        "tier": traits.tier.value,
        "order": traits.order,
        "available": availability.available and breaker.allows(now),
        "reason": availability.reason or ("" if breaker.allows(now) else _breaker_reason(breaker, now)),
        "in_flight": state.in_flight,
        "max_concurrent": traits.max_concurrent,
        "breaker": {
            "state": breaker.state.value,
            "failures": breaker.consecutive_failures,
            "retry_in_s": round(max(0.0, breaker.retry_at - now), 3) if breaker.state is BreakerState.OPEN else 0.0,
        },
        "cost_usd": traits.cost_usd,
        "region": traits.region,
        "service_ms": max(service.values(), key=lambda times: times["p95"], default=None),
        "service_ms_by_variant": service,
        "requests": state.requests,
        "failures": state.failures,
        "detail": dict(state.target.status()),
    }


def _breaker_reason(breaker: Breaker, now: float) -> str:
    if now >= breaker.retry_at:
        return "breaker is half open: a probe is under way"
    return (
        f"breaker is open after {breaker.consecutive_failures} failures, next probe in {breaker.retry_at - now:.1f} s"
    )
