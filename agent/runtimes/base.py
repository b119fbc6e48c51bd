"""The seam between a model file and the library that runs it."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Protocol

from agent.core.types import Described, Tensor, Tensors

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

    def load(self, path: Path, data: bytes | None = None) -> ModelRunner:
        """Load a file, or `data`, which was read from it: then the file is not opened. Raises `RuntimeUnavailable` or
        `ValueError` (not a usable model)."""
        ...


class RuntimeFactory(Protocol):
    """Makes the runtime of a format; imports its library only then."""

    def __call__(self, format: Format) -> Runtime:
        """Raises `RuntimeUnavailable`."""
        ...


@dataclass(frozen=True, slots=True)
class ModelFile:
    """A file, and the digest without which it is not loaded. `size`: bytes, if they are known: no more are read."""

    path: Path
    format: Format
    sha256: str
    size: int | None = None

    def read(self) -> bytes:
        """Its content, which is what is to be opened: a moment later the file may be another one.

        Raises `ValueError` if it cannot be read or is not the one with that digest."""
        try:
            with self.path.open("rb") as file:
                data = file.read(-1 if self.size is None else self.size + 1)
        except OSError as error:
            raise ValueError(f"{self.path.name} cannot be read: {error.strerror}") from None
        found = hashlib.sha256(data).hexdigest()
        if found != self.sha256:
            short = f"SHA-256 {found[:12]}…, not {self.sha256[:12]}…"
            raise ValueError(f"{self.path.name} is not the recorded file: {short}")
        return data


@dataclass(frozen=True, slots=True)
class Confinement:
    """For models of unknown origin. `check` looks through the content of a file of that name and format before anything
    opens it, and raises `ValueError`. The disposable process that opens it may take so many MB beyond what it starts
    with, and so many seconds; it has no sockets and starts no programs. `passed`: a file that holds which have passed.
    """

    memory_mb: int
    load_s: float
    check: Callable[[str, bytes, Format], None]
    passed: Path | None = None

    def limits(self, threads: int) -> dict[str, int]:
        """For `confine.confine`, of a process whose inferences run on so many threads."""
        return {"memory_mb": self.memory_mb, "cpu_s": math.ceil(self.load_s * (threads + 1)) if self.memory_mb else 0}

    def lasting(self) -> Confinement:
        """For the process that runs what has passed: without limits on memory and time, which several models share."""
        return replace(self, memory_mb=0)


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """What a load tells: `provider` really ran it; `samples_s` are the first service times, warm-up left out; `inputs`
    and `outputs` are those of the first run."""

    file: ModelFile
    runtime: str
    provider: str
    samples_s: Sequence[float]
    inputs: Described = field(default_factory=dict)
    outputs: Described = field(default_factory=dict)


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

    def has(self, sha256: str) -> bool:
        """Whether a model that was loaded still can be run: one may be left out that takes the child down."""
        ...

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
