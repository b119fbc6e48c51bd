"""`RuntimePool`: model files in, outputs by a deadline out. Used by the gateway target and by the cloud worker.

Where a model runs is measured, not configured: handing an inference to a thread and back costs more than a very small
model takes, so a model whose service time stays below `inline_below_ms` runs on the event loop, any other in a pool.
"""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from agent.config import GpuSection
from agent.core.clock import Clock
from agent.core.errors import TargetBusy, TargetTimeout, TargetUnavailable
from agent.core.types import Tensors
from agent.runtimes.base import (
    Confinement,
    Engine,
    Format,
    LoadedModel,
    ModelFile,
    RunOutcome,
    RuntimeFactory,
    RuntimeUnavailable,
)
from agent.runtimes.isolated import ProcessEngine
from agent.runtimes.memory import release_unused
from agent.runtimes.passed import Passed
from agent.runtimes.runners import RuntimeOptions
from agent.runtimes.threads import ThreadEngine

WINDOW = 32
"""Service times kept for each model: the 95th percentile of fewer says little, of more reacts late."""
RECHECK = 8
"""Runs between two looks at the window, which has to be sorted for it."""
OUTLIER = 4.0
"""One run this many times over the inline limit moves the model off the event loop at once."""
BUSY_WINDOW_S = 10.0
"""Time constant of the busy share."""


class ServiceTimes:
    """The latest service times of one model, and whether they allow running it on the event loop. Seconds."""

    def __init__(self, inline_below_s: float) -> None:
        self._limit = inline_below_s
        self._window: deque[float] = deque(maxlen=WINDOW)
        self._until_recheck = RECHECK
        self.inline = False

    def add(self, service_s: float) -> None:
        self._window.append(service_s)
        if service_s > self._limit * OUTLIER and self.inline:
            self.inline = False
            self._window.clear()  # It has to prove itself again.
            self._until_recheck = RECHECK
            return
        self._until_recheck -= 1
        if self._until_recheck <= 0:
            self._until_recheck = RECHECK
            self.inline = self.quantile(0.95) < self._limit

    def quantile(self, share: float) -> float:
        """Infinite while nothing was measured."""
        if not self._window:
            return math.inf
        return sorted(self._window)[min(int(share * len(self._window)), len(self._window) - 1)]


class BusyShare:
    """Exponentially weighted share of time that was spent computing, 0 to 1 for each of `workers`."""

    def __init__(self, workers: int, clock: Clock) -> None:
        self._workers = workers
        self._clock = clock
        self._value = 0.0
        self._at = clock.monotonic()

    def add(self, busy_s: float) -> None:
        self._value = self._decayed() + busy_s / (BUSY_WINDOW_S * self._workers)
        self._at = self._clock.monotonic()

    def share(self) -> float:
        return min(1.0, self._decayed())

    def _decayed(self) -> float:
        return self._value * math.exp((self._at - self._clock.monotonic()) / BUSY_WINDOW_S)


class _Model:
    __slots__ = ("loaded", "runs", "times")

    def __init__(self, loaded: LoadedModel, inline_below_s: float) -> None:
        self.loaded = loaded
        self.runs = 0
        self.times = ServiceTimes(inline_below_s)
        for sample in loaded.samples_s:
            self.times.add(sample)


