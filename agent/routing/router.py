"""Tries the ranked targets one after the other until one answers or the deadline leaves no room for another."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from agent.config import RoutingSection
from agent.core.clock import Clock
from agent.core.errors import TargetBusy, TargetError, TargetFailed, TargetTimeout
from agent.core.types import Attempt, Complexity, InferenceRequest, TargetAnswer
from agent.core.within import within
from agent.registry.catalog import Family, Variant, complexity
from agent.routing.breaker import Breaker, BreakerState
from agent.routing.estimate import Estimate, TargetTimes
from agent.routing.policy import Candidate, Constraint, Decision, Question, decide
from agent.targets.base import Target, TargetTraits

log = logging.getLogger(__name__)

MARGIN_S = 0.0005
"""Kept back from every deadline to build and send the answer, or to find a stale one."""
RESERVE_FACTOR = 2.0
RESERVE_SHARE = 0.1
"""An attempt leaves the next target this multiple of its 95th percentile, and at least this share of what is left."""
GRACE_S = 0.005
"""A target that overruns its attempt's deadline by this much is cut off, and at the request's deadline in any case."""


@dataclass(slots=True)
class TargetState:
    """What routing remembers of one target."""

    target: Target
    traits: TargetTraits
    breaker: Breaker
    in_flight: int = 0
    requests: int = 0
    failures: int = 0
    was_available: bool = False
    times: dict[str, TargetTimes] = field(default_factory=dict)

    def times_of(self, variant: Variant) -> TargetTimes:
        times = self.times.get(variant.name)
        if times is None:
            times = self.times[variant.name] = TargetTimes(self.traits.prior_s)
        return times


@dataclass(slots=True)
class Routed:
    """A fresh answer, by whom, and how it came about."""

    answer: TargetAnswer
    traits: TargetTraits
    variant: Variant
    attempts: tuple[Attempt, ...]
    reasons: tuple[str, ...]
    cost_usd: float


class NoAnswer(Exception):
    """No target answered. `late`: because the deadline left no room, not because all failed."""

    def __init__(
        self, attempts: Sequence[Attempt], reasons: Sequence[str], *, late: bool, busy: bool, cost_usd: float
    ) -> None:
        super().__init__("no target answered")
        self.attempts = tuple(attempts)
        self.reasons = tuple(reasons)
        self.late = late
        self.busy = busy
        self.cost_usd = cost_usd


class Router:
    """Holds the breaker, the estimates and the in-flight count of every target."""

    def __init__(self, targets: Sequence[Target], settings: RoutingSection, clock: Clock) -> None:
        self._settings = settings
        self._clock = clock
        self._states = {
            target.traits.name: TargetState(target, target.traits, Breaker(settings.breaker))
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

    def available(self) -> bool:
        """Whether any target can be asked now."""
        return any(state.target.availability().available for state in self._states.values())

    def decide(self, request: InferenceRequest, family: Family, now: float) -> tuple[Decision, dict[str, Variant]]:
        """Rank the targets for a request; also the variant that each of them would run."""
        grade = (
            complexity(family.variants[request.variant], simple=self._simple, medium=self._medium)
            if request.variant
            else self.complexity_of(family)
        )
        question = Question(
            latency_class=request.latency_class,
            complexity=grade,
            priority=request.priority,
            time_left_s=request.deadline - MARGIN_S - now,
            allowed_regions=request.allowed_regions,
        )
        variants: dict[str, Variant] = {}
        candidates = []
        for name, state in self._states.items():
            avoided = state.traits.tier in request.avoid
            variant = None if avoided else state.target.variant_for(family, request.variant)
            if variant is not None:
                variants[name] = variant
            candidates.append(self._candidate(state, variant, now))
        return decide(question, candidates, self._settings), variants

    async def run(self, request: InferenceRequest, family: Family) -> Routed:
        """Ask until one answers. Raises `NoAnswer`."""
        now = self._clock.monotonic()
        decision, variants = self.decide(request, family, now)
        attempts: list[Attempt] = []
        reasons = list(decision.reasons)
        cost_usd = 0.0
        late = False
        for position, name in enumerate(decision.ranked):
            tries_left = request.max_retries - len(attempts) + 1
            if not tries_left:
                break
            state, variant = self._states[name], variants[name]
            now = self._clock.monotonic()
            following = decision.ranked[position + 1 :] if tries_left > 1 else ()
            until = self._attempt_deadline(request, following, variants, state, variant, now)
            if position > 0:
                objection = self._objection(state, variant, until, now)
                if objection:
                    constraint, text = objection
                    reasons.append(f"{name}: skipped: {text}")
                    late = late or constraint is Constraint.DEADLINE
                    continue
                reasons.append(f"{name}: next in the chain")
            answer, attempt = await self._attempt(request, family, state, variant, until)
            attempts.append(attempt)
            if attempt.outcome != TargetBusy.code:
                cost_usd += state.traits.cost_usd
            if answer is not None:
                return Routed(answer, state.traits, variant, tuple(attempts), tuple(reasons), cost_usd)
            reasons.append(f"{name}: {attempt.outcome} after {attempt.elapsed_s * 1e3:.1f} ms: {attempt.error}")
        excluded = set(decision.excluded.values())
        late = late or Constraint.DEADLINE in excluded or self._clock.monotonic() >= request.deadline - MARGIN_S
        busy = bool(attempts or Constraint.BUSY in excluded) and all(
            attempt.outcome == TargetBusy.code for attempt in attempts
        )
        raise NoAnswer(attempts, reasons, late=late, busy=busy, cost_usd=cost_usd)

    async def _attempt(
        self, request: InferenceRequest, family: Family, state: TargetState, variant: Variant, until: float
    ) -> tuple[TargetAnswer | None, Attempt]:
        """One try. Feeds the breaker and the estimates; raises nothing but `CancelledError` of its own task."""
        started = self._clock.monotonic()
        cut_off = max(until, min(until + GRACE_S, request.deadline))
        state.in_flight += 1
        state.requests += 1
        probe = state.breaker.began(started)
        error: TargetError
        try:
            # A span, not a moment: an event loop's clock may be coarser than ours.
            answer = await within(cut_off - started, state.target.infer(request, family, variant, until))
        except TimeoutError:
            error = TargetTimeout("did not keep its deadline")
        except TargetError as raised:
            error = raised
        except asyncio.CancelledError:
            if _cancelled_from_outside():
                state.breaker.released(probe=probe)
                raise
            error = TargetFailed("the target cancelled what it was asked")
        except Exception as defect:  # a target's fault must not lose the request: it is named, and the next is asked
            log.exception("target raised what is no TargetError", extra={"target": state.traits.name})
            error = TargetFailed(f"{type(defect).__name__}: {defect}")
        else:
            now = self._clock.monotonic()
            state.breaker.succeeded()
            state.times_of(variant).observe(now, service_s=answer.compute_s, link_s=answer.link_s)
            return answer, _attempt_record(state, variant, "ok", now - started)
        finally:
            state.in_flight -= 1
        now = self._clock.monotonic()
        self._count_failure(
            state, state.times_of(variant), error, probe, now, waited_s=now - started, given_s=until - started
        )
        return None, _attempt_record(state, variant, error.code, now - started, str(error))

    @staticmethod
    def _count_failure(
        state: TargetState,
        times: TargetTimes,
        error: TargetError,
        probe: bool,
        now: float,
        *,
        waited_s: float,
        given_s: float,
    ) -> None:
        """Tell the breaker and the estimates of an attempt that was given `given_s` and failed after `waited_s`."""
        state.failures += 1
        hurried = False
        if isinstance(error, TargetTimeout):
            # A wait shorter than the target usually takes says more about the deadline than about the target.
            hurried = given_s < times.estimate(now, 0, 1).p50_s / 2
            times.observe_timeout(now, waited_s)
        if error.counts and not hurried:
            state.breaker.failed(now, probe=probe, permanent=error.permanent)
        else:
            state.breaker.released(probe=probe)

    def _candidate(self, state: TargetState, variant: Variant | None, now: float) -> Candidate:
        availability = state.target.availability()
        if availability.available and not state.was_available:
            state.breaker.came_back(now)
        state.was_available = availability.available
        traits = state.traits
        estimate = (
            state.times_of(variant).estimate(now, state.in_flight, traits.parallel)
            if variant is not None
            else Estimate(traits.prior_s, traits.prior_s, measured=False)
        )
        return Candidate(
            name=traits.name,
            tier=traits.tier,
            order=traits.order,
            in_flight=state.in_flight,
            max_concurrent=traits.max_concurrent,
            estimate=estimate,
            accuracy=variant.accuracy.value if variant is not None else None,
            model_bytes=variant.bytes if variant is not None else 0,
            max_bytes=traits.max_bytes,
            cost_usd=traits.cost_usd,
            region=traits.region,
            backup=traits.backup,
            unavailable="" if availability.available else availability.reason or "unavailable",
            breaker="" if state.breaker.allows(now) else _breaker_reason(state.breaker, now),
        )

    def _objection(
        self, state: TargetState, variant: Variant, until: float, now: float
    ) -> tuple[Constraint, str] | None:
        """What has changed since the ranking: time has passed, others may have taken the place."""
        availability = state.target.availability()
        if not availability.available:
            return Constraint.UNAVAILABLE, availability.reason or "unavailable"
        if not state.breaker.allows(now):
            return Constraint.BREAKER, _breaker_reason(state.breaker, now)
        if state.in_flight >= state.traits.max_concurrent:
            return Constraint.BUSY, "busy"
        needed = state.times_of(variant).estimate(now, state.in_flight, state.traits.parallel).p50_s
        if now + needed > until:
            left = max(0.0, until - now)
            return Constraint.DEADLINE, f"would take {needed * 1e3:.1f} ms, {left * 1e3:.1f} ms are left for it"
        return None

    def _attempt_deadline(
        self,
        request: InferenceRequest,
        following: Sequence[str],
        variants: Mapping[str, Variant],
        state: TargetState,
        variant: Variant,
        now: float,
    ) -> float:
        """When an attempt must end: early enough for the quickest of the following targets to be tried as well, unless
        that would leave this one less than it usually takes."""
        end = request.deadline - MARGIN_S
        until = end
        others = [
            other.times_of(variants[name]).estimate(now, other.in_flight, other.traits.parallel).p95_s
            for name in following
            if (other := self._states[name]).breaker.allows(now) and other.target.availability().available
        ]
        if others:
            own = state.times_of(variant).estimate(now, state.in_flight, state.traits.parallel).p95_s
            share = RESERVE_SHARE * (end - now)
            reserve = max(RESERVE_FACTOR * min(others), share) + min(GRACE_S, share)
            until = min(end, max(end - reserve, now + own))
        until = min(until, now + state.traits.timeout_s)
        if request.timeout_ms is not None:
            until = min(until, now + request.timeout_ms / 1e3)
        return until

    def status(self) -> list[dict[str, Any]]:
        """Every target for `/status`, in the order of the chain."""
        now = self._clock.monotonic()
        return [self._target_status(state, now) for state in self._states.values()]

    def _target_status(self, state: TargetState, now: float) -> dict[str, Any]:
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


def _cancelled_from_outside() -> bool:
    task = asyncio.current_task()
    return task is None or task.cancelling() > 0


def _breaker_reason(breaker: Breaker, now: float) -> str:
    if now >= breaker.retry_at:
        return "breaker is half open: a probe is under way"
    return (
        f"breaker is open after {breaker.consecutive_failures} failures, next probe in {breaker.retry_at - now:.1f} s"
    )


def _attempt_record(
    state: TargetState, variant: Variant, outcome: str, elapsed_s: float, error: str | None = None
) -> Attempt:
    return Attempt(state.traits.name, state.traits.tier, variant.id, outcome, elapsed_s, error)
