"""Waiting for a place: in virtual time, so that nothing here waits."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from fakes import INPUT

from agent.config import OverloadSection
from agent.core.errors import Overloaded
from agent.core.types import InferenceRequest, LatencyClass, Tier
from agent.routing.queue import RequestQueue
from agent.routing.walk import NoAnswer
from hil.sim.loop import VirtualClock, VirtualLoop, run_virtual

BATCH, NEAR, REALTIME = LatencyClass.BATCH, LatencyClass.NEAR, LatencyClass.REALTIME


class House:
    """A queue before `room` targets' places, each of which is taken for `busy_s`."""

    def __init__(self, places: int = 100, room: int = 1, busy_s: float = 1.0, **settings: Any) -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualLoop)
        self.clock = VirtualClock(loop)
        self.queue = RequestQueue(OverloadSection.model_validate(settings), places, self.clock)
        self.room, self.busy_s = room, busy_s
        self.order: list[str] = []
        self.tries = 0

    def full(self) -> bool:
        return self.room == 0

    async def ask(self, name: str) -> str:
        self.tries += 1
        if self.full():
            raise NoAnswer((), (), late=False, busy=True, cost_usd=0.0, decision=None)  # type: ignore[arg-type]
        self.room -= 1
        self.order.append(name)
        try:
            await asyncio.sleep(self.busy_s)
        finally:
            self.room += 1
            self.queue.room()
        return name

    async def infer(
        self, name: str, latency_class: LatencyClass = NEAR, within_s: float = 100.0, priority: int = 5
    ) -> tuple[str, float]:
        now = self.clock.monotonic()
        request = InferenceRequest(name, "toy", {"window": INPUT}, latency_class, now, now + within_s, priority)
        return await self.queue.run(request, lambda: self.ask(name), full=self.full, needed_s=lambda: self.busy_s)

    def empty(self) -> bool:
        status = self.queue.status()
        return status["in_service"] == 0 and not any(status["waiting"].values())


def virtual(test: Callable[[], Awaitable[None]]) -> Callable[[], None]:
    def run() -> None:
        async def main() -> None:
            await test()

        run_virtual(main())

    run.__name__ = test.__name__
    return run


@virtual
async def test_where_there_is_room_nobody_waits() -> None:
    house = House()
    assert await house.infer("a") == ("a", 0.0)
    assert house.empty()


@virtual
async def test_a_full_target_is_waited_for_and_the_wait_is_told() -> None:
    house = House()
    found = await asyncio.gather(*(house.infer(name) for name in "abc"))
    assert found == [("a", 0.0), ("b", 1.0), ("c", 2.0)]
    assert house.empty()


@virtual
async def test_one_free_place_does_not_wake_them_all() -> None:
    house = House()
    await asyncio.gather(*(house.infer(str(number)) for number in range(50)))
    assert house.tries <= 2 * 50


@virtual
async def test_the_tightest_class_goes_first() -> None:
    house = House()
    await asyncio.gather(
        house.infer("first"), house.infer("batch", BATCH), house.infer("near"), house.infer("realtime", REALTIME)
    )
    assert house.order == ["first", "realtime", "near", "batch"]


@virtual
async def test_a_loose_class_leaves_places_of_the_daemon_to_the_tighter_ones() -> None:
    house = House(places=4, room=100)
    batch = [asyncio.create_task(house.infer(f"batch {number}", BATCH)) for number in range(4)]
    await asyncio.sleep(0)
    assert house.queue.status()["in_service"] == 2
    assert await house.infer("realtime", REALTIME) == ("realtime", 0.0)
    await asyncio.gather(*batch)
    assert house.empty()


@virtual
async def test_it_is_refused_as_soon_as_its_deadline_cannot_be_met() -> None:
    house = House(busy_s=2.0)
    first = asyncio.create_task(house.infer("first"))
    await asyncio.sleep(0)
    with pytest.raises(Overloaded, match=r"waited 500\.0 ms for a place") as caught:
        await house.infer("hurried", within_s=2.5)
    assert house.clock.monotonic() == pytest.approx(0.5)
    assert caught.value.retry_after_s is not None
    with pytest.raises(Overloaded, match="the deadline leaves no time to wait"):
        await house.infer("too late", within_s=1.0)
    await first
    assert house.empty()


@virtual
async def test_a_full_line_refuses_and_a_more_urgent_request_takes_a_place_in_it() -> None:
    house = House(waiting={"near": 1, "total": 1})
    waiting = [asyncio.create_task(house.infer(name)) for name in ("first", "second")]
    await asyncio.sleep(0)
    with pytest.raises(Overloaded, match="the line of near requests"):
        await house.infer("third")
    urgent = asyncio.create_task(house.infer("urgent", REALTIME))
    await asyncio.sleep(0)
    with pytest.raises(Overloaded, match="gave its place in the line to a more urgent request"):
        await waiting[1]
    assert (await waiting[0])[0] == "first"
    assert (await urgent)[0] == "urgent"
    assert house.empty()


