"""The seam between a model file and the library that runs it."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from agent.core.types import Tensor, Tensors


class RuntimeUnavailable(Exception):
    """The library, or the provider that was insisted on, cannot be used on this machine."""


class ModelRunner(Protocol):
    """One loaded model file. Not safe for use by two threads at once."""

    @property
    def provider(self) -> str:
        """What really runs it, for example `litert/xnnpack` or `onnxruntime/CUDAExecutionProvider`."""
        ...

    def run(self, inputs: Tensors) -> dict[str, Tensor]:
        """One inference, blocking. Names, dtypes and shapes as in the file; outputs are copies the caller owns."""
        ...

    def close(self) -> None:
        """Free the model."""
        ...


class Runtime(Protocol):
    """A library that runs model files of one format."""

    @property
    def name(self) -> str:
        """Library and version, for example `litert 2.3.0`."""
        ...

    @property
    def format(self) -> str:
        """`tflite` or `onnx`, as in the catalogue."""
        ...

    def load(self, path: Path) -> ModelRunner:
        """Load a file. Raises `RuntimeUnavailable` or `ValueError` (not a usable model)."""
        ...
