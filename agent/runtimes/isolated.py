"""Runs models in a child process (`process`), and keeps one running.

What can happen to the child, and what follows:

- It dies (a crash, SIGKILL, the kernel's OOM killer): everything in flight fails at once, the child is started again
  after a back-off and the models are loaded again. A model that takes it down while loading is tried three times.
- It hangs (an accelerator that never answers, SIGSTOP): callers get `TargetTimeout` at their deadlines. One inference
  without an answer for `timeout_s` is a `problem`; for five times as long, and the child is killed.
- The daemon dies: the kernel kills the child.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import socket
import sys
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, cast

from agent.core.clock import Clock
from agent.core.errors import TargetFailed, TargetTimeout, TargetUnavailable
from agent.core.types import Tensor, Tensors
from agent.runtimes import channel
from agent.runtimes.base import Confinement, LoadedModel, ModelFile, RunOutcome, RuntimeUnavailable
from agent.runtimes.late import within
from agent.runtimes.runners import RuntimeOptions

log = logging.getLogger(__name__)

HANG_FACTOR = 5
"""Times `timeout_s` after which a child that does not answer is killed: well beyond what a throttled board explains."""
HANG_MIN_S = 1.0
"""Lower bound of that, for very short timeouts."""
LOAD_LIMIT_S = 600.0
"""Loading may build a TensorRT engine, which takes minutes on a small board."""
BACKOFF_INITIAL_S = 0.5
BACKOFF_MAX_S = 30.0
STABLE_S = 30.0
"""A child that lived this long starts the back-off anew."""
RELOADS = 3
"""Times that a model may take the child down while it is loaded again, before it is left out."""
EXIT_S = 2.0
"""How long a child may take to end after its sockets were closed."""

SAID_CHARACTERS = 1000  # Of what a child printed before it died.

_PYTHONPATH = os.pathsep.join(filter(None, (str(Path(__file__).resolve().parents[2]), os.environ.get("PYTHONPATH"))))
_Reply = tuple[dict[str, Any], dict[str, Tensor]]


class _Call:
    """One message to the child, and the future of its reply. `provider` is empty for a load."""

    __slots__ = ("abandoned", "future", "limit_s", "loading", "message", "provider", "sent", "submitted")

    def __init__(self, message: bytes, provider: str, submitted: float, limit_s: float) -> None:
        self.message = message
        self.provider = provider
        self.submitted = submitted
        self.limit_s = limit_s
        self.loading = not provider
        self.sent: float | None = None
        self.abandoned = False
        self.future: asyncio.Future[_Reply] = asyncio.get_running_loop().create_future()

    async def outcome(self, timeout_s: float) -> RunOutcome:
        try:
            header, outputs = await within(self.future, timeout_s, self._where)
        except (TargetTimeout, asyncio.CancelledError):
            self.abandoned = True
            raise
        if "error" in header:
            raise TargetFailed(header["error"])
        sent = self.submitted if self.sent is None else self.sent
        return RunOutcome(outputs, self.provider, sent - self.submitted, header["compute_s"])

    def _where(self) -> str:
        return "waiting for its turn" if self.sent is None else "in the runtime process"

    def fail(self, error: Exception) -> None:
        if not self.future.done():
            self.future.set_exception(error)
            self.future.exception()  # Marked as seen: nobody may be waiting any more.


class _Lane(asyncio.Protocol):
    """One socket to one thread of the child; at most one call at a time."""

    def __init__(self, replied: Callable[[_Lane], None], lost: Callable[[str], None]) -> None:
        self._replied = replied
        self._lost = lost
        self._received = bytearray()
        self._transport: asyncio.WriteTransport | None = None
        self._timer: asyncio.TimerHandle | None = None
        self.call: _Call | None = None

    def send(self, call: _Call, now: float) -> None:
        assert self._transport is not None
        call.sent = now
        self.call = call
        self._timer = asyncio.get_running_loop().call_later(call.limit_s, self._hung)
        self._transport.write(call.message)

    def close(self, error: Exception) -> None:
        """Fail what is in flight."""
        call, self.call = self.call, None
        if self._timer is not None:
            self._timer.cancel()
        if self._transport is not None:
            self._transport.abort()
        if call is not None:
            call.fail(error)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.WriteTransport, transport)  # uvloop's do not derive from asyncio's.

    def data_received(self, data: bytes) -> None:
        self._received += data
        call = self.call
        try:
            if len(self._received) < channel.HEAD.size or len(self._received) < channel.size(self._received):
                return
            reply = channel.decode(bytes(self._received))
        except (ValueError, KeyError, TypeError) as error:
            self._lost(f"sent something unreadable: {error}")
            return
        self._received.clear()
        self.call = None
        if self._timer is not None:
            self._timer.cancel()
        if call is not None and not call.future.done():
            call.future.set_result(reply)
        self._replied(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._lost("died")

    def _hung(self) -> None:
        if self.call is not None:
            self._lost(f"did not answer for {self.call.limit_s:.1f} s and was killed")


class _Child:
    """A running child."""

    def __init__(self, process: asyncio.subprocess.Process, started: float) -> None:
        self.process = process
        self.started = started
        self.lanes: list[_Lane] = []
        self.free: deque[_Lane] = deque()
        self.said = ""
        self.listening = asyncio.get_running_loop().create_task(self._listen())

    async def _listen(self) -> None:
        """Read what it prints until it ends, and keep the end."""
        stream = self.process.stderr
        while stream is not None and (part := await stream.read(4096)):
            self.said = (self.said + part.decode(errors="replace"))[-SAID_CHARACTERS:]


class ProcessEngine:
    """Runs models in one child process, `workers` at once. Timings in seconds."""

    def __init__(
        self,
        options: RuntimeOptions,
        workers: int,
        timeout_s: float,
        clock: Clock,
        confinement: Confinement | None = None,
    ) -> None:
        self._options = options
        self._confinement = confinement
        self._workers = workers
        self._timeout_s = timeout_s
        self._hang_s = max(HANG_MIN_S, HANG_FACTOR * timeout_s)
        self._clock = clock
        self._child: _Child | None = None
        self._files: dict[str, ModelFile] = {}
        self._providers: dict[str, str] = {}
        self._crashes: dict[str, int] = {}
        self._waiting: deque[_Call] = deque()
        self._changing = asyncio.Lock()
        self._reaping: set[asyncio.Task[None]] = set()
        self._restarting: asyncio.Task[None] | None = None
        self._backoff_s = BACKOFF_INITIAL_S
        self._restarts = 0
        self._problem = ""
        self._closing = False

    @property
    def in_flight(self) -> int:
        running = sum(lane.call is not None for lane in self._child.lanes) if self._child is not None else 0
        return running + len(self._waiting)

    async def load(self, file: ModelFile) -> LoadedModel:
        async with self._changing:
            if self._child is None:
                await self._start()
            loaded = await self._load(file)
        self._files[file.sha256] = file
        return loaded

    def run_here(self, sha256: str, inputs: Tensors) -> None:
        return None

    def submit(self, sha256: str, inputs: Tensors) -> _Call:
        """Raises `TargetUnavailable` while there is no child."""
        child = self._child
        if child is None or self._problem or sha256 not in self._files:
            raise TargetUnavailable(self._problem or "the runtime process does not have this model")
        message = channel.encode({"run": sha256}, inputs)
        call = _Call(message, self._providers[sha256], self._clock.monotonic(), self._hang_s)
        self._waiting.append(call)
        self._dispatch(child)
        return call

    def has(self, sha256: str) -> bool:
        return sha256 in self._files

    def problem(self) -> str:
        child = self._child
        if child is None or self._problem:
            return self._problem or "the runtime process has not been started"
        now = self._clock.monotonic()
        running = (lane.call for lane in child.lanes if lane.call is not None and not lane.call.loading)
        longest = max((now - call.sent for call in running if call.sent is not None), default=0.0)
        if longest <= self._timeout_s:
            return ""
        return f"runtime hangs: no answer from its process {child.process.pid} for {longest:.1f} s"

    def status(self) -> Mapping[str, Any]:
        child = self._child
        return {
            "isolation": "process",
            "pid": None if child is None else child.process.pid,
            "restarts": self._restarts,
            "running": 0 if child is None else sum(lane.call is not None for lane in child.lanes),
        }

    async def close(self) -> None:
        self._closing = True
        if self._restarting is not None:
            self._restarting.cancel()
            await asyncio.wait((self._restarting,))
        self._lost(self._child, "was stopped")
        if self._reaping:
            await asyncio.wait(self._reaping, timeout=2 * EXIT_S)

    def _dispatch(self, child: _Child) -> None:
        while self._waiting and child.free:
            call = self._waiting.popleft()
            if not call.abandoned:
                child.free.popleft().send(call, self._clock.monotonic())

    async def _start(self) -> None:
        """Raises `RuntimeUnavailable`."""
        pairs = [socket.socketpair() for _ in range(self._workers)]
        theirs = [their.fileno() for _, their in pairs]
        loop = asyncio.get_running_loop()
        child: _Child | None = None
        lanes: list[_Lane] = []
        try:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-P",  # Or modules of the folder that this was started in would take the place of the real ones.
                "-m",
                "agent.runtimes.process",
                json.dumps(asdict(self._options)),
                str(os.getpid()),
                json.dumps(self._confinement and self._confinement.limits(self._options.threads)),
                *map(str, theirs),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.DEVNULL,
                stderr=asyncio.subprocess.PIPE,  # What libraries print is not to stand among the daemon's own lines.
                pass_fds=theirs,
                env={**os.environ, "PYTHONPATH": _PYTHONPATH},
                start_new_session=True,  # Ctrl-C at the terminal is for the daemon, also while the child still starts.
            )
            child = _Child(process, self._clock.monotonic())
            lanes = child.lanes
            replied, lost = partial(self._replied, child), partial(self._lost, child)
            for ours, _ in pairs:
                lanes.append((await loop.create_unix_connection(lambda: _Lane(replied, lost), sock=ours))[1])
        except BaseException as error:  # Cancelled, most often: the daemon is stopped while it starts.
            why = RuntimeUnavailable(f"the runtime process cannot be started: {error}")
            for lane in lanes:
                lane.close(why)
            for ours, _ in pairs[len(lanes) :]:
                ours.close()
            if child is not None:
                self._reap(child, 0.0)
            if isinstance(error, OSError):
                raise why from None
            raise
        finally:
            for _, their in pairs:
                their.close()
        child.free.extend(child.lanes)
        self._child = child

    async def _load(self, file: ModelFile) -> LoadedModel:
        """Raises `RuntimeUnavailable` or `ValueError`, also when the child dies of it."""
        if self._child is None:
            raise RuntimeUnavailable("the runtime process is gone")
        header = {"load": [str(file.path), file.format, file.sha256, file.size]}
        limit_s = self._confinement.load_s if self._confinement else LOAD_LIMIT_S
        call = _Call(channel.encode(header, {}), "", self._clock.monotonic(), limit_s)
        self._waiting.append(call)
        self._dispatch(self._child)
        try:
            reply, _ = await call.future
        except asyncio.CancelledError:
            call.abandoned = True
            raise
        except TargetUnavailable as error:
            raise ValueError(f"{file.path.name} takes the runtime down: {error}") from None
        if "error" in reply:
            raise (RuntimeUnavailable if reply.get("unavailable") else ValueError)(reply["error"])
        self._providers[file.sha256] = reply["provider"]
        inputs, outputs = (
            {name: (dtype, tuple(shape)) for name, (dtype, shape) in reply[which].items()}
            for which in ("inputs", "outputs")
        )
        return LoadedModel(file, reply["runtime"], reply["provider"], reply["samples_s"], inputs, outputs)

    def _replied(self, child: _Child, lane: _Lane) -> None:
        if child is self._child:
            child.free.append(lane)
            self._dispatch(child)

    def _lost(self, child: _Child | None, why: str) -> None:
        """The child is dead, or is to be; whatever waits for it fails now. Only the first report counts."""
        if child is None or child is not self._child:
            return
        self._child = None
        what = f"the runtime process {child.process.pid} {why}"
        error = TargetUnavailable(what)
        for lane in child.lanes:
            lane.close(error)
        while self._waiting:
            self._waiting.popleft().fail(error)
        self._reap(child, EXIT_S if self._closing else 0.0)
        if self._closing:
            return
        log.warning("runtime process lost: %s", what)
        if self._clock.monotonic() - child.started > STABLE_S:
            self._backoff_s = BACKOFF_INITIAL_S
        if self._files:
            self._problem = what
            if self._restarting is None:
                self._restarting = asyncio.get_running_loop().create_task(self._restart(), name="runtime-restart")

    def _reap(self, child: _Child, grace_s: float) -> None:
        self._reaping.add(reaping := asyncio.get_running_loop().create_task(_reap(child, grace_s)))
        reaping.add_done_callback(self._reaping.discard)

    async def _restart(self) -> None:
        """Start a child and load everything again, until that succeeds."""
        why = self._problem
        while self._problem:
            delay = self._backoff_s
            self._backoff_s = min(2 * delay, BACKOFF_MAX_S)
            self._problem = f"{why}; it is started again after {delay:.1f} s"
            await asyncio.sleep(delay)
            async with self._changing:
                try:
                    if self._child is None:
                        self._restarts += 1
                        await self._start()
                    await self._reload()
                except RuntimeUnavailable as error:
                    why = str(error)
                    continue
                except Exception as defect:  # it is tried again, whatever it was
                    log.exception("task failed", extra={"component": "runtime process"})
                    why = f"{type(defect).__name__}: {defect}"
                    continue
            if self._child is not None:
                self._problem = ""
        self._restarting = None
        log.info("runtime process is back", extra={"restarts": self._restarts})

    async def _reload(self) -> None:
        """Raises `RuntimeUnavailable` if the child died again."""
        for file in list(self._files.values()):
            try:
                await self._load(file)
            except (ValueError, RuntimeUnavailable) as error:
                if self._child is None:
                    self._crashes[file.sha256] = self._crashes.get(file.sha256, 0) + 1
                    if self._crashes[file.sha256] < RELOADS:
                        raise RuntimeUnavailable(str(error)) from None
                del self._files[file.sha256]
                log.warning("model is left out: %s", error, extra={"file": file.path.name})
                if self._child is None:
                    raise RuntimeUnavailable(str(error)) from None
            else:
                self._crashes.pop(file.sha256, None)


async def _reap(child: _Child, grace_s: float) -> None:
    """Collect the exit status; kill what has not ended after `grace_s`."""
    process = child.process
    try:
        async with asyncio.timeout(grace_s):
            await process.wait()
    except TimeoutError:
        with suppress(ProcessLookupError):  # It ended while the limit ran out.
            process.kill()
        await process.wait()
    await child.listening
    if process.returncode not in (0, -signal.SIGKILL) and child.said:
        log.warning("last words of the runtime process", extra={"pid": process.pid, "text": child.said.strip()})
