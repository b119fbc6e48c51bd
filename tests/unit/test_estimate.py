"""Estimates: windows against sorted lists, the formulas of the page, ageing, and what is assumed before."""

import math
from math import inf

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.routing.estimate import (
    ENOUGH,
    FRESH_S,
    HALF_LIFE_S,
    KEEP_S,
    MAX_AGE_S,
    OUTCOME_HALF_LIFE_S,
    PRIOR_FAILURES,
    PRIOR_SUCCESSES,
    SPREAD,
    TIMEOUT_MEMORY_S,
    WINDOW,
    Cold,
    Link,
    Outcomes,
    TrackRecord,
    Window,
    fit_link,
)

COLD = Cold(0.004, 0.001)
SAMPLES = st.lists(
    st.tuples(st.floats(0, 100), st.floats(0, 10)), min_size=1, max_size=200
)  # (seconds since the one before, what was measured)


def track(cold: Cold = COLD, size: int = 0) -> TrackRecord:
    return TrackRecord(lambda now: cold, size)


def seen(*services: float, link_s: float = 0.001, now: float = 0.0) -> TrackRecord:
    record = track()
    for service_s in services:
        record.observe(now, service_s=service_s, link_s=link_s)
    return record


# --- the window ------------------------------------------------------------------------------------------------------


@given(samples=SAMPLES, q=st.sampled_from([0.01, 0.25, 0.5, 0.9, 0.95, 0.99, 1.0]))
def test_a_quantile_is_that_of_the_sorted_recent_samples(samples: list[tuple[float, float]], q: float) -> None:
    window, now, kept = Window(), 0.0, []
    for gap, value in samples:
        now += gap
        window.add(now, value)
        kept.append((now, value))
    recent = sorted(value for at, value in kept[-WINDOW:] if at >= now - MAX_AGE_S)
    assert window.quantile(q) == recent[math.ceil(q * len(recent)) - 1]
    assert len(window) == len(recent)
    assert window.usual() == (window.quantile(0.5), window.quantile(0.95))
    assert window.newest == now


def test_nearest_rank_by_hand() -> None:
    window = Window()
    assert window.quantile(0.5) is None
    for value in (30.0, 10.0, 20.0, 40.0):
        window.add(0.0, value)
    assert [window.quantile(q) for q in (0.25, 0.5, 0.75, 0.95)] == [10, 20, 30, 40]


def test_a_full_window_forgets_the_oldest() -> None:
    window = Window()
    for value in range(WINDOW + 10):
        window.add(0.0, float(value))
    assert len(window) == WINDOW
    assert window.quantile(0.001) == 10.0


@pytest.mark.parametrize("reported", [math.nan, -1.0, -math.inf])
def test_a_senseless_sample_counts_as_nothing_and_keeps_the_order(reported: float) -> None:
    window = Window()
    for at in range(3 * WINDOW):
        window.add(at / 10, reported if at % 3 == 0 else float(at % 7))
    assert window.quantile(0.01) == 0.0
    assert len(window) == WINDOW


# --- time ------------------------------------------------------------------------------------------------------------


def test_until_something_was_measured_the_first_guess_counts() -> None:
    estimate = track().estimate(0.0, 0, 1)
    assert (estimate.p50_s, estimate.p95_s, estimate.measured, estimate.age_s) == (0.005, SPREAD * 0.005, False, inf)
    waiting = track().estimate(0.0, 2, 1)
    assert (waiting.p50_s, waiting.wait_s) == pytest.approx((0.001 + 0.004 * 3, 0.008))


@pytest.mark.parametrize(
    ("in_flight", "parallel", "ahead"), [(0, 1, 0), (1, 1, 1), (3, 1, 3), (1, 2, 0), (2, 2, 1), (5, 2, 4), (9, 10, 0)]
)
def test_a_request_waits_for_the_departures_before_it(in_flight: int, parallel: int, ahead: int) -> None:
    estimate = seen(*[0.010] * ENOUGH).estimate(0.0, in_flight, parallel)
    assert estimate.wait_s == pytest.approx(0.010 * ahead / parallel)
    assert estimate.p50_s == pytest.approx(0.011 + estimate.wait_s)
    assert estimate.p95_s == pytest.approx(estimate.p50_s)


def test_the_95th_percentile_adds_what_varies_as_variances_add() -> None:
    record = track()
    for n in range(1, 21):
        record.observe(0.0, service_s=n / 1000, link_s=n / 100)
    estimate = record.estimate(0.0, 4, 2)  # three departures, of two servers
    assert estimate.p50_s == pytest.approx(0.10 + 0.010 + 0.010 * 3 / 2)
    assert estimate.p95_s - estimate.p50_s == pytest.approx(math.sqrt(0.09**2 + 0.009**2 * (1 + 3 / 4)))


