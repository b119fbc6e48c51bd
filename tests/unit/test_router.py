"""The router: along the chain until one answers, within the deadline, and with every target treated fairly.

Time is a clock moved by the targets, except where a target hangs: what cuts that off is the event loop's own timer.
"""

import asyncio
from dataclasses import replace
from typing import Any

import pytest
from fakes import (
    PATIENCE_S,
    UNPLUGGED,
    FakeTarget,
    after,
    failure,
    hangs,
    make_answer,
    make_request,
    outcomes,
    raises,
)

from agent.config import RoutingSection
from agent.core.clock import ManualClock, SystemClock
from agent.core.errors import TargetBusy, TargetFailed, TargetTimeout, TargetUnavailable
from agent.core.types import AccuracyMode, InferenceRequest, LatencyClass, TargetAnswer, Tier
from agent.registry.catalog import Family, Variant
from agent.routing.attempt import GRACE_S
from agent.routing.estimate import FRESH_S
from agent.routing.router import NoAnswer, Router
from agent.routing.walk import MARGIN_S, RESERVE_FACTOR, RESERVE_SHARE

SETTINGS = RoutingSection(policy="scorecard")
"""Fixed points: what is tested here is not who comes first."""
UNHEDGED = RoutingSection(policy="scorecard", hedge_classes=())
COLD_SPREAD = 2
"""p95 over p50 where nothing was measured."""

MCU, GPU, CLOUD, SERVERLESS = Tier.EDGE_MCU, Tier.EDGE_GPU, Tier.CLOUD_GPU, Tier.CLOUD_SERVERLESS


def given_s(target: FakeTarget, request: InferenceRequest) -> float:
    """How long the latest attempt was given."""
    return target.asked[-1][2] - request.received


# --- who answers -----------------------------------------------------------------------------------------------------


async def test_the_first_of_the_ranking_answers(
    router: Router, fleet: dict[str, FakeTarget], family: Family, clock: ManualClock
) -> None:
    fleet["edge_gpu"].behaviour = after(clock, 0.003)
    routed = await router.run(make_request(clock), family)
    assert routed.traits.name == "edge_gpu"
    assert routed.variant.id == "medium"
    assert outcomes(routed.attempts) == [("edge_gpu", "ok")]
    assert routed.attempts[0].elapsed_s == pytest.approx(0.003)
    assert routed.attempts[0].to_dict() == {
        "target": "edge_gpu",
        "tier": "edge_gpu",
        "variant": "medium",
        "outcome": "ok",
        "elapsed_ms": 3.0,
    }
    assert routed.cost_usd == 0.0
    assert routed.reasons == ("edge_gpu: score 115 >= 0.7 x cloud_gpu 63",)
    assert sum(len(target.asked) for target in fleet.values()) == 1


async def test_it_fails_over_along_the_chain_within_the_deadline(
    router: Router, fleet: dict[str, FakeTarget], family: Family, clock: ManualClock
) -> None:
    fleet["edge_gpu"].behaviour = after(clock, 0.010, raises(TargetFailed("out of memory")))
    fleet["edge_mcu"].behaviour = after(clock, 0.020, raises(TargetUnavailable("link lost")))
    request = make_request(clock)
    routed = await router.run(request, family)
    assert outcomes(routed.attempts) == [("edge_gpu", "failed"), ("edge_mcu", "unavailable"), ("cloud_gpu", "ok")]
    assert routed.cost_usd == 0.002
    assert clock.monotonic() < request.deadline
    assert routed.reasons[1:] == (
        "edge_gpu: failed after 10.0 ms: out of memory",
        "edge_mcu: next in the chain",
        "edge_mcu: unavailable after 20.0 ms: link lost",
        "cloud_gpu: next in the chain",
    )


async def test_cost_is_counted_for_every_attempt_that_was_taken(
    router: Router, fleet: dict[str, FakeTarget], family: Family, clock: ManualClock
) -> None:
    for name in ("edge_gpu", "edge_mcu"):
        fleet[name].state = UNPLUGGED
    fleet["cloud_gpu"].behaviour = raises(TargetFailed("worker crashed"))
    assert (await router.run(make_request(clock), family)).cost_usd == pytest.approx(0.006)
    fleet["cloud_gpu"].behaviour = raises(TargetBusy("queue full"))
    assert (await router.run(make_request(clock), family)).cost_usd == pytest.approx(0.004)
    fleet["cloud_serverless"].behaviour = fleet["cloud_gpu"].behaviour = raises(TargetFailed("gone"))
    assert (await failure(router, make_request(clock), family)).cost_usd == pytest.approx(0.006)


