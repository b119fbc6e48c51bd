"""10,000 broken frames and models: nothing crashes, and the next good frame is understood."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, build
from fuzz import fuzz_decoder, fuzz_session, fuzz_validator

SANITIZED_LIMIT_S = 240


def test_decoder() -> None:
    fuzz_decoder(random.Random(1), 10_000)


def test_session() -> None:
    fuzz_session(random.Random(2), 10_000)


def test_validator() -> None:
    fuzz_validator(random.Random(3), 10_000)


def run_sanitized(script: str, *arguments: str) -> str:
    """What a script of this folder prints when the firmware is its sanitized build."""
    runtime = subprocess.run(["g++", "-print-file-name=libasan.so"], capture_output=True, text=True).stdout.strip()
    if not Path(runtime).is_absolute():
        assert not os.environ.get("CI"), "the compiler has no address sanitizer"
        pytest.skip("the compiler has no address sanitizer")
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name(script), *arguments],
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "EDGE_AGENT_FIRMWARE": str(build("host-asan")),
            "LD_PRELOAD": runtime,
            # Python itself leaks by design.
            "ASAN_OPTIONS": "detect_leaks=0",
        },
        capture_output=True,
        text=True,
        timeout=SANITIZED_LIMIT_S,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    return done.stdout


def test_all_under_the_address_and_undefined_behaviour_sanitizers() -> None:
    assert run_sanitized("fuzz.py", "4", "3000").count("ok") == 3
