"""A board's clock: the bound holds whatever the line does to the exchanges, and it is small where the line is good."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.link.timesync import MAX_TOLERANCE, SAMPLES, TOLERANCE, ClockSync


class Truth:
    """A board clock that was `offset` when ours was 0, and gains `drift` a second."""

    def __init__(self, offset_s: float, drift: float) -> None:
        self.offset_s, self.drift = offset_s, drift

    def offset(self, at: float) -> float:
        return self.offset_s + self.drift * at

    def exchange(self, sync: ClockSync, sent: float, out_s: float, back_s: float) -> float:
        """One PING with these times on the way; returns when its PONG was here."""
        stamp = sent + out_s + self.offset(sent + out_s)
        received = sent + out_s + back_s
        sync.note((sent + received) / 2, (stamp - sent + stamp - received) / 2, received - sent)
        return received


def test_nothing_is_known_before_the_first_exchange() -> None:
    sync = ClockSync()
    assert sync.estimate(1.0) is None
    assert sync.our_time(5.0, 1.0) is None


def test_of_several_exchanges_the_quickest_counts() -> None:
    sync, truth = ClockSync(), Truth(-900.0, 0.0)
    truth.exchange(sync, 10.0, 0.010, 0.001)
    truth.exchange(sync, 10.1, 0.0002, 0.0002)
    truth.exchange(sync, 10.2, 0.001, 0.010)
    found = sync.estimate(10.3)
    assert found is not None
    assert found.offset_s == pytest.approx(-900.0, abs=1e-5)
    assert found.bound_s < 0.00025


def test_each_way_counts_for_itself() -> None:
    """One exchange was quick on its way there, another on its way back: neither alone bounds the offset as well."""
    sync, truth = ClockSync(), Truth(40.0, 0.0)
    truth.exchange(sync, 10.0, 0.0002, 0.010)
    truth.exchange(sync, 10.1, 0.010, 0.0002)
    found = sync.estimate(10.2)
    assert found is not None
    assert abs(found.offset_s - 40.0) <= found.bound_s < 0.00025


@given(
    offset=st.floats(-1e6, 1e6),
    drift_ppm=st.floats(-TOLERANCE * 1e6, TOLERANCE * 1e6),
    seed=st.integers(0, 2**32),
    interval_s=st.floats(0.01, 60),
)
def test_the_true_offset_is_within_the_bound(offset: float, drift_ppm: float, seed: int, interval_s: float) -> None:
    rng, sync, truth = random.Random(seed), ClockSync(), Truth(offset, drift_ppm * 1e-6)
    now = 1000.0
    for _ in range(2 * SAMPLES):
        now = truth.exchange(sync, now, rng.expovariate(1 / 0.002), rng.expovariate(1 / 0.001))
        for later in (0.0, interval_s / 2, interval_s):
            found = sync.estimate(now + later)
            assert found is not None
            assert abs(found.offset_s - truth.offset(now + later)) <= found.bound_s + 1e-9 * (1 + abs(offset))
        now += interval_s
    assert sync.steps == 0


def test_drift_is_learnt_and_carries_the_estimate_on() -> None:
    sync, truth = ClockSync(), Truth(5.0, 60e-6)
    now = 0.0
    for _ in range(SAMPLES):
        now = truth.exchange(sync, now, 0.0002, 0.0003) + 5.0
    assert sync.drift == pytest.approx(60e-6, abs=3e-6)
    found = sync.estimate(now + 30)
    assert found is not None
    assert abs(found.offset_s - truth.offset(now + 30)) <= found.bound_s < 0.001


def test_a_board_time_becomes_our_time() -> None:
    sync, truth = ClockSync(), Truth(-100.0, 50e-6)
    now = 0.0
    for _ in range(SAMPLES):
        now = truth.exchange(sync, now, 0.0002, 0.0002) + 5.0
    at = now - 2.0
    found = sync.our_time(at + truth.offset(at), now)
    assert found is not None
    ours, bound_s = found
    assert abs(ours - at) <= bound_s < 0.001


def test_a_clock_that_is_worse_than_reckoned_is_noticed_and_followed() -> None:
    """An RC oscillator, 0.5 % off."""
    sync, truth = ClockSync(), Truth(0.0, 0.005)
    now = 0.0
    for _ in range(SAMPLES):
        now = truth.exchange(sync, now, 0.0002, 0.0002) + 1.0
    assert 0 < sync.steps < 6
    found = sync.estimate(now)
    assert found is not None
    assert abs(found.offset_s - truth.offset(now)) <= found.bound_s < 0.001


def test_a_clock_that_was_set_is_begun_anew() -> None:
    sync, truth = ClockSync(), Truth(0.0, 0.0)
    truth.exchange(sync, 1.0, 0.001, 0.001)
    truth.offset_s = -77.0
    now = truth.exchange(sync, 2.0, 0.001, 0.001)
    found = sync.estimate(now)
    assert found is not None
    assert found.offset_s == pytest.approx(-77.0, abs=0.001)
    assert sync.steps == 1


def test_steps_do_not_raise_the_tolerance_without_end() -> None:
    sync = ClockSync()
    for step in range(20):
        sync.note(float(step), float(step % 2) * 100, 0.0002)
    found = sync.estimate(30.0)
    assert found is not None
    assert found.bound_s <= MAX_TOLERANCE * 11 + 0.001
