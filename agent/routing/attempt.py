"""One try on one target: counted, bounded in time, and told to the breaker, the limit and the estimates."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from math import prod

import numpy as np

from agent.core.clock import Clock
from agent.core.errors import TargetBusy, TargetError, TargetFailed, TargetTimeout
from agent.core.types import Attempt, InferenceRequest, TargetAnswer
from agent.core.within import within
from agent.registry.catalog import Family, Variant
from agent.routing.breaker import Breaker
from agent.routing.decision import Budgets, Fixed, Limit, Play
from agent.routing.estimate import Cold, Estimate, Link, TrackRecord, fit_link
from agent.targets.base import Target, TargetTraits

log = logging.getLogger(__name__)

GRACE_S = 0.005
"""A target that overruns its attempt's deadline by this much is cut off, and at the request's deadline in any case."""
MAX_LINK_POINTS = 8
"""Variants that a target's line of link times is fitted to: the slopes between them number 28."""

AccuracyOf = Callable[[Variant], float]
"""The share of a variant's answers that are right."""


@dataclass(slots=True)
class TargetState:
    """What routing remembers of one target."""

    target: Target
    traits: TargetTraits
    breaker: Breaker
    limit: Limit
    accuracy_of: AccuracyOf
    in_flight: int = 0
    requests: int = 0
    failures: int = 0
    was_available: bool = False
    records: dict[str, TrackRecord] = field(default_factory=dict)
    _plays: dict[str, Play] = field(default_factory=dict)
    on_free: Callable[[], None] | None = None
    """Called when an attempt has ended, whatever came of it."""

    @classmethod
    def of(cls, target: Target, breaker: Breaker, limit: Limit | None, accuracy_of: AccuracyOf) -> TargetState:
        return cls(target, target.traits, breaker, limit or Fixed(target.traits.max_concurrent), accuracy_of)

    def record(self, variant: Variant) -> TrackRecord:
        record = self.records.get(variant.name)
        if record is None:
            record = self.records[variant.name] = self._new_record(variant)
        return record

    def _new_record(self, variant: Variant) -> TrackRecord:
        size = self.bytes_of(variant)
        return TrackRecord(partial(self.cold, variant.name, size), size)

    def estimate(self, variant: Variant, now: float) -> Estimate:
        """Of an attempt that starts now, behind what is in flight."""
        traits, accuracy = self.traits, self.accuracy_of(variant)
        return self.record(variant).estimate(now, self.in_flight, traits.parallel, traits.cost_usd, accuracy)

    def play(self, variant: Variant) -> Play:
        """With this target."""
        play = self._plays.get(variant.id)
        if play is None:
            play = self._plays[variant.id] = Play(self.traits.name, variant.id)
        return play

    def cold(self, name: str, size: int, now: float) -> Cold:
        """What to assume of a variant of which nothing is known lately: the target's first guess, and a link as the
        other variants found it."""
        traits = self.traits
        points: list[tuple[int, float]] = []
        for other, record in self.records.items():
            point = record.link_point(now) if other != name else None
            if point is not None and len(points) < MAX_LINK_POINTS:
                points.append(point)
        link = fit_link(points, Link(traits.prior_link_s, 1.0 / traits.bytes_per_s))
        return Cold(max(0.0, traits.prior_s - traits.prior_link_s), link.takes(size))

    def bytes_of(self, variant: Variant) -> int:
        """On the wire, both ways, until it was measured; 0 where nothing is sent."""
        if self.traits.bytes_per_s == np.inf:
            return 0
        tensors = (*variant.inputs, *variant.outputs)
        return self.traits.overhead_bytes + sum(prod(t.shape) * np.dtype(t.dtype).itemsize for t in tensors)


