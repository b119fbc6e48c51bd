"""A second target asked while the first is late: when, what it costs, and that nothing is left behind.

The clock stands still unless a target moves it; the pause before the second one is a few real milliseconds.
"""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from fakes import (
    PATIENCE_S,
    FakeTarget,
    after,
    answers,
    failure,
    hangs,
    make_answer,
    make_request,
    outcomes,
    raises,
)

from agent.config import RoutingSection
from agent.core.clock import ManualClock
from agent.core.errors import TargetFailed
from agent.core.types import InferenceRequest, LatencyClass, TargetAnswer, Tier
from agent.registry.catalog import Family, Variant
from agent.routing.breaker import BreakerState
from agent.routing.router import Router

RIGHT = {"small": 0.99, "medium": 0.9, "large": 0.9}
"""The microcontroller is worth most, though it is the slower one: 3.6 to 7.2 ms of the 9.5 ms there are."""
SLOW_S, QUICK_S = 0.0036, 0.002


class Spent:
    """Budgets that allow everything and remember what was spent."""

    def __init__(self) -> None:
        self.spent: list[tuple[str, float]] = []

    def objection(self, lane: str, cost_usd: float, bytes: int, priority: int, now: float) -> str:
        return ""

    def spend(self, lane: str, cost_usd: float, bytes: int, now: float) -> None:
        self.spent.append((lane, cost_usd))


class Pair:
    """A microcontroller that is asked first, and a second target."""

    def __init__(self, clock: ManualClock, *, tier: Tier = Tier.EDGE_GPU, settings: Any = None, **traits: Any) -> None:
        self.clock = clock
        self.first = FakeTarget(Tier.EDGE_MCU, hangs, prior_s=SLOW_S)
        self.second = FakeTarget(tier, prior_s=QUICK_S, **traits)
        self.budgets = Spent()
        self.router = Router(
            [self.first, self.second],
            RoutingSection.model_validate(settings or {}),
            clock,
            budgets=self.budgets,
            accuracy_of=lambda variant: RIGHT[variant.id],
        )

    def request(self, **changes: Any) -> InferenceRequest:
        return make_request(self.clock, 10, **({"latency_class": LatencyClass.REALTIME} | changes))

    def run(self, family: Family, **changes: Any) -> Awaitable[Any]:
        return asyncio.wait_for(self.router.run(self.request(**changes), family), PATIENCE_S)

    def is_clean(self) -> bool:
        """Nothing runs, no place is taken, no probe is under way, nothing is held against anybody."""
        states = self.router._states.values()
        return (
            all(target.running == 0 for target in (self.first, self.second))
            and all(state.in_flight == 0 for state in states)
            and all(not state.breaker._probing for state in states)
        )


@pytest.fixture
def pair(clock: ManualClock) -> Pair:
    return Pair(clock)


def answers_once(event: asyncio.Event) -> Callable[..., Awaitable[TargetAnswer]]:
    async def behaviour(request: InferenceRequest, variant: Variant, deadline: float) -> TargetAnswer:
        await event.wait()
        return make_answer("the slow one")

    return behaviour


# --- what happens ----------------------------------------------------------------------------------------------------


async def test_the_second_answers_while_the_first_is_late(pair: Pair, family: Family, clock: ManualClock) -> None:
    pair.second.behaviour = after(clock, 0.0072)
    routed = await pair.run(family)
    assert routed.traits.name == "edge_gpu"
    assert outcomes(routed.attempts) == [("edge_mcu", "cancelled"), ("edge_gpu", "ok")]
    assert [attempt.hedge for attempt in routed.attempts] == [False, True]
    assert "hedge" not in routed.attempts[0].to_dict()
    assert routed.attempts[1].to_dict()["hedge"] is True
    assert routed.reasons[1:] == (
        "edge_gpu: asked as well: edge_mcu took over 7.2 ms",
        "edge_mcu: cancelled after 7.2 ms: the other answered first",
    )
    assert pair.is_clean()
    breaker = pair.router._states["edge_mcu"].breaker
    assert (breaker.state, breaker.consecutive_failures) == (BreakerState.CLOSED, 0)


async def test_the_first_gets_the_whole_deadline_and_so_does_the_second(pair: Pair, family: Family) -> None:
    request = pair.request()
    await pair.router.run(request, family)
    for target in (pair.first, pair.second):
        assert target.asked[0][2] == pytest.approx(request.deadline - 0.0005)


async def test_nobody_else_is_asked_if_the_first_is_not_late(pair: Pair, family: Family) -> None:
    pair.first.behaviour = answers
    routed = await pair.run(family)
    assert outcomes(routed.attempts) == [("edge_mcu", "ok")]
    assert not pair.second.asked


async def test_the_first_may_still_win(pair: Pair, family: Family) -> None:
    go = asyncio.Event()
    pair.first.behaviour = answers_once(go)

    async def lets_the_first_go(request: InferenceRequest, variant: Variant, deadline: float) -> TargetAnswer:
        go.set()
        return await hangs(request, variant, deadline)

    pair.second.behaviour = lets_the_first_go
    routed = await pair.run(family)
    assert routed.traits.name == "edge_mcu"
    assert outcomes(routed.attempts) == [("edge_mcu", "ok"), ("edge_gpu", "cancelled")]
    assert pair.is_clean()


