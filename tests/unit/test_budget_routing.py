"""Budgets where they count: what the router asks, what it pays, and what it says when a budget is spent."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from fakes import UNPLUGGED, FakeTarget, failure, make_answer, make_request, outcomes, raises

from agent.config import RoutingSection
from agent.core.clock import ManualClock
from agent.core.errors import TargetBusy, TargetFailed
from agent.core.types import InferenceRequest, LatencyClass, TargetAnswer, Tier
from agent.registry.catalog import Family, Variant
from agent.routing.budget import Budget, Terms
from agent.routing.decision import Constraint
from agent.routing.meter import Allowance, nano_usd
from agent.routing.router import NoAnswer, Router

COST_USD = 0.001
USD = Allowance("", "usd", "day", nano_usd(0.005))
REQUESTS = Allowance("", "requests", "minute", 5)
BYTES = Allowance("", "bytes", "day", 10_000)


class House:
    """A cloud lane with a budget, and perhaps an edge target."""

    def __init__(self, clock: ManualClock, *allowances: Allowance, edge: bool = False, **terms: Any) -> None:
        self.clock = clock
        self.cloud = FakeTarget(Tier.CLOUD_GPU, cost_usd=COST_USD)
        self.edge = FakeTarget(Tier.EDGE_GPU)
        self.budget = Budget(allowances, {"cloud_gpu": COST_USD}, Terms(**{"burst": 1.0, **terms}))
        targets = [self.cloud, self.edge] if edge else [self.cloud]
        self.router = Router(targets, RoutingSection(), clock, budgets=self.budget)

    def used(self) -> Any:
        return self.budget.left(self.clock.monotonic())[0]["used"]


async def slow(request: InferenceRequest, variant: Variant, deadline: float) -> TargetAnswer:
    for _ in range(5):
        await asyncio.sleep(0)
    return make_answer()


@pytest.mark.parametrize("latency_class", list(LatencyClass))
@pytest.mark.parametrize("allowance", [USD, REQUESTS])
async def test_requests_at_the_same_time_do_not_overshoot_together(
    clock: ManualClock, family: Family, allowance: Allowance, latency_class: LatencyClass
) -> None:
    house = House(clock, allowance)
    house.cloud.traits = FakeTarget(Tier.CLOUD_GPU, cost_usd=COST_USD, max_concurrent=1000).traits
    house.router = Router([house.cloud], RoutingSection(), clock, budgets=house.budget)
    house.cloud.behaviour = slow
    requests = [make_request(clock, 60_000, id=f"r{n}", latency_class=latency_class) for n in range(50)]
    results = await asyncio.gather(*(house.router.run(request, family) for request in requests), return_exceptions=True)
    assert len(house.cloud.asked) == 5
    assert sum(isinstance(result, NoAnswer) for result in results) == 45
    assert all(isinstance(result, NoAnswer) for result in results if isinstance(result, BaseException))


async def test_when_the_budget_is_spent_the_edge_answers_and_the_decision_says_why(
    clock: ManualClock, family: Family
) -> None:
    house = House(clock, REQUESTS, edge=True)
    for _ in range(5):
        house.budget.spend("cloud_gpu", COST_USD, 0, clock.monotonic())
    routed = await house.router.run(make_request(clock, latency_class=LatencyClass.BATCH), family)
    assert routed.traits.name == "edge_gpu"
    assert Constraint.BUDGET in routed.decision.excluded.values()
    assert any("budget of 5 requests per minute: 0 requests left" in reason for reason in routed.reasons)


async def test_what_the_edge_does_costs_nothing(clock: ManualClock, family: Family) -> None:
    house = House(clock, REQUESTS, edge=True)
    house.cloud.state = UNPLUGGED
    await house.router.run(make_request(clock), family)
    assert house.used() == 0


async def test_an_attempt_that_failed_is_paid_and_one_that_was_refused_as_busy_is_not(
    clock: ManualClock, family: Family
) -> None:
    house = House(clock, USD)
    house.cloud.behaviour = raises(TargetFailed("out of memory"))
    await failure(house.router, make_request(clock), family)
    assert house.used() == COST_USD
    house.cloud.behaviour = raises(TargetBusy("queue is full"))
    await failure(house.router, make_request(clock), family)
    assert house.used() == COST_USD


async def test_bytes_are_what_the_answer_says_they_were(clock: ManualClock, family: Family) -> None:
    async def large(request: InferenceRequest, variant: Variant, deadline: float) -> TargetAnswer:
        return make_answer()._replace(bytes_sent=300, bytes_received=1200)

    house = House(clock, BYTES, overhead_bytes=700)
    house.cloud.behaviour = large
    await house.router.run(make_request(clock), family)
    assert house.used() == 2200


async def test_high_priority_runs_ahead_and_low_priority_waits(clock: ManualClock, family: Family) -> None:
    house = House(clock, Allowance("", "requests", "day", 40), burst=0.1, borrow=0.1)
    for number in range(8):
        await house.router.run(make_request(clock, id=f"r{number}", priority=9), family)
    refused = await failure(house.router, make_request(clock, priority=5), family)
    assert any("ahead of its pace, again in" in reason for reason in refused.reasons)
    clock.advance(0.5 * 86_400)
    routed = await house.router.run(make_request(clock, priority=5), family)
    assert outcomes(routed.attempts) == [("cloud_gpu", "ok")]


async def test_a_request_that_was_cancelled_stays_paid(clock: ManualClock, family: Family) -> None:
    house = House(clock, USD)

    async def hangs(request: InferenceRequest, variant: Variant, deadline: float) -> TargetAnswer:
        await asyncio.Event().wait()
        raise AssertionError("nobody sets that event")

    house.cloud.behaviour = hangs
    task = asyncio.ensure_future(house.router.run(make_request(clock), family))
    await house.cloud.begun.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert house.used() == COST_USD


async def test_answers_that_are_larger_than_the_last_do_not_overshoot_together(
    clock: ManualClock, family: Family
) -> None:
    """Many at once, each a fifth larger than what was known when it began."""
    house = House(clock, BYTES)
    house.cloud.traits = FakeTarget(Tier.CLOUD_GPU, cost_usd=COST_USD, max_concurrent=1000).traits
    house.router = Router([house.cloud], RoutingSection(), clock, budgets=house.budget)
    size = 1000

    async def large(request: InferenceRequest, variant: Variant, deadline: float) -> TargetAnswer:
        return (await slow(request, variant, deadline))._replace(bytes_sent=size)

    house.cloud.behaviour = large
    await house.router.run(make_request(clock), family)
    assert house.used() == size
    size = 1200
    requests = [make_request(clock, id=f"r{n}") for n in range(50)]
    await asyncio.gather(*(house.router.run(request, family) for request in requests), return_exceptions=True)
    asked = len(house.cloud.asked) - 1
    assert asked > 5
    assert house.used() == 1000 + 1200 * asked <= BYTES.amount