def test_one_slow_outlier_does_not_move_the_median() -> None:
    assert seen(*[0.002] * 7, 5.0, *[0.002] * 12).estimate(0.0, 0, 1).p50_s == pytest.approx(0.003)


@pytest.mark.parametrize(("samples", "spread"), [(1, 2**0.95), (10, 2**0.5), (19, 2**0.05), (20, 1.0), (40, 1.0)])
def test_few_samples_are_not_trusted_to_be_all_there_is(samples: int, spread: float) -> None:
    estimate = seen(*[0.009] * samples).estimate(0.0, 0, 1)
    assert estimate.p95_s / estimate.p50_s == pytest.approx(spread)


def test_what_few_samples_show_by_themselves_is_not_made_smaller() -> None:
    assert seen(0.009, 0.009, 0.099).estimate(0.0, 0, 1).p95_s == pytest.approx(0.100)


def test_what_was_measured_long_ago_draws_near_to_the_first_guess_and_gets_wider() -> None:
    record = seen(*[0.079] * ENOUGH)  # 80 ms, where 5 ms would be assumed
    assert record.estimate(FRESH_S, 0, 1).p50_s == record.estimate(0.0, 0, 1).p50_s == pytest.approx(0.080)
    old = record.estimate(FRESH_S + HALF_LIFE_S, 0, 1)
    assert old.link_s + old.service_s == pytest.approx(old.p50_s) == pytest.approx(math.sqrt(0.080 * 0.005))
    assert old.p95_s / old.p50_s == pytest.approx(math.sqrt(SPREAD))
    older = record.estimate(FRESH_S + 2 * HALF_LIFE_S, 0, 1)
    assert older.p50_s == pytest.approx(0.080**0.25 * 0.005**0.75)
    assert older.p95_s / older.p50_s == pytest.approx(SPREAD**0.75)
    assert record.estimate(MAX_AGE_S, 0, 1).measured
    assert not record.estimate(MAX_AGE_S + 1, 0, 1).measured
    assert record.estimate(MAX_AGE_S + 1, 0, 1).p50_s == 0.005


@given(age=st.floats(0, 400), more=st.floats(0, 400), fast=st.booleans())
def test_age_never_narrows_what_is_narrower_than_nothing_known(age: float, more: float, fast: bool) -> None:
    record = seen(*([0.001] if fast else [0.5]) * ENOUGH)
    young = record.estimate(age, 0, 1)
    old = record.estimate(age + max(more, KEEP_S), 0, 1)
    assert old.p95_s / old.p50_s >= young.p95_s / young.p50_s * (1 - 1e-9)


def test_a_long_tail_is_forgiven_in_time() -> None:
    record = seen(*[0.004] * 15, *[0.4] * 5)
    assert record.estimate(0.0, 0, 1).p95_s == pytest.approx(0.401)
    old = record.estimate(FRESH_S + 4 * HALF_LIFE_S, 0, 1)
    assert old.p95_s / old.p50_s == pytest.approx((0.401 / 0.005) ** (1 / 16) * SPREAD ** (15 / 16))


def test_a_target_that_came_back_is_not_held_to_what_it_did_while_it_went() -> None:
    record = seen(*[0.002] * ENOUGH)
    for _ in range(5):
        record.observe_failure(0.0)
    record.observe_timeout(0.0, 1.0)
    record.came_back()
    estimate = record.estimate(0.0, 0, 1)
    assert (estimate.success, estimate.p95_s) == pytest.approx((Outcomes().mean(0.0), 0.003))


def test_an_attempt_given_up_took_at_least_as_long_for_a_while() -> None:
    record = track()
    record.observe_timeout(0.0, 0.3)
    assert record.estimate(0.0, 5, 1).p95_s == 0.3
    record.observe_timeout(1.0, 0.1)
    assert record.estimate(1.0 + TIMEOUT_MEMORY_S, 0, 1).p95_s == 0.3
    assert record.estimate(1.001 + TIMEOUT_MEMORY_S, 0, 1).p95_s == 0.01
    record.observe_timeout(100.0, 0.1)
    assert record.estimate(100.0, 0, 1).p95_s == 0.1


