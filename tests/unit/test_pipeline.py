"""The pipeline: a fresh answer, a cached one, a stale one with its label, or a refusal that says why."""

import asyncio
import json
from typing import Any

import numpy as np
import pytest
from fakes import (
    INPUT,
    LABELS,
    PATIENCE_S,
    UNPLUGGED,
    FakeTarget,
    after,
    answers,
    family_document,
    hangs,
    make_catalog,
    make_request,
    outcomes,
    raises,
    variant_document,
)

from agent.config import FallbackSection, RoutingSection
from agent.core.clock import Clock, ManualClock, SystemClock
from agent.core.errors import (
    DeadlineExceeded,
    InferenceError,
    Overloaded,
    TargetBusy,
    TargetFailed,
    Unavailable,
    UnknownModel,
)
from agent.core.types import InferenceRequest, InferenceResult, Tier
from agent.pipeline import MAX_RECENT, Pipeline
from agent.registry.catalog import Catalog
from agent.routing.router import Router
from agent.store.cache import ResultCache
from agent.targets.base import AVAILABLE
from agent.telemetry.metrics import Metrics

OTHER = {"window": np.array([[9.0, 9.0, 9.0, 9.0]], np.float32)}
FALLBACK = FallbackSection(cache_ttl=60, stale_ttl=600)


class House:
    """A pipeline and everything below it, with two targets."""

    def __init__(self, catalog: Catalog, clock: Clock, fallback: FallbackSection = FALLBACK, **routing: Any) -> None:
        settings = RoutingSection.model_validate(routing)
        self.clock = clock
        self.gpu = FakeTarget(Tier.EDGE_GPU)
        self.cloud = FakeTarget(Tier.CLOUD_GPU, cost_usd=0.002, region="us")
        self.targets = (self.gpu, self.cloud)
        self.metrics = Metrics()
        router = Router(self.targets, settings, clock)
        cache = ResultCache(fallback, None, catalog, clock)
        self.pipeline = Pipeline(catalog, router, cache, self.metrics, clock, settings)
        self._again = lambda catalog: Pipeline(catalog, router, cache, self.metrics, clock, settings)

    def now_reads(self, **family: Any) -> None:
        """The catalogue says this of the same model files."""
        self.pipeline = self._again(make_catalog(toy=family_document(**family)))

    async def infer(self, deadline_ms: float = 100, **changes: Any) -> InferenceResult:
        async with asyncio.timeout(PATIENCE_S):
            return await self.pipeline.infer(make_request(self.clock, deadline_ms, **changes))

    async def refusal(self, **changes: Any) -> InferenceError:
        with pytest.raises(InferenceError) as caught:
            await self.infer(**changes)
        return caught.value

    def unplug(self) -> None:
        for target in self.targets:
            target.state = UNPLUGGED

    def plug(self) -> None:
        for target in self.targets:
            target.state = AVAILABLE


@pytest.fixture
def house(catalog: Catalog, clock: ManualClock) -> House:
    return House(catalog, clock)


# --- fresh answers ---------------------------------------------------------------------------------------------------


async def test_an_answer_says_all_there_is_to_know(house: House, clock: ManualClock) -> None:
    house.gpu.behaviour = after(clock, 0.004)
    result = await house.infer()
    assert (result.label, result.confidence) == (LABELS[1], pytest.approx(0.7))
    assert (result.tier, result.origin_tier, result.target, result.variant) == (
        "edge_gpu",
        "edge_gpu",
        "edge_gpu",
        "medium",
    )
    assert (result.model_sha256, result.provider) == ("b" * 64, "fake")
    assert (result.cached, result.stale, result.same_input, result.age_s) == (False, False, True, 0.0)
    assert result.total_s == pytest.approx(0.004)
    assert result.deadline_met
    assert outcomes(result.attempts) == [("edge_gpu", "ok")]
    assert result.reasons
    json.dumps(result.to_dict())


async def test_failing_over_shows_every_attempt_and_its_cost(house: House) -> None:
    house.gpu.behaviour = raises(TargetFailed("out of memory"))
    result = await house.infer()
    assert outcomes(result.attempts) == [("edge_gpu", "failed"), ("cloud_gpu", "ok")]
    assert (result.tier, result.cost_usd) == ("cloud_gpu", 0.002)


async def test_an_answer_after_the_deadline_is_said_to_be_late(house: House, clock: ManualClock) -> None:
    house.gpu.behaviour = after(clock, 0.2)
    assert not (await house.infer()).deadline_met


async def test_a_model_that_is_not_there(house: House) -> None:
    error = await house.refusal(model="none")
    assert isinstance(error, UnknownModel)
    assert error.request_id == "r1"