@pytest.mark.parametrize("max_retries", [0, 1, 2, 3])
async def test_no_more_than_max_retries_after_the_first(
    router: Router, fleet: dict[str, FakeTarget], family: Family, clock: ManualClock, max_retries: int
) -> None:
    for target in fleet.values():
        target.behaviour = raises(TargetFailed("broken"))
    error = await failure(router, make_request(clock, max_retries=max_retries), family)
    assert len(error.attempts) == max_retries + 1
    assert not error.late
    assert not error.busy


async def test_a_target_that_was_skipped_is_no_retry(
    router: Router, fleet: dict[str, FakeTarget], family: Family, clock: ManualClock
) -> None:
    async def unplugs(request: InferenceRequest, variant: Variant, deadline: float) -> TargetAnswer:
        fleet["edge_mcu"].state = UNPLUGGED
        raise TargetFailed("broken")

    fleet["edge_gpu"].behaviour = unplugs
    routed = await router.run(make_request(clock, max_retries=1), family)
    assert outcomes(routed.attempts) == [("edge_gpu", "failed"), ("cloud_gpu", "ok")]
    assert "edge_mcu: skipped: unplugged" in routed.reasons


async def test_a_pinned_variant_and_an_allowed_region_bind_the_router(family: Family, clock: ManualClock) -> None:
    fleet = [FakeTarget(GPU), FakeTarget(CLOUD, region="us", name="us"), FakeTarget(CLOUD, region="eu", name="eu")]
    router = Router(fleet, SETTINGS, clock)
    request = make_request(clock, variant="large", allowed_regions=frozenset({"eu"}))
    routed = await router.run(request, family)
    assert (routed.traits.name, routed.variant.id) == ("eu", "large")
    fleet[2].state = UNPLUGGED
    error = await failure(router, request, family)
    assert not fleet[1].asked
    assert error.attempts == ()
    assert "us: not asked: region us is not allowed" in error.reasons


def test_two_targets_of_one_name_are_a_fault_of_the_wiring(clock: ManualClock) -> None:
    with pytest.raises(ValueError, match="two targets have the same name"):
        Router([FakeTarget(GPU), FakeTarget(GPU)], SETTINGS, clock)


# --- time ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("usual", "kept_back"), [(0.010, RESERVE_FACTOR * COLD_SPREAD * 0.010), (0.001, RESERVE_SHARE * (0.1 - MARGIN_S))]
)
async def test_what_a_later_target_needs_is_kept_back(
    family: Family, clock: ManualClock, usual: float, kept_back: float
) -> None:
    gpu, mcu, cloud = FakeTarget(GPU, prior_s=0.002), FakeTarget(MCU, prior_s=usual), FakeTarget(CLOUD, prior_s=0.08)
    request = make_request(clock, 100)
    await Router([gpu, mcu, cloud], SETTINGS, clock).run(request, family)
    assert given_s(gpu, request) == pytest.approx(0.1 - MARGIN_S - kept_back - GRACE_S)


async def test_nothing_is_kept_back_for_one_that_is_gone_by_now(family: Family, clock: ManualClock) -> None:
    async def unplugs(request: InferenceRequest, variant: Variant, deadline: float) -> TargetAnswer:
        cloud.state = UNPLUGGED
        raise TargetFailed("broken")

    gpu, mcu, cloud = FakeTarget(GPU, unplugs), FakeTarget(MCU), FakeTarget(CLOUD)
    request = make_request(clock, 100)
    await Router([gpu, mcu, cloud], SETTINGS, clock).run(request, family)
    assert given_s(mcu, request) == pytest.approx(0.1 - MARGIN_S)


@pytest.mark.parametrize("changes", [{"max_retries": 0}, {"variant": "medium"}])
async def test_the_last_one_may_use_the_whole_deadline(family: Family, clock: ManualClock, changes: Any) -> None:
    gpu, mcu = FakeTarget(GPU, prior_s=0.002), FakeTarget(MCU, prior_s=0.030)
    request = make_request(clock, 100, **changes)
    await Router([gpu, mcu], SETTINGS, clock).run(request, family)
    assert given_s(gpu, request) == pytest.approx(0.1 - MARGIN_S)


@pytest.mark.parametrize(
    ("own", "given"), [(0.020, 0.1 - MARGIN_S - COLD_SPREAD * 0.020 - GRACE_S), (0.030, 0.1 - MARGIN_S)]
)
async def test_less_is_kept_back_where_the_first_would_not_have_what_it_usually_takes(
    family: Family, clock: ManualClock, own: float, given: float
) -> None:
    """The other's 95th percentile once, 40 ms; or nothing."""
    gpu, mcu = FakeTarget(GPU, prior_s=own), FakeTarget(MCU, prior_s=0.020)
    request = make_request(clock, 100)
    await Router([gpu, mcu], UNHEDGED, clock).run(request, family)
    assert given_s(gpu, request) == pytest.approx(given)


