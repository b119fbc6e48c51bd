"""Trains the `digits` family: 8x8 digits as read from a meter, three sizes of network.

Writes `digits/` and its entry in catalog.yaml. `--check` trains aside and compares with the
catalogue; `--cross-validate` scores the recipes on the training data alone, which is how they
were chosen.
"""

from __future__ import annotations

import sys

import keras
import numpy as np
from training.data import augment_digits, load_digits
from training.family import Family, Variant, main
from training.fit import Recipe

layers = keras.layers


def small() -> keras.Model:
    """One hidden layer of 12: about 900 multiplications per image."""
    return keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            layers.Flatten(),
            layers.Dense(12, activation="relu"),
            layers.Dense(10),
        ]
    )


def medium() -> keras.Model:
    """Two convolutions of 3x3, each halved by pooling, and a hidden layer."""
    return keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            layers.Conv2D(16, 3, padding="same", activation="relu"),
            layers.MaxPooling2D(),
            layers.Conv2D(32, 3, padding="same", activation="relu"),
            layers.MaxPooling2D(),
            layers.Flatten(),
            layers.Dense(64, activation="relu"),
            layers.Dense(10),
        ]
    )


def large() -> keras.Model:
    """Two pairs of normalised 3x3 convolutions with pooling, and a hidden layer with dropout."""

    def block(filters: int) -> list[keras.layers.Layer]:
        return [
            layers.Conv2D(filters, 3, padding="same", use_bias=False),
            layers.BatchNormalization(),
            layers.ReLU(),
        ]

    return keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            *block(32),
            *block(32),
            layers.MaxPooling2D(),
            *block(64),
            *block(64),
            layers.MaxPooling2D(),
            layers.Flatten(),
            layers.Dropout(0.4),
            layers.Dense(128, activation="relu"),
            layers.Dropout(0.4),
            layers.Dense(10),
        ]
    )


FAMILY = Family(
    name="digits",
    script="train_digits.py",
    description="Handwritten digit in an 8x8 grey image, as read from a meter",
    labels=tuple("0123456789"),
    input={
        "name": "image",
        "dtype": "float32",
        "shape": [1, 8, 8, 1],
        "minimum": 0.0,
        "maximum": 16.0,
        "unit": "grey level",
    },
    provenance={
        "name": "Optical Recognition of Handwritten Digits (UCI), test part, 1,797 images",
        "source": "scikit-learn load_digits",
        "licence": "CC BY 4.0",
        "split": "stratified, 1,347 train and 450 held out, seed 2024; 15 % of the training part "
        "sets the softmax temperature",
    },
    scale=np.array([16.0], np.float32),
    validation=0.15,
    variants={
        "mcu-int8": Variant(Recipe(small, 60, 64, 8e-3), "int8", ("edge_mcu",), 0.015),
        "gateway-fp16": Variant(Recipe(medium, 40, 64, 2e-3), "float16", ("edge_gpu",), 0.01),
        "cloud-fp32": Variant(
            Recipe(large, 6, 128, 2e-3, augment_digits, copies=15, members=3),
            "float32",
            ("cloud",),
            0.01,
        ),
    },
)

if __name__ == "__main__":
    sys.exit(main(FAMILY, load_digits()))