@virtual
async def test_whoever_goes_away_while_waiting_leaves_nothing_behind() -> None:
    house = House()
    first = asyncio.create_task(house.infer("first"))
    gone = asyncio.create_task(house.infer("gone"))
    last = asyncio.create_task(house.infer("last"))
    await asyncio.sleep(0.5)
    gone.cancel()
    await asyncio.wait([first, gone, last])
    assert gone.cancelled()
    assert (first.result(), last.result()) == (("first", 0.0), ("last", 1.0))
    assert house.empty()


@virtual
async def test_whoever_goes_away_at_the_moment_of_being_let_in_hands_the_place_on() -> None:
    house = House()
    first = asyncio.create_task(house.infer("first"))
    gone = asyncio.create_task(house.infer("gone"))
    last = asyncio.create_task(house.infer("last"))
    await first
    gone.cancel()
    await asyncio.gather(gone, return_exceptions=True)
    assert (await last)[0] == "last"
    assert house.empty()


@virtual
async def test_a_target_that_only_seems_to_have_room_does_not_make_it_spin() -> None:
    house = House()
    house.full = lambda: False  # type: ignore[method-assign]
    house.room = 0

    async def refused() -> str:
        house.tries += 1
        raise NoAnswer((), (), late=False, busy=True, cost_usd=0.0, decision=None)  # type: ignore[arg-type]

    house.ask = lambda name: refused()  # type: ignore[method-assign]
    with pytest.raises(Overloaded):
        await house.infer("a", within_s=5.0)
    assert house.tries == 1
    assert house.empty()


@virtual
async def test_what_an_answer_raises_passes_and_frees_the_place() -> None:
    house = House()

    async def broken() -> str:
        raise NoAnswer((), (), late=True, busy=False, cost_usd=0.0, decision=None)  # type: ignore[arg-type]

    house.ask = lambda name: broken()  # type: ignore[method-assign]
    with pytest.raises(NoAnswer):
        await house.infer("a")
    assert house.empty()


@virtual
async def test_one_that_may_not_use_the_free_target_does_not_hold_up_one_that_may() -> None:
    """A board's escalation does not go back to the board."""
    house = House()
    room = {"edge_mcu": 0, "edge_gpu": 0}

    async def infer(name: str, avoid: frozenset[Tier]) -> str:
        able = [target for target in room if target not in avoid]

        async def ask() -> str:
            if not any(room[target] for target in able):
                raise NoAnswer((), (), late=False, busy=True, cost_usd=0.0, decision=None)  # type: ignore[arg-type]
            return name

        now = house.clock.monotonic()
        request = InferenceRequest(name, "toy", {"window": INPUT}, NEAR, now, now + 10, 5, avoid=avoid)
        full = lambda: not any(room[target] for target in able)  # noqa: E731
        return (await house.queue.run(request, ask, full=full, needed_s=lambda: 0.1))[0]

    escalation = asyncio.create_task(infer("escalation", frozenset({Tier.EDGE_MCU})))
    await asyncio.sleep(0.1)
    ordinary = asyncio.create_task(infer("ordinary", frozenset()))
    await asyncio.sleep(0.1)
    room["edge_mcu"] = 1
    house.queue.room()
    assert await ordinary == "ordinary"
    assert house.clock.monotonic() < 1.0
    with pytest.raises(Overloaded):
        await escalation
    assert house.empty()


@virtual
async def test_a_place_that_is_given_up_for_good_is_handed_on() -> None:
    house = House(places=1)
    first = asyncio.create_task(_finds_its_target_full(house))
    await asyncio.sleep(0.01)
    began = house.clock.monotonic()
    assert (await house.infer("second", within_s=5.0))[0] == "second"
    assert house.clock.monotonic() - began < 2.0
    with pytest.raises(Overloaded):
        await first
    assert house.empty()


async def _finds_its_target_full(house: House) -> tuple[str, float]:
    async def ask() -> str:
        await asyncio.sleep(0.5)
        raise NoAnswer((), (), late=False, busy=True, cost_usd=0.0, decision=None)  # type: ignore[arg-type]

    now = house.clock.monotonic()
    request = InferenceRequest("first", "other", {"window": INPUT}, NEAR, now, now + 0.6, 5)
    return await house.queue.run(request, ask, full=lambda: True, needed_s=lambda: 0.2)