class RuntimePool:
    """Loads model files and runs them, at most `settings.workers` at once and `max_queued` waiting.

    `settings.isolation` chooses threads of this process or a child process. With threads, and with `trial`, a file is
    first loaded and run in a child process that may die of it; a file that crashes the library is then refused.
    `confinement` is for files of unknown origin: each is looked through, then opened and run in a disposable child
    process of its own with these limits, and only then loaded, always in a child process.
    """

    def __init__(
        self,
        settings: GpuSection,
        clock: Clock,
        *,
        max_queued: int = 16,
        trial: bool = True,
        factory: RuntimeFactory | None = None,
        confinement: Confinement | None = None,
    ) -> None:
        if confinement is not None and settings.isolation == "thread":
            settings = settings.model_copy(update={"isolation": "process"})
        self._settings = settings
        self._confinement = confinement
        self._clock = clock
        self._limit = settings.workers + max_queued
        self._inline_below_s = settings.inline_below_ms / 1e3 if settings.isolation == "thread" else 0.0
        self._models: dict[str, _Model] = {}
        self._busy = BusyShare(settings.workers, clock)
        timeout_s = settings.timeout_ms / 1e3
        options = RuntimeOptions(settings.threads, settings.accelerator, settings.providers, settings.strict_provider)
        self._trial: Callable[[], ProcessEngine] | None = None
        lasting = None
        if confinement is not None:
            self._trial = lambda: ProcessEngine(options, 1, timeout_s, clock, confinement)
            lasting = confinement.lasting()
            self._passed = Passed(confinement.passed, [asdict(options), confinement.memory_mb, confinement.load_s])
        if settings.isolation == "process":
            self._engine: Engine = ProcessEngine(options, settings.workers, timeout_s, clock, lasting)
        else:
            self._engine = ThreadEngine(factory or options.runtime, settings.workers, timeout_s, clock)
            if trial and factory is None:
                self._trial = lambda: ProcessEngine(options, 1, timeout_s, clock)

    async def load(self, path: Path, format: Format, sha256: str) -> LoadedModel:
        """Raises `RuntimeUnavailable` or `ValueError` (not the recorded file, or not a usable model)."""
        outcome = (await self.load_all([ModelFile(path, format, sha256)]))[sha256]
        if isinstance(outcome, LoadedModel):
            return outcome
        raise outcome

    async def load_all(self, files: Iterable[ModelFile]) -> dict[str, LoadedModel | RuntimeUnavailable | ValueError]:
        """Load several files, by digest; what one of them lacks does not keep the others out."""
        outcomes: dict[str, LoadedModel | RuntimeUnavailable | ValueError] = {}
        trial = None if self._trial is None or self._confinement is not None else self._trial()
        try:
            for file in files:
                try:
                    if self._confinement is not None:
                        await self._inspect(file, self._confinement)
                    if trial is not None:
                        await trial.load(file)
                    outcomes[file.sha256] = loaded = await self._engine.load(file)
                except (RuntimeUnavailable, ValueError) as error:
                    outcomes[file.sha256] = error
                    continue
                self._models.setdefault(file.sha256, _Model(loaded, self._inline_below_s))
        finally:
            if trial is not None:
                await trial.close()
            release_unused()
        return outcomes

    async def _inspect(self, file: ModelFile, confinement: Confinement) -> None:
        """Raises `RuntimeUnavailable` or `ValueError` for a file that is not sound, or does not run within the limits.
        Each has a process of its own: what one of them does there must not speak for the next."""
        await asyncio.to_thread(lambda: confinement.check(file.path.name, file.read(), file.format))
        if self._trial is None or self._passed.has(file.sha256):
            return
        trial = self._trial()
        try:
            await trial.load(file)
        finally:
            await trial.close()
        self._passed.add(file.sha256)

    async def run(self, sha256: str, inputs: Tensors, deadline: float) -> RunOutcome:
        """Run the model with that digest by `deadline` (monotonic seconds). Names, dtypes, shapes as in the file.

        Raises `TargetUnavailable` (not loaded), `TargetBusy`, `TargetTimeout` or `TargetFailed`. A run in
        the pool that is late keeps its place until it ends; one on the event loop cannot be cut short and is returned
        even if it is late.
        """
        model = self._models.get(sha256)
        if model is None:
            raise TargetUnavailable(f"model {sha256[:12]} is not loaded")
        remaining = deadline - self._clock.monotonic()
        if remaining <= 0:
            raise TargetTimeout("the deadline had passed before it could begin")
        outcome = self._engine.run_here(sha256, inputs) if model.times.inline else None
        if outcome is None:
            if self._engine.in_flight >= self._limit:
                raise TargetBusy(f"{self._limit} inferences run or wait already")
            outcome = await self._engine.submit(sha256, inputs).outcome(remaining)
        model.runs += 1
        model.times.add(outcome.compute_s)
        self._busy.add(outcome.compute_s)
        return outcome

    def has(self, sha256: str) -> bool:
        """Whether it can be run: it was loaded, and not left out since."""
        return sha256 in self._models and self._engine.has(sha256)

    def loaded(self, sha256: str) -> LoadedModel | None:
        model = self._models.get(sha256)
        return None if model is None else model.loaded

    def service_time_s(self, sha256: str) -> float | None:
        """Median of the latest computing times."""
        model = self._models.get(sha256)
        median = math.inf if model is None else model.times.quantile(0.5)
        return median if math.isfinite(median) else None

    @property
    def in_process(self) -> bool:
        """Whether the models run in a process of their own."""
        return self._settings.isolation == "process"

    def problem(self) -> str:
        """Why nothing can be run now, for people; empty if it can."""
        return self._engine.problem()

    def status(self) -> dict[str, Any]:
        """For `/status`: plain JSON types. Times in milliseconds."""
        return {
            **self._engine.status(),
            "runtimes": sorted({model.loaded.runtime for model in self._models.values()}),
            "workers": self._settings.workers,
            "in_flight": self._engine.in_flight,
            "limit": self._limit,
            "busy_share": round(self._busy.share(), 3),
            "models": {sha256[:12]: self._model_status(sha256, model) for sha256, model in self._models.items()},
        }

    def _model_status(self, sha256: str, model: _Model) -> Mapping[str, Any]:
        median = self.service_time_s(sha256)
        return {
            "file": model.loaded.file.path.name,
            "provider": model.loaded.provider,
            "runs": model.runs,
            "service_ms_p50": None if median is None else round(median * 1e3, 3),
            "service_ms_p95": None if median is None else round(model.times.quantile(0.95) * 1e3, 3),
            "runs_in": "event loop" if model.times.inline else self._settings.isolation,
        }

    async def close(self) -> None:
        await self._engine.close()
        self._models.clear()
