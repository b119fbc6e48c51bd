"""How a request was decided, as it is told afterwards: answers, refusals, cache hits; bounded, without tensors."""

from __future__ import annotations

import asyncio
import gc
import json
import tracemalloc
import weakref
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from fakes import UNPLUGGED, FakeTarget, hangs, make_request, raises

from agent.config import FallbackSection, RoutingSection
from agent.core.clock import ManualClock
from agent.core.errors import InferenceError, TargetFailed, Unavailable
from agent.core.types import Attempt, InferenceRequest, InferenceResult, Tier
from agent.pipeline import Pipeline
from agent.registry.catalog import Catalog
from agent.routing.router import Router
from agent.store.cache import ResultCache
from agent.telemetry.metrics import Metrics
from agent.telemetry.story import Stories, Story


class House:
    """A pipeline with two targets, and everything that is told of it."""

    def __init__(self, catalog: Catalog, clock: ManualClock, keep: int = 3) -> None:
        self.clock = clock
        self.told: list[tuple[InferenceRequest, Story]] = []
        self.gpu = FakeTarget(Tier.EDGE_GPU)
        self.cloud = FakeTarget(Tier.CLOUD_GPU, cost_usd=0.002, region="us")
        self.stories = Stories(keep, clock, self)
        settings = RoutingSection()
        router = Router((self.gpu, self.cloud), settings, clock, watcher=self.stories.routed)
        cache = ResultCache(FallbackSection(cache_ttl=60, stale_ttl=600), None, catalog, clock)
        self.pipeline = Pipeline(catalog, router, cache, Metrics(), clock, settings, stories=self.stories)

    def put(self, request: InferenceRequest, story: Story) -> None:
        self.told.append((request, story))

    async def infer(self, **changes: Any) -> InferenceResult:
        return await self.pipeline.infer(make_request(self.clock, **changes))

    def explained(self, request_id: str = "r1") -> dict[str, Any]:
        found = self.stories.explain(request_id)
        assert found is not None
        json.dumps(found)
        return found


@pytest.fixture
def house(catalog: Catalog, clock: ManualClock) -> House:
    return House(catalog, clock)


async def test_an_answer_is_told_with_every_candidate_and_attempt(house: House) -> None:
    house.gpu.behaviour = raises(TargetFailed("out of memory"))
    result = await house.infer(allowed_regions=frozenset({"us"}), priority=7)
    told = house.explained()
    assert told["request"] | {"deadline_ms": 100.0, "priority": 7, "allowed_regions": ["us"]} == told["request"]
    (stage,) = told["stages"]
    assert (stage["stage"], stage["at_ms"]) == ("route", 0.0)
    decision = stage["decision"]
    assert {one["target"] for one in decision["candidates"]} == {"edge_gpu", "cloud_gpu"}
    assert [play["target"] for play in decision["ranked"]] == ["edge_gpu", "cloud_gpu"]
    assert [(one["target"], one["outcome"]) for one in stage["attempts"]] == [
        ("edge_gpu", "failed"),
        ("cloud_gpu", "ok"),
    ]
    assert stage["attempts"][0]["error"] == "out of memory"
    outcome = told["outcome"]
    assert (outcome["status"], outcome["target"], outcome["cost_usd"]) == ("computed", "cloud_gpu", 0.002)
    assert told["reasons"] == list(result.reasons)
    assert told["at"] == house.clock.wall()


async def test_what_ruled_a_target_out_is_told(house: House) -> None:
    house.cloud.state = UNPLUGGED
    await house.infer()
    (cloud,) = [one for one in house.explained()["stages"][0]["decision"]["candidates"] if one["target"] == "cloud_gpu"]
    assert (cloud["excluded"], cloud["text"], cloud["utility"]) == ("unavailable", "unplugged", None)


async def test_a_refusal_is_told_too(house: House) -> None:
    house.gpu.state = house.cloud.state = UNPLUGGED
    with pytest.raises(Unavailable):
        await house.infer()
    told = house.explained()
    assert (told["outcome"]["status"], told["outcome"]["code"]) == ("refused", "unavailable")
    assert told["outcome"]["message"]
    assert [one["excluded"] for one in told["stages"][0]["decision"]["candidates"]] == ["unavailable"] * 2


async def test_an_answer_from_the_cache_says_that_routing_was_not_asked(house: House, clock: ManualClock) -> None:
    await house.infer()
    clock.advance(5)
    await house.infer(id="r2")
    told = house.explained("r2")
    assert told["stages"] == []
    assert (told["outcome"]["status"], told["outcome"]["age_s"]) == ("cached", 5.0)
    assert told["reasons"] == ["cache: the same input was answered before"]


