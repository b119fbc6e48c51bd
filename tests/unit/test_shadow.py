"""Shadow samples: fair, within their bounds, and never in the way of a request."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from cascade_fakes import Tiers, sure
from fakes import PATIENCE_S, UNPLUGGED, hangs, make_request
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.config import AccuracySection, DriftSection, ShadowSection
from agent.core.clock import ManualClock
from agent.core.types import AccuracyMode, LatencyClass
from agent.registry.accuracy import Accuracies
from agent.routing.cascade import Cascade
from agent.routing.router import of_the_catalogue
from agent.routing.shadow import Shadow


class Rig:
    def __init__(self, clock: ManualClock, chance: float = 0.0, **changes: Any) -> None:
        self.clock = clock
        self.tiers = Tiers(clock)
        self.accuracies = Accuracies(self.tiers.catalog, DriftSection())
        section = ShadowSection.model_validate({"rate": 0.5} | changes)
        self.shadow = Shadow(self.tiers.router, self.accuracies, section, clock, lambda: chance)
        self.cascade = Cascade(self.tiers.router, AccuracySection(), clock, of_the_catalogue)

    async def answer(self, **changes: Any) -> None:
        request = make_request(self.clock, 100, **changes)
        self.shadow.consider(request, self.tiers.family, await self.cascade.run(request, self.tiers.family))

    async def next(self) -> None:
        async with asyncio.timeout(PATIENCE_S):
            await self.shadow.next()

    @property
    def count(self) -> dict[str, int]:
        return {key: value for key, value in self.shadow.counters.items() if value}

    @property
    def drift(self) -> dict[str, Any]:
        return self.accuracies.status()["toy/medium"]


@pytest.fixture
def rig(clock: ManualClock) -> Rig:
    return Rig(clock)


async def test_an_edge_answer_is_asked_again_of_the_cloud(rig: Rig) -> None:
    await rig.answer(priority=7, timeout_ms=30.0, idempotency_key="k")
    await rig.next()
    assert rig.count == {"drawn": 1, "asked": 1, "answered": 1}
    (request, variant, _) = rig.tiers.cloud.asked[0]
    assert (request.priority, request.latency_class, variant.id) == (1, LatencyClass.BATCH, "large")
    assert (request.timeout_ms, request.idempotency_key) == (None, None)
    assert (rig.drift["samples"], rig.drift["agreement"]) == (1, 0.0)  # the gateway says 1, the cloud 2
    assert rig.shadow.cost_usd == pytest.approx(0.001)


async def test_what_was_escalated_is_answered_already(rig: Rig) -> None:
    rig.tiers.gpu.behaviour = sure(0.7, label=2)
    await rig.answer()
    asked = len(rig.tiers.cloud.asked)
    await rig.next()
    assert (rig.count, len(rig.tiers.cloud.asked)) == ({"drawn": 1, "free": 1}, asked)
    assert (rig.drift["samples"], rig.drift["agreement"]) == (1, 1.0)
    assert rig.shadow.cost_usd == 0.0


async def test_an_answer_of_the_cloud_is_no_sample(rig: Rig) -> None:
    await rig.answer(accuracy=AccuracyMode.HIGH)
    assert rig.count == {}


@pytest.mark.parametrize("changes", [{"chance": 0.5}, {"rate": 0.0}])
async def test_the_rate_is_kept(clock: ManualClock, changes: dict[str, float]) -> None:
    rig = Rig(clock, **changes)
    await rig.answer()
    assert rig.count == {}


async def test_who_does_not_want_it_is_not_sampled(rig: Rig) -> None:
    await rig.answer(shadow=False)
    assert rig.count == {}


async def test_a_region_that_is_not_allowed_sees_nothing(rig: Rig) -> None:
    await rig.answer(allowed_regions=frozenset({"us"}))
    await rig.next()
    assert rig.tiers.cloud.asked == []
    assert rig.count == {"drawn": 1, "asked": 1, "failed": 1}
    assert rig.drift["samples"] == 0


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 4000), st.booleans()), max_size=60))
async def test_bounds_hold_over_any_hour_and_any_day(steps: list[tuple[float, bool]]) -> None:
    clock = ManualClock()
    rig = Rig(clock, per_hour=5, usd_per_day=0.0035)
    began = clock.monotonic()
    for wait_s, unsure in steps:
        clock.advance(wait_s)
        rig.tiers.gpu.behaviour = sure(0.7 if unsure else 0.9)
        await rig.answer()
        if rig.shadow.counters["drawn"] > rig.shadow.counters["free"] + rig.shadow.counters["asked"]:
            await rig.next()
    days, hours = (clock.monotonic() - began) / 86_400, (clock.monotonic() - began) / 3600
    assert rig.shadow.counters["drawn"] <= 5 * (1 + hours) + 1e-6
    assert rig.shadow.cost_usd <= 0.0035 * (1 + days) + 1e-9


async def test_samples_that_wait_are_bounded(clock: ManualClock) -> None:
    rig = Rig(clock, max_queued=2)
    for _ in range(5):
        await rig.answer()
    assert rig.count == {"drawn": 5, "dropped": 3}


async def test_a_lane_that_is_half_taken_is_left_alone(rig: Rig) -> None:
    rig.tiers.cloud.behaviour = hangs
    request = make_request(rig.clock, 100_000, variant="large")
    real = [asyncio.create_task(rig.tiers.router.run(request, rig.tiers.family)) for _ in range(2)]
    async with asyncio.timeout(PATIENCE_S):
        await rig.tiers.cloud.begun.wait()
    await rig.answer()
    waiting = asyncio.create_task(rig.shadow.next())
    done, _ = await asyncio.wait([waiting], timeout=0.05)
    assert not done
    assert len(rig.tiers.cloud.asked) == 2
    for task in (*real, waiting):
        task.cancel()
    await asyncio.gather(*real, waiting, return_exceptions=True)


async def test_a_sample_makes_way_for_a_request(rig: Rig) -> None:
    rig.tiers.cloud.behaviour = hangs
    await rig.answer()
    working = asyncio.create_task(rig.shadow.next())
    async with asyncio.timeout(PATIENCE_S):
        await rig.tiers.cloud.begun.wait()
    await rig.shadow.make_way(LatencyClass.NEAR)
    assert rig.tiers.cloud.running == 1  # there is room: nobody has to give way
    request = make_request(rig.clock, 100_000, variant="large")
    real = [asyncio.create_task(rig.tiers.router.run(request, rig.tiers.family)) for _ in range(3)]
    for _ in range(20):
        await asyncio.sleep(0)
    assert rig.tiers.cloud.running == 4
    await rig.shadow.make_way(LatencyClass.NEAR)
    assert rig.tiers.cloud.running == 3
    assert rig.count["gave_way"] == 1
    assert rig.shadow.cost_usd == pytest.approx(0.001)
    async with asyncio.timeout(PATIENCE_S):
        await working
    for task in real:
        task.cancel()
    await asyncio.gather(*real, return_exceptions=True)
    assert all(state.in_flight == 0 for state in rig.tiers.router._states.values())


async def test_a_cloud_that_is_gone_costs_nothing(rig: Rig) -> None:
    rig.tiers.cloud.state = UNPLUGGED
    await rig.answer()
    assert rig.count == {"not_drawn": 1}


async def test_ending_the_work_ends_what_is_asked(rig: Rig) -> None:
    rig.tiers.cloud.behaviour = hangs
    await rig.answer()
    working = asyncio.create_task(rig.shadow.work())
    async with asyncio.timeout(PATIENCE_S):
        await rig.tiers.cloud.begun.wait()
    working.cancel()
    with pytest.raises(asyncio.CancelledError):
        await working
    for _ in range(3):
        await asyncio.sleep(0)
    assert rig.tiers.cloud.running == 0
