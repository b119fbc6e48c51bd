"""The supervisor: tasks that fail are run again, alone, and a stall is noticed."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from fakes import PATIENCE_S

from agent.core.clock import ManualClock
from agent.supervisor import (
    CORE_FAILURES,
    RESTART_INITIAL_S,
    RESTART_MAX_S,
    STARTING_S,
    Component,
    ComponentState,
    Reading,
    Supervisor,
)


class Chance:
    """A random source that remembers how often it was asked; 0: no wait at all."""

    def __init__(self) -> None:
        self.asked = 0

    def __call__(self) -> float:
        self.asked += 1
        return 0.0


@pytest.fixture
async def supervisor(clock: ManualClock) -> AsyncIterator[Supervisor]:
    found = Supervisor(clock, Chance())
    yield found
    await found.stop()


def states(supervisor: Supervisor) -> dict[str, tuple[str, str]]:
    return {component["name"]: (component["state"], component["reason"]) for component in supervisor.status()}


async def wait(event: asyncio.Event) -> None:
    async with asyncio.timeout(PATIENCE_S):
        await event.wait()


async def test_a_task_that_raises_is_run_again_alone(supervisor: Supervisor, caplog: pytest.LogCaptureFixture) -> None:
    runs: dict[str, int] = {"good": 0, "bad": 0}
    again = asyncio.Event()

    async def good(component: Component) -> None:
        runs["good"] += 1
        component.set(ComponentState.UP)
        await asyncio.Event().wait()

    async def bad(component: Component) -> None:
        runs["bad"] += 1
        if runs["bad"] < 3:
            raise OSError("port is gone")
        again.set()
        await asyncio.Event().wait()

    supervisor.spawn("good", good)
    supervisor.spawn("bad", bad)
    await wait(again)
    assert runs == {"good": 1, "bad": 3}
    assert states(supervisor) == {"good": ("up", ""), "bad": ("down", "OSError: port is gone")}
    assert [record.message for record in caplog.records if record.levelname == "ERROR"] == ["task failed"] * 2


async def test_a_task_that_ends_or_loses_what_it_waited_for_is_run_again(supervisor: Supervisor) -> None:
    reasons: list[str] = []
    third = asyncio.Event()

    async def work(component: Component) -> None:
        reasons.append(component.reason)
        if len(reasons) == 1:
            return
        if len(reasons) == 2:
            future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            future.cancel()
            await future
        third.set()
        await asyncio.Event().wait()

    supervisor.spawn("link", work)
    await wait(third)
    assert reasons == ["", "ended", "CancelledError: what it waited for was cancelled"]


async def test_waits_grow_and_start_again_after_a_long_run(clock: ManualClock, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    enough = asyncio.Event()
    really_sleep = asyncio.sleep

    async def sleep(seconds: float) -> None:
        waits.append(seconds)
        await really_sleep(0)

    async def work(component: Component) -> None:
        if len(waits) == 9:
            clock.advance(RESTART_MAX_S + 1)
        if len(waits) == 11:
            enough.set()
            await asyncio.Event().wait()
        raise OSError

    monkeypatch.setattr("agent.supervisor.asyncio.sleep", sleep)
    supervisor = Supervisor(clock, lambda: 1.0)
    supervisor.spawn("link", work)
    await wait(enough)
    await supervisor.stop()
    first = [min(RESTART_MAX_S, RESTART_INITIAL_S * 2**n) for n in range(9)]
    assert waits == [*first, RESTART_INITIAL_S, 2 * RESTART_INITIAL_S]


async def test_stop_ends_every_task(supervisor: Supervisor) -> None:
    ended: list[str] = []
    begun = asyncio.Event()

    async def work(component: Component) -> None:
        begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(component.name)

    supervisor.spawn("a", work)
    supervisor.spawn("b", work)
    await wait(begun)
    await asyncio.sleep(0)
    await supervisor.stop()
    assert ended == ["a", "b"]


def test_a_component_without_a_beat_is_overdue(clock: ManualClock) -> None:
    supervisor = Supervisor(clock)
    component = supervisor.component("mqtt", stall_s=10)
    supervisor.component("http")
    clock.advance(10)
    assert supervisor.overdue() == []
    clock.advance(0.001)
    assert supervisor.overdue() == ["mqtt"]
    component.beat()
    assert supervisor.overdue() == []
    clock.advance(11)
    component.set(ComponentState.DEGRADED, "slow")
    assert supervisor.overdue() == []


def test_how_long_a_component_may_stall_can_be_said_later(clock: ManualClock) -> None:
    supervisor = Supervisor(clock)
    assert supervisor.component("mqtt") is supervisor.component("mqtt", stall_s=1) is supervisor.component("mqtt")
    clock.advance(2)
    assert supervisor.overdue() == ["mqtt"]


async def test_waiting_to_be_run_again_is_no_stall(clock: ManualClock, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else one task in its back-off would keep the watchdog from being fed, and the whole daemon would be restarted."""
    resting, wake, again = asyncio.Event(), asyncio.Event(), asyncio.Event()
    runs: list[Any] = []

    async def sleep(seconds: float) -> None:
        resting.set()
        await wake.wait()

    async def work(component: Component) -> None:
        runs.append(component)
        if len(runs) == 1:
            raise OSError
        again.set()
        await asyncio.Event().wait()

    monkeypatch.setattr("agent.supervisor.asyncio.sleep", sleep)
    supervisor = Supervisor(clock)
    supervisor.spawn("link", work, stall_s=10)
    await wait(resting)
    clock.advance(50)
    assert supervisor.overdue() == []
    wake.set()
    await wait(again)
    assert supervisor.overdue() == []
    clock.advance(11)
    assert supervisor.overdue() == ["link"]
    await supervisor.stop()