async def test_a_stale_answer_is_told_with_the_attempts_that_failed(house: House, clock: ManualClock) -> None:
    await house.infer()
    clock.advance(120)
    house.gpu.behaviour = house.cloud.behaviour = raises(TargetFailed("no"))
    await house.infer(id="r2")
    told = house.explained("r2")
    assert told["outcome"]["status"] == "stale"
    assert len(told["stages"][0]["attempts"]) == 2


async def test_who_asks_for_it_gets_it_with_the_answer_and_with_the_refusal(house: House) -> None:
    result = await house.infer(explain=True)
    assert result.explanation == house.explained()
    assert result.to_dict()["explanation"]["stages"][0]["attempts"]
    assert (await house.infer(id="r2", use_cache=False)).explanation is None
    house.gpu.state = house.cloud.state = UNPLUGGED
    with pytest.raises(InferenceError) as caught:
        await house.infer(id="r3", explain=True, model="toy", variant="large", producer="other")
    assert caught.value.to_dict()["explanation"]["outcome"]["code"] == "unavailable"


async def test_the_oldest_is_forgotten_first_and_a_repeated_id_is_told_anew(house: House) -> None:
    for request_id in ("a", "b", "c", "a", "d"):
        await house.infer(id=request_id, use_cache=False)
    assert house.stories.explain("b") is None
    assert all(house.stories.explain(request_id) for request_id in "cad")
    assert len(house.told) == 5


async def test_no_tensor_is_kept(house: House) -> None:
    inputs = np.array([[1.0, 2.0, 3.0, 4.0]], np.float32)
    seen = weakref.ref(inputs)
    await house.infer(inputs={"window": inputs})
    house.told.clear()
    house.gpu.asked.clear()
    del inputs
    gc.collect()
    assert seen() is None
    assert house.explained()


def test_a_cascade_has_two_stages_and_each_its_own_attempts(house: House, clock: ManualClock) -> None:
    class Decision:
        def __init__(self, policy: str) -> None:
            self.policy = policy

        def to_dict(self) -> dict[str, Any]:
            return {"policy": self.policy, "reasons": ["for a person"]}

    request = make_request(clock)
    again = replace(request, max_retries=1)
    attempt = Attempt("edge_gpu", Tier.EDGE_GPU, "medium", "ok", 0.001)
    attempts: list[Attempt] = []
    house.stories.begin(request)
    house.stories.routed(request, Decision("one"), attempts)
    attempts.append(attempt)
    clock.advance(0.004)
    house.stories.routed(again, Decision("two"), [attempt, attempt])
    house.stories.ended(request, Unavailable("no"))
    first, escalation = house.explained()["stages"]
    assert (first["stage"], first["at_ms"], first["decision"]) == ("first", 0.0, {"policy": "one"})
    assert (escalation["stage"], escalation["at_ms"], escalation["decision"]) == ("escalation", 4.0, {"policy": "two"})
    assert (len(first["attempts"]), len(escalation["attempts"])) == (1, 2)


async def test_nothing_is_kept_of_a_request_that_was_cancelled(house: House) -> None:
    house.gpu.behaviour = hangs
    task = asyncio.ensure_future(house.infer())
    await house.gpu.begun.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert house.stories.explain("r1") is None
    assert not house.stories._running


async def test_what_is_decided_for_nobody_is_not_kept(house: House, clock: ManualClock) -> None:
    class Decision:
        def to_dict(self) -> dict[str, Any]:
            raise AssertionError("nobody asks")

    house.stories.routed(make_request(clock, id="stranger"), Decision(), [])
    assert not house.stories._running


async def test_none_is_kept_where_none_is_wanted(catalog: Catalog, clock: ManualClock) -> None:
    house = House(catalog, clock, keep=0)
    assert (await house.infer(explain=True)).explanation is not None
    assert house.stories.explain("r1") is None
    assert len(house.told) == 1


async def test_what_is_remembered_is_small(catalog: Catalog, clock: ManualClock) -> None:
    """docs/operations.md: below 10 kB for each request with two candidates."""
    house, count = House(catalog, clock, keep=200), 200
    for number in range(20):
        await house.infer(id=f"warm-{number}", use_cache=False)
    house.told.clear()
    gc.collect()
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        for number in range(count):
            await house.infer(id=f"r{number}", use_cache=False)
            house.told.clear()
            house.gpu.asked.clear()
        gc.collect()
        after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert 0 < (after - before) / count < 10_000
