"""One try on one target: counted, bounded in time, and told to the breaker, the limit and the estimates."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass, field

from agent.core.clock import Clock
from agent.core.errors import TargetBusy, TargetError, TargetFailed, TargetTimeout
from agent.core.types import Attempt, InferenceRequest, TargetAnswer
from agent.core.within import within
from agent.registry.catalog import Family, Variant
from agent.routing.breaker import Breaker
from agent.routing.decision import Budgets, Fixed, Limit
from agent.routing.estimate import Estimate, TargetTimes
from agent.targets.base import Target, TargetTraits

log = logging.getLogger(__name__)

GRACE_S = 0.005
"""A target that overruns its attempt's deadline by this much is cut off, and at the request's deadline in any case."""


@dataclass(slots=True)
class TargetState:
    """What routing remembers of one target."""

    target: Target
    traits: TargetTraits
    breaker: Breaker
    limit: Limit
    in_flight: int = 0
    requests: int = 0
    failures: int = 0
    was_available: bool = False
    times: dict[str, TargetTimes] = field(default_factory=dict)

    @classmethod
    def of(cls, target: Target, breaker: Breaker, limit: Limit | None = None) -> TargetState:
        return cls(target, target.traits, breaker, limit or Fixed(target.traits.max_concurrent))

    def times_of(self, variant: Variant) -> TargetTimes:
        times = self.times.get(variant.name)
        if times is None:
            times = self.times[variant.name] = TargetTimes(self.traits.prior_s)
        return times

    def estimate(self, variant: Variant, now: float) -> Estimate:
        """Of an attempt that starts now, behind what is in flight."""
        return self.times_of(variant).estimate(now, self.in_flight, self.traits.parallel)


@dataclass(slots=True)
class Asking:
    """What every attempt of one request has in common. `deadline` (monotonic seconds) ends all of them."""

    request: InferenceRequest
    family: Family
    deadline: float
    clock: Clock
    budgets: Budgets | None = None

    async def attempt(self, state: TargetState, variant: Variant, until: float) -> tuple[TargetAnswer | None, Attempt]:
        """One try, to end by `until`. Raises nothing but `CancelledError` of its own task."""
        started = self.clock.monotonic()
        cut_off = max(until, min(until + GRACE_S, self.deadline))
        settle = self._spend(state, variant, started)
        others = state.in_flight
        state.in_flight += 1
        state.requests += 1
        probe = state.breaker.began(started)
        error: TargetError
        try:
            # A span, not a moment: an event loop's clock may be coarser than ours.
            answer = await within(cut_off - started, state.target.infer(self.request, self.family, variant, until))
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
            now = self.clock.monotonic()
            state.breaker.succeeded()
            state.limit.observe(now, latency_s=now - started, in_flight=others, ok=True)
            state.times_of(variant).observe(now, service_s=answer.compute_s, link_s=answer.link_s)
            settle(state.traits.cost_usd, answer.bytes_sent + answer.bytes_received, now)
            return answer, record(state, variant, "ok", now - started)
        finally:
            state.in_flight -= 1
        now = self.clock.monotonic()
        if isinstance(error, TargetBusy):
            settle(0.0, None, now)
        overloaded = isinstance(error, TargetTimeout | TargetBusy)
        state.limit.observe(now, latency_s=now - started, in_flight=others, ok=not overloaded)
        count_failure(
            state, state.times_of(variant), error, probe, now, waited_s=now - started, given_s=until - started
        )
        return None, record(state, variant, error.code, now - started, str(error))

    def _spend(self, state: TargetState, variant: Variant, now: float) -> Callable[[float, int | None, float], None]:
        """Count the attempt against the lane's budget. What is returned corrects that: cost, bytes (None: as expected)
        and now."""
        budgets = self.budgets
        if budgets is None or not state.traits.tier.is_cloud:
            return lambda cost_usd, bytes, now: None
        expected = state.estimate(variant, now).bytes
        receipt = budgets.spend(state.traits.name, state.traits.cost_usd, expected, now)
        return lambda cost_usd, bytes, now: budgets.settle(receipt, cost_usd, expected if bytes is None else bytes, now)


def count_failure(
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


def record(state: TargetState, variant: Variant, outcome: str, elapsed_s: float, error: str | None = None) -> Attempt:
    return Attempt(state.traits.name, state.traits.tier, variant.id, outcome, elapsed_s, error)


def _cancelled_from_outside() -> bool:
    task = asyncio.current_task()
    return task is None or task.cancelling() > 0