# --- the cache -------------------------------------------------------------------------------------------------------


async def test_the_same_input_is_answered_from_the_cache_with_its_original_tier(
    house: House, clock: ManualClock
) -> None:
    await house.infer()
    clock.advance(10)
    result = await house.infer(id="r2")
    assert len(house.gpu.asked) == 1
    assert (result.request_id, result.target, result.cached, result.stale) == ("r2", "cache", True, False)
    assert (result.tier, result.origin_tier) == ("edge_gpu", "edge_gpu")
    assert (result.label, result.confidence) == (LABELS[1], pytest.approx(0.7))
    assert result.age_s == pytest.approx(10)
    assert (result.cost_usd, result.attempts) == (0.0, ())
    assert result.reasons == ("cache: the same input was answered before",)


@pytest.mark.parametrize("changes", [{"inputs": OTHER}, {"variant": "medium"}, {"use_cache": False}])
async def test_another_question_is_asked_anew(house: House, changes: Any) -> None:
    await house.infer()
    result = await house.infer(**changes)
    assert not result.cached
    assert len(house.gpu.asked) == 2


async def test_an_answer_that_is_not_fresh_any_more_is_asked_anew(house: House, clock: ManualClock) -> None:
    await house.infer()
    clock.advance(60.001)
    assert not (await house.infer()).cached


async def test_a_cached_answer_costs_no_place(catalog: Catalog, clock: ManualClock) -> None:
    house = House(catalog, clock, max_in_flight=1)
    await house.infer()
    house.gpu.behaviour, house.gpu.begun = hangs, asyncio.Event()
    blocking = asyncio.create_task(house.infer(60_000, inputs=OTHER))
    await house.gpu.begun.wait()
    assert (await house.infer()).cached
    blocking.cancel()
    await asyncio.gather(blocking, return_exceptions=True)


# --- stale answers ---------------------------------------------------------------------------------------------------


async def test_when_nobody_answers_the_stale_answer_is_given_and_labelled(house: House, clock: ManualClock) -> None:
    await house.infer()
    clock.advance(120)
    house.unplug()
    result = await house.infer()
    assert (result.tier, result.origin_tier, result.target) == ("fallback", "edge_gpu", "cache")
    assert (result.cached, result.stale, result.same_input) == (True, True, True)
    assert result.age_s == pytest.approx(120)
    assert result.label == LABELS[1]
    assert result.reasons == (
        "edge_gpu: not asked: unplugged",
        "cloud_gpu: not asked: unplugged",
        "no target can be asked",
        "cache: no target answered; an earlier answer to the same input",
    )


async def test_a_stale_answer_tells_what_was_tried_and_paid(house: House, clock: ManualClock) -> None:
    await house.infer()
    clock.advance(120)
    for target in house.targets:
        target.behaviour = raises(TargetFailed("broken"))
    result = await house.infer()
    assert outcomes(result.attempts) == [("edge_gpu", "failed"), ("cloud_gpu", "failed")]
    assert result.cost_usd == 0.002
    assert result.stale


async def test_the_last_known_answer_of_the_producer_is_said_to_be_of_another_input(
    house: House, clock: ManualClock
) -> None:
    await house.infer(producer="press-7")
    clock.advance(5)
    house.unplug()
    result = await house.infer(producer="press-7", inputs=OTHER)
    assert (result.tier, result.stale, result.same_input, result.age_s) == ("fallback", True, False, pytest.approx(5))
    assert result.confidence is None, "how sure the model was of an earlier input says nothing of this one"
    assert result.reasons[-1] == "cache: no target answered; the last known answer of producer press-7"
    assert isinstance(await house.refusal(producer="press-8", inputs=OTHER), Unavailable)
    assert isinstance(await house.refusal(producer="press-7", inputs=OTHER, variant="large"), Unavailable)


async def test_a_stale_answer_is_better_than_none_even_where_fresh_ones_are_not_wanted(house: House) -> None:
    await house.infer()
    house.unplug()
    result = await house.infer(use_cache=False)
    assert (result.tier, result.stale) == ("fallback", True)


async def test_a_stale_answer_ages_while_others_are_tried(house: House, clock: ManualClock) -> None:
    await house.infer()
    clock.advance(120)
    house.gpu.behaviour = after(clock, 40.0, raises(TargetFailed("broken")))
    house.cloud.state = UNPLUGGED
    assert (await house.infer(60_000)).age_s == pytest.approx(160)
    clock.advance(420)
    assert isinstance(await house.refusal(deadline_ms=60_000), Unavailable), "by then it is 620 s old"