@pytest.mark.parametrize(("traits", "changes"), [({"timeout_s": 0.02}, {}), ({}, {"timeout_ms": 20.0})])
async def test_no_attempt_takes_longer_than_its_own_bounds(
    family: Family, clock: ManualClock, traits: Any, changes: Any
) -> None:
    gpu = FakeTarget(GPU, **traits)
    request = make_request(clock, 100, **changes)
    await Router([gpu], SETTINGS, clock).run(request, family)
    assert given_s(gpu, request) == pytest.approx(0.02)


async def test_a_target_that_hangs_is_cut_off_and_the_next_still_answers_in_time(family: Family) -> None:
    clock = SystemClock()
    gpu, mcu = FakeTarget(GPU, hangs, prior_s=0.001), FakeTarget(MCU, prior_s=0.200)
    request = make_request(clock, 500)
    async with asyncio.timeout(PATIENCE_S):
        routed = await Router([gpu, mcu], UNHEDGED, clock).run(request, family)
    assert outcomes(routed.attempts) == [("edge_gpu", "timeout"), ("edge_mcu", "ok")]
    assert routed.attempts[0].error == "did not keep its deadline"
    assert gpu.running == 0
    assert gpu.asked[0][2] + GRACE_S <= request.deadline - 0.200
    assert clock.monotonic() < request.deadline


async def test_nothing_runs_on_after_the_deadline(family: Family) -> None:
    clock = SystemClock()
    targets = [FakeTarget(GPU, hangs, prior_s=0.001), FakeTarget(MCU, hangs, prior_s=0.001)]
    request = make_request(clock, 300)
    error = await failure(Router(targets, SETTINGS, clock), request, family)
    assert error.late
    assert [target.running for target in targets] == [0, 0]
    assert {attempt.outcome for attempt in error.attempts} == {"timeout"}


async def test_one_that_would_take_too_long_by_now_is_skipped(
    router: Router, fleet: dict[str, FakeTarget], family: Family, clock: ManualClock
) -> None:
    fleet["edge_gpu"].behaviour = after(clock, 0.097, raises(TargetFailed("broken")))
    error = await failure(router, make_request(clock), family)
    assert outcomes(error.attempts) == [("edge_gpu", "failed")]
    assert error.late
    assert "edge_mcu: skipped: would take 5.0 ms, 2.5 ms are left for it" in error.reasons


async def test_two_lanes_over_one_dead_link_leave_the_edge_its_time(family: Family, clock: ManualClock) -> None:
    """The second lane was slow for others as well: it waits until who is sure to be in time has failed too."""
    gpu, first, second = FakeTarget(GPU), FakeTarget(CLOUD), FakeTarget(SERVERLESS, cost_usd=0.001)
    router = Router(
        [gpu, first, second],
        RoutingSection(hedge_classes=()),
        clock,
        accuracy_of=lambda variant: 0.99 if variant.id == "large" else 0.9,
    )
    first.behaviour = second.behaviour = after(clock, 1.8, raises(TargetTimeout("no reply")))
    asked: dict[str, Any] = {"latency_class": LatencyClass.BATCH, "accuracy": AccuracyMode.HIGH}
    with pytest.raises(NoAnswer):
        only = make_request(clock, 2000, **asked)
        await router.run(only, family, among=lambda traits, _: traits.name == second.traits.name)
    routed = await router.run(make_request(clock, 2000, **asked), family)
    assert outcomes(routed.attempts) == [("cloud_gpu", "timeout"), ("edge_gpu", "ok")]
    assert any(reason.startswith("cloud_serverless: put off") for reason in routed.reasons)


@pytest.mark.parametrize("shared", [True, False])
async def test_what_is_reached_over_a_link_that_was_silent_goes_last(
    family: Family, clock: ManualClock, shared: bool
) -> None:
    gpu = FakeTarget(GPU)
    first = FakeTarget(CLOUD, link="mqtts://one")
    second = FakeTarget(SERVERLESS, link="mqtts://one" if shared else "mqtts://another")
    router = Router(
        [gpu, first, second],
        RoutingSection(hedge_classes=()),
        clock,
        accuracy_of=lambda variant: 0.99 if variant.id == "large" else 0.5,
    )
    first.behaviour = after(clock, 0.2, raises(TargetTimeout("no reply")))
    request = make_request(clock, 5000, latency_class=LatencyClass.BATCH, accuracy=AccuracyMode.HIGH)
    routed = await router.run(request, family)
    after_it = "edge_gpu" if shared else "cloud_serverless"
    assert outcomes(routed.attempts) == [("cloud_gpu", "timeout"), (after_it, "ok")]
    told = "cloud_serverless: put off: reached over the link that was silent"
    assert (told in routed.reasons) == shared