def test_since_counts_from_the_change(clock: ManualClock) -> None:
    component = Supervisor(clock).component("mqtt")
    clock.advance(5)
    component.set(ComponentState.UP)
    clock.advance(3)
    component.set(ComponentState.UP, "reconnected")
    since = clock.wall() - 3.0
    shown = {"name": "mqtt", "state": "up", "reason": "reconnected", "since_s": 3.0, "since": since}
    assert component.to_dict() == shown


def test_parts_are_read_and_start_before_they_are_down(clock: ManualClock) -> None:
    """What has not worked yet may still be starting, for a while; what has worked and does not is down at once."""
    supervisor = Supervisor(clock)
    found = {"lane": Reading.there(False, "no worker"), "cache": Reading.working("no space left")}
    supervisor.reads(lambda: found)
    assert states(supervisor) == {"lane": ("starting", "no worker"), "cache": ("degraded", "no space left")}
    clock.advance(STARTING_S)
    assert states(supervisor)["lane"] == ("down", "no worker")
    found["lane"] = Reading.there(True)
    assert states(supervisor)["lane"] == ("up", "")
    found["lane"] = Reading.there(False, "gone")
    supervisor.look()
    clock.advance(2)
    (lane,) = [one for one in supervisor.status() if one["name"] == "lane"]
    assert (lane["state"], lane["since_s"]) == ("down", 2.0)
    del found["lane"]
    assert "lane" not in states(supervisor)


async def test_only_a_core_that_fails_again_and_again_is_the_daemons_end(supervisor: Supervisor) -> None:
    told: list[str] = []
    runs = {"door": 0, "other": 0}
    enough = asyncio.Event()

    async def work(component: Component) -> None:
        runs[component.name] += 1
        if min(runs.values()) > 3 * CORE_FAILURES:
            enough.set()
        raise OSError("address in use")

    supervisor.broken = told.append
    supervisor.spawn("other", work)
    supervisor.spawn("door", work, core=True)
    await wait(enough)
    assert told == [f"door failed {CORE_FAILURES} times in a row: OSError: address in use"]


async def test_a_core_that_fails_now_and_then_is_not(clock: ManualClock) -> None:
    told: list[str] = []
    runs = 0
    enough = asyncio.Event()

    async def work(component: Component) -> None:
        nonlocal runs
        runs += 1
        if runs > 3 * CORE_FAILURES:
            enough.set()
        clock.advance(RESTART_MAX_S + 1)
        raise OSError

    supervisor = Supervisor(clock, lambda: 0.0)
    supervisor.broken = told.append
    supervisor.spawn("door", work, core=True)
    await wait(enough)
    await supervisor.stop()
    assert told == []


async def test_a_watched_part_whose_work_has_ended_is_overdue(clock: ManualClock) -> None:
    supervisor = Supervisor(clock)
    running = True
    supervisor.watch("edge_mcu", lambda: running)
    assert supervisor.overdue() == []
    running = False
    assert supervisor.overdue() == ["edge_mcu"]
