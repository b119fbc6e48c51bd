"""The emulated board as the daemon's tier `edge_mcu`: it answers with an engine, and is never asked without one."""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from board import ROOT
from qemu import RUN, build

from agent import cli
from agent.config import McuSection
from agent.core.clock import SystemClock
from agent.core.types import InferenceRequest, LatencyClass
from agent.registry.catalog import load_catalog
from agent.targets.mcu import McuTarget

CLOCK = SystemClock()
CATALOG = load_catalog(ROOT / "models/catalog.yaml")


@contextmanager
def switched_on(image: Path) -> Iterator[str]:
    """Its port, for as long as the block."""
    process = subprocess.Popen([RUN, image], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        assert process.stdout is not None
        said = process.stdout.readline()
        found = re.search(r"/dev/pts/\d+", said)
        assert found, said
        yield found[0]
    finally:
        process.terminate()
        process.communicate(timeout=10)


def tier(port: str) -> McuTarget:
    return McuTarget(McuSection(ports=(port,), timeout_ms=5000, health_check_interval=1), CATALOG, CLOCK)


async def until(condition: Callable[[], bool], what: str) -> None:
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110 - what it waits for is in another process
            await asyncio.sleep(0.01)
    assert condition(), what


async def test_a_board_without_an_engine_is_never_asked(tmp_path: Path) -> None:
    with switched_on(build("qemu", tmp_path)) as port:
        target = tier(port)
        await target.start()
        try:
            await until(lambda: "without an engine" in target.availability().reason, "greeted")
            assert not target.availability().available
        finally:
            await target.stop()


async def test_a_board_with_an_engine_answers(tmp_path: Path) -> None:
    library = os.environ.get("TFLM_LIB_DIR")
    if not library:
        pytest.skip("TFLM_LIB_DIR does not name a TensorFlow Lite Micro tree (docs/firmware.md)")
    with switched_on(build("qemu", tmp_path, library)) as port:
        assert await asyncio.to_thread(cli.main, ["mcu", "push", "digits", "--port", port]) == 0
        target = tier(port)
        await target.start()
        try:
            await until(lambda: target.availability().available, "available")
            family = CATALOG.family("digits")
            variant = family.variant_for("edge_mcu")
            assert variant is not None
            image = {"image": np.zeros((1, 8, 8, 1), np.float32)}
            deadline = CLOCK.monotonic() + 5
            request = InferenceRequest("r", "digits", image, LatencyClass.BATCH, CLOCK.monotonic(), deadline)
            answer = await target.infer(request, family, variant, deadline)
            assert answer.outputs["probabilities"].shape == (1, 10)
        finally:
            await target.stop()
