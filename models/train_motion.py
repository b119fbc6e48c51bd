"""Trains the `motion` family: what a wrist does, from ten seconds of a smart watch's sensors.

Writes `motion/` and its entry in catalog.yaml. `--check` trains aside and compares with the
catalogue; `--cross-validate` scores the recipes on the training data alone, which is how they
were chosen. There are 40 training windows: all are trained on, and no temperature is fitted.
"""

from __future__ import annotations

import math
import sys

import keras
from training.data import MOTION_LABELS, Dataset, augment_motion, load_motion
from training.family import Family, Variant, main
from training.fit import Recipe

layers = keras.layers

CHANNELS = ("accel_x", "accel_y", "accel_z", "gyro_x", "gyro_y", "gyro_z")


def network(filters: tuple[int, ...], width: int, dropout: float) -> keras.Model:
    """Convolutions over time, the first two with stride 2, and the mean over what is left.

    The mean makes the answer independent of the phase at which a window starts.
    """
    convolutions = [
        layers.Conv2D(
            count,
            (width, 1),
            strides=(2 if index < 2 else 1, 1),
            padding="same",
            activation="relu",
        )
        for index, count in enumerate(filters)
    ]
    return keras.Sequential(
        [
            keras.Input((100, 1, 6)),
            *convolutions,
            layers.GlobalAveragePooling2D(),
            layers.Dropout(dropout),
            layers.Dense(len(MOTION_LABELS)),
        ]
    )


def small() -> keras.Model:
    """Two convolutions, 8 and 16 filters."""
    return network((8, 16), 5, 0.0)


def medium() -> keras.Model:
    """Three convolutions, 24 to 32 filters."""
    return network((24, 32, 32), 5, 0.2)


def large() -> keras.Model:
    """Three wider convolutions, 32 to 64 filters."""
    return network((32, 64, 64), 7, 0.3)


def family(data: Dataset) -> Family:
    """The family; input limits and channel scales come from the training windows.

    Limits are rounded outwards to 0.01. The channels' ranges are within a factor of two of one
    another, so the int8 input keeps one scale for all six.
    """
    windows = data.train_inputs
    return Family(
        name="motion",
        script="train_motion.py",
        description="Activity of the wearer in a 10 s window of wrist accelerometer and gyroscope",
        labels=MOTION_LABELS,
        input={
            "name": "window",
            "dtype": "float32",
            "shape": [1, 100, 6],
            "minimum": math.floor(float(windows.min()) * 100) / 100,
            "maximum": math.ceil(float(windows.max()) * 100) / 100,
            "unit": "raw sensor units at 10 Hz",
            "channels": list(CHANNELS),
        },
        provenance={
            "name": "BasicMotions (UEA multivariate time series classification archive)",
            "source": "aeon load_basic_motions",
            "licence": "shipped in aeon under BSD-3-Clause; the archive states none of its own",
            "split": "the archive's own, 40 train and 40 held out",
        },
        scale=windows.std(axis=(0, 1)),
        validation=0.0,
        variants={
            "mcu-int8": Variant(
                Recipe(small, 20, 32, 5e-3, augment_motion, copies=15),
                "int8",
                ("edge_mcu",),
                0.05,
            ),
            "gateway-fp16": Variant(
                Recipe(medium, 15, 32, 2e-3, augment_motion, copies=15),
                "float16",
                ("edge_gpu",),
                0.05,
            ),
            "cloud-fp32": Variant(
                Recipe(large, 12, 32, 2e-3, augment_motion, copies=15, members=3),
                "float32",
                ("cloud",),
                0.05,
            ),
        },
    )


if __name__ == "__main__":
    motion = load_motion()
    sys.exit(main(family(motion), motion))
