"""Estimates: windows against sorted lists, ageing, and the formula of the queue."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.routing.estimate import MAX_AGE_S, TIMEOUT_MEMORY_S, WINDOW, Estimate, TargetTimes, Window

SAMPLES = st.lists(
    st.tuples(st.floats(0, 20), st.floats(0, 10)), max_size=200
)  # (seconds since the one before, what was measured)


@given(samples=SAMPLES, q=st.sampled_from([0.01, 0.25, 0.5, 0.9, 0.95, 0.99, 1.0]), pause=st.floats(0, 100))
def test_a_quantile_is_that_of_the_sorted_recent_samples(
    samples: list[tuple[float, float]], q: float, pause: float
) -> None:
    window, now, kept = Window(), 0.0, []
    for gap, value in samples:
        now += gap
        window.add(now, value)
        kept.append((now, value))
    now += pause
    recent = sorted(value for at, value in kept[-WINDOW:] if at >= now - MAX_AGE_S)
    expected = recent[math.ceil(q * len(recent)) - 1] if recent else None
    assert window.quantile(q, now) == expected
    assert len(window) == len(recent)
    usual = (window.quantile(0.5, now), window.quantile(0.95, now)) if recent else None
    assert window.usual(now) == usual
    assert window.usual(now + 2 * MAX_AGE_S) is None


def test_nearest_rank_by_hand() -> None:
    window = Window()
    for value in (30.0, 10.0, 20.0, 40.0):
        window.add(0.0, value)
    assert [window.quantile(q, 0.0) for q in (0.25, 0.5, 0.75, 0.95)] == [10, 20, 30, 40]


def test_the_95th_percentile_of_twenty_is_not_the_worst() -> None:
    window = Window()
    for value in range(1, 21):
        window.add(0.0, float(value))
    assert window.quantile(0.95, 0.0) == 19.0


def test_one_slow_outlier_does_not_move_the_median() -> None:
    times = TargetTimes(0.005)
    for at in range(20):
        times.observe(at, service_s=0.002 if at != 7 else 5.0, link_s=0.001)
    assert times.estimate(20, 0, 1).p50_s == pytest.approx(0.003)


def test_a_full_window_forgets_the_oldest() -> None:
    window = Window()
    for value in range(WINDOW + 10):
        window.add(0.0, float(value))
    assert len(window) == WINDOW
    assert window.quantile(0.001, 0.0) == 10.0


@pytest.mark.parametrize("reported", [math.nan, -1.0, -math.inf])
def test_a_senseless_sample_counts_as_nothing_and_keeps_the_order(reported: float) -> None:
    window = Window()
    for at in range(3 * WINDOW):
        window.add(at / 10, reported if at % 3 == 0 else float(at % 7))
    assert window.quantile(0.01, 3 * WINDOW / 10) == 0.0
    assert len(window) == WINDOW


def test_until_something_was_measured_the_prior_counts() -> None:
    assert TargetTimes(0.02).estimate(0.0, 3, 1) == Estimate(0.02, 0.02, measured=False)


def test_after_a_while_without_samples_the_prior_counts_again() -> None:
    times = TargetTimes(0.02)
    times.observe(100.0, service_s=1.0, link_s=1.0)
    assert times.estimate(100.0 + MAX_AGE_S, 0, 1) == Estimate(2.0, 2.0, measured=True)
    assert times.estimate(100.001 + MAX_AGE_S, 0, 1) == Estimate(0.02, 0.02, measured=False)


@pytest.mark.parametrize(
    ("in_flight", "parallel", "expected"), [(0, 1, 0.011), (1, 1, 0.021), (3, 1, 0.041), (2, 2, 0.021), (3, 2, 0.026)]
)
def test_what_waits_takes_its_share_first(in_flight: int, parallel: int, expected: float) -> None:
    times = TargetTimes(0.005)
    times.observe(0.0, service_s=0.010, link_s=0.001)
    estimate = times.estimate(0.0, in_flight, parallel)
    assert estimate.p50_s == pytest.approx(expected)
    assert estimate.p95_s == pytest.approx(expected)
    assert estimate.measured


def test_median_and_95th_percentile_are_of_link_and_service_each() -> None:
    times = TargetTimes(0.005)
    for n in range(1, 21):
        times.observe(0.0, service_s=n / 1000, link_s=n / 100)
    estimate = times.estimate(0.0, 1, 1)
    assert estimate.p50_s == pytest.approx(0.10 + 0.010 * 2)
    assert estimate.p95_s == pytest.approx(0.19 + 0.019 * 2)


def test_an_attempt_given_up_took_at_least_as_long_for_a_while() -> None:
    times = TargetTimes(0.005)
    times.observe_timeout(0.0, 0.3)
    assert times.estimate(0.0, 5, 1) == Estimate(0.005, 0.3, measured=False)
    times.observe_timeout(1.0, 0.1)
    assert times.estimate(1.0 + TIMEOUT_MEMORY_S, 0, 1).p95_s == 0.3
    assert times.estimate(1.001 + TIMEOUT_MEMORY_S, 0, 1).p95_s == 0.005
    times.observe_timeout(100.0, 0.1)
    assert times.estimate(100.0, 0, 1).p95_s == 0.1


def test_an_answer_ends_the_memory_of_a_timeout() -> None:
    times = TargetTimes(0.005)
    times.observe(0.0, service_s=0.001, link_s=0.002)
    times.observe_timeout(0.0, 0.3)
    assert times.estimate(0.0, 0, 1).p50_s == pytest.approx(0.003)
    assert times.estimate(0.0, 0, 1).p95_s == pytest.approx(0.3)
    times.observe(1.0, service_s=0.001, link_s=0.002)
    assert times.estimate(1.0, 0, 1).p95_s == pytest.approx(0.003)