async def test_when_the_second_fails_the_first_is_still_waited_for(pair: Pair, family: Family) -> None:
    go = asyncio.Event()
    pair.first.behaviour = answers_once(go)

    async def fails(request: InferenceRequest, variant: Variant, deadline: float) -> TargetAnswer:
        asyncio.get_running_loop().call_soon(go.set)
        raise TargetFailed("out of memory")

    pair.second.behaviour = fails
    routed = await pair.run(family)
    assert outcomes(routed.attempts) == [("edge_mcu", "ok"), ("edge_gpu", "failed")]
    assert "edge_gpu: failed after 0.0 ms: out of memory" in routed.reasons


async def test_when_the_first_fails_at_once_the_second_is_next_in_the_chain(pair: Pair, family: Family) -> None:
    pair.first.behaviour = raises(TargetFailed("link lost"))
    routed = await pair.run(family)
    assert outcomes(routed.attempts) == [("edge_mcu", "failed"), ("edge_gpu", "ok")]
    assert not routed.attempts[1].hedge
    assert "edge_gpu: next in the chain" in routed.reasons


async def test_when_both_fail_there_is_no_answer(pair: Pair, family: Family, clock: ManualClock) -> None:
    failed = asyncio.Event()

    async def fails_then(request: InferenceRequest, variant: Variant, deadline: float) -> TargetAnswer:
        await failed.wait()
        raise TargetFailed("link lost")

    async def fails(request: InferenceRequest, variant: Variant, deadline: float) -> TargetAnswer:
        failed.set()
        raise TargetFailed("out of memory")

    pair.first.behaviour, pair.second.behaviour = fails_then, fails
    error = await failure(pair.router, pair.request(), family)
    assert outcomes(error.attempts) == [("edge_mcu", "failed"), ("edge_gpu", "failed")]
    assert pair.is_clean()


async def test_what_was_cancelled_for_being_slow_is_remembered_as_slow(
    pair: Pair, family: Family, clock: ManualClock
) -> None:
    pair.second.behaviour = after(clock, 0.009)
    await pair.run(family)
    state = pair.router._states["edge_mcu"]
    assert state.estimate(family.variants["small"], clock.monotonic()).p95_s == pytest.approx(0.009)


async def test_a_caller_who_goes_away_leaves_nothing_behind(pair: Pair, family: Family) -> None:
    pair.second.behaviour = hangs
    asking = asyncio.create_task(pair.router.run(pair.request(), family))
    async with asyncio.timeout(PATIENCE_S):
        await pair.second.begun.wait()
    assert (pair.first.running, pair.second.running) == (1, 1)
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    assert pair.is_clean()


async def test_a_probe_that_was_cancelled_lets_the_next_one_through(
    pair: Pair, family: Family, clock: ManualClock
) -> None:
    breaker = pair.router._states["edge_mcu"].breaker
    breaker.failed(clock.monotonic(), permanent=True)
    clock.advance(121)
    routed = await pair.run(family)
    assert outcomes(routed.attempts) == [("edge_mcu", "cancelled"), ("edge_gpu", "ok")]
    assert pair.is_clean()
    assert breaker.allows(clock.monotonic())


# --- when it does not ------------------------------------------------------------------------------------------------

NO_HEDGE: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "classes that are not tight": ({}, {"latency_class": LatencyClass.INTERACTIVE}, {}),
    "no class at all": ({"hedge_classes": []}, {}, {}),
    "no second try allowed": ({}, {"max_retries": 0}, {}),
    "time to ask one after the other": ({}, {"deadline": 0.03}, {}),
    "a second that could not be in time": ({}, {}, {"prior_s": 0.0024}),
    "a metered lane": ({}, {}, {"tier": Tier.CLOUD_GPU, "metered": True, "cost_usd": 0.0001}),
}


@pytest.mark.parametrize(("settings", "changes", "traits"), NO_HEDGE.values(), ids=NO_HEDGE.keys())
async def test_no_hedge(clock: ManualClock, family: Family, settings: Any, changes: Any, traits: Any) -> None:
    quick = traits.pop("prior_s", QUICK_S)
    pair = Pair(clock, settings=settings, **traits)
    object.__setattr__(pair.second.traits, "prior_s", quick)
    seen = asyncio.Event()

    async def only_one(request: InferenceRequest, variant: Variant, deadline: float) -> TargetAnswer:
        for _ in range(10):
            await asyncio.sleep(0)
        seen.set()
        return make_answer()

    pair.first.behaviour = only_one
    request = pair.request(**changes)
    decision, variants = pair.router.decide(request, family, clock.monotonic())
    assert decision.ranked[0].target == "edge_mcu"
    routed = await pair.router.run(request, family)
    assert outcomes(routed.attempts) == [("edge_mcu", "ok")]
    assert seen.is_set()
    assert not pair.second.asked
