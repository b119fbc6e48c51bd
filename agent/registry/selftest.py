"""Self-test vectors of a model: inputs, and the outputs of the reference runtime (`*.selftest.npz`)."""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path

import numpy as np

from agent.core.errors import ConfigError


def load_selftest(path: Path) -> tuple[tuple[bytes, bytes], ...]:
    """All samples as (input bytes, output bytes), as INFER and RESULT carry them. Raises `ConfigError`."""
    try:
        with np.load(path, allow_pickle=False) as vectors:
            pairs = zip(vectors["inputs"], vectors["outputs"], strict=True)
            samples = tuple((inputs.tobytes(), outputs.tobytes()) for inputs, outputs in pairs)
    except (OSError, ValueError, KeyError, IndexError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ConfigError([f"{path}: is no self-test of a model: {error}"]) from None
    if not samples:
        raise ConfigError([f"{path}: is no self-test of a model: it has no samples"])
    return samples
