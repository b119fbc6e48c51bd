"""One answer for each idempotency key, and a pipeline that can be drained."""

import asyncio
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from fakes import PATIENCE_S, UNPLUGGED, FakeTarget, answers, make_answer, make_request, raises

from agent import pipeline as module
from agent.config import FallbackSection, RoutingSection
from agent.core.clock import ManualClock
from agent.core.errors import DeadlineExceeded, InvalidRequest, TargetFailed, Unavailable
from agent.core.types import InferenceRequest, InferenceResult, TargetAnswer, Tier
from agent.pipeline import Pipeline
from agent.registry.catalog import Catalog, Variant
from agent.routing.router import Router
from agent.store.cache import ResultCache
from agent.targets.base import AVAILABLE
from agent.telemetry.metrics import Metrics

OTHER = {"window": np.array([[9.0, 9.0, 9.0, 9.0]], np.float32)}
Ask = Callable[..., asyncio.Task[InferenceResult]]


class Gate:
    """A behaviour that answers when it is let."""

    def __init__(self) -> None:
        self.open = asyncio.Event()

    async def __call__(self, request: InferenceRequest, variant: Variant, deadline: float) -> TargetAnswer:
        await self.open.wait()
        return make_answer()


@pytest.fixture
def target() -> FakeTarget:
    return FakeTarget(Tier.CLOUD_GPU, cost_usd=0.002)


@pytest.fixture
def pipeline(catalog: Catalog, clock: ManualClock, target: FakeTarget) -> Pipeline:
    settings = RoutingSection()
    cache = ResultCache(FallbackSection(enable_stale_results=False), None, catalog, clock)
    return Pipeline(catalog, Router([target], settings, clock), cache, Metrics(), clock, settings)


@pytest.fixture
def ask(pipeline: Pipeline, clock: ManualClock) -> Ask:
    def ask(id_: str = "r1", key: str | None = "k", deadline_ms: float = 60_000, **changes: Any) -> Any:
        request = make_request(clock, deadline_ms, id=id_, idempotency_key=key, use_cache=False, **changes)
        return asyncio.create_task(pipeline.infer(request))

    return ask


async def soon(task: asyncio.Task[InferenceResult]) -> InferenceResult:
    async with asyncio.timeout(PATIENCE_S):
        return await task


async def begun(target: FakeTarget) -> None:
    async with asyncio.timeout(PATIENCE_S):
        await target.begun.wait()
    target.begun.clear()


async def test_duplicates_at_the_same_time_run_once(target: FakeTarget, ask: Ask, clock: ManualClock) -> None:
    target.behaviour = gate = Gate()
    tasks = [ask(f"r{n}") for n in range(5)]
    await begun(target)
    clock.advance(0.01)
    gate.open.set()
    results = [await soon(task) for task in tasks]
    assert len(target.asked) == 1
    assert [result.request_id for result in results] == ["r0", "r1", "r2", "r3", "r4"]
    assert [result.cached for result in results] == [False, True, True, True, True]
    assert sum(result.cost_usd for result in results) == 0.002
    assert {result.label for result in results} == {"walk"}
    assert results[1].reasons[0] == "daemon: answered before under the same idempotency key"


async def test_a_duplicate_later_gets_the_same_answer_and_its_age(
    target: FakeTarget, ask: Ask, clock: ManualClock
) -> None:
    await soon(ask())
    clock.advance(100)
    result = await soon(ask("r2"))
    assert len(target.asked) == 1
    assert (result.cached, result.age_s, result.request_id) == (True, pytest.approx(100), "r2")
    assert (result.total_s, result.deadline_met) == (0.0, True)
    assert (result.tier, result.target) == ("cloud_gpu", "cloud_gpu")


@pytest.mark.parametrize("changes", [{"producer": "other"}, {"key": "l"}, {"key": None}])
async def test_a_key_is_of_one_producer(target: FakeTarget, ask: Ask, changes: Any) -> None:
    await soon(ask())
    assert not (await soon(ask(**changes))).cached
    assert len(target.asked) == 2


@pytest.mark.parametrize("changes", [{"inputs": OTHER}, {"variant": "large"}])
async def test_a_key_is_of_one_question(target: FakeTarget, ask: Ask, changes: Any) -> None:
    await soon(ask())
    with pytest.raises(InvalidRequest, match="was used for another question before") as caught:
        await soon(ask("r2", **changes))
    assert (caught.value.field, caught.value.request_id) == ("idempotency_key", "r2")
    assert len(target.asked) == 1


