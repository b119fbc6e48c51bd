"""The runtime process: what is killed, stopped or crashing takes nothing else along."""

from __future__ import annotations

import asyncio
import json
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np
import psutil
import pytest

from agent.config import GpuSection
from agent.core.clock import SystemClock
from agent.core.errors import TargetError, TargetFailed, TargetTimeout, TargetUnavailable
from agent.registry.catalog import Variant, load_catalog
from agent.runtimes import channel, isolated
from agent.runtimes.base import ModelFile, RuntimeUnavailable
from agent.runtimes.isolated import ProcessEngine
from agent.runtimes.litert import LiteRtRuntime
from agent.runtimes.pool import RuntimePool
from agent.runtimes.runners import RuntimeOptions

ROOT = Path(__file__).resolve().parents[2]
CATALOG = load_catalog(ROOT / "models" / "catalog.yaml")
TFLITE, ONNX = (CATALOG.families["digits"].variants[name] for name in ("gateway-fp16", "cloud-fp32"))
X = {"image": np.zeros((1, 8, 8, 1), np.float32)}
SOON_S = 20.0
"""For waits that end soon unless something is broken."""

pytestmark = pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="needs Linux")


def file_of(variant: Variant) -> ModelFile:
    return ModelFile(CATALOG.path(variant), variant.format, variant.sha256)


def in_s(seconds: float) -> float:
    return SystemClock().monotonic() + seconds


async def until(condition: Callable[[], bool]) -> None:
    """Let the event loop turn until the condition holds."""
    async with asyncio.timeout(SOON_S):
        while not condition():  # noqa: ASYNC110 - the states waited for are another process's
            await asyncio.sleep(0.005)


async def stop(pid: int) -> None:
    """SIGSTOP, and wait until every thread has stopped: one that runs on could still answer."""

    def stopped() -> bool:
        states = [stat.read_text().rpartition(")")[2].split()[0] for stat in Path(f"/proc/{pid}/task").glob("*/stat")]
        return all(state == "T" for state in states)

    os.kill(pid, signal.SIGSTOP)
    await until(stopped)