async def test_a_request_is_one_look_up_however_often_the_cache_is_asked(house: House, clock: ManualClock) -> None:
    await house.infer()
    clock.advance(120)
    house.unplug()
    assert (await house.infer()).stale
    assert house.pipeline._cache.stats()["lookups"] == {"fresh": 0, "stale": 1, "missed": 1}


async def test_what_another_was_told_meanwhile_is_an_earlier_answer(house: House, clock: ManualClock) -> None:
    async def breaks(*_: Any) -> Any:
        house.gpu.behaviour = answers
        await house.infer(producer="another")
        raise TargetFailed("broken")

    house.gpu.behaviour, house.cloud.state = breaks, UNPLUGGED
    assert (await house.infer(producer="one")).same_input


async def test_a_stale_answer_says_what_is_odd_about_the_inputs(house: House) -> None:
    odd = {"out_of_range": True, "notes": ("inputs.window: 9 to 9; the model was trained on 0 to 1",)}
    await house.infer(**odd)
    house.unplug()
    result = await house.infer(use_cache=False, **odd)
    assert (result.stale, result.out_of_range) == (True, True)
    assert result.reasons[0] == odd["notes"][0]


async def test_a_fresh_answer_of_a_tier_to_be_avoided_will_not_do(house: House) -> None:
    await house.infer()
    result = await house.infer(avoid=frozenset({Tier.EDGE_GPU}))
    assert (result.target, result.cached) == ("cloud_gpu", False)


async def test_a_remembered_answer_has_the_labels_of_today(house: House) -> None:
    await house.infer()
    house.now_reads(labels=["rest", "run", "walk"])
    result = await house.infer()
    assert (result.cached, result.label) == (True, "run")


async def test_a_remembered_answer_whose_outputs_have_other_names_now_is_asked_anew(house: House) -> None:
    await house.infer()
    scores_of = {"name": "scores", "dtype": "float32", "shape": [1, 3]}
    variant = variant_document("edge_gpu", outputs=[{**scores_of, "name": "out", "maps": "scores"}])
    house.now_reads(outputs=[scores_of], variants={"medium": variant})

    async def scores(*_: Any) -> Any:
        answer = await answers(*_)
        return answer._replace(outputs={"scores": answer.outputs["probabilities"]})

    house.gpu.behaviour = scores
    result = await house.infer()
    assert (result.cached, list(result.outputs)) == (False, ["scores"])


async def test_stale_answers_can_be_switched_off(catalog: Catalog, clock: ManualClock) -> None:
    house = House(catalog, clock, FallbackSection(cache_ttl=60, enable_stale_results=False))
    await house.infer()
    clock.advance(61)
    house.unplug()
    assert isinstance(await house.refusal(), Unavailable)
    assert isinstance(await house.refusal(inputs=OTHER), Unavailable)


async def test_an_answer_can_be_too_old_for_anything(house: House, clock: ManualClock) -> None:
    await house.infer()
    clock.advance(600.001)
    house.unplug()
    assert isinstance(await house.refusal(), Unavailable)


# --- refusals --------------------------------------------------------------------------------------------------------


async def test_nobody_there(house: House) -> None:
    house.unplug()
    error = await house.refusal()
    assert type(error) is Unavailable
    assert (error.http_status, error.retry_after_s, error.attempts, error.cost_usd) == (503, 1.0, (), 0.0)
    assert error.reasons[-2:] == ("no target can be asked", "cache: no earlier answer")
    assert error.to_dict()["request_id"] == "r1"


async def test_everybody_fails(house: House) -> None:
    for target in house.targets:
        target.behaviour = raises(TargetFailed("broken"))
    error = await house.refusal()
    assert type(error) is Unavailable
    assert outcomes(error.attempts) == [("edge_gpu", "failed"), ("cloud_gpu", "failed")]
    assert error.cost_usd == 0.002
    assert "edge_gpu: failed after 0.0 ms: broken" in error.reasons
    json.dumps(error.to_dict())


async def test_everybody_is_busy(house: House) -> None:
    for target in house.targets:
        target.behaviour = raises(TargetBusy("queue full"))
    error = await house.refusal()
    assert type(error) is Overloaded
    assert (error.http_status, error.retry_after_s) == (429, 1.0)


async def test_nobody_can_be_in_time(house: House) -> None:
    error = await house.refusal(deadline_ms=2)
    assert type(error) is DeadlineExceeded
    assert error.http_status == 504
    assert "edge_gpu: not asked: would take 5.0 ms, 1.5 ms of the deadline left" in error.reasons


