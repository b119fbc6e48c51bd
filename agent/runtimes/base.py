"""The seam between a model file and the library that runs it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from agent.core.types import Tensor, Tensors

Format = Literal["tflite", "onnx"]


class RuntimeUnavailable(Exception):
    """The library, or the provider that was insisted on, cannot be used on this machine."""


class ModelRunner(Protocol):
    """One loaded model file. Not safe for use by two threads at once, unless `reentrant`."""

    @property
    def provider(self) -> str:
        """What really runs it, for example `litert 2.3.0/xnnpack` or `onnxruntime 1.32.0/CUDAExecutionProvider`."""
        ...

    @property
    def reentrant(self) -> bool:
        """Whether several threads may call `run` at once."""
        ...

    def zeros(self) -> dict[str, Tensor]:
        """Inputs of the right names, dtypes and shapes, for a first run."""
        ...

    def run(self, inputs: Tensors) -> dict[str, Tensor]:
        """One inference, blocking. Names, dtypes and shapes as in the file; outputs are copies the caller owns.

        Raises `ValueError` or `RuntimeError`: the inputs are not what the file takes, or the library failed.
        """
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
    def format(self) -> Format:
        """`tflite` or `onnx`, as in the catalogue."""
        ...

    def load(self, path: Path) -> ModelRunner:
        """Load a file. Raises `RuntimeUnavailable` or `ValueError` (not a usable model)."""
        ...


class RuntimeFactory(Protocol):
    """Makes the runtime of a format; imports its library only then."""

    def __call__(self, format: Format) -> Runtime:
        """Raises `RuntimeUnavailable`."""
        ...


@dataclass(frozen=True, slots=True)
class ModelFile:
    """A file, and the digest without which it is not loaded."""

    path: Path
    format: Format
    sha256: str

    def verify(self) -> None:
        """Raises `ValueError` if the file cannot be read or is not the one with that digest."""
        try:
            with self.path.open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise ValueError(f"{self.path.name} cannot be read: {error.strerror}") from None
        if found != self.sha256:
            short = f"SHA-256 {found[:12]}…, not {self.sha256[:12]}…"
            raise ValueError(f"{self.path.name} is not the recorded file: {short}")


@dataclass(frozen=True, slots=True)
class Confinement:
    """For models of unknown origin. `check` looks through a file of a format before it is opened, and raises
    `ValueError`; the process that opens it may take so many MB beyond what it starts with, and so many seconds each."""

    memory_mb: int
    load_s: float
    check: Callable[[Path, Format], None]


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """What a load tells: `provider` really ran it; `samples_s` are the first service times, warm-up left out."""

    file: ModelFile
    runtime: str
    provider: str
    samples_s: Sequence[float]


@dataclass(frozen=True, slots=True)
class RunOutcome:
    """One inference: outputs as the file names them; seconds spent waiting and computing."""

    outputs: dict[str, Tensor]
    provider: str
    queue_s: float
    compute_s: float


class Run(Protocol):
    """An inference that was handed over. It keeps its place until it ends, whether or not anybody still waits."""

    async def outcome(self, timeout_s: float) -> RunOutcome:
        """Raises `TargetError`; `TargetTimeout` after `timeout_s`, and then it is skipped if it has not begun."""
        ...


class Engine(Protocol):
    """Where models run: in threads of this process, or in a child process. Used on the event loop's thread."""

    async def load(self, file: ModelFile) -> LoadedModel:
        """Check the digest, load, run a few times. Raises `RuntimeUnavailable` or `ValueError`."""
        ...

    def run_here(self, sha256: str, inputs: Tensors) -> RunOutcome | None:
        """Run at once on the calling thread; None if that cannot be done now. Raises `TargetFailed`."""
        ...

    def submit(self, sha256: str, inputs: Tensors) -> Run: ...

    @property
    def in_flight(self) -> int:
        """Inferences that wait or run, abandoned ones included."""
        ...

    def problem(self) -> str:
        """Why nothing can be run now, for people; empty if it can."""
        ...

    def status(self) -> Mapping[str, Any]:
        """Plain JSON types."""
        ...

    async def close(self) -> None:
        """Fail what waits and release everything."""
        ...