async def test_a_refusal_reaches_every_duplicate_under_its_own_id(target: FakeTarget, ask: Ask) -> None:
    release = asyncio.Event()

    async def fails(request: InferenceRequest, variant: Variant, deadline: float) -> TargetAnswer:
        await release.wait()
        raise TargetFailed("broken")

    target.behaviour = fails
    tasks = [ask("r1"), ask("r2")]
    await begun(target)
    release.set()
    errors = await asyncio.gather(*tasks, return_exceptions=True)
    assert [type(error) for error in errors] == [Unavailable, Unavailable]
    assert [error.request_id for error in errors if isinstance(error, Unavailable)] == ["r1", "r2"]
    assert [len(error.attempts) for error in errors if isinstance(error, Unavailable)] == [1, 1]
    assert len(target.asked) == 1


async def test_after_a_refusal_the_same_key_may_be_tried_again(target: FakeTarget, ask: Ask) -> None:
    target.behaviour = raises(TargetFailed("broken"))
    with pytest.raises(Unavailable):
        await soon(ask())
    target.behaviour = answers
    assert not (await soon(ask("r2"))).cached
    assert (await soon(ask("r3"))).cached
    assert len(target.asked) == 2


async def test_when_the_first_caller_goes_away_a_duplicate_takes_over(target: FakeTarget, ask: Ask) -> None:
    target.behaviour = gate = Gate()
    first, second, third = ask("r1"), ask("r2"), ask("r3")
    await begun(target)
    first.cancel()
    await begun(target)
    gate.open.set()
    assert (await soon(second)).request_id == "r2"
    assert (await soon(third)).request_id == "r3"
    assert first.cancelled()
    assert len(target.asked) == 2


async def test_a_duplicate_that_goes_away_takes_nothing_along(target: FakeTarget, ask: Ask) -> None:
    target.behaviour = gate = Gate()
    first, second = ask("r1"), ask("r2")
    await begun(target)
    second.cancel()
    await asyncio.gather(second, return_exceptions=True)
    assert second.cancelled()
    gate.open.set()
    assert (await soon(first)).request_id == "r1"


async def test_a_duplicate_keeps_its_own_deadline(target: FakeTarget, ask: Ask) -> None:
    target.behaviour = gate = Gate()
    first = ask("r1")
    await begun(target)
    with pytest.raises(DeadlineExceeded, match="asked before, is not answered yet") as caught:
        await soon(ask("r2", deadline_ms=5))
    assert caught.value.request_id == "r2"
    gate.open.set()
    assert (await soon(first)).request_id == "r1"


async def test_keys_are_bounded(target: FakeTarget, ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_REMEMBERED_KEYS", 3)
    for key in "abc":
        await soon(ask(key=key))
    assert (await soon(ask(key="a"))).cached  # now the most recent
    await soon(ask(key="d"))
    assert (await soon(ask(key="a"))).cached
    assert not (await soon(ask(key="b"))).cached
    assert len(target.asked) == 5


async def test_drained_waits_for_what_is_in_flight(target: FakeTarget, ask: Ask, pipeline: Pipeline) -> None:
    assert await pipeline.drained(0)
    target.behaviour = gate = Gate()
    tasks = [ask(key=None), ask(key=None)]
    await begun(target)
    assert pipeline.in_flight == 2
    assert not await pipeline.drained(0)
    draining = asyncio.create_task(pipeline.drained(PATIENCE_S))
    tasks[0].cancel()
    await asyncio.gather(tasks[0], return_exceptions=True)
    assert not draining.done()
    gate.open.set()
    assert await draining
    assert tasks[1].done() or pipeline.in_flight == 0
    await soon(tasks[1])


async def test_a_refusal_drains_too(target: FakeTarget, ask: Ask, pipeline: Pipeline) -> None:
    target.state = UNPLUGGED
    with pytest.raises(Unavailable):
        await soon(ask())
    assert pipeline.in_flight == 0
    assert await pipeline.drained(0)
    target.state = AVAILABLE
    await soon(ask())
    assert await pipeline.drained(0)
