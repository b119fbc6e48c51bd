"""Models in this process: a few threads that run inferences, and as many instances of each model as run at once."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Mapping
from queue import SimpleQueue
from typing import Any

from agent.core.clock import Clock
from agent.core.errors import TargetFailed, TargetTimeout
from agent.core.types import Tensors
from agent.runtimes.base import (
    LoadedModel,
    ModelFile,
    RunOutcome,
    RuntimeFactory,
)
from agent.runtimes.late import within
from agent.runtimes.runners import Runners


class _Job:
    """A call on its way through the workers. `future` is the caller's, who may leave; `on_end` comes in any case."""

    __slots__ = ("abandoned", "began", "call", "ended", "future", "on_end", "submitted")

    def __init__(self, call: Callable[[], Any], on_end: Callable[[], None], submitted: float) -> None:
        self.call = call
        self.on_end = on_end
        self.future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self.submitted = submitted
        self.began: float | None = None
        self.ended = submitted
        self.abandoned = False

    async def result(self, timeout_s: float) -> Any:
        """What the call returned or raised; `TargetTimeout` after `timeout_s`."""
        try:
            return await within(self.future, timeout_s, self._where)
        except (TargetTimeout, asyncio.CancelledError):
            self.abandoned = True
            raise

    def finish(self, result: Any, error: Exception | None) -> None:
        """On the event loop's thread, when the worker is free again."""
        self.on_end()
        if self.future.done():
            return
        if error is None:
            self.future.set_result(result)
        else:
            self.future.set_exception(error)

    def _where(self) -> str:
        return "waiting for a thread" if self.began is None else "in the runtime"


class Workers:
    """A fixed number of threads for blocking calls, started when first needed.

    They are daemon threads, unlike `ThreadPoolExecutor`'s: one that hangs in a driver must not keep the daemon from
    stopping.
    """

    def __init__(self, count: int, clock: Clock) -> None:
        self._count = count
        self._clock = clock
        self._queue: SimpleQueue[_Job | None] = SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._jobs: list[_Job | None] = [None] * count

    @property
    def running(self) -> list[_Job]:
        """What the threads are doing."""
        return [job for job in self._jobs if job is not None]

    def submit(self, call: Callable[[], Any], on_end: Callable[[], None]) -> _Job:
        """Hand a call over. On an event loop's thread."""
        loop = asyncio.get_running_loop()
        if not self._threads:
            self._threads = [
                threading.Thread(target=self._work, args=(n, loop), name=f"runtime-{n}", daemon=True)
                for n in range(self._count)
            ]
            for thread in self._threads:
                thread.start()
        job = _Job(call, on_end, self._clock.monotonic())
        self._queue.put(job)
        return job

    def close(self) -> None:
        """Let the threads end after what they are doing."""
        for _ in self._threads:
            self._queue.put(None)

    def _work(self, place: int, loop: asyncio.AbstractEventLoop) -> None:
        while (job := self._queue.get()) is not None:
            result, error = None, None
            job.began = self._clock.monotonic()
            if not job.abandoned:
                self._jobs[place] = job
                try:
                    result = job.call()
                except Exception as raised:
                    error = raised  # Whatever it is belongs to the caller, on the other thread.
                self._jobs[place] = None
            job.ended = self._clock.monotonic()
            try:
                loop.call_soon_threadsafe(job.finish, result, error)
            except RuntimeError:
                return  # The loop was closed while this ran.


class _ThreadRun:
    """A submitted inference."""

    __slots__ = ("_job", "_provider")

    def __init__(self, job: _Job, provider: str) -> None:
        self._job = job
        self._provider = provider

    async def outcome(self, timeout_s: float) -> RunOutcome:
        job = self._job
        try:
            outputs = await job.result(timeout_s)
        except (ValueError, RuntimeError) as error:
            raise TargetFailed(str(error)) from None
        began = job.began if job.began is not None else job.ended
        return RunOutcome(outputs, self._provider, began - job.submitted, job.ended - began)


class ThreadEngine:
    """Runs models in threads of this process, or on the caller's.

    A runtime that hangs cannot be stopped here: its thread stays taken, and when all are, `problem` says so.
    `stuck_s` is how long an inference must have been running to count as hung.
    """

    def __init__(self, factory: RuntimeFactory, workers: int, stuck_s: float, clock: Clock) -> None:
        self._runners = Runners(factory, clock.monotonic)
        self._workers = Workers(workers, clock)
        self._count = workers
        self._stuck_s = stuck_s
        self._clock = clock
        self._in_flight = 0

    @property
    def in_flight(self) -> int:
        return self._in_flight

    async def load(self, file: ModelFile) -> LoadedModel:
        job = self._workers.submit(lambda: self._runners.load(file), lambda: None)
        loaded: LoadedModel = await job.future
        return loaded

    def run_here(self, sha256: str, inputs: Tensors) -> RunOutcome | None:
        runners = self._runners[sha256]
        if not runners.idle:
            return None
        began = self._clock.monotonic()
        try:
            outputs = runners.run(inputs)
        except (ValueError, RuntimeError) as error:
            raise TargetFailed(str(error)) from None
        return RunOutcome(outputs, runners.provider, 0.0, self._clock.monotonic() - began)

    def submit(self, sha256: str, inputs: Tensors) -> _ThreadRun:
        runners = self._runners[sha256]
        job = self._workers.submit(lambda: runners.run(inputs), self._ended)
        self._in_flight += 1
        return _ThreadRun(job, runners.provider)

    def has(self, sha256: str) -> bool:
        return True

    def problem(self) -> str:
        running = self._workers.running
        if len(running) < self._count:
            return ""
        now = self._clock.monotonic()
        least = min(now - job.began for job in running if job.began is not None)
        if least <= self._stuck_s:
            return ""
        return f"runtime hangs: all {self._count} threads have been busy with one inference for over {least:.1f} s"

    def status(self) -> Mapping[str, Any]:
        return {"isolation": "thread", "threads": self._count, "running": len(self._workers.running)}

    async def close(self) -> None:
        self._workers.close()
        self._runners.close()

    def _ended(self) -> None:
        self._in_flight -= 1
