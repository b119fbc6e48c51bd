"""Loaded models by digest, with as many instances of each as run at once. Shared by both engines."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from agent.core.types import Described, Tensor, Tensors
from agent.runtimes.base import Format, LoadedModel, ModelFile, ModelRunner, Runtime, RuntimeFactory

FIRST_RUNS = 8
"""Timed runs after loading: enough to choose between inline and pool before the first request."""
FIRST_RUNS_S = 0.05
"""Bound on those runs, so that a slow model does not hold up the start."""


@dataclass(frozen=True, slots=True)
class RuntimeOptions:
    """What of the settings the libraries need: plain values, so that a child process can be given them."""

    threads: int = 1
    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    providers: Sequence[str] = ("cpu",)
    strict_provider: bool = False

    def runtime(self, format: Format) -> Runtime:
        """The library for a format, imported now. Raises `RuntimeUnavailable`."""
        if format == "tflite":
            from agent.runtimes.litert import LiteRtRuntime

            return LiteRtRuntime(self.threads, self.accelerator, strict=self.strict_provider)
        from agent.runtimes.onnx import OnnxRuntime

        return OnnxRuntime(self.threads, self.providers, strict=self.strict_provider)


class RunnerSet:
    """The instances of one model. One is made now, more when several threads want the model at once.

    There are never more than threads that use it. Raises `RuntimeUnavailable` or `ValueError`.
    """

    def __init__(self, runtime: Runtime, file: ModelFile, data: bytes, monotonic: Callable[[], float]) -> None:
        self._runtime = runtime
        self._file = file
        self._monotonic = monotonic
        first = self._load(data)
        self.provider = first.provider
        self._shared = first if first.reentrant else None
        self._free = deque([first])
        inputs = first.zeros()
        samples, outputs = self._first_runs(first, inputs)
        self.loaded = LoadedModel(file, runtime.name, first.provider, samples, _described(inputs), _described(outputs))

    def run(self, inputs: Tensors) -> dict[str, Tensor]:
        """Raises what `ModelRunner.run` raises, and `ValueError` if the file is no longer the one recorded."""
        if self._shared is not None:
            return self._shared.run(inputs)
        try:
            runner = self._free.pop()
        except IndexError:
            runner = self._load(self._file.read())
        try:
            return runner.run(inputs)
        finally:
            self._free.append(runner)

    @property
    def idle(self) -> bool:
        """Whether `run` would find an instance at hand."""
        return bool(self._free)

    def close(self) -> None:
        """Free the instances that are not running; the others go when their run ends and nothing refers to them."""
        while self._free:
            self._free.pop().close()

    def _load(self, data: bytes) -> ModelRunner:
        return self._runtime.load(self._file.path, data)

    def _first_runs(self, runner: ModelRunner, inputs: Tensors) -> tuple[tuple[float, ...], Tensors]:
        """Seconds of each, and the outputs."""
        samples: list[float] = []
        try:
            outputs = runner.run(inputs)  # The first run allocates and is not typical.
            began = now = self._monotonic()
            while len(samples) < FIRST_RUNS and now - began < FIRST_RUNS_S:
                runner.run(inputs)
                samples.append(self._monotonic() - now)
                now += samples[-1]
        except RuntimeError as error:
            raise ValueError(f"{self._file.path.name} loads but does not run: {error}") from None
        return tuple(samples), outputs


def _described(tensors: Tensors) -> Described:
    return {name: (str(value.dtype), tuple(value.shape)) for name, value in tensors.items()}


class Runners:
    """All models of one process, by digest; shared by the threads engine and the child process."""

    def __init__(self, factory: RuntimeFactory, monotonic: Callable[[], float]) -> None:
        self._factory = factory
        self._monotonic = monotonic
        self._runtimes: dict[str, Runtime] = {}
        self._sets: dict[str, RunnerSet] = {}
        self._loading = threading.Lock()

    def load(self, file: ModelFile) -> LoadedModel:
        """Blocking. Raises `RuntimeUnavailable` or `ValueError`."""
        with self._loading:
            if (known := self._sets.get(file.sha256)) is not None:
                return known.loaded
            data = file.read()
            runtime = self._runtimes.get(file.format)
            if runtime is None:
                runtime = self._runtimes[file.format] = self._factory(file.format)
            made = self._sets[file.sha256] = RunnerSet(runtime, file, data, self._monotonic)
            return made.loaded

    def __getitem__(self, sha256: str) -> RunnerSet:
        """Raises `KeyError`."""
        return self._sets[sha256]

    def close(self) -> None:
        """Free all; a load that is under way on another thread may add its model meanwhile."""
        while self._sets:
            self._sets.popitem()[1].close()