def test_an_answer_ends_the_memory_of_a_timeout() -> None:
    record = seen(*[0.002] * ENOUGH)
    record.observe_timeout(0.0, 0.3)
    assert (record.estimate(0.0, 0, 1).p50_s, record.estimate(0.0, 0, 1).p95_s) == pytest.approx((0.003, 0.3))
    record.observe(1.0, service_s=0.002, link_s=0.001)
    assert record.estimate(1.0, 0, 1).p95_s == pytest.approx(0.003)


def test_an_estimate_is_made_anew_when_something_happened() -> None:
    record = seen(*[0.002] * ENOUGH)
    first = record.estimate(0.0, 0, 1, 0.001, 0.9)
    assert record.estimate(KEEP_S / 2, 0, 1, 0.001, 0.9) is first
    assert record.estimate(KEEP_S, 0, 1, 0.001, 0.9).age_s == KEEP_S
    assert record.estimate(KEEP_S, 0, 1, 0.001, 0.8).accuracy == 0.8
    assert record.estimate(KEEP_S, 1, 1, 0.001, 0.8).wait_s == 0.002
    record.observe_failure(KEEP_S)
    assert record.estimate(KEEP_S, 1, 1, 0.001, 0.8).success < first.success
    assert record.estimate(0.0, 1, 1).age_s == 0.0, "a clock that was put back is no reason to answer from the future"


# --- outcomes --------------------------------------------------------------------------------------------------------


def test_success_is_the_mean_of_the_posterior() -> None:
    outcomes = Outcomes()
    prior = PRIOR_SUCCESSES / (PRIOR_SUCCESSES + PRIOR_FAILURES)
    assert outcomes.mean(0.0) == pytest.approx(prior) == pytest.approx(0.99, abs=0.001)
    for _ in range(3):
        outcomes.add(0.0, ok=False)
    assert outcomes.mean(0.0) == pytest.approx(20 / 23.2)
    assert outcomes.mean(OUTCOME_HALF_LIFE_S) == pytest.approx(20 / 21.7)
    outcomes.add(OUTCOME_HALF_LIFE_S, ok=True)
    assert outcomes.mean(OUTCOME_HALF_LIFE_S) == pytest.approx(21 / 22.7)
    assert outcomes.mean(1e9) == pytest.approx(prior)


@given(outcomes=st.lists(st.tuples(st.floats(0, 100), st.booleans()), max_size=100))
def test_success_is_a_probability_and_never_certain(outcomes: list[tuple[float, bool]]) -> None:
    counted, now = Outcomes(), 0.0
    for gap, ok in outcomes:
        now += gap
        before = counted.mean(now)
        counted.add(now, ok=ok)
        assert 0 < counted.mean(now) < 1
        assert (counted.mean(now) >= before - 1e-12) is ok


# --- the link --------------------------------------------------------------------------------------------------------

PRIOR = Link(0.045, 1e-6)


def test_a_line_through_sizes_and_times() -> None:
    assert fit_link([], PRIOR) == PRIOR
    assert fit_link([(1000, 0.012)], PRIOR) == pytest.approx((0.011, 1e-6))
    assert fit_link([(1000, 0.012), (5000, 0.020)], PRIOR) == pytest.approx((0.010, 2e-6))
    assert fit_link([(1000, 0.012), (5000, 0.020), (9000, 0.028), (7000, 5.0)], PRIOR).takes(3000) == pytest.approx(
        0.016, rel=0.2
    ), "one point off does not move it"
    assert fit_link([(1000, 0.012), (5000, 0.008)], PRIOR).s_per_byte == 0.0, "more bytes never take less"


@given(
    rtt=st.floats(0.001, 1),
    s_per_byte=st.floats(0, 1e-4),
    sizes=st.lists(st.integers(1, 10**6), min_size=2, max_size=8, unique=True),
)
def test_a_line_that_is_there_is_found(rtt: float, s_per_byte: float, sizes: list[int]) -> None:
    link = fit_link([(size, rtt + size * s_per_byte) for size in sizes], PRIOR)
    assert link.takes(5000) == pytest.approx(rtt + 5000 * s_per_byte, rel=1e-3)


def test_the_bytes_are_those_that_went_over_the_wire_last() -> None:
    record = track(size=700)
    assert (record.estimate(0.0, 0, 1).bytes, record.link_point(0.0)) == (700, None)
    record.observe(0.0, service_s=0.001, link_s=0.030, bytes=812)
    assert (record.estimate(0.0, 0, 1).bytes, record.link_point(0.0)) == (812, (812, 0.030))
    assert record.link_point(MAX_AGE_S + 1) is None