@dataclass(slots=True)
class Asking:
    """What every attempt of one request has in common. `deadline` (monotonic seconds) ends all of them."""

    request: InferenceRequest
    family: Family
    deadline: float
    clock: Clock
    budgets: Budgets | None = None

    async def attempt(
        self, state: TargetState, variant: Variant, until: float, *, hedge: bool = False
    ) -> tuple[TargetAnswer | None, Attempt]:
        """One try, to end by `until`. Raises nothing but `CancelledError` of its own task."""
        budgets, traits = self.budgets, state.traits
        if budgets is None or not traits.tier.is_cloud:
            return await self._try(state, variant, until, hedge=hedge)
        now = self.clock.monotonic()
        expected = state.estimate(variant, now)
        over = self.over_budget(state, expected, now)
        if over:  # another request may have been quicker since the ranking; between here and `spend` none can be
            return None, attempted(state, variant, TargetBusy.code, 0.0, over, hedge=hedge)
        receipt = budgets.spend(traits.name, traits.cost_usd, reserved(expected.bytes), now)
        answer, attempt = await self._try(state, variant, until, hedge=hedge)
        if answer is not None:
            used = answer.bytes_sent + answer.bytes_received
            budgets.settle(receipt, traits.cost_usd, used, self.clock.monotonic())
        elif attempt.outcome == TargetBusy.code:
            budgets.settle(receipt, 0.0, expected.bytes, self.clock.monotonic())
        return answer, attempt

    async def _try(
        self, state: TargetState, variant: Variant, until: float, *, hedge: bool
    ) -> tuple[TargetAnswer | None, Attempt]:
        """The same, whatever it costs."""
        started = self.clock.monotonic()
        cut_off = max(until, min(until + GRACE_S, self.deadline))
        expected, others = state.estimate(variant, started), state.in_flight
        usual_s = expected.idle_s
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
                now = self.clock.monotonic()
                if now - started > expected.p95_s:  # or only quick answers would be counted
                    state.record(variant).observe_timeout(now, now - started)
                raise
            error = TargetFailed("the target cancelled what it was asked")
        except Exception as defect:  # a target's fault must not lose the request: it is named, and the next is asked
            log.exception("target raised what is no TargetError", extra={"target": state.traits.name})
            error = TargetFailed(f"{type(defect).__name__}: {defect}")
        else:
            now = self.clock.monotonic()
            state.breaker.succeeded()
            state.limit.observe(now, latency_s=now - started, usual_s=usual_s, in_flight=others, ok=True)
            sent = answer.bytes_sent + answer.bytes_received
            state.record(variant).observe(now, service_s=answer.compute_s, link_s=answer.link_s, bytes=sent)
            return answer, attempted(state, variant, "ok", now - started, hedge=hedge)
        finally:
            state.in_flight -= 1
            if state.on_free is not None:
                state.on_free()
        now = self.clock.monotonic()
        patient = until - started >= usual_s
        overloaded = isinstance(error, TargetBusy) or (patient and isinstance(error, TargetTimeout))
        if overloaded:  # of any other failure: how soon it came says nothing about a queue
            state.limit.observe(now, latency_s=now - started, usual_s=usual_s, in_flight=others, ok=False)
        _count_failure(state, variant, error, probe, now, waited_s=now - started, given_s=until - started)
        return None, attempted(state, variant, error.code, now - started, str(error), hedge=hedge)

    def over_budget(self, state: TargetState, estimate: Estimate, now: float) -> str:
        """Why the budgets do not let the lane be asked; empty: they do."""
        if self.budgets is None or not state.traits.tier.is_cloud:
            return ""
        traits = state.traits
        size = reserved(estimate.bytes)
        return self.budgets.objection(traits.name, traits.cost_usd, size, self.request.priority, now)


def reserved(expected_bytes: int) -> int:
    """Bytes set aside for an attempt: a quarter more than expected. Tensors have one size, but texts vary, and many
    attempts at once that each took a little more would go over a budget together."""
    return expected_bytes + expected_bytes // 4


def _count_failure(
    state: TargetState,
    variant: Variant,
    error: TargetError,
    probe: bool,
    now: float,
    *,
    waited_s: float,
    given_s: float,
) -> None:
    """Tell the breaker and the estimates of an attempt that was given `given_s` and failed after `waited_s`."""
    state.failures += 1
    record = state.record(variant)
    hurried = False
    if isinstance(error, TargetTimeout):
        # A wait shorter than the target usually takes says more about the deadline than about the target.
        hurried = given_s < state.estimate(variant, now).idle_s / 2
        record.observe_timeout(now, waited_s)
    if error.counts and not hurried:
        record.observe_failure(now)
        state.breaker.failed(now, probe=probe, permanent=error.permanent)
    else:
        state.breaker.released(probe=probe)


def attempted(
    state: TargetState,
    variant: Variant,
    outcome: str,
    elapsed_s: float,
    error: str | None = None,
    *,
    hedge: bool = False,
) -> Attempt:
    """The record of one try, for the answer."""
    return Attempt(state.traits.name, state.traits.tier, variant.id, outcome, elapsed_s, error, hedge)


def _cancelled_from_outside() -> bool:
    task = asyncio.current_task()
    return task is None or task.cancelling() > 0