async def test_time_runs_out(house: House, clock: ManualClock) -> None:
    house.gpu.behaviour = after(clock, 0.099, raises(TargetFailed("broken")))
    error = await house.refusal()
    assert type(error) is DeadlineExceeded
    assert outcomes(error.attempts) == [("edge_gpu", "failed")]


async def test_a_hung_target_does_not_keep_a_caller_waiting(catalog: Catalog) -> None:
    clock = SystemClock()
    house = House(catalog, clock)
    for target in house.targets:
        target.behaviour = hangs
    began = clock.monotonic()
    error = await house.refusal(deadline_ms=80)
    assert type(error) is DeadlineExceeded
    assert clock.monotonic() - began >= 0.05
    assert [target.running for target in house.targets] == [0, 0]


async def test_every_place_and_the_line_before_them_taken(catalog: Catalog, clock: ManualClock) -> None:
    house = House(catalog, clock, max_in_flight=1, overload={"waiting": {"near": 0}})
    await house.infer()
    house.gpu.behaviour, house.gpu.begun = hangs, asyncio.Event()
    blocking = asyncio.create_task(house.infer(60_000, inputs=OTHER))
    await house.gpu.begun.wait()
    error = await house.refusal(producer="somebody else", inputs={"window": INPUT + 1})
    assert type(error) is Overloaded
    refusal = "every place is taken, and so is the line of near requests that wait"
    assert str(error) == refusal
    assert error.reasons == (f"daemon: {refusal}", "cache: no earlier answer")
    clock.advance(61)
    assert (await house.infer()).stale
    blocking.cancel()
    await asyncio.gather(blocking, return_exceptions=True)
    house.gpu.behaviour = answers
    assert not (await house.infer(use_cache=False)).stale


async def test_a_region_that_is_not_allowed_never_sees_the_inputs(house: House) -> None:
    house.gpu.state = UNPLUGGED
    allowed = frozenset({"eu"})
    error = await house.refusal(allowed_regions=allowed)
    assert type(error) is Unavailable
    assert "cloud_gpu: not asked: region us is not allowed" in error.reasons
    house.gpu.state, house.gpu.behaviour = AVAILABLE, raises(TargetFailed("broken"))
    assert outcomes((await house.refusal(allowed_regions=allowed)).attempts) == [("edge_gpu", "failed")]
    assert not house.cloud.asked
    assert (await house.infer(allowed_regions=frozenset({"eu", "us"}))).target == "cloud_gpu"


async def test_a_defect_inside_is_a_refusal_with_a_code(house: House, caplog: pytest.LogCaptureFixture) -> None:
    async def wrong(*_: Any) -> Any:
        return (await answers(*_)).__class__({}, "fake", 0.0, 0.0, 0.0)  # an answer without outputs

    house.gpu.behaviour = wrong
    error = await house.refusal()
    assert (error.code, error.http_status) == ("internal", 500)
    assert str(error) == "KeyError inside the daemon; its log says more"
    assert error.request_id == "r1"
    assert caplog.records[-1].exc_info
    assert house.metrics.counters()["refused"] == 1
    assert house.metrics.active == house.pipeline.in_flight == 0


# --- what is recorded ------------------------------------------------------------------------------------------------


async def test_everything_is_counted_once(house: House) -> None:
    await house.infer()
    await house.infer()
    house.unplug()
    await house.infer(inputs=OTHER)
    await house.refusal(producer="p", inputs=OTHER)
    counters = house.metrics.counters()
    assert {key: counters[key] for key in ("requests", "answered", "refused", "stale", "cached", "active")} == {
        "requests": 4,
        "answered": 3,
        "refused": 1,
        "stale": 1,
        "cached": 1,
        "active": 0,
    }


async def test_listeners_hear_answers_and_refusals_and_cannot_lose_them(
    house: House, caplog: pytest.LogCaptureFixture
) -> None:
    heard: list[tuple[InferenceRequest, InferenceResult | InferenceError]] = []

    def breaks(*_: object) -> None:
        raise OSError("disk full")

    house.pipeline.listeners += [breaks, lambda request, outcome: heard.append((request, outcome))]
    result = await house.infer()
    house.unplug()
    error = await house.refusal(producer="p", inputs=OTHER)
    assert [outcome for _, outcome in heard] == [result, error]
    assert [outcome for _, outcome in house.pipeline.recent] == [result, error]
    assert [record.message for record in caplog.records] == ["a listener failed"] * 2


async def test_the_recent_ones_are_bounded(house: House) -> None:
    for _ in range(MAX_RECENT + 5):
        await house.infer()
    assert len(house.pipeline.recent) == MAX_RECENT
