"""Builds the firmware's host library once per run; $EDGE_AGENT_FIRMWARE names one that is built already."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
sys.path.append(str(ROOT / "tests/unit"))  # its microcontroller's lines serve the firmware as well

BUILD_LIMIT_S = 300


def build(environment: str) -> Path:
    """The library of a PlatformIO environment, built by script/firmware."""
    done = subprocess.run(
        [ROOT / "script" / "firmware", environment],
        env={**os.environ, "VENV": sys.prefix},
        capture_output=True,
        text=True,
        timeout=BUILD_LIMIT_S,
    )
    if "lacks platformio" in done.stderr and not os.environ.get("CI"):
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stdout + done.stderr
    return ROOT / "firmware" / ".pio" / "build" / environment / "libedge_mcu.so"


@pytest.fixture(scope="session", autouse=True)
def host_library() -> Path:
    named = os.environ.get("EDGE_AGENT_FIRMWARE")
    return Path(named) if named else build("host")
