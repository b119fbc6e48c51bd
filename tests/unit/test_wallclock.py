"""One process's wall clock is moved while it runs; nothing else notices."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hil.wallclock import WallClock, compiler

YEAR_S = 365 * 86400
SAYS = """
import sqlite3, sys, time
for _ in sys.stdin:
    seconds = sqlite3.connect(":memory:").execute("SELECT strftime('%s', 'now')").fetchone()[0]
    print(time.time(), seconds, time.monotonic(), flush=True)
"""


@pytest.mark.skipif(compiler() is None, reason="no C compiler")
def test_the_wall_clock_of_one_process_jumps_and_no_other_clock(tmp_path: Path) -> None:
    clock = WallClock(tmp_path)
    with subprocess.Popen(
        [sys.executable, "-c", SAYS],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **clock.environ},
    ) as process:
        assert process.stdin and process.stdout
        for offset in (0, YEAR_S, -YEAR_S, 0):
            clock.set(offset)
            wall, monotonic = time.time(), time.monotonic()
            process.stdin.write("\n")
            process.stdin.flush()
            theirs = [float(word) for word in process.stdout.readline().split()]
            took = time.monotonic() - monotonic
            assert 0 <= theirs[0] - offset - wall <= took + 0.1
            assert -1 <= theirs[1] - offset - wall <= took + 0.1
            assert 0 <= theirs[2] - monotonic <= took
        process.stdin.close()
    assert process.returncode == 0
