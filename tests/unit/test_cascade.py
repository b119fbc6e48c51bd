"""The cascade: when it escalates, to whom, and that an answer which is held is never lost."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import pytest
from cascade_fakes import THRESHOLD, Tiers, sure
from fakes import LABELS, PATIENCE_S, UNPLUGGED, FakeTarget, hangs, make_request, outcomes, raises
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.config import AccuracySection, FallbackSection
from agent.core.clock import ManualClock, SystemClock
from agent.core.errors import TargetBusy, TargetFailed, TargetUnavailable
from agent.core.types import AccuracyMode, InferenceRequest, InferenceResult, TargetAnswer
from agent.pipeline import Pipeline
from agent.registry.catalog import Variant
from agent.routing.cascade import HOLD_MIN_S, Answered, Cascade
from agent.routing.router import NoAnswer, of_the_catalogue
from agent.store.cache import ResultCache
from agent.targets.base import AVAILABLE
from agent.telemetry.metrics import Metrics


@pytest.fixture
def tiers(clock: ManualClock) -> Tiers:
    return Tiers(clock)


async def run(tiers: Tiers, clock: Any, deadline_ms: float = 100, floor: float = 0.9, **changes: Any) -> Answered:
    cascade = Cascade(tiers.router, AccuracySection(floor=floor), clock, of_the_catalogue)
    async with asyncio.timeout(PATIENCE_S):
        return await cascade.run(make_request(clock, deadline_ms, **changes), tiers.family)


def only(tiers: Tiers, *kept: FakeTarget) -> None:
    for target in tiers.targets:
        if target not in kept:
            target.state = UNPLUGGED


# --- adaptive --------------------------------------------------------------------------------------------------------


async def test_a_sure_answer_of_the_edge_is_taken(tiers: Tiers, clock: ManualClock) -> None:
    answered = await run(tiers, clock)
    assert (answered.escalation, answered.classified.confidence) == ("", pytest.approx(0.9, abs=1e-6))
    assert answered.classified.calibrated
    assert not tiers.cloud.asked
    assert answered.routed.cost_usd == 0.0


async def test_an_answer_that_is_not_sure_is_asked_of_the_most_accurate(tiers: Tiers, clock: ManualClock) -> None:
    tiers.gpu.behaviour = sure(0.7)
    answered = await run(tiers, clock)
    assert answered.escalation == "escalated"
    assert (answered.first.label, answered.classified.label) == (LABELS[1], LABELS[2])
    assert outcomes(answered.routed.attempts) == [("edge_gpu", "ok"), ("cloud_gpu", "ok")]
    assert answered.routed.cost_usd == pytest.approx(0.001)
    assert any(f"confidence 0.700 is below {THRESHOLD:.3f}" in reason for reason in answered.routed.reasons)


async def test_from_the_board_the_gateway_is_passed_over(tiers: Tiers, clock: ManualClock) -> None:
    """Losses of two thresholds would add up: docs/cascade.md has the figures."""
    tiers.mcu.state = AVAILABLE
    tiers.mcu.behaviour = sure(0.7)
    answered = await run(tiers, clock)
    assert outcomes(answered.routed.attempts) == [("edge_mcu", "ok"), ("cloud_gpu", "ok")]


async def test_without_the_cloud_the_gateway_answers_for_the_board(tiers: Tiers, clock: ManualClock) -> None:
    tiers.mcu.state = AVAILABLE
    tiers.mcu.behaviour, tiers.gpu.behaviour = sure(0.7), sure(0.95, label=0)
    tiers.cloud.behaviour = raises(TargetFailed("x"))
    answered = await run(tiers, clock)
    assert outcomes(answered.routed.attempts) == [("edge_mcu", "ok"), ("cloud_gpu", "failed"), ("edge_gpu", "ok")]
    assert (answered.escalation, answered.classified.label) == ("escalated", LABELS[0])


async def test_where_the_gateway_is_not_sure_either_its_answer_is_held(tiers: Tiers, clock: ManualClock) -> None:
    tiers.mcu.state = AVAILABLE
    tiers.mcu.behaviour, tiers.gpu.behaviour = sure(0.7), sure(0.6, label=0)
    tiers.cloud.state = UNPLUGGED
    answered = await run(tiers, clock)
    assert (answered.escalation, answered.classified.label, answered.routed.variant.id) == ("held", LABELS[0], "medium")


async def test_an_answer_of_the_cloud_is_the_last_word(tiers: Tiers, clock: ManualClock) -> None:
    only(tiers, tiers.cloud)
    tiers.cloud.behaviour = sure(0.4)
    answered = await run(tiers, clock)
    assert (answered.escalation, len(tiers.cloud.asked)) == ("", 1)


async def test_a_pinned_variant_is_what_was_asked_for(tiers: Tiers, clock: ManualClock) -> None:
    tiers.gpu.behaviour = sure(0.4)
    answered = await run(tiers, clock, variant="medium")
    assert (answered.escalation, answered.routed.variant.id) == ("", "medium")
    assert not tiers.cloud.asked


# --- what is held is never lost --------------------------------------------------------------------------------------

FAULTS = {
    "unavailable": raises(TargetUnavailable("gone")),
    "busy": raises(TargetBusy("full")),
    "failed": raises(TargetFailed("out of memory")),
    "defect": raises(RuntimeError("a defect")),
    "cancels itself": raises(asyncio.CancelledError()),
}


@pytest.mark.parametrize("fault", FAULTS)
async def test_whatever_the_cloud_does_the_held_answer_is_returned(
    tiers: Tiers, clock: ManualClock, fault: str
) -> None:
    tiers.gpu.behaviour, tiers.cloud.behaviour = sure(0.7), FAULTS[fault]
    answered = await run(tiers, clock)
    assert (answered.escalation, answered.classified.label, answered.routed.traits.name) == (
        "held",
        LABELS[1],
        "edge_gpu",
    )
    assert outcomes(answered.routed.attempts)[0] == ("edge_gpu", "ok")
    assert len(answered.routed.attempts) == 2
    assert answered.routed.attempts[1].outcome != "ok"


async def test_a_cloud_that_hangs_is_cut_off_in_time_to_return_the_held_answer() -> None:
    clock = SystemClock()
    tiers = Tiers(clock)
    tiers.gpu.behaviour, tiers.cloud.behaviour = sure(0.7), hangs
    request = make_request(clock, 60)
    cascade = Cascade(tiers.router, AccuracySection(), clock, of_the_catalogue)
    async with asyncio.timeout(PATIENCE_S):
        answered = await cascade.run(request, tiers.family)
    assert answered.escalation == "held"
    (_, _, until) = tiers.cloud.asked[0]
    assert until <= request.deadline - HOLD_MIN_S
    assert tiers.cloud.running == 0


async def test_no_time_left_is_no_escalation(tiers: Tiers, clock: ManualClock) -> None:
    async def slow(request: InferenceRequest, variant: Variant, deadline: float) -> TargetAnswer:
        clock.advance(0.0995)
        return await sure(0.7)(request, variant, deadline)

    tiers.gpu.behaviour = slow
    answered = await run(tiers, clock, 100)
    assert answered.escalation == "held"
    assert not tiers.cloud.asked
    assert any("deadline" in reason for reason in answered.routed.reasons)


async def test_a_region_that_is_not_allowed_sees_nothing(tiers: Tiers, clock: ManualClock) -> None:
    tiers.gpu.behaviour = sure(0.7)
    answered = await run(tiers, clock, allowed_regions=frozenset({"us"}))
    assert answered.escalation == "held"
    assert not tiers.cloud.asked


async def test_a_budget_that_is_spent_holds_the_answer(clock: ManualClock) -> None:
    class Spent:
        def objection(self, lane: str, cost_usd: float, bytes: int, priority: int, now: float) -> str:
            return "0 USD left today"

        def spend(self, lane: str, cost_usd: float, bytes: int, now: float) -> None:
            raise AssertionError("nothing may be spent")

    tiers = Tiers(clock)
    tiers.router._budgets = Spent()
    tiers.gpu.behaviour = sure(0.7)
    answered = await run(tiers, clock)
    assert (answered.escalation, answered.routed.cost_usd) == ("held", 0.0)
    assert any("0 USD left today" in reason for reason in answered.routed.reasons)


async def test_a_caller_who_goes_away_leaves_nothing_behind(tiers: Tiers, clock: ManualClock) -> None:
    tiers.gpu.behaviour, tiers.cloud.behaviour = sure(0.7), hangs
    task = asyncio.create_task(run(tiers, clock))
    async with asyncio.timeout(PATIENCE_S):
        await tiers.cloud.begun.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert tiers.cloud.running == 0
    assert all(state.in_flight == 0 for state in tiers.router._states.values())


async def test_a_fault_of_the_daemon_itself_costs_no_answer(
    tiers: Tiers, clock: ManualClock, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiers.gpu.behaviour = sure(0.7)
    run_ = tiers.router.run
    calls = iter([run_])

    async def breaks(*args: Any, **options: Any) -> Any:
        return await next(calls)(*args, **options)

    monkeypatch.setattr(tiers.router, "run", breaks)
    with caplog.at_level(logging.ERROR):
        answered = await run(tiers, clock)
    assert answered.escalation == "held"
    assert "an escalation failed inside the daemon" in caplog.text


async def test_retries_of_both_stages_count_together(tiers: Tiers, clock: ManualClock) -> None:
    tiers.mcu.state = AVAILABLE
    tiers.mcu.behaviour, tiers.gpu.behaviour = raises(TargetFailed("x")), sure(0.7)
    tiers.cloud.behaviour = raises(TargetFailed("y"))
    answered = await run(tiers, clock, max_retries=1)
    assert outcomes(answered.routed.attempts) == [("edge_mcu", "failed"), ("edge_gpu", "ok"), ("cloud_gpu", "failed")]
    assert answered.escalation == "held"


@settings(max_examples=60, deadline=None)
@given(
    confidence=st.floats(0.34, 1.0),
    cloud=st.sampled_from(["ok", *FAULTS, "unplugged"]),
    deadline_ms=st.floats(3, 200),
    retries=st.integers(0, 4),
)
async def test_once_the_edge_has_answered_there_is_an_answer(
    confidence: float, cloud: str, deadline_ms: float, retries: int
) -> None:
    clock = ManualClock()
    tiers = Tiers(clock)
    only(tiers, tiers.gpu, tiers.cloud)
    tiers.gpu.behaviour = sure(confidence)
    if cloud == "unplugged":
        tiers.cloud.state = UNPLUGGED
    elif cloud != "ok":
        tiers.cloud.behaviour = FAULTS[cloud]
    try:
        answered = await run(tiers, clock, deadline_ms, max_retries=retries)
    except NoAnswer:
        assert not tiers.gpu.asked
        return
    if answered.routed.traits.name == "edge_gpu":
        assert (answered.escalation == "") == (answered.classified.confidence >= THRESHOLD)
    assert answered.routed.cost_usd == pytest.approx(
        0.001 * sum(a.target == "cloud_gpu" and a.outcome != "busy" for a in answered.routed.attempts)
    )


# --- the other modes -------------------------------------------------------------------------------------------------


async def test_high_asks_the_most_accurate_first_and_the_next_when_that_fails(tiers: Tiers, clock: ManualClock) -> None:
    tiers.cloud.behaviour = raises(TargetFailed("x"))
    answered = await run(tiers, clock, accuracy=AccuracyMode.HIGH)
    assert outcomes(answered.routed.attempts) == [("cloud_gpu", "failed"), ("edge_gpu", "ok")]


async def test_acceptable_takes_what_routing_prefers_above_the_floor(tiers: Tiers, clock: ManualClock) -> None:
    tiers.gpu.behaviour = sure(0.4)
    answered = await run(tiers, clock, accuracy=AccuracyMode.ACCEPTABLE)
    assert (answered.escalation, answered.routed.traits.name) == ("", "edge_gpu")


async def test_acceptable_never_asks_below_the_floor(tiers: Tiers, clock: ManualClock) -> None:
    tiers.gpu.state, tiers.mcu.state, tiers.cloud.state = UNPLUGGED, AVAILABLE, UNPLUGGED
    with pytest.raises(NoAnswer) as caught:
        await run(tiers, clock, floor=0.95, accuracy=AccuracyMode.ACCEPTABLE)
    assert not tiers.mcu.asked
    assert caught.value.reasons[-1] == "not asked: small: below accuracy.floor 0.95"


@pytest.mark.parametrize(("policy", "gain"), [("utility", 0.025), ("scorecard", 0.0)])
async def test_a_first_stage_counts_as_right_as_the_cascade(clock: ManualClock, policy: str, gain: float) -> None:
    tiers = Tiers(clock, policy=policy)
    for mode, more in ((AccuracyMode.ADAPTIVE, gain), (AccuracyMode.HIGH, 0.0)):
        decision, _ = tiers.router.decide(make_request(clock, accuracy=mode), tiers.family, clock.monotonic())
        (judged,) = (one for one in decision.judged if one.variant == "medium")
        assert judged.estimate.accuracy == pytest.approx(0.96 + more)


@pytest.mark.parametrize("why", ["unplugged", "another region", "too late"])
async def test_what_cannot_be_asked_again_counts_as_right_as_it_is(clock: ManualClock, why: str) -> None:
    tiers = Tiers(clock)
    changes: dict[str, Any] = {"accuracy": AccuracyMode.ADAPTIVE}
    if why == "unplugged":
        tiers.cloud.state = UNPLUGGED
    elif why == "another region":
        changes["allowed_regions"] = frozenset({"mars"})
    request = make_request(clock, 1.0 if why == "too late" else 100.0, **changes)
    decision, _ = tiers.router.decide(request, tiers.family, clock.monotonic())
    (judged,) = (one for one in decision.judged if one.variant == "medium")
    assert judged.estimate.accuracy == pytest.approx(0.96)


# --- the cache -------------------------------------------------------------------------------------------------------


class House:
    def __init__(self, clock: ManualClock) -> None:
        self.tiers = Tiers(clock)
        self.clock = clock
        cache = ResultCache(FallbackSection(), None, self.tiers.catalog, clock)
        self.metrics = Metrics()
        self.pipeline = Pipeline(self.tiers.catalog, self.tiers.router, cache, self.metrics, clock, self.tiers.settings)

    async def infer(self, accuracy: AccuracyMode, **changes: Any) -> InferenceResult:
        async with asyncio.timeout(PATIENCE_S):
            return await self.pipeline.infer(make_request(self.clock, 100, accuracy=accuracy, **changes))


@pytest.fixture
def house(clock: ManualClock) -> House:
    return House(clock)


MODES = [AccuracyMode.ACCEPTABLE, AccuracyMode.ADAPTIVE, AccuracyMode.HIGH]
"""From the one that asks least."""


@pytest.mark.parametrize("first", MODES)
@pytest.mark.parametrize("then", MODES)
async def test_no_cached_answer_for_who_asks_for_more(house: House, first: AccuracyMode, then: AccuracyMode) -> None:
    """The gateway is not sure, so each mode gets another answer."""
    house.tiers.gpu.behaviour = sure(0.7)
    await house.infer(first)
    again = await house.infer(then)
    asks_more = first is AccuracyMode.ACCEPTABLE and then is not first
    assert again.cached is not asks_more


async def test_a_held_answer_is_asked_again_when_the_cloud_is_back(house: House) -> None:
    house.tiers.gpu.behaviour, house.tiers.cloud.state = sure(0.7), UNPLUGGED
    assert (await house.infer(AccuracyMode.ADAPTIVE)).escalation == "held"
    house.tiers.cloud.state = house.tiers.gpu.state
    assert (await house.infer(AccuracyMode.ADAPTIVE)).escalation == "escalated"
    assert (await house.infer(AccuracyMode.ADAPTIVE)).cached


async def test_a_held_answer_is_still_better_than_none(house: House) -> None:
    house.tiers.gpu.behaviour, house.tiers.cloud.state = sure(0.7), UNPLUGGED
    await house.infer(AccuracyMode.ADAPTIVE)
    house.tiers.gpu.state = UNPLUGGED
    stale = await house.infer(AccuracyMode.ADAPTIVE)
    assert (stale.tier, stale.stale, stale.confidence) == ("fallback", True, pytest.approx(0.7, abs=1e-6))


async def test_one_key_is_one_mode(house: House) -> None:
    await house.infer(AccuracyMode.ACCEPTABLE, idempotency_key="k")
    with pytest.raises(Exception, match="was used for another question"):
        await house.infer(AccuracyMode.HIGH, idempotency_key="k")


async def test_what_the_models_are_sure_of_is_counted(house: House) -> None:
    await house.infer(AccuracyMode.ADAPTIVE)
    house.tiers.gpu.behaviour = sure(0.7)
    await house.infer(AccuracyMode.ADAPTIVE, use_cache=False, out_of_range=True)
    shown = house.metrics.quality.status()["toy/medium"]
    assert (shown["answers"], shown["taken"], shown["escalated"], shown["held"]) == (2, 1, 1, 0)
    text = house.metrics.render().decode()
    assert 'edge_agent_cascade_total{model="toy",outcome="escalated",variant="medium"} 1.0' in text
    assert 'edge_agent_out_of_range_total{model="toy"} 1.0' in text
    assert 'edge_agent_confidence_bucket{le="0.7",model="toy",variant="medium"} 1.0' in text
