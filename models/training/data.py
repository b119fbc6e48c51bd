"""The two data sets, their fixed splits and their augmentations.

Both come from files inside PyPI packages, so nothing is downloaded while training. Arrays are in
the family's canonical form: float32, raw units, one leading sample axis.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from sklearn.datasets import load_digits as sklearn_digits
from sklearn.model_selection import train_test_split

Floats = NDArray[np.float32]
Labels = NDArray[np.int64]

SPLIT_SEED = 2024
DIGITS_HELDOUT_FRACTION = 0.25
_PAD = 2  # zero pixels around a digit, so that a warp may look outside it
MOTION_LABELS = ("standing", "walking", "running", "badminton")


@dataclass(frozen=True)
class Dataset:
    """Canonical inputs [n, ...] float32 and class indices [n] int64, training and held out."""

    train_inputs: Floats
    train_labels: Labels
    heldout_inputs: Floats
    heldout_labels: Labels

    def save_heldout(self, path: Path) -> None:
        """Writes `inputs` (canonical float32) and `labels` (int64) as a compressed .npz."""
        np.savez_compressed(path, inputs=self.heldout_inputs, labels=self.heldout_labels)


def load_digits() -> Dataset:
    """8x8 handwritten digits, [n, 8, 8, 1], grey levels 0..16; a stratified quarter held out."""
    inputs, labels = sklearn_digits(return_X_y=True)
    train_x, heldout_x, train_y, heldout_y = train_test_split(
        inputs.astype(np.float32).reshape(-1, 8, 8, 1),
        labels.astype(np.int64),
        test_size=DIGITS_HELDOUT_FRACTION,
        stratify=labels,
        random_state=SPLIT_SEED,
    )
    return Dataset(train_x, train_y, heldout_x, heldout_y)


def load_motion() -> Dataset:
    """BasicMotions windows, [n, 100, 6], as recorded at 10 Hz; the archive's own 40/40 split."""
    from aeon.datasets import load_basic_motions  # imported here: numba takes seconds to load

    parts: list[tuple[Floats, Labels]] = []
    for split in ("train", "test"):
        series, names = load_basic_motions(split=split)  # [n, channels, samples]
        windows = np.ascontiguousarray(series.transpose(0, 2, 1), dtype=np.float32)
        parts.append((windows, np.array([MOTION_LABELS.index(str(name)) for name in names])))
    return Dataset(*parts[0], *parts[1])


def augment_digits(images: Floats, rng: np.random.Generator) -> Floats:
    """One random affine copy of each image [n, 8, 8, 1], bilinear, zero outside the frame.

    Rotation up to 12 degrees, scale and shear up to 10 %, shift up to 0.8 pixel.
    """
    count = len(images)
    angle = np.deg2rad(rng.uniform(-12, 12, count))
    scale = rng.uniform(0.9, 1.1, count)
    shear = rng.uniform(-0.1, 0.1, count)
    shift = rng.uniform(-0.8, 0.8, (2, count))
    cos, sin = np.cos(angle) / scale, np.sin(angle) / scale
    row, column = np.meshgrid(np.arange(8) - 3.5, np.arange(8) - 3.5, indexing="ij")

    def positions(by_row: NDArray, by_column: NDArray, offset: NDArray) -> NDArray:
        """Source coordinate in the padded image of each target pixel, [n, 8, 8]."""
        centred = by_row[:, None, None] * row + by_column[:, None, None] * column
        return np.clip(centred + offset[:, None, None] + 3.5 + _PAD, 0, 7 + 2 * _PAD - 1e-3)

    rows = positions(cos, sin, shift[0])
    columns = positions(-sin, cos + shear, shift[1])
    padded = np.pad(images[..., 0], ((0, 0), (_PAD, _PAD), (_PAD, _PAD)))
    top, left = rows.astype(int), columns.astype(int)
    down, right = rows - top, columns - left
    sample = np.arange(count)[:, None, None]
    warped = (
        padded[sample, top, left] * (1 - down) * (1 - right)
        + padded[sample, top + 1, left] * down * (1 - right)
        + padded[sample, top, left + 1] * (1 - down) * right
        + padded[sample, top + 1, left + 1] * down * right
    )
    return warped[..., None].astype(np.float32)


def augment_motion(windows: Floats, rng: np.random.Generator) -> Floats:
    """One random copy of each window [n, 100, 6]: gain, circular shift in time, sensor noise.

    Gain is 0.8 to 1.25 per channel (another wrist, another sensor), the shift is any number of
    samples (a window starts at any phase of a movement), the noise has deviation 0.1.
    """
    count, length, channels = windows.shape
    scaled = windows * rng.uniform(0.8, 1.25, (count, 1, channels))
    starts = rng.integers(0, length, count)
    order = (np.arange(length)[None, :] + starts[:, None]) % length
    shifted = np.take_along_axis(scaled, order[:, :, None], axis=1)
    return (shifted + rng.normal(0.0, 0.1, windows.shape)).astype(np.float32)
