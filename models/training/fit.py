"""Deterministic training: a recipe, an ensemble of one or more members, a softmax temperature."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import keras
import numpy as np
import tensorflow as tf
from scipy.special import log_softmax, logsumexp
from sklearn.model_selection import StratifiedKFold

from training.data import Floats, Labels
from training.graph import Network, fold

Augment = Callable[[Floats, np.random.Generator], Floats]

# Only softening is allowed: on a few hundred samples without an error the likelihood would sharpen
# a model without bound.
TEMPERATURES = np.geomspace(1.0, 5.0, 81)


@dataclass(frozen=True)
class Recipe:
    """How one variant is trained: architecture, length, augmentation, number of members.

    `copies` augmented copies of each training sample join the originals.
    """

    build: Callable[[], keras.Model]
    epochs: int
    batch: int
    learning_rate: float
    augment: Augment | None = None
    copies: int = 0
    members: int = 1


def make_deterministic() -> None:
    """Makes TensorFlow repeat itself bit for bit on one machine. Call before any training."""
    tf.config.experimental.enable_op_determinism()


def train(recipe: Recipe, inputs: Floats, labels: Labels, scale: Floats, seed: int) -> list[keras.Model]:
    """The trained members, logit outputs, for inputs [n, ...] divided by `scale` ([channels])."""
    models = []
    for member in range(recipe.members):
        keras.utils.set_random_seed(seed + member)
        rng = np.random.default_rng(seed + member)
        parts = [inputs]
        if recipe.augment is not None:
            parts += [recipe.augment(inputs, rng) for _ in range(recipe.copies)]
        model = recipe.build()
        x = _normalised(model, np.concatenate(parts), scale)
        y = np.tile(labels, len(parts))
        steps = recipe.epochs * -(-len(x) // recipe.batch)
        schedule = keras.optimizers.schedules.CosineDecay(recipe.learning_rate, steps)
        model.compile(
            keras.optimizers.Adam(schedule),
            keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        )
        model.fit(x, y, batch_size=recipe.batch, epochs=recipe.epochs, verbose=0)
        models.append(model)
    return models


def _normalised(model: keras.Model, inputs: Floats, scale: Floats) -> Floats:
    """Inputs divided by the channel scales, in the spatial shape that `model` takes."""
    return (inputs / scale).reshape(-1, *model.input_shape[1:])


def logits(models: list[keras.Model], inputs: Floats, scale: Floats) -> Floats:
    """Logits of every member, [members, n, classes]."""
    outputs = [model.predict(_normalised(model, inputs, scale), batch_size=512, verbose=0) for model in models]
    return np.stack(outputs)


def log_probabilities(member_logits: Floats, temperature: float = 1.0) -> Floats:
    """Log of the members' mean probability, [n, classes]."""
    members = log_softmax(member_logits / temperature, axis=-1)
    return logsumexp(members, axis=0) - np.log(len(members))


def fit_temperature(member_logits: Floats, labels: Labels) -> float:
    """The temperature that makes `labels` likeliest (Guo et al. 2017), at least 1."""
    rows = np.arange(len(labels))
    losses = [-log_probabilities(member_logits, t)[rows, labels].mean() for t in TEMPERATURES]
    return float(TEMPERATURES[int(np.argmin(losses))])


def folded(models: list[keras.Model], scale: Floats, temperature: float) -> list[Network]:
    """The members as exportable networks of raw inputs, temperature included."""
    return [fold(model, scale).with_temperature(temperature) for model in models]


def cross_validate(recipe: Recipe, inputs: Floats, labels: Labels, scale: Floats, seed: int, folds: int) -> list[float]:
    """Accuracy on each fold of the training data: what recipes are compared by."""
    splitter = StratifiedKFold(folds, shuffle=True, random_state=seed)
    accuracies = []
    for fit_rows, test_rows in splitter.split(inputs, labels):
        models = train(recipe, inputs[fit_rows], labels[fit_rows], scale, seed)
        answers = log_probabilities(logits(models, inputs[test_rows], scale)).argmax(axis=1)
        accuracies.append(float(np.mean(answers == labels[test_rows])))
    return accuracies
