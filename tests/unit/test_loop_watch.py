"""What holds up the event loop is measured and named."""

from __future__ import annotations

import asyncio
import time

import pytest

from agent.telemetry import loop_watch
from agent.telemetry.loop_watch import LIMIT_S, PERIOD_S, RECENT_S, LoopWatch

SOON_S = 20.0


class Hand:
    """A clock moved by hand."""

    def __init__(self) -> None:
        self.at = 100.0

    def __call__(self) -> float:
        return self.at


@pytest.fixture
def hand(monkeypatch: pytest.MonkeyPatch) -> Hand:
    monkeypatch.setattr(loop_watch, "_run_delay", lambda thread: 0.0)
    return Hand()


def beats(watch: LoopWatch, hand: Hand, late_s: float) -> None:
    hand.at = watch._due + late_s
    watch.beaten(hand.at)


def test_beats_in_time_are_no_block(hand: Hand) -> None:
    watch = LoopWatch(hand)
    watch._due = hand.at + PERIOD_S
    for _ in range(100):
        beats(watch, hand, 0.9 * LIMIT_S)
    assert (watch.blocks, watch.status()["loop_lag_ms"]) == (0, pytest.approx(45.0))


def test_a_late_beat_is_one_and_its_lag_is_shown_for_a_while(hand: Hand, caplog: pytest.LogCaptureFixture) -> None:
    watch = LoopWatch(hand)
    watch._due = hand.at
    beats(watch, hand, 0.3)
    for _ in range(5):
        beats(watch, hand, 0.001)
    assert (watch.blocks, watch.longest_s) == (1, pytest.approx(0.3))
    assert watch.status()["loop_lag_ms"] == pytest.approx(300.0)
    assert [record.message for record in caplog.records] == ["event loop blocked"]
    hand.at += RECENT_S - 0.01
    watch._due = hand.at
    watch.beaten(hand.at)
    assert watch.status()["loop_lag_ms"] < 300.0


def test_a_loop_that_does_not_turn_is_shown_while_it_does_not(hand: Hand) -> None:
    watch = LoopWatch(hand)
    watch._due = hand.at
    hand.at += 2.0
    assert watch.status()["loop_lag_ms"] == pytest.approx(2000.0)


def test_what_the_machine_took_is_not_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    hand, delay = Hand(), [0.0]
    monkeypatch.setattr(loop_watch, "_run_delay", lambda thread: delay[0])
    watch = LoopWatch(hand)
    watch._due, watch._thread = hand.at, 1
    delay[0] = 0.28
    beats(watch, hand, 0.3)
    assert (watch.blocks, watch.starved_s) == (0, pytest.approx(0.28))
    delay[0] = 0.30
    beats(watch, hand, 0.3)
    assert (watch.blocks, watch.longest_s) == (1, pytest.approx(0.28))


async def test_the_culprit_is_named() -> None:
    watch = LoopWatch()

    def a_long_computation() -> None:
        end = time.monotonic() + SOON_S
        while not watch._seen and time.monotonic() < end:
            sum(range(1000))

    task = asyncio.create_task(watch.run())
    async with asyncio.timeout(SOON_S):
        while not watch._recent:  # noqa: ASYNC110 - until it has beaten once
            await asyncio.sleep(0)
    a_long_computation()
    assert "a_long_computation" in watch._seen
    task.cancel()
    await asyncio.wait([task])
