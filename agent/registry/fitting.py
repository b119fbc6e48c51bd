"""Fits temperatures and thresholds to held-out answers, and judges them by cross-validation. Pure numpy.

The threshold is that of hierarchical inference (Al-Atat, Fresa, Behera, Moothedath, Gross and Champati 2023, The Case
for Hierarchical Deep Learning Inference at the Network Edge): a small model's answer is taken above it, and the large
model is asked below. There it minimises cost with a price on each offload; here the same rule is written as a
constraint: the lowest threshold, so the fewest offloads, at which no more than a given share of the answers is lost.
An answer is lost where the small model is sure and wrong and the reference is right. Being right where the reference is
wrong is no credit, for it would hide losses.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]

LOWEST_TEMPERATURE, HIGHEST_TEMPERATURE = 0.25, 10.0
MIN_ERRORS = 2
"""Wrong answers that a temperature takes; with fewer, nothing says how sure the model should be, and it stays at 1."""
AIM = 0.5
"""The share of the permitted loss that the fit uses up: a threshold is optimistic on the data it was fitted to."""
NOTHING_TAKEN = 2.0
"""A threshold that no confidence reaches: even the surest answers are wrong too often."""
FOLDS = 10
REPEATS = 10
_GOLDEN = (5**0.5 - 1) / 2


@dataclass(frozen=True, slots=True)
class Answers:
    """What one variant gave for the held-out inputs: `probabilities` [n, classes] as canonical outputs."""

    probabilities: Floats
    least: float

    @property
    def classes(self) -> Integers:
        chosen: Integers = self.probabilities.argmax(axis=1)
        return chosen

    def confidences(self, temperature: float) -> Floats:
        """As `calibration.confidence`, for all."""
        raised = np.maximum(self.probabilities, self.least)
        powers = (raised / raised.max(axis=1, keepdims=True)) ** (1.0 / temperature)
        result: Floats = 1.0 / powers.sum(axis=1)
        return result

    def some(self, which: Mask | Integers) -> Answers:
        return Answers(self.probabilities[which], self.least)


@dataclass(frozen=True, slots=True)
class Judgement:
    """Of a cascade on samples that took no part in the fit: shares, means over all repeats."""

    accuracy: float
    offload: float


def fit_temperature(answers: Answers, labels: Integers) -> float:
    """The temperature of the least negative log-likelihood, by golden-section search over its logarithm."""
    if (answers.classes != labels).sum() < MIN_ERRORS:
        return 1.0
    logits = np.log(np.maximum(answers.probabilities, answers.least))
    logits -= logits.max(axis=1, keepdims=True)
    right = logits[np.arange(len(labels)), labels]

    def loss(log_temperature: float) -> float:
        scale = float(np.exp(-log_temperature))
        return float((np.log(np.exp(logits * scale).sum(axis=1)) - right * scale).sum())

    low, high = np.log(LOWEST_TEMPERATURE), np.log(HIGHEST_TEMPERATURE)
    for _ in range(40):
        a, b = high - _GOLDEN * (high - low), low + _GOLDEN * (high - low)
        low, high = (low, b) if loss(a) <= loss(b) else (a, high)
    return round(float(np.exp((low + high) / 2)), 4)


def fit_threshold(confidences: Floats, lost: Mask, max_share: float) -> float:
    """The lowest threshold above which at most `max_share` of all samples are lost. `lost` says which would be, taken.

    It lies half-way to the next less sure sample. Where nothing needs to be asked again it is the least confidence
    seen, since nothing says what answers less sure than that are worth.
    """
    order = np.argsort(-confidences, kind="stable")
    sorted_ = confidences[order]
    losses = np.cumsum(lost[order])
    allowed = max_share * len(confidences) + 1e-9
    for taken in range(len(sorted_), 0, -1):
        below = sorted_[taken] if taken < len(sorted_) else None
        if losses[taken - 1] <= allowed and below != sorted_[taken - 1]:
            return float(sorted_[taken - 1] if below is None else (sorted_[taken - 1] + below) / 2)
    return NOTHING_TAKEN


def lost(answers: Integers, reference: Integers, labels: Integers) -> Mask:
    """Where taking the answer makes wrong what the reference has right."""
    result: Mask = (answers != labels) & (reference == labels)
    return result


def judge(
    stages: Sequence[Answers], reference: Integers, labels: Integers, max_loss: float, *, seed: int = 0
) -> Judgement:
    """A cascade through `stages`, least accurate first, and then the reference: temperatures and thresholds are fitted
    to all folds but one and tried on that one, `REPEATS` times. `offload` counts what the reference is asked."""
    right, asked = 0, 0
    for fitted, tried in _folds(len(labels), seed):
        outcome = reference[tried].copy()
        open_ = np.ones(len(tried), np.bool_)
        for answers in stages:
            part, rest = answers.some(fitted), answers.some(tried)
            temperature = fit_temperature(part, labels[fitted])
            threshold = fit_threshold(
                part.confidences(temperature), lost(part.classes, reference[fitted], labels[fitted]), AIM * max_loss
            )
            taken = open_ & (rest.confidences(temperature) >= threshold)
            outcome[taken] = rest.classes[taken]
            open_ &= ~taken
        right += int((outcome == labels[tried]).sum())
        asked += int(open_.sum())
    total = len(labels) * REPEATS
    return Judgement(right / total, asked / total)


def _folds(samples: int, seed: int) -> Iterator[tuple[Integers, Integers]]:
    random = np.random.default_rng(seed)
    for _ in range(REPEATS):
        parts: Sequence[Integers] = np.array_split(random.permutation(samples), min(FOLDS, samples))
        for at, part in enumerate(parts):
            yield np.concatenate([*parts[:at], *parts[at + 1 :]]), part


@dataclass(frozen=True, slots=True)
class Curve:
    """Accuracy by share of samples asked again, least sure first; `random` is the line of asking again by chance."""

    offload: tuple[float, ...]
    accuracy: tuple[float, ...]
    random: tuple[float, ...]


def curve(confidences: Floats, answers: Integers, reference: Integers, labels: Integers) -> Curve:
    """One point for each share that a threshold can give: equally sure samples go together.

    Asking a random share f again gives (1 - f) x accuracy of the small model + f x accuracy of the reference.
    """
    order = np.argsort(confidences, kind="stable")
    ranked, total = confidences[order], len(labels)
    small, large = (answers == labels)[order], (reference == labels)[order]
    gained = np.concatenate([[0], np.cumsum(large.astype(int) - small.astype(int))])
    asked = [k for k in range(total + 1) if k in (0, total) or ranked[k - 1] < ranked[k]]
    base, best = float(small.mean()), float(large.mean())
    return Curve(
        offload=tuple(k / total for k in asked),
        accuracy=tuple(float(base + gained[k] / total) for k in asked),
        random=tuple(base + (best - base) * k / total for k in asked),
    )
