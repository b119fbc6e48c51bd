"""The pool: deadlines, bounds and the choice between event loop and threads on scripted models; then real ones."""

from __future__ import annotations

import asyncio
import hashlib
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import numpy as np
import pytest

from agent.config import GpuSection
from agent.core.clock import ManualClock, SystemClock
from agent.core.errors import TargetBusy, TargetFailed, TargetTimeout, TargetUnavailable
from agent.core.types import Tensor, Tensors
from agent.registry.catalog import load_catalog
from agent.runtimes.base import Format, ModelFile, RuntimeUnavailable
from agent.runtimes.litert import LiteRtRuntime
from agent.runtimes.pool import OUTLIER, RECHECK, WINDOW, RuntimePool, ServiceTimes
from agent.runtimes.runners import FIRST_RUNS, Runners

CATALOG = load_catalog(Path(__file__).resolve().parents[2] / "models" / "catalog.yaml")
DIGITS = CATALOG.families["digits"].variants
X = {"x": np.zeros(1, np.float32)}
SOON_S = 5.0
"""For waits that end at once unless something is broken."""


class Scripted:
    """A runtime and its only model: `step` is what an inference does."""

    name = "scripted 1"
    format: Format = "tflite"
    provider = "scripted 1/steps"
    reentrant = False

    def __init__(self) -> None:
        self.step: Callable[[], None] = lambda: None
        self.instances = 0
        self.closed = 0
        self.threads: list[int] = []
        self.begun = threading.Semaphore(0)

    def __call__(self, format: Format) -> Scripted:
        return self

    def load(self, path: Path, data: bytes | None = None) -> Scripted:
        self.instances += 1
        return self

    def zeros(self) -> dict[str, Tensor]:
        return X

    def run(self, inputs: Tensors) -> dict[str, Tensor]:
        self.threads.append(threading.get_ident())
        self.begun.release()
        self.step()
        return {"y": inputs["x"] + 1}

    def close(self) -> None:
        self.closed += 1

    async def runs_begun(self, count: int) -> None:
        """Wait for so many more inferences to begin."""
        for _ in range(count):
            assert await asyncio.to_thread(self.begun.acquire, timeout=SOON_S)


@pytest.fixture
def file(tmp_path: Path) -> ModelFile:
    path = tmp_path / "model.tflite"
    path.write_bytes(b"model")
    return ModelFile(path, "tflite", hashlib.sha256(b"model").hexdigest())


@pytest.fixture
def scripted() -> Scripted:
    return Scripted()


@pytest.fixture
async def pool(scripted: Scripted, file: ModelFile) -> AsyncIterator[RuntimePool]:
    """Two workers and one place in the queue; never inline."""
    settings = GpuSection(inline_below_ms=0, workers=2, timeout_ms=50)
    made = RuntimePool(settings, SystemClock(), max_queued=1, factory=scripted)
    await made.load(file.path, file.format, file.sha256)
    yield made
    await made.close()


def in_s(seconds: float) -> float:
    return SystemClock().monotonic() + seconds


async def test_runs_in_a_thread(pool: RuntimePool, scripted: Scripted, file: ModelFile) -> None:
    outcome = await pool.run(file.sha256, X, in_s(SOON_S))
    assert outcome.outputs["y"] == 1
    assert outcome.provider == "scripted 1/steps"
    assert outcome.queue_s >= 0 and outcome.compute_s >= 0
    assert scripted.threads[-1] != threading.get_ident()
    assert pool.status()["models"][file.sha256[:12]]["runs_in"] == "thread"


async def test_a_late_run_keeps_its_place_until_it_ends(pool: RuntimePool, scripted: Scripted, file: ModelFile) -> None:
    release = threading.Event()
    scripted.step = release.wait  # type: ignore[assignment]
    begun = in_s(0)
    results = await asyncio.gather(*(pool.run(file.sha256, X, in_s(0.05)) for _ in range(3)), return_exceptions=True)
    assert [type(result) for result in results] == [TargetTimeout] * 3
    assert in_s(0) - begun < SOON_S
    assert "in the runtime" in str(results[0]) and "waiting for a thread" in str(results[2])
    with pytest.raises(TargetBusy, match="3 inferences run or wait already"):
        await pool.run(file.sha256, X, in_s(SOON_S))
    async with asyncio.timeout(SOON_S):
        while "all 2 threads" not in pool.problem():  # noqa: ASYNC110 - the second thread begins when it does
            await asyncio.sleep(0)
    before = len(scripted.threads)
    release.set()
    outcome = None
    while outcome is None:
        try:
            outcome = await pool.run(file.sha256, X, in_s(SOON_S))
        except TargetBusy:
            await asyncio.sleep(0)
    async with asyncio.timeout(SOON_S):
        while pool.problem() or pool.status()["in_flight"]:  # noqa: ASYNC110 - the other thread ends when it does
            await asyncio.sleep(0)
    assert len(scripted.threads) == before + 1, "the run that was abandoned while it waited was not made"
    assert scripted.instances == 2, "one for each thread that ran at once"


