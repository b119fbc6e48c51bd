"""A second target asked while the first is late: when, what it costs, and that nothing is left behind.

Time is virtual: it jumps to the next timer when nothing is ready.
"""

import asyncio
from collections.abc import Callable, Coroutine
from functools import wraps
from typing import Any

import pytest
from fakes import Behaviour, FakeTarget, answers, hangs, make_answer, make_request, outcomes, raises

from agent.config import RoutingSection
from agent.core.errors import TargetBusy, TargetError, TargetFailed
from agent.core.types import InferenceRequest, LatencyClass, TargetAnswer, Tier
from agent.registry.catalog import Family, Variant
from agent.routing.breaker import BreakerState
from agent.routing.limits import limits_of
from agent.routing.router import NoAnswer, Routed, Router
from hil.sim.loop import VirtualClock, VirtualLoop, run_virtual

RIGHT = {"small": 0.99, "medium": 0.9, "large": 0.9}
"""The microcontroller is worth most, though it is the slower one: 3.6 to 7.2 ms of the 9.5 ms there are."""
SLOW_S, QUICK_S = 0.0036, 0.002
P95_S = 2 * SLOW_S


def virtual(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Runs it on a loop whose time is virtual."""

    @wraps(test)
    def run(*args: Any, **kwargs: Any) -> None:
        run_virtual(test(*args, **kwargs))

    return run


def takes(seconds: float, error: TargetError | None = None) -> Behaviour:
    async def behaviour(request: InferenceRequest, variant: Variant, deadline: float) -> TargetAnswer:
        await asyncio.sleep(seconds)
        if error is not None:
            raise error
        return make_answer()

    return behaviour


class Spent:
    """Budgets that allow everything and remember what was spent."""

    def __init__(self) -> None:
        self.spent: list[tuple[str, float]] = []
        self.settled: list[tuple[float, int]] = []

    def objection(self, lane: str, cost_usd: float, bytes: int, priority: int, now: float) -> str:
        return ""

    def spend(self, lane: str, cost_usd: float, bytes: int, now: float) -> None:
        self.spent.append((lane, cost_usd))

    def settle(self, receipt: None, cost_usd: float, bytes: int, now: float) -> None:
        self.settled.append((cost_usd, bytes))


class Pair:
    """A microcontroller that is asked first, and a second target."""

    def __init__(
        self,
        first: Behaviour = hangs,
        second: Behaviour = answers,
        *,
        tier: Tier = Tier.EDGE_GPU,
        settings: Any = None,
        **traits: Any,
    ) -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualLoop)
        self.clock = VirtualClock(loop)
        self.first = FakeTarget(Tier.EDGE_MCU, first, prior_s=SLOW_S, link=traits.get("link", ""))
        self.second = FakeTarget(tier, second, **({"prior_s": QUICK_S} | traits))
        self.budgets = Spent()
        self.router = Router(
            [self.first, self.second],
            RoutingSection.model_validate(settings or {}),
            self.clock,
            budgets=self.budgets,
            accuracy_of=lambda variant: RIGHT[variant.id],
        )

    def request(self, deadline_ms: float = 10, **changes: Any) -> InferenceRequest:
        return make_request(self.clock, deadline_ms, **({"latency_class": LatencyClass.REALTIME} | changes))

    async def run(self, family: Family, **changes: Any) -> Routed:
        request = self.request(**changes)
        assert self.router.decide(request, family, self.clock.monotonic())[0].ranked[0].target == "edge_mcu"
        return await self.router.run(request, family)

    def is_clean(self) -> bool:
        """Nothing runs, no place is taken, no probe is under way."""
        states = self.router._states.values()
        return (
            all(target.running == 0 for target in (self.first, self.second))
            and all(state.in_flight == 0 and not state.breaker._probing for state in states)
            and asyncio.all_tasks() == {asyncio.current_task()}
        )


# --- what happens ----------------------------------------------------------------------------------------------------


@virtual
async def test_the_second_answers_while_the_first_is_late(family: Family) -> None:
    pair = Pair(second=takes(0.001))
    routed = await pair.run(family)
    assert routed.traits.name == "edge_gpu"
    assert outcomes(routed.attempts) == [("edge_mcu", "cancelled"), ("edge_gpu", "ok")]
    assert pair.clock.monotonic() == pytest.approx(P95_S + 0.001)
    assert [attempt.hedge for attempt in routed.attempts] == [False, True]
    assert "hedge" not in routed.attempts[0].to_dict()
    assert routed.attempts[1].to_dict()["hedge"] is True
    assert routed.reasons[1:] == (
        "edge_gpu: asked as well: edge_mcu took over 7.2 ms",
        "edge_mcu: cancelled after 8.2 ms: the other answered first",
    )
    assert pair.is_clean()
    breaker = pair.router._states["edge_mcu"].breaker
    assert (breaker.state, breaker.consecutive_failures) == (BreakerState.CLOSED, 0)


@virtual
async def test_both_get_the_whole_deadline(family: Family) -> None:
    pair = Pair()
    await pair.run(family)
    for target in (pair.first, pair.second):
        assert target.asked[0][2] == pytest.approx(0.0095)


@virtual
async def test_nobody_else_is_asked_if_the_first_is_not_late(family: Family) -> None:
    pair = Pair(takes(P95_S - 1e-4))
    routed = await pair.run(family)
    assert outcomes(routed.attempts) == [("edge_mcu", "ok")]
    assert not pair.second.asked
    assert pair.is_clean()


@virtual
async def test_the_first_may_still_win(family: Family) -> None:
    pair = Pair(takes(P95_S + 0.001), hangs)
    routed = await pair.run(family)
    assert routed.traits.name == "edge_mcu"
    assert outcomes(routed.attempts) == [("edge_mcu", "ok"), ("edge_gpu", "cancelled")]
    assert pair.is_clean()


@virtual
async def test_of_two_that_answer_at_once_the_first_counts(family: Family) -> None:
    pair = Pair(takes(0.0085), takes(0.0085 - P95_S))
    routed = await pair.run(family)
    assert routed.traits.name == "edge_mcu"
    assert pair.is_clean()


@virtual
async def test_when_the_second_fails_the_first_is_still_waited_for(family: Family) -> None:
    pair = Pair(takes(P95_S + 0.001), raises(TargetFailed("out of memory")))
    routed = await pair.run(family)
    assert outcomes(routed.attempts) == [("edge_mcu", "ok"), ("edge_gpu", "failed")]
    assert "edge_gpu: failed after 0.0 ms: out of memory" in routed.reasons


@virtual
async def test_when_the_first_fails_before_it_is_late_the_second_is_next_in_the_chain(family: Family) -> None:
    pair = Pair(takes(0.002, TargetFailed("link lost")))
    routed = await pair.run(family)
    assert outcomes(routed.attempts) == [("edge_mcu", "failed"), ("edge_gpu", "ok")]
    assert not routed.attempts[1].hedge
    assert "edge_gpu: next in the chain" in routed.reasons


@virtual
async def test_when_the_first_fails_late_the_second_is_still_waited_for(family: Family) -> None:
    pair = Pair(takes(P95_S + 0.0005, TargetFailed("link lost")), takes(0.001))
    routed = await pair.run(family)
    assert outcomes(routed.attempts) == [("edge_mcu", "failed"), ("edge_gpu", "ok")]


@virtual
async def test_when_neither_answers_that_is_told_of_both(family: Family) -> None:
    pair = Pair(hangs, takes(0.001, TargetFailed("out of memory")))
    with pytest.raises(NoAnswer) as caught:
        await pair.run(family)
    assert outcomes(caught.value.attempts) == [("edge_mcu", "timeout"), ("edge_gpu", "failed")]
    assert pair.clock.monotonic() <= 0.010
    assert caught.value.late
    assert pair.is_clean()


@virtual
async def test_what_was_cancelled_for_being_slow_is_remembered_as_slow(family: Family) -> None:
    pair = Pair(second=takes(0.002))
    await pair.run(family)
    state = pair.router._states["edge_mcu"]
    assert state.estimate(family.variants["small"], pair.clock.monotonic()).p95_s == pytest.approx(P95_S + 0.002)


@virtual
async def test_a_caller_who_goes_away_leaves_nothing_behind(family: Family) -> None:
    pair = Pair(hangs, hangs)
    asking = asyncio.create_task(pair.run(family))
    await pair.second.begun.wait()
    assert (pair.first.running, pair.second.running) == (1, 1)
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    assert pair.is_clean()
    assert pair.router._states["edge_gpu"].breaker.consecutive_failures == 0


@virtual
async def test_a_probe_of_a_breaker_that_was_cancelled_lets_the_next_one_through(family: Family) -> None:
    pair = Pair()
    breaker = pair.router._states["edge_mcu"].breaker
    breaker.failed(pair.clock.monotonic(), permanent=True)
    await asyncio.sleep(121)
    routed = await pair.run(family)
    assert outcomes(routed.attempts) == [("edge_mcu", "cancelled"), ("edge_gpu", "ok")]
    assert pair.is_clean()
    assert breaker.allows(pair.clock.monotonic())


@virtual
async def test_the_time_that_an_attempt_may_take_counts_from_its_own_beginning(family: Family) -> None:
    pair = Pair(takes(P95_S + 0.002), takes(0.001))
    routed = await pair.run(family, timeout_ms=9.4)
    assert outcomes(routed.attempts) == [("edge_mcu", "cancelled"), ("edge_gpu", "ok")]
    assert pair.second.asked[0][2] == pytest.approx(0.0095)
    pair = Pair(hangs, takes(0.001), timeout_s=0.0021)
    begun = pair.clock.monotonic()
    await pair.run(family)
    assert pair.second.asked[0][2] - begun == pytest.approx(P95_S + 0.0021)


# --- what it costs ---------------------------------------------------------------------------------------------------


@virtual
async def test_a_metered_lane_is_used_where_that_is_allowed_and_is_paid_for_even_if_it_loses(family: Family) -> None:
    lane = {"tier": Tier.CLOUD_GPU, "metered": True, "cost_usd": 0.0001, "settings": {"hedge_metered": True}}
    pair = Pair(takes(P95_S + 0.001), hangs, **lane)
    routed = await pair.run(family)
    assert outcomes(routed.attempts) == [("edge_mcu", "ok"), ("cloud_gpu", "cancelled")]
    assert routed.cost_usd == 0.0001
    assert pair.budgets.spent == [("cloud_gpu", 0.0001)]


@virtual
async def test_what_was_refused_as_busy_costs_nothing(family: Family) -> None:
    lane = {"tier": Tier.CLOUD_GPU, "metered": True, "cost_usd": 0.0001, "settings": {"hedge_metered": True}}
    pair = Pair(takes(P95_S + 0.001), raises(TargetBusy("full")), **lane)
    assert (await pair.run(family)).cost_usd == 0.0


# --- when it does not happen -----------------------------------------------------------------------------------------

NO_HEDGE: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "a class that is not tight": ({}, {"latency_class": LatencyClass.INTERACTIVE}),
    "a class that is not named": ({"settings": {"hedge_classes": ["near"]}}, {}),
    "no second try allowed": ({}, {"max_retries": 0}),
    "time to ask one after the other": ({}, {"deadline_ms": 30}),
    "a second that could not be in time": ({"prior_s": 0.0024}, {}),
    "a metered lane": ({"tier": Tier.CLOUD_GPU, "metered": True, "cost_usd": 0.0001}, {}),
}


@pytest.mark.parametrize(("setting", "changes"), NO_HEDGE.values(), ids=NO_HEDGE.keys())
def test_no_hedge(family: Family, setting: dict[str, Any], changes: dict[str, Any]) -> None:
    async def main() -> None:
        pair = Pair(takes(P95_S + 0.0005), **setting)
        routed = await pair.run(family, **changes)
        assert outcomes(routed.attempts) == [("edge_mcu", "ok")]
        assert not pair.second.asked

    run_virtual(main())


@virtual
async def test_a_second_that_filled_up_meanwhile_is_not_asked(family: Family) -> None:
    pair = Pair(takes(P95_S + 0.001), max_concurrent=1)
    busy = pair.router._states["edge_gpu"]
    asyncio.get_running_loop().call_later(0.001, setattr, busy, "in_flight", 1)
    routed = await pair.run(family)
    assert outcomes(routed.attempts) == [("edge_mcu", "ok")]
    assert not pair.second.asked


@virtual
async def test_many_at_once_keep_to_the_places_of_the_target(family: Family) -> None:
    """A second may be started, so each attempt is a task of its own: its place is taken before it begins."""
    loop = asyncio.get_running_loop()
    assert isinstance(loop, VirtualLoop)
    clock, peak = VirtualClock(loop), 0

    async def slow(request: InferenceRequest, variant: Variant, deadline: float) -> TargetAnswer:
        nonlocal peak
        peak = max(peak, first.running)
        await asyncio.sleep(0.004)
        return make_answer()

    first = FakeTarget(Tier.EDGE_MCU, slow, prior_s=SLOW_S, max_concurrent=4, parallel=100)
    second = FakeTarget(Tier.EDGE_GPU, answers, prior_s=QUICK_S, max_concurrent=4, parallel=100)
    settings = RoutingSection()
    router = Router(
        [first, second],
        settings,
        clock,
        limit_for=limits_of(settings.overload),
        accuracy_of=lambda variant: RIGHT[variant.id],
    )
    asked = [make_request(clock, 10.0, id=str(i), latency_class=LatencyClass.REALTIME) for i in range(50)]
    await asyncio.gather(*(router.run(one, family) for one in asked), return_exceptions=True)
    assert peak == 4
    assert all(state.in_flight == 0 for state in router._states.values())


@virtual
async def test_the_second_is_reached_over_another_link_if_there_is_one(family: Family) -> None:
    loop = asyncio.get_running_loop()
    assert isinstance(loop, VirtualLoop)
    first = FakeTarget(Tier.EDGE_MCU, hangs, prior_s=SLOW_S, link="mqtts://one")
    same = FakeTarget(Tier.CLOUD_GPU, hangs, prior_s=QUICK_S, link="mqtts://one")
    other = FakeTarget(Tier.EDGE_GPU, prior_s=QUICK_S)
    right = RIGHT | {"large": 0.95}
    settings, clock = RoutingSection(), VirtualClock(loop)
    router = Router([first, same, other], settings, clock, accuracy_of=lambda variant: right[variant.id])
    request = make_request(clock, 10, latency_class=LatencyClass.REALTIME)
    ranked = [play.target for play in router.decide(request, family, clock.monotonic())[0].ranked]
    assert ranked == ["edge_mcu", "cloud_gpu", "edge_gpu"]
    routed = await router.run(request, family)
    assert routed.traits.name == "edge_gpu"
    assert not same.asked


@virtual
async def test_over_the_same_link_is_better_than_no_second(family: Family) -> None:
    pair = Pair(link="mqtts://one")
    routed = await pair.run(family)
    assert routed.traits.name == "edge_gpu"
