"""The router and targets that fail: breakers, places, and targets that break the rules."""

import asyncio
import logging
from collections.abc import Callable
from typing import Any

import pytest
from fakes import (
    PATIENCE_S,
    UNPLUGGED,
    Behaviour,
    FakeTarget,
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
from agent.core.errors import TargetBusy, TargetFailed, TargetTimeout
from agent.core.types import InferenceRequest, TargetAnswer, Tier
from agent.registry.catalog import Family, Variant
from agent.routing.breaker import BreakerState
from agent.routing.router import Router
from agent.targets.base import Availability

SETTINGS = RoutingSection(policy="scorecard")

MCU, GPU, CLOUD, SERVERLESS = Tier.EDGE_MCU, Tier.EDGE_GPU, Tier.CLOUD_GPU, Tier.CLOUD_SERVERLESS


def breaker_of(router: Router, name: str) -> Any:
    return router._states[name].breaker


# --- the breaker -----------------------------------------------------------------------------------------------------


async def test_failures_open_the_breaker_and_one_probe_heals_it(
    router: Router, fleet: dict[str, FakeTarget], family: Family, clock: ManualClock
) -> None:
    fleet["edge_gpu"].behaviour = raises(TargetFailed("broken"))
    for _ in range(5):
        assert (await router.run(make_request(clock), family)).traits.name == "edge_mcu"
    assert breaker_of(router, "edge_gpu").state is BreakerState.OPEN
    routed = await router.run(make_request(clock), family)
    assert len(fleet["edge_gpu"].asked) == 5
    assert routed.reasons[0].startswith("edge_gpu: not asked: breaker is open after 5 failures, next probe in 0.")

    fleet["edge_gpu"].behaviour = answers
    clock.advance(0.5)
    assert (await router.run(make_request(clock), family)).traits.name == "edge_gpu"
    assert breaker_of(router, "edge_gpu").state is BreakerState.CLOSED


async def test_while_the_probe_runs_the_others_go_elsewhere(
    router: Router, fleet: dict[str, FakeTarget], family: Family, clock: ManualClock
) -> None:
    let_go = asyncio.Event()

    async def waits(request: InferenceRequest, variant: Variant, deadline: float) -> TargetAnswer:
        await let_go.wait()
        return make_answer()

    gpu = fleet["edge_gpu"]
    gpu.behaviour = raises(TargetFailed("broken", permanent=True))
    await router.run(make_request(clock), family)
    gpu.behaviour, gpu.begun = waits, asyncio.Event()
    clock.advance(120)
    probing = asyncio.create_task(router.run(make_request(clock, 5000), family))
    async with asyncio.timeout(PATIENCE_S):
        await gpu.begun.wait()
        routed = await router.run(make_request(clock), family)
        assert routed.traits.name == "edge_mcu"
        assert routed.reasons[0] == "edge_gpu: not asked: breaker is half open: a probe is under way"
        let_go.set()
        assert (await probing).traits.name == "edge_gpu"
    assert breaker_of(router, "edge_gpu").state is BreakerState.CLOSED


async def test_a_permanent_failure_opens_at_once_and_what_comes_back_is_probed_at_once(
    router: Router, fleet: dict[str, FakeTarget], family: Family, clock: ManualClock
) -> None:
    gpu = fleet["edge_gpu"]
    gpu.behaviour = raises(TargetFailed("wrong protocol version", permanent=True))
    await router.run(make_request(clock), family)
    assert breaker_of(router, "edge_gpu").retry_at - clock.monotonic() >= 0.8 * SETTINGS.breaker.backoff_max_s
    gpu.state = UNPLUGGED
    await router.run(make_request(clock), family)
    gpu.state, gpu.behaviour = Availability(True), answers
    assert (await router.run(make_request(clock), family)).traits.name == "edge_gpu"


async def test_a_full_queue_is_not_held_against_the_target(
    router: Router, fleet: dict[str, FakeTarget], family: Family, clock: ManualClock
) -> None:
    fleet["edge_gpu"].behaviour = raises(TargetBusy("queue full"))
    for _ in range(30):
        routed = await router.run(make_request(clock), family)
        assert outcomes(routed.attempts) == [("edge_gpu", "busy"), ("edge_mcu", "ok")]
    assert breaker_of(router, "edge_gpu").state is BreakerState.CLOSED


@pytest.mark.parametrize(("timeout_ms", "state"), [(2.0, BreakerState.CLOSED), (4.0, BreakerState.OPEN)])
async def test_a_wait_that_was_too_short_to_begin_with_is_not_either(
    family: Family, clock: ManualClock, timeout_ms: float, state: BreakerState
) -> None:
    """Below half of what the target usually takes, 5 ms here."""
    gpu = FakeTarget(GPU, raises(TargetTimeout("no answer")), prior_s=0.005)
    router = Router([gpu], SETTINGS, clock)
    for _ in range(5):
        await failure(router, make_request(clock, timeout_ms=timeout_ms), family)
        router._states["edge_gpu"].records.clear()
    assert breaker_of(router, "edge_gpu").state is state


# --- places ----------------------------------------------------------------------------------------------------------


async def test_a_place_is_held_while_an_attempt_runs_and_given_back_when_it_is_cancelled(
    family: Family, clock: ManualClock
) -> None:
    gpu = FakeTarget(GPU, hangs, max_concurrent=2)
    router = Router([gpu], SETTINGS, clock)
    tasks = [asyncio.create_task(router.run(make_request(clock, 60_000), family)) for _ in range(2)]
    async with asyncio.timeout(PATIENCE_S):
        await gpu.begun.wait()
    assert gpu.running == 2
    assert router.status()[0]["in_flight"] == 2
    error = await failure(router, make_request(clock), family)
    assert error.busy
    assert error.reasons == ("edge_gpu: not asked: busy: 2 of 2 in flight", "no target can be asked")
    for task in tasks:
        task.cancel()
    assert all(isinstance(e, asyncio.CancelledError) for e in await asyncio.gather(*tasks, return_exceptions=True))
    assert router.status()[0]["in_flight"] == 0
    assert gpu.running == 0
    assert breaker_of(router, "edge_gpu").consecutive_failures == 0


async def test_a_cancelled_probe_lets_the_next_one_through(family: Family, clock: ManualClock) -> None:
    gpu = FakeTarget(GPU, raises(TargetFailed("broken", permanent=True)))
    router = Router([gpu], SETTINGS, clock)
    await failure(router, make_request(clock), family)
    clock.advance(120)
    gpu.behaviour, gpu.begun = hangs, asyncio.Event()
    task = asyncio.create_task(router.run(make_request(clock, 60_000), family))
    async with asyncio.timeout(PATIENCE_S):
        await gpu.begun.wait()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    gpu.behaviour = answers
    assert (await router.run(make_request(clock), family)).traits.name == "edge_gpu"


async def test_everybody_busy_is_overload(
    router: Router, fleet: dict[str, FakeTarget], family: Family, clock: ManualClock
) -> None:
    for target in fleet.values():
        target.behaviour = raises(TargetBusy("queue full"))
    assert (await failure(router, make_request(clock), family)).busy
    fleet["edge_mcu"].behaviour = raises(TargetFailed("broken"))
    assert not (await failure(router, make_request(clock), family)).busy


async def test_everybody_away_is_neither_late_nor_busy(
    router: Router, fleet: dict[str, FakeTarget], family: Family, clock: ManualClock
) -> None:
    for target in fleet.values():
        target.state = UNPLUGGED
    error = await failure(router, make_request(clock), family)
    assert (error.late, error.busy, error.attempts, error.cost_usd) == (False, False, (), 0.0)
    assert not router.available()


# --- targets that break the rules ------------------------------------------------------------------------------------


def cancels_itself() -> Behaviour:
    async def behaviour(request: InferenceRequest, variant: Variant, deadline: float) -> TargetAnswer:
        future: asyncio.Future[TargetAnswer] = asyncio.get_running_loop().create_future()
        future.cancel()
        return await future

    return behaviour


@pytest.mark.parametrize(
    ("behaviour", "expected", "logged"),
    [
        (lambda: raises(KeyError("window")), "KeyError: 'window'", True),
        (lambda: raises(ExceptionGroup("two", [TargetFailed("a"), OSError("b")])), "ExceptionGroup: two", True),
        (lambda: raises(TimeoutError("its own")), "did not keep its deadline", False),
        (cancels_itself, "the target cancelled what it was asked", False),
    ],
)
async def test_what_is_no_target_error_fails_the_attempt_and_not_the_request(
    router: Router,
    fleet: dict[str, FakeTarget],
    family: Family,
    clock: ManualClock,
    caplog: pytest.LogCaptureFixture,
    behaviour: Callable[[], Behaviour],
    expected: str,
    logged: bool,
) -> None:
    fleet["edge_gpu"].behaviour = behaviour()
    with caplog.at_level(logging.ERROR):
        routed = await router.run(make_request(clock), family)
    assert routed.traits.name == "edge_mcu"
    assert routed.attempts[0].outcome in ("failed", "timeout")
    assert routed.attempts[0].error is not None
    assert routed.attempts[0].error.startswith(expected)
    assert breaker_of(router, "edge_gpu").consecutive_failures == 1
    assert router.status()[1]["in_flight"] == 0
    assert bool(caplog.records) is logged
    assert not logged or caplog.records[0].exc_info is not None