async def test_a_cancelled_run_is_skipped(pool: RuntimePool, scripted: Scripted, file: ModelFile) -> None:
    release = threading.Event()
    scripted.step = release.wait  # type: ignore[assignment]
    tasks = [asyncio.create_task(pool.run(file.sha256, X, in_s(SOON_S))) for _ in range(3)]
    await scripted.runs_begun(FIRST_RUNS + 1 + 2)
    tasks[2].cancel()
    await asyncio.wait({tasks[2]})
    release.set()
    await asyncio.gather(*tasks[:2])
    await pool.run(file.sha256, X, in_s(SOON_S))
    assert len(scripted.threads) == FIRST_RUNS + 1 + 2 + 1


async def test_a_deadline_that_has_passed_is_not_begun(pool: RuntimePool, scripted: Scripted, file: ModelFile) -> None:
    before = len(scripted.threads)
    with pytest.raises(TargetTimeout):
        await pool.run(file.sha256, X, in_s(-1))
    assert len(scripted.threads) == before


async def test_a_failing_run_is_translated(pool: RuntimePool, scripted: Scripted, file: ModelFile) -> None:
    def fail() -> None:
        raise RuntimeError("out of device memory")

    scripted.step = fail
    with pytest.raises(TargetFailed, match="out of device memory"):
        await pool.run(file.sha256, X, in_s(SOON_S))
    scripted.step = lambda: None
    await pool.run(file.sha256, X, in_s(SOON_S))


async def test_unknown_models_and_wrong_files_are_refused(pool: RuntimePool, file: ModelFile) -> None:
    with pytest.raises(TargetUnavailable, match="is not loaded"):
        await pool.run("f" * 64, X, in_s(SOON_S))
    with pytest.raises(ValueError, match="is not the recorded file"):
        await pool.load(file.path, "tflite", "f" * 64)


async def test_a_file_that_changed_is_not_loaded_a_second_time(
    pool: RuntimePool, scripted: Scripted, file: ModelFile
) -> None:
    release = threading.Event()
    scripted.step = release.wait  # type: ignore[assignment]
    first = asyncio.create_task(pool.run(file.sha256, X, in_s(SOON_S)))
    await scripted.runs_begun(FIRST_RUNS + 1 + 1)
    file.path.write_bytes(b"another")
    with pytest.raises(TargetFailed, match="is not the recorded file"):
        await pool.run(file.sha256, X, in_s(SOON_S))
    release.set()
    await first


async def test_close_frees_the_instances(pool: RuntimePool, scripted: Scripted, file: ModelFile) -> None:
    await pool.run(file.sha256, X, in_s(SOON_S))
    await pool.close()
    assert scripted.closed == 1
    with pytest.raises(TargetUnavailable):
        await pool.run(file.sha256, X, in_s(SOON_S))


async def test_a_fast_model_runs_on_the_event_loop_until_it_is_slow(scripted: Scripted, file: ModelFile) -> None:
    clock = ManualClock()
    took = [0.0001]
    scripted.step = lambda: clock.advance(took[0])
    pool = RuntimePool(GpuSection(inline_below_ms=0.5), clock, factory=scripted)
    await pool.load(file.path, file.format, file.sha256)

    async def inline() -> bool:
        await pool.run(file.sha256, X, clock.monotonic() + SOON_S)
        return scripted.threads[-1] == threading.get_ident()

    assert await inline(), "the first runs at loading were fast"
    took[0] = 0.01
    assert await inline()
    took[0] = 0.0001
    assert not await inline(), "one outlier is enough to leave the event loop"
    for _ in range(RECHECK):
        await inline()
    assert await inline(), "fast again"
    await pool.close()


def test_service_times_leave_inline_when_the_95th_percentile_rises() -> None:
    times = ServiceTimes(0.0005)
    for _ in range(WINDOW):
        times.add(0.0004)
    assert times.inline
    times.add(0.0006)  # Slow, but no outlier: one in 32 is below the percentile.
    for _ in range(RECHECK):
        times.add(0.0004)
    assert times.inline
    for _ in range(RECHECK):
        times.add(0.0006)
    assert not times.inline
    assert times.quantile(0.5) == 0.0004


def test_service_times_drop_what_was_before_an_outlier() -> None:
    times = ServiceTimes(0.0005)
    for _ in range(RECHECK):
        times.add(0.0001)
    times.add(0.0005 * OUTLIER * 1.1)
    assert not times.inline
    assert times.quantile(0.5) == float("inf")


