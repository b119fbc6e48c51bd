"""Runs in forks: none is left or complains when the whole is interrupted."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).parents[2]
WORKS = """
import os
import time
from hil.processes import interruptible
from hil.sim.side_by_side import side_by_side

def job():
    os.write(1, b"works\\n")
    time.sleep(60)

with interruptible():
    side_by_side([job, job])
"""


@pytest.mark.parametrize("way", [signal.SIGINT, signal.SIGTERM], ids=str)
def test_an_interrupt_leaves_no_worker_and_no_traceback_of_one(way: signal.Signals) -> None:
    whole = subprocess.Popen(
        [sys.executable, "-c", WORKS],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert whole.stdout is not None
    for _ in range(min(2, os.cpu_count() or 1)):
        assert whole.stdout.readline() == b"works\n"
    workers = psutil.Process(whole.pid).children()
    (os.killpg if way is signal.SIGINT else os.kill)(whole.pid, way)  # Ctrl-C reaches the workers as well
    _, complaint = whole.communicate(timeout=20)
    _, alive = psutil.wait_procs(workers, timeout=10)
    assert workers
    assert not alive
    assert b"ForkPoolWorker" not in complaint
