"""What confidence is worth: scaling, intervals, the fit of temperatures and thresholds."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.registry import fitting
from agent.registry.calibration import LEAST_PROBABILITY, confidence, least_probability, wilson
from agent.registry.fitting import Answers

CLASSES = 4
shares = st.lists(st.floats(0, 1), min_size=2, max_size=12).filter(lambda values: max(values) > 1e-3)
temperatures = st.floats(0.25, 10)


def world(seed: int, samples: int, *, sharpness: float = 1.0) -> tuple[Answers, np.ndarray, np.ndarray]:
    """Answers whose own probabilities are the truth when `sharpness` is 1: labels are drawn from them."""
    random = np.random.default_rng(seed)
    logits = random.normal(0, 2, (samples, CLASSES))
    honest = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    labels = np.array([random.choice(CLASSES, p=row) for row in honest])
    told = np.exp(logits * sharpness) / np.exp(logits * sharpness).sum(1, keepdims=True)
    reference = np.where(random.random(samples) < 0.98, labels, (labels + 1) % CLASSES)
    return Answers(told, LEAST_PROBABILITY), labels, reference


# --- confidence ------------------------------------------------------------------------------------------------------


@given(shares, temperatures)
def test_confidence_is_a_share_and_no_less_than_chance(values: list[float], temperature: float) -> None:
    found = confidence(np.array(values), temperature, 1e-7)
    assert 1 / len(values) - 1e-9 <= found <= 1


@given(shares, temperatures, temperatures)
def test_a_higher_temperature_is_never_surer(values: list[float], one: float, other: float) -> None:
    low, high = sorted((one, other))
    assert confidence(np.array(values), high, 1e-7) <= confidence(np.array(values), low, 1e-7) + 1e-9


def test_at_temperature_one_probabilities_are_taken_as_they_are() -> None:
    assert confidence(np.array([0.1, 0.7, 0.2]), 1.0, 1e-7) == pytest.approx(0.7)


@given(st.integers(60, 70), temperatures, st.integers(0, 1000))
def test_few_classes_and_many_are_reckoned_alike(classes: int, temperature: float, seed: int) -> None:
    values = np.random.default_rng(seed).dirichlet(np.ones(classes))
    one = confidence(values, temperature, 1e-7)
    padded = np.concatenate([values, np.full(200, 1e-300)])
    rest = 200 * (1e-7 / values.max()) ** (1 / temperature)
    assert 1 / confidence(padded, temperature, 1e-7) == pytest.approx(1 / one + rest)


def test_temperature_divides_the_logits() -> None:
    logits = np.array([1.0, -2.0, 0.5])
    own, scaled = np.exp(logits), np.exp(logits / 2.5)
    assert confidence(own / own.sum(), 2.5, 1e-9) == pytest.approx(scaled.max() / scaled.sum())


def test_coarse_outputs_hide_half_a_step_at_most() -> None:
    least = least_probability(1 / 256, 10)
    assert least == pytest.approx(1 / 5120)
    certain = np.zeros(10)
    certain[3] = 255 / 256
    assert 1 - 1 / 256 < confidence(certain, 1.0, least) < 1
    assert least_probability(None, 10) == LEAST_PROBABILITY


# --- intervals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("successes", "samples", "low", "high"),
    [(0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (5, 10, 0.2366, 0.7634), (81, 263, 0.2553, 0.3662)],
)
def test_wilson_as_published(successes: int, samples: int, low: float, high: float) -> None:
    assert wilson(successes, samples) == (pytest.approx(low, abs=5e-5), pytest.approx(high, abs=5e-5))


@given(st.integers(0, 1000), st.integers(0, 1000))
def test_an_interval_holds_the_share(successes: int, more: int) -> None:
    samples = successes + more
    low, high = wilson(successes, samples)
    assert 0 <= low <= high <= 1
    if samples:
        assert low <= successes / samples <= high


# --- the fit ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sharpness", [0.5, 1.0, 2.0, 4.0])
def test_the_temperature_undoes_what_made_the_model_too_sure(sharpness: float) -> None:
    answers, labels, _ = world(1, 6000, sharpness=sharpness)
    temperature = fitting.fit_temperature(answers, labels)
    assert temperature == pytest.approx(sharpness, rel=0.06)
    right = (answers.classes == labels).mean()
    assert answers.confidences(temperature).mean() == pytest.approx(right, abs=0.015)


def test_without_errors_nothing_says_how_sure_to_be() -> None:
    answers = Answers(np.array([[0.8, 0.2], [0.1, 0.9]]), LEAST_PROBABILITY)
    assert fitting.fit_temperature(answers, np.array([0, 1])) == 1.0


def test_confidences_are_those_of_single_answers() -> None:
    answers, _, _ = world(2, 50)
    each = [confidence(row, 1.7, answers.least) for row in answers.probabilities]
    assert answers.confidences(1.7) == pytest.approx(each)


@given(st.integers(0, 10_000), st.integers(5, 200), st.floats(0, 0.2))
def test_a_threshold_loses_no_more_than_allowed_and_is_the_lowest(seed: int, samples: int, allowed: float) -> None:
    random = np.random.default_rng(seed)
    confidences = np.round(random.random(samples), 2)  # with ties, as of coarse outputs
    lost = random.random(samples) < 0.1
    threshold = fitting.fit_threshold(confidences, lost, allowed)

    def share_lost(at: float) -> float:
        return float((lost & (confidences >= at)).sum()) / samples

    assert share_lost(threshold) <= allowed + 1e-9
    for lower in sorted({value for value in confidences.tolist() if value < threshold}):
        assert share_lost(lower) > allowed


def test_where_nothing_is_lost_the_least_sure_answer_seen_is_the_limit() -> None:
    assert fitting.fit_threshold(np.array([0.9, 0.7, 0.8]), np.zeros(3, np.bool_), 0.0) == 0.7


def test_where_the_surest_is_lost_everything_is_asked_again() -> None:
    assert fitting.fit_threshold(np.array([0.9, 0.9]), np.array([True, False]), 0.0) == fitting.NOTHING_TAKEN


def test_being_right_by_chance_is_no_credit() -> None:
    answers, reference, labels = np.array([0, 1, 1]), np.array([1, 1, 0]), np.array([1, 1, 1])
    assert fitting.lost(answers, reference, labels).tolist() == [True, False, False]


def test_a_judged_cascade_keeps_its_promise_on_new_samples() -> None:
    """Fitted and judged on 600 samples; 20,000 more of the same world show what it really does."""
    answers, labels, reference = world(3, 600, sharpness=1.5)
    judged = fitting.judge([answers], reference, labels, 0.02)
    temperature = fitting.fit_temperature(answers, labels)
    lost = fitting.lost(answers.classes, reference, labels)
    threshold = fitting.fit_threshold(answers.confidences(temperature), lost, fitting.AIM * 0.02)
    more, truth, best = world(4, 20_000, sharpness=1.5)
    again = more.confidences(temperature) < threshold
    right = (np.where(again, best, more.classes) == truth).mean()
    low, high = wilson(judged.accuracy * 600, 600)
    assert low <= right <= high
    assert again.mean() == pytest.approx(judged.offload, abs=0.06)


def test_the_curve_runs_from_the_small_model_to_the_large_one_above_chance() -> None:
    answers, labels, reference = world(5, 2000)
    curve = fitting.curve(answers.confidences(1.0), answers.classes, reference, labels)
    assert (curve.offload[0], curve.offload[-1]) == (0, 1)
    assert curve.accuracy[0] == pytest.approx((answers.classes == labels).mean())
    assert curve.accuracy[-1] == pytest.approx((reference == labels).mean())
    assert curve.random[0] == pytest.approx(curve.accuracy[0])
    assert curve.random[-1] == pytest.approx(curve.accuracy[-1])
    middle = len(curve.offload) // 4
    assert curve.accuracy[middle] > curve.random[middle] + 0.05


def test_equally_sure_answers_are_asked_again_together() -> None:
    labels = np.zeros(4, np.int64)
    curve = fitting.curve(np.array([0.5, 0.5, 0.9, 0.9]), np.array([1, 0, 0, 0]), labels, labels)
    assert curve.offload == (0, 0.5, 1)
    assert curve.accuracy == (0.75, 1, 1)