async def test_busy_share_follows_the_time_spent(scripted: Scripted, file: ModelFile) -> None:
    clock = ManualClock()
    scripted.step = lambda: clock.advance(0.1)
    pool = RuntimePool(GpuSection(workers=1, inline_below_ms=0), clock, factory=scripted)
    await pool.load(file.path, file.format, file.sha256)
    for _ in range(600):
        clock.advance(0.1)
        await pool.run(file.sha256, X, clock.monotonic() + SOON_S)
    assert pool.status()["busy_share"] == pytest.approx(0.5, abs=0.02)
    clock.advance(100)
    assert pool.status()["busy_share"] == 0
    await pool.close()


@pytest.mark.parametrize("variant", [DIGITS["gateway-fp16"], DIGITS["cloud-fp32"]], ids=lambda v: v.format)
@pytest.mark.parametrize("inline_below_ms", [0, 5])
async def test_real_models_under_concurrency(variant, inline_below_ms: float) -> None:  # type: ignore[no-untyped-def]
    pool = RuntimePool(GpuSection(inline_below_ms=inline_below_ms), SystemClock(), max_queued=50)
    loaded = await pool.load(CATALOG.path(variant), variant.format, variant.sha256)
    random = np.random.default_rng(2)
    inputs = [random.uniform(0, 16, variant.inputs[0].shape).astype(np.float32) for _ in range(50)]
    outcomes = await asyncio.gather(*(pool.run(variant.sha256, {"image": x}, in_s(SOON_S)) for x in inputs))
    alone = [await pool.run(variant.sha256, {"image": x}, in_s(SOON_S)) for x in inputs]
    for together, single in zip(outcomes, alone, strict=True):
        np.testing.assert_array_equal(
            together.outputs[variant.outputs[0].name], single.outputs[variant.outputs[0].name]
        )
    assert outcomes[0].provider == loaded.provider
    service_s = pool.service_time_s(variant.sha256)
    assert service_s is not None and service_s > 0
    await pool.close()


async def test_a_damaged_model_that_was_catalogued_is_refused(tmp_path: Path) -> None:
    """Whole and recorded, but no model: what a library makes of it happens in a process that may die."""
    whole = CATALOG.path(DIGITS["gateway-fp16"]).read_bytes()
    random = np.random.default_rng(3)
    files = []
    for n, size in enumerate((10, 100, len(whole) // 2, len(whole) - 1)):
        path = tmp_path / f"cut-{n}.tflite"
        path.write_bytes(whole[:size])
        files.append(ModelFile(path, "tflite", hashlib.sha256(path.read_bytes()).hexdigest()))
    garbled = tmp_path / "garbled.tflite"
    garbled.write_bytes(whole[:64] + random.bytes(len(whole) - 64))
    files.append(ModelFile(garbled, "tflite", hashlib.sha256(garbled.read_bytes()).hexdigest()))
    good = ModelFile(CATALOG.path(DIGITS["gateway-fp16"]), "tflite", DIGITS["gateway-fp16"].sha256)
    pool = RuntimePool(GpuSection(), SystemClock())
    outcomes = await pool.load_all([*files, good])
    for file in files:
        assert isinstance(outcomes[file.sha256], ValueError), file.path.name
    assert await pool.run(good.sha256, {"image": np.zeros((1, 8, 8, 1), np.float32)}, in_s(SOON_S))
    await pool.close()


async def test_a_runtime_that_is_not_installed_keeps_no_other_out(file: ModelFile) -> None:
    def factory(format: Format) -> LiteRtRuntime:
        if format == "onnx":
            raise RuntimeUnavailable("onnxruntime is not installed")
        return LiteRtRuntime()

    pool = RuntimePool(GpuSection(), SystemClock(), factory=factory)
    onnx, tflite = DIGITS["cloud-fp32"], DIGITS["gateway-fp16"]
    outcomes = await pool.load_all(ModelFile(CATALOG.path(v), v.format, v.sha256) for v in (onnx, tflite))
    assert str(outcomes[onnx.sha256]) == "onnxruntime is not installed"
    assert pool.loaded(tflite.sha256) is outcomes[tflite.sha256]
    assert pool.loaded(onnx.sha256) is None
    await pool.close()


def test_a_load_that_ends_while_the_models_are_freed_disturbs_nothing(file: ModelFile, tmp_path: Path) -> None:
    late = tmp_path / "late.tflite"
    late.write_bytes(b"late")
    also = ModelFile(late, "tflite", hashlib.sha256(b"late").hexdigest())

    class Freed(Scripted):
        def close(self) -> None:
            super().close()
            if self.closed == 1:
                runners.load(also)

    scripted = Freed()
    runners = Runners(scripted, SystemClock().monotonic)
    runners.load(file)
    runners.close()
    assert scripted.closed == 2
