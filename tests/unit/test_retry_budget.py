"""Further attempts at lanes are a part of the traffic."""

from __future__ import annotations

import pytest
from cascade_fakes import Tiers, sure
from fakes import UNPLUGGED, FakeTarget, make_request, outcomes, raises
from hypothesis import given
from hypothesis import strategies as st

from agent.config import AccuracySection, RetryBudgetSection
from agent.core.clock import ManualClock
from agent.core.errors import TargetFailed, TargetUnavailable
from agent.core.types import AccuracyMode, InferenceRequest, TargetAnswer
from agent.registry.catalog import Family, Variant
from agent.routing.cascade import Cascade
from agent.routing.retry_budget import SLOT_S, RetryBudget
from agent.routing.router import NoAnswer, Router, of_the_catalogue


def budget(**settings: float) -> RetryBudget:
    return RetryBudget(RetryBudgetSection.model_validate({"ratio": 0.1, "min_per_s": 0, "window_s": 10, **settings}))


def test_a_tenth_of_the_requests() -> None:
    made = budget()
    assert not made.take(0.0)
    for _ in range(100):
        made.requested(0.0)
    assert [made.take(0.5) for _ in range(11)] == [True] * 10 + [False]
    assert made.status(0.5) == {"left": 0.0, "granted": 10, "refused": 2, "taken_over": 0}


def test_the_window_moves() -> None:
    made = budget()
    for _ in range(100):
        made.requested(0.0)
    assert all(made.take(0.5) for _ in range(10))
    for _ in range(50):
        made.requested(9.0)
    assert made.status(9.0)["left"] == 5.0
    assert made.status(10.0)["left"] == 5.0, "what was asked and retried at first has left the window together"
    assert made.status(19.0)["left"] == 0.0


def test_who_asks_rarely_may_try_again() -> None:
    made = budget(min_per_s=2)
    made.requested(0.0)
    assert [made.take(0.0) for _ in range(21)] == [True] * 20 + [False]
    assert made.take(10.0)


@given(st.lists(st.tuples(st.floats(0, 0.4), st.booleans()), max_size=300))
def test_never_more_than_its_share(events: list[tuple[float, bool]]) -> None:
    """Over any window, with the slots' second to spare."""
    made, now = budget(min_per_s=1), 0.0
    requests: list[float] = []
    granted: list[float] = []
    for step, retry in events:
        now += step
        if retry:
            if made.take(now):
                granted.append(now)
        else:
            made.requested(now)
            requests.append(now)
    for end in granted:
        recent = [at for at in granted if end - 10.0 + SLOT_S < at <= end]
        asked = [at for at in requests if end - 10.0 - SLOT_S <= at <= end]
        assert len(recent) <= 0.1 * len(asked) + 10.0


def edge_fails(fleet: dict[str, FakeTarget]) -> None:
    for name in ("edge_gpu", "edge_mcu"):
        fleet[name].behaviour = raises(TargetFailed("out of memory"))


async def test_a_lane_is_asked_after_a_failure(
    router: Router, fleet: dict[str, FakeTarget], family: Family, clock: ManualClock
) -> None:
    edge_fails(fleet)
    routed = await router.run(make_request(clock), family)
    assert outcomes(routed.attempts) == [("edge_gpu", "failed"), ("edge_mcu", "failed"), ("cloud_gpu", "ok")]
    assert router.retries.status(clock.monotonic())["granted"] == 1


async def test_but_only_within_the_budget_and_the_edge_always(
    router: Router, fleet: dict[str, FakeTarget], family: Family, clock: ManualClock
) -> None:
    while router.retries.take(clock.monotonic()):
        pass
    edge_fails(fleet)
    with pytest.raises(NoAnswer) as refused:
        await router.run(make_request(clock), family)
    assert outcomes(refused.value.attempts) == [("edge_gpu", "failed"), ("edge_mcu", "failed")]
    assert "cloud_gpu: skipped: the retry budget of the cloud lanes is used up" in refused.value.reasons
    assert not fleet["cloud_gpu"].asked


async def test_a_first_attempt_needs_none(
    router: Router, fleet: dict[str, FakeTarget], family: Family, clock: ManualClock
) -> None:
    while router.retries.take(clock.monotonic()):
        pass
    for name in ("edge_gpu", "edge_mcu"):
        fleet[name].state = UNPLUGGED
    routed = await router.run(make_request(clock), family)
    assert outcomes(routed.attempts) == [("cloud_gpu", "ok")]


async def test_who_is_gone_is_taken_over_from_without_limit(
    router: Router, fleet: dict[str, FakeTarget], family: Family, clock: ManualClock
) -> None:
    """A lane whose link is lost fails all that it has in flight at once: each goes on to the next one that can answer,
    whatever the budget says, and has failed once."""
    while router.retries.take(clock.monotonic()):
        pass
    fleet["edge_mcu"].state = UNPLUGGED

    async def lost(request: InferenceRequest, variant: Variant, deadline: float) -> TargetAnswer:
        fleet["edge_gpu"].state = UNPLUGGED
        raise TargetUnavailable("the runtime process died")

    fleet["edge_gpu"].behaviour = lost
    routed = await router.run(make_request(clock), family)
    assert outcomes(routed.attempts) == [("edge_gpu", "unavailable"), ("cloud_gpu", "ok")]
    assert router.retries.status(clock.monotonic())["taken_over"] == 1


async def test_so_is_who_has_an_open_breaker(
    router: Router, fleet: dict[str, FakeTarget], family: Family, clock: ManualClock
) -> None:
    """Nobody else is sent there, so nobody's load is doubled. Failures before it opened need the budget."""
    edge_fails(fleet)
    fleet["edge_mcu"].state = UNPLUGGED
    taken = [await router.run(make_request(clock), family) for _ in range(5)]
    assert [outcomes(routed.attempts) for routed in taken] == [[("edge_gpu", "failed"), ("cloud_gpu", "ok")]] * 5
    status = router.retries.status(clock.monotonic())
    assert (status["granted"], status["taken_over"]) == (4, 1)


@pytest.mark.parametrize("mode", list(AccuracyMode))
async def test_a_request_counts_once_whatever_its_accuracy(clock: ManualClock, mode: AccuracyMode) -> None:
    """`acceptable` leaves some plays out at its first look already; an escalation is a further look."""
    tiers = Tiers(clock)
    tiers.gpu.behaviour = sure(0.7)
    cascade = Cascade(tiers.router, AccuracySection(), clock, of_the_catalogue)
    for _ in range(10):
        await cascade.run(make_request(clock, accuracy=mode), tiers.family)
    assert tiers.router.retries._requests == 10
