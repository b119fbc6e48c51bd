"""A demonstration that is interrupted, however rudely, leaves no process behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from gateway import wait_until


@pytest.mark.parametrize("ways", [[signal.SIGINT, signal.SIGINT], [signal.SIGHUP], [signal.SIGKILL]], ids=str)
def test_nothing_is_left_behind(ways: list[signal.Signals], tmp_path: Path) -> None:
    with (tmp_path / "log").open("wb") as log:
        demo = subprocess.Popen(
            [sys.executable, "-m", "agent.cli", "demo", "--seconds", "60", "--http-port", "0"],
            stdout=log,
            stderr=log,
            env={**os.environ, "TMPDIR": str(tmp_path), "PYTHONUNBUFFERED": "1"},
            # Where the tests run in a shell's background, SIGINT is ignored, and children inherit that.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
    parent = psutil.Process(demo.pid)
    wait_until(lambda: "ready" in (tmp_path / "log").read_text(), "the demonstration running", 40.0)
    children = parent.children(recursive=True)
    assert len(children) >= 6
    for way in ways:
        demo.send_signal(way)
    demo.wait(40)
    _, alive = psutil.wait_procs(children, timeout=15)
    assert not alive, [process.cmdline() for process in alive]