@pytest.fixture
async def pool(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[RuntimePool]:
    monkeypatch.setattr(isolated, "BACKOFF_INITIAL_S", 0.01)
    made = RuntimePool(GpuSection(isolation="process", timeout_ms=100), SystemClock(), max_queued=6)
    await made.load(CATALOG.path(TFLITE), TFLITE.format, TFLITE.sha256)
    yield made
    await made.close()


async def test_runs_equal_those_of_this_process(pool: RuntimePool) -> None:
    await pool.load(CATALOG.path(ONNX), ONNX.format, ONNX.sha256)
    here = LiteRtRuntime().load(CATALOG.path(TFLITE))
    random = np.random.default_rng(4)
    inputs = [random.uniform(0, 16, (1, 8, 8, 1)).astype(np.float32) for _ in range(8)]
    outcomes = await asyncio.gather(*(pool.run(TFLITE.sha256, {"image": x}, in_s(SOON_S)) for x in inputs))
    for x, outcome in zip(inputs, outcomes, strict=True):
        name = TFLITE.outputs[0].name
        np.testing.assert_array_equal(outcome.outputs[name], here.run({"image": x})[name])
        assert outcome.provider == here.provider
        assert outcome.queue_s >= 0 and outcome.compute_s > 0
    assert (await pool.run(ONNX.sha256, X, in_s(SOON_S))).provider.startswith("onnxruntime ")
    status = pool.status()
    assert status["isolation"] == "process" and status["pid"] != os.getpid()
    assert status["models"][TFLITE.sha256[:12]]["runs_in"] == "process"


async def test_errors_of_the_model_cross_over(pool: RuntimePool) -> None:
    with pytest.raises(TargetFailed, match="input 'image' is missing"):
        await pool.run(TFLITE.sha256, {"other": X["image"]}, in_s(SOON_S))
    with pytest.raises(ValueError, match="is not the recorded file"):
        await pool.load(CATALOG.path(TFLITE), "tflite", "0" * 64)
    await pool.run(TFLITE.sha256, X, in_s(SOON_S))


async def test_killed_fails_at_once_and_comes_back(pool: RuntimePool) -> None:
    pid = pool.status()["pid"]
    await stop(pid)
    running = [asyncio.create_task(pool.run(TFLITE.sha256, X, in_s(SOON_S))) for _ in range(5)]
    await until(lambda: pool.status()["in_flight"] == 5)
    os.kill(pid, signal.SIGKILL)
    async with asyncio.timeout(SOON_S / 2):
        results = await asyncio.gather(*running, return_exceptions=True)
    assert [type(result) for result in results] == [TargetUnavailable] * 5
    assert f"process {pid} died" in pool.problem()
    with pytest.raises(TargetUnavailable):
        await pool.run(TFLITE.sha256, X, in_s(SOON_S))
    await until(lambda: not pool.problem())
    await pool.run(TFLITE.sha256, X, in_s(SOON_S))
    assert pool.status()["pid"] != pid
    assert pool.status()["restarts"] == 1


async def test_stopped_times_out_is_reported_and_replaced(pool: RuntimePool, monkeypatch: pytest.MonkeyPatch) -> None:
    pid = pool.status()["pid"]
    await stop(pid)
    begun = in_s(0)
    with pytest.raises(TargetTimeout):
        await pool.run(TFLITE.sha256, X, in_s(0.15))
    assert in_s(0) - begun < isolated.HANG_MIN_S, "the caller waited for its deadline, not for the child"
    assert f"runtime hangs: no answer from its process {pid}" in pool.problem()
    fd = os.pidfd_open(pid)
    await until(lambda: pool.status()["restarts"] == 1 and not pool.problem())
    assert select.select([fd], [], [], SOON_S)[0], "the hung process was killed"
    os.close(fd)
    await pool.run(TFLITE.sha256, X, in_s(SOON_S))


async def test_a_short_stop_needs_no_restart(pool: RuntimePool) -> None:
    pid = pool.status()["pid"]
    await stop(pid)
    with pytest.raises(TargetTimeout):
        await pool.run(TFLITE.sha256, X, in_s(0.12))
    os.kill(pid, signal.SIGCONT)
    await until(lambda: not pool.problem())
    await pool.run(TFLITE.sha256, X, in_s(SOON_S))
    assert pool.status()["pid"] == pid


async def test_a_model_that_takes_the_process_down_is_refused(tmp_path: Path) -> None:
    """A file that nobody writes to holds the load up long enough to be killed in the middle of it."""
    fifo = tmp_path / "crash.tflite"
    os.mkfifo(fifo)
    engine = ProcessEngine(RuntimeOptions(), 1, 0.1, SystemClock())
    await engine.load(file_of(TFLITE))
    loading = asyncio.create_task(engine.load(ModelFile(fifo, "tflite", "0" * 64)))
    await until(lambda: engine.in_flight == 1)
    os.kill(engine.status()["pid"], signal.SIGKILL)
    with pytest.raises(ValueError, match=r"crash\.tflite takes the runtime down: .* died"):
        await loading
    await until(lambda: not engine.problem())
    assert (await engine.submit(TFLITE.sha256, X).outcome(SOON_S)).outputs
    await engine.close()


async def test_last_words_are_logged_and_nothing_else_is_printed(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    fifo = tmp_path / "crash.tflite"
    os.mkfifo(fifo)
    engine = ProcessEngine(RuntimeOptions(), 1, 0.1, SystemClock())
    await engine.load(file_of(TFLITE))
    loading = asyncio.create_task(engine.load(ModelFile(fifo, "tflite", "0" * 64)))
    await until(lambda: engine.in_flight == 1)
    os.kill(engine.status()["pid"], signal.SIGABRT)
    with pytest.raises(ValueError, match="takes the runtime down"):
        await loading
    await until(lambda: "last words of the runtime process" in caplog.messages)
    said = next(vars(record)["text"] for record in caplog.records if "last words" in record.message)
    assert said.startswith("INFO: Created TensorFlow Lite XNNPACK delegate")
    await engine.close()
    assert capfd.readouterr().err == ""


async def test_a_process_that_ends_by_itself_at_the_last_moment(caplog: pytest.LogCaptureFixture) -> None:
    """Between the end of its time and the kill it was collected: there is nobody left to kill."""

    class Ended:
        pid, returncode = 1, -signal.SIGABRT

        def __init__(self) -> None:
            self.ends = asyncio.Event()

        async def wait(self) -> int:
            await self.ends.wait()
            return self.returncode

        def kill(self) -> None:
            self.ends.set()
            raise ProcessLookupError

    async def silent() -> None:
        pass

    child = SimpleNamespace(process=Ended(), said="a last word", listening=asyncio.create_task(silent()))
    await isolated._reap(cast(isolated._Child, child), 0.0)
    assert "last words of the runtime process" in caplog.messages


async def test_a_model_that_is_gone_at_the_restart_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(isolated, "BACKOFF_INITIAL_S", 0.01)
    copy = tmp_path / "copy.onnx"
    copy.write_bytes(CATALOG.path(ONNX).read_bytes())
    engine = ProcessEngine(RuntimeOptions(), 1, 0.1, SystemClock())
    await engine.load(ModelFile(copy, "onnx", ONNX.sha256))
    await engine.load(file_of(TFLITE))
    copy.unlink()
    os.kill(engine.status()["pid"], signal.SIGKILL)
    await until(lambda: bool(engine.problem()))
    await until(lambda: not engine.problem())
    with pytest.raises(TargetUnavailable, match="does not have this model"):
        engine.submit(ONNX.sha256, X)
    assert (await engine.submit(TFLITE.sha256, X).outcome(SOON_S)).outputs
    await engine.close()


async def test_close_ends_the_process_and_what_waits(pool: RuntimePool) -> None:
    pid = pool.status()["pid"]
    fd = os.pidfd_open(pid)
    await stop(pid)
    waiting = asyncio.create_task(pool.run(TFLITE.sha256, X, in_s(SOON_S)))
    await until(lambda: pool.status()["in_flight"] == 1)
    os.kill(pid, signal.SIGCONT)
    await pool.close()
    assert select.select([fd], [], [], SOON_S)[0]
    os.close(fd)
    outcome = (await asyncio.gather(waiting, return_exceptions=True))[0]
    assert not isinstance(outcome, BaseException) or isinstance(outcome, TargetError)


async def test_a_process_that_cannot_be_started_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/nonexistent/python")
    engine = ProcessEngine(RuntimeOptions(), 1, 0.1, SystemClock())
    with pytest.raises(RuntimeUnavailable, match="cannot be started"):
        await engine.load(file_of(TFLITE))
    assert "has not been started" in engine.problem()
    await engine.close()


def test_it_dies_with_its_parent_even_while_stopped() -> None:
    program = (
        "import asyncio, sys\n"
        "from agent.core.clock import SystemClock\n"
        "from agent.runtimes.base import ModelFile\n"
        "from agent.runtimes.isolated import ProcessEngine\n"
        "from agent.runtimes.runners import RuntimeOptions\n"
        "from pathlib import Path\n"
        "async def main():\n"
        "    engine = ProcessEngine(RuntimeOptions(), 1, 1.0, SystemClock())\n"
        "    await engine.load(ModelFile(Path(sys.argv[1]), 'tflite', sys.argv[2]))\n"
        "    print(engine.status()['pid'], flush=True)\n"
        "    await asyncio.Event().wait()\n"
        "asyncio.run(main())\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, str(CATALOG.path(TFLITE)), TFLITE.sha256],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    ) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        fd = os.pidfd_open(pid)
        os.kill(pid, signal.SIGSTOP)
        parent.kill()
    assert select.select([fd], [], [], SOON_S)[0]
    os.close(fd)


def test_it_ends_quietly_when_the_parent_leaves_while_it_loads(tmp_path: Path) -> None:
    """As when the daemon cannot open its door: a file that nobody writes to yet holds the load up until it has gone."""
    fifo = tmp_path / "slow.tflite"
    os.mkfifo(fifo)
    ours, theirs = socket.socketpair()
    with subprocess.Popen(
        [sys.executable, "-m", "agent.runtimes.process", "{}", str(os.getpid()), "null", str(theirs.fileno())],
        pass_fds=[theirs.fileno()],
        stderr=subprocess.PIPE,
        cwd=ROOT,
    ) as process:
        theirs.close()
        ours.sendall(channel.encode({"load": [str(fifo), "tflite", "0" * 64, None]}, {}))
        with fifo.open("wb"):  # Returns when the child has opened the other end.
            ours.close()
        _, said = process.communicate(timeout=SOON_S)
    assert (process.returncode, said) == (0, b"")


@pytest.mark.parametrize("isolation", ["thread", "process"])
@pytest.mark.parametrize("turns", [1, 3, 30])
async def test_stopping_while_models_load_ends_the_child(isolation: str, turns: int, tmp_path: Path) -> None:
    fifo = tmp_path / "slow.tflite"
    os.mkfifo(fifo)
    before = {child.pid for child in psutil.Process().children()}
    made = RuntimePool(GpuSection.model_validate({"isolation": isolation}), SystemClock())
    loading = asyncio.create_task(made.load(fifo, "tflite", "0" * 64))
    for _ in range(turns):
        await asyncio.sleep(0)
    loading.cancel()
    await asyncio.wait([loading])
    await made.close()
    assert loading.cancelled()
    assert {child.pid for child in psutil.Process().children()} <= before, "a child is left, running or dead"


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8", "int64"])
def test_messages_come_through_whole(dtype: str) -> None:
    tensors = {"a": np.arange(6).reshape(1, 2, 3).astype(dtype), "b": np.zeros((0, 4), dtype), "c": np.array(5, dtype)}
    message = channel.encode({"run": "x", "n": 1.5}, tensors)
    assert channel.size(message) == len(message)
    header, decoded = channel.decode(message)
    assert header == {"run": "x", "n": 1.5}
    for name, value in tensors.items():
        assert decoded[name].dtype == value.dtype
        np.testing.assert_array_equal(decoded[name], value)


@pytest.mark.parametrize("start", [b"\x00" * 8, b"\xff" * 8])
def test_a_stream_out_of_step_is_noticed(start: bytes) -> None:
    with pytest.raises(ValueError, match="a message of"):
        channel.size(start)


@pytest.mark.parametrize(("dtype", "shape"), [("|O", [1]), ("<U4", [1]), ("V8", [1]), ("<f4", [-1])])
def test_a_child_that_was_taken_over_sends_numbers_or_nothing(dtype: str, shape: list[int]) -> None:
    """An array of objects would have the daemon follow its bytes as addresses."""
    head = json.dumps({"compute_s": 0.1, "tensors": [["y", dtype, shape]]}).encode()
    message = channel.HEAD.pack(4 + len(head) + 8, len(head)) + head + b"A" * 8
    with pytest.raises(ValueError, match="a tensor of"):
        channel.decode(message)


async def test_modules_of_the_folder_it_is_started_in_are_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`cd download && edge-agent models inspect model.tflite`."""
    (tmp_path / "ctypes.py").write_text("open('ran', 'w').close()")
    monkeypatch.chdir(tmp_path)
    engine = ProcessEngine(RuntimeOptions(), 1, 1.0, SystemClock())
    await engine.load(file_of(TFLITE))
    await engine.close()
    assert not (tmp_path / "ran").exists()