async def test_over_a_silent_link_is_better_than_not_at_all(family: Family, clock: ManualClock) -> None:
    first, second = FakeTarget(CLOUD, link="mqtts://one"), FakeTarget(SERVERLESS, link="mqtts://one")
    router = Router([first, second], RoutingSection(hedge_classes=()), clock)
    first.behaviour = after(clock, 0.2, raises(TargetTimeout("no reply")))
    routed = await router.run(make_request(clock, 5000, latency_class=LatencyClass.BATCH), family)
    assert outcomes(routed.attempts) == [("cloud_gpu", "timeout"), ("cloud_serverless", "ok")]


async def test_a_deadline_that_nobody_can_meet_is_late_at_once(
    router: Router, fleet: dict[str, FakeTarget], family: Family, clock: ManualClock
) -> None:
    error = await failure(router, make_request(clock, 4), family)
    assert error.late
    assert error.attempts == ()
    assert error.reasons[0] == "edge_mcu: not asked: would take 5.0 ms, 3.5 ms of the deadline left"
    assert error.reasons[-1] == "no target can be asked"


async def test_measured_times_rule_out_a_slow_target(family: Family, clock: ManualClock) -> None:
    async def slow(request: InferenceRequest, variant: Variant, deadline: float) -> TargetAnswer:
        return make_answer(compute_s=0.2)

    router = Router([FakeTarget(GPU, slow), FakeTarget(MCU)], SETTINGS, clock)
    assert (await router.run(make_request(clock), family)).traits.name == "edge_gpu"
    assert (await router.run(make_request(clock), family)).traits.name == "edge_mcu"
    clock.advance(61)  # by then less than a third of it still counts
    assert (await router.run(make_request(clock), family)).traits.name == "edge_gpu"


# --- what is shown ---------------------------------------------------------------------------------------------------


async def test_every_decision_gives_reasons(
    router: Router, fleet: dict[str, FakeTarget], family: Family, clock: ManualClock
) -> None:
    for latency_class in LatencyClass:
        routed = await router.run(make_request(clock, latency_class=latency_class), family)
        assert any(reason.startswith(f"{routed.traits.name}: ") for reason in routed.reasons)


async def test_status_tells_what_routing_knows(
    router: Router, fleet: dict[str, FakeTarget], family: Family, clock: ManualClock
) -> None:
    await router.run(make_request(clock), family)
    fleet["edge_mcu"].state = UNPLUGGED
    status = {target["name"]: target for target in router.status()}
    assert list(status) == ["edge_mcu", "edge_gpu", "cloud_gpu", "cloud_serverless"]
    assert (status["edge_mcu"]["available"], status["edge_mcu"]["reason"]) == (False, "unplugged")
    assert status["edge_gpu"]["service_ms"] == {"p50": 1.5, "p95": 2.898}
    assert status["edge_gpu"]["service_ms_by_variant"] == {"toy/medium": {"p50": 1.5, "p95": 2.898}}
    assert (status["edge_gpu"]["requests"], status["edge_gpu"]["failures"]) == (1, 0)
    assert status["cloud_gpu"]["service_ms"] is None
    assert status["edge_gpu"]["breaker"] == {"state": "closed", "failures": 0, "retry_in_s": 0.0}
    assert status["edge_gpu"]["detail"] == {"asked": 1}
    assert [target["service_aged"] for target in router.status()] == [False] * 4
    clock.advance(FRESH_S + 1)
    assert [target["name"] for target in router.status() if target["service_aged"]] == ["edge_gpu"]
    assert router.available()


async def test_a_tier_that_gave_the_answer_to_improve_on_is_not_asked_again(
    router: Router, fleet: dict[str, FakeTarget], family: Family, clock: ManualClock
) -> None:
    for target in fleet.values():
        target.behaviour = raises(TargetFailed("down"))
    request = replace(make_request(clock), avoid=frozenset({MCU}))
    with pytest.raises(NoAnswer) as failed:
        await router.run(request, family)
    assert fleet["edge_mcu"].asked == []
    assert {attempt.target for attempt in failed.value.attempts} == {"edge_gpu", "cloud_gpu", "cloud_serverless"}
