"""One request's way along its ranking: until somebody answers, or the deadline leaves no room for another try."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from agent.config import RoutingSection
from agent.core.errors import TargetBusy, TargetTimeout
from agent.core.types import Attempt, LatencyClass, TargetAnswer
from agent.registry.catalog import Variant
from agent.routing.attempt import GRACE_S, Asking, TargetState
from agent.routing.breaker import Breaker
from agent.routing.decision import Constraint, Decision, Play
from agent.routing.hedge import CANCELLED, Side, race
from agent.routing.retry_budget import RetryBudget
from agent.targets.base import TargetTraits

MARGIN_S = 0.0005
"""Kept back from every deadline to build and send the answer, or to find a stale one."""
RESERVE_FACTOR = 2.0
RESERVE_SHARE = 0.1
"""Where there is so much time, an attempt leaves the next target this multiple of its 95th percentile, and at least
this share of what is left."""

Variants: TypeAlias = Mapping[Play, Variant]


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


class Walk:
    """One request being answered."""

    def __init__(
        self,
        asking: Asking,
        decision: Decision,
        variants: Variants,
        states: Mapping[str, TargetState],
        settings: RoutingSection,
        retries: RetryBudget,
    ) -> None:
        self._retries = retries
        self._asking = asking
        self._decision = decision
        self._variants = variants
        self._states = states
        self._latency_class = asking.request.latency_class
        self._may_hedge = self._latency_class.value in settings.hedge_classes
        self._hedge_metered = settings.hedge_metered
        self._end = asking.deadline - MARGIN_S
        self._attempts: list[Attempt] = []
        self._reasons: list[str] = []
        self._failed: list[TargetState] = []
        self._silent: set[str] = set()
        self._cost_usd = 0.0
        self._late = False

    @property
    def attempts(self) -> Sequence[Attempt]:
        """Those that have ended; grows while it runs."""
        return self._attempts

    async def run(self) -> Routed:
        """Ask until one answers. Raises `NoAnswer`."""
        left = list(self._decision.ranked)
        while left and self._tries_left() > 0:
            play = left.pop(self._position(left))
            side = self._side(play, left)
            if self._attempts or len(left) + 1 < len(self._decision.ranked):
                found = self._objection(side)
                if found:
                    self._reasons.append(f"{play.target}: skipped: {found[1]}")
                    self._late = self._late or found[0] is Constraint.DEADLINE
                    continue
                if self._attempts and not self._may_follow(side):
                    self._reasons.append(f"{play.target}: skipped: the retry budget of the cloud lanes is used up")
                    continue
                self._reasons.append(f"{play.target}: next in the chain")
            answer, by = await self._try(side, left)
            if answer is not None:
                return Routed(
                    answer,
                    by.state.traits,
                    by.variant,
                    tuple(self._attempts),
                    (*self._decision.reasons, *self._reasons),
                    self._cost_usd,
                    self._decision,
                )
        raise self._no_answer()

    def _position(self, left: Sequence[Play]) -> int:
        """Of the play to ask now. Once time has passed, what may not be in time any more waits for what will be: two
        lanes over one dead link must not use up the time that the edge would have answered in."""
        if not self._attempts:
            return 0
        now = self._asking.clock.monotonic()
        room_s = self._end - now
        # Over the link that was silent last, whatever it was that kept the one from answering.
        order = sorted(range(len(left)), key=lambda position: self._link(left[position]) in self._silent)
        for position in order:
            state = self._states[left[position].target]
            gone = standing(state, self._latency_class, now) is not None
            if gone and position == 0:
                return 0  # to be skipped, and to say why
            if not gone and state.estimate(self._variants[left[position]], now).p95_s <= room_s:
                if position:
                    why = f"not sure to answer in the {room_s * 1e3:.1f} ms left"
                    if self._link(left[0]) in self._silent:
                        why = "reached over the link that was silent"
                    self._reasons.append(f"{left[0].target}: put off: {why}")
                return position
        return 0

    def _link(self, play: Play) -> str:
        return self._states[play.target].traits.link

    async def _try(self, side: Side, left: list[Play]) -> tuple[TargetAnswer | None, Side]:
        """One attempt, or two that overlap; the second is then taken off what is left."""
        hedge = self._hedge(side, left) if self._may_hedge and left and self._tries_left() > 1 else None
        if hedge is None:
            answer, attempt = await self._asking.attempt(side.state, side.variant, side.until)
            self._note(side, attempt)
            return answer, side
        second, after_s = hedge
        side = Side(side.state, side.variant, self._bounded(side.state, self._end))
        raced = await race(self._asking, side, second, after_s, lambda: self._still(second))
        if len(raced.attempts) > 1:
            left.remove(Play(second.state.traits.name, second.variant.id))
            waited_ms = after_s * 1e3
            name = side.state.traits.name
            self._reasons.append(f"{second.state.traits.name}: asked as well: {name} took over {waited_ms:.1f} ms")
        for each, attempt in zip((side, second), raced.attempts, strict=False):
            self._note(each, attempt)
        return raced.answer, raced.by

    def _note(self, side: Side, attempt: Attempt) -> None:
        self._attempts.append(attempt)
        if attempt.outcome != TargetBusy.code:
            self._cost_usd += side.state.traits.cost_usd
        took = f"after {attempt.elapsed_s * 1e3:.1f} ms"
        if attempt.outcome == CANCELLED:
            self._reasons.append(f"{attempt.target}: cancelled {took}: the other answered first")
        elif attempt.outcome != "ok":
            self._failed.append(side.state)
            if attempt.outcome == TargetTimeout.code and side.state.traits.link:
                self._silent.add(side.state.traits.link)
            self._reasons.append(f"{attempt.target}: {attempt.outcome} {took}: {attempt.error}")

    def _no_answer(self) -> NoAnswer:
        excluded = set(self._decision.excluded.values())
        late = self._late or Constraint.DEADLINE in excluded or self._asking.clock.monotonic() >= self._end
        busy = bool(self._attempts or Constraint.BUSY in excluded) and all(
            attempt.outcome == TargetBusy.code for attempt in self._attempts
        )
        reasons = (*self._decision.reasons, *self._reasons)
        return NoAnswer(self._attempts, reasons, late=late, busy=busy, cost_usd=self._cost_usd, decision=self._decision)

    def _tries_left(self) -> int:
        return self._asking.request.max_retries - len(self._attempts) + 1

    # --- time ----------------------------------------------------------------------------------------------------

    def _side(self, play: Play, following: Sequence[Play]) -> Side:
        """The play with the moment at which it must end: early enough for the quickest of the following ones to be
        tried twice over, or once, if that leaves this one what it usually takes; else it has all the time there is."""
        state, variant = self._states[play.target], self._variants[play]
        now = self._asking.clock.monotonic()
        until = self._end
        least_s = state.estimate(variant, now).p95_s + self._spare_s(now)  # one in twenty takes longer than its p95
        for reserve_s in self._reserves_s(following, now) if self._tries_left() > 1 else ():
            if self._end - reserve_s >= now + least_s:
                until = self._end - reserve_s
                break
        return Side(state, variant, self._bounded(state, until, now))

    def _reserves_s(self, following: Sequence[Play], now: float) -> tuple[float, ...]:
        """What is kept back for the next one, if there is one: ample, and just enough."""
        others = [
            state.estimate(self._variants[play], now).p95_s
            for play in following
            if (state := self._states[play.target]).breaker.allows(now) and state.target.availability().available
        ]
        if not others:
            return ()
        spare_s, quickest_s = self._spare_s(now), min(others)
        ample_s = max(RESERVE_FACTOR * quickest_s, RESERVE_SHARE * (self._end - now))
        return ample_s + spare_s, quickest_s + spare_s

    def _spare_s(self, now: float) -> float:
        """What an attempt may overrun by, and what it is to have beyond its p95."""
        return min(GRACE_S, RESERVE_SHARE * (self._end - now))

    def _bounded(self, state: TargetState, until: float, now: float | None = None) -> float:
        """By what any single attempt on the target may take."""
        now = self._asking.clock.monotonic() if now is None else now
        until = min(until, now + state.traits.timeout_s)
        timeout_ms = self._asking.request.timeout_ms
        return until if timeout_ms is None else min(until, now + timeout_ms / 1e3)

    # --- what has changed ----------------------------------------------------------------------------------------

    def _objection(self, side: Side) -> tuple[Constraint, str] | None:
        """What has changed since the ranking: time has passed, others may have taken the place."""
        now = self._asking.clock.monotonic()
        found = standing(side.state, self._latency_class, now)
        if found is not None:
            return found
        estimate = side.state.estimate(side.variant, now)
        over = self._asking.over_budget(side.state, estimate, now)
        if over:
            return Constraint.BUDGET, over
        if now + estimate.p50_s > side.until:
            needed_ms, left_ms = estimate.p50_s * 1e3, max(0.0, side.until - now) * 1e3
            return Constraint.DEADLINE, f"would take {needed_ms:.1f} ms, {left_ms:.1f} ms are left for it"
        return None

    def _may_follow(self, side: Side) -> bool:
        """Whether it may be asked after a failure. Where whoever failed is asked by nobody any more, it takes over a
        load, and nobody's is doubled: that is free, or a lane that dies with a hundred requests would cost most of them
        the answer that the next one has."""
        now = self._asking.clock.monotonic()
        if side.state.traits.tier.is_cloud and self._failed and all(is_out(state, now) for state in self._failed):
            self._retries.took_over()
            return True
        return self._may_add(side)

    def _may_add(self, side: Side) -> bool:
        """Only lanes share what they run on with others, whom a further attempt takes it from."""
        return not side.state.traits.tier.is_cloud or self._retries.take(self._asking.clock.monotonic())

    def _still(self, second: Side) -> bool:
        return self._objection(second) is None and self._may_add(second)

    def _hedge(self, side: Side, following: Sequence[Play]) -> tuple[Side, float] | None:
        """Whom to ask as well, and after how many seconds, where there is no time to ask one after the other: when the
        first has taken longer than its 95th percentile, and as late as the second one's allows."""
        now = self._asking.clock.monotonic()
        first_s, room_s = side.state.estimate(side.variant, now).p95_s, self._end - now
        reserves_s = self._reserves_s(following, now)
        if not reserves_s or room_s - reserves_s[0] >= first_s + self._spare_s(now):
            return None
        link = side.state.traits.link  # over the same one last: what keeps the first from answering may keep the second
        for play in sorted(following, key=lambda play: bool(link) and self._link(play) == link):
            state, variant = self._states[play.target], self._variants[play]
            if state is side.state or (state.traits.metered and not self._hedge_metered):
                continue
            estimate = state.estimate(variant, now)
            after_s = max(first_s, room_s - estimate.p95_s)
            if standing(state, self._latency_class, now) is None and after_s + estimate.p50_s <= room_s:
                return Side(state, variant, self._bounded(state, self._end, now + after_s)), after_s
        return None


def is_out(state: TargetState, now: float) -> bool:
    """Whether nobody asks the target now: it is away, or its breaker lets nothing pass."""
    return not state.target.availability().available or not state.breaker.allows(now)


def standing(state: TargetState, latency_class: LatencyClass, now: float) -> tuple[Constraint, str] | None:
    """Whether a target can be asked at all now, and why not."""
    availability = state.target.availability()
    if not availability.available:
        return Constraint.UNAVAILABLE, availability.reason or "unavailable"
    if not state.breaker.allows(now):
        return Constraint.BREAKER, breaker_reason(state.breaker, now)
    if state.in_flight >= state.limit.limit(now, latency_class):
        return Constraint.BUSY, "busy"
    return None


def breaker_reason(breaker: Breaker, now: float) -> str:
    """Why a breaker lets nothing pass."""
    if now >= breaker.retry_at:
        return "breaker is half open: a probe is under way"
    return (
        f"breaker is open after {breaker.consecutive_failures} failures, next probe in {breaker.retry_at - now:.1f} s"
    )
