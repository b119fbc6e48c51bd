"""What a machine takes from the programs that are measured on it, so that it is not counted as theirs."""

from __future__ import annotations

import bisect
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

KEPT = 200_000
"""Looks that are remembered: more than an hour of them."""


class Stalls:
    """What the machine takes from us: how late it wakes somebody who wants to be woken, and how long the daemon was
    ready to run while others ran (`run_delay` of schedstat, of its threads, which wait for each other)."""

    STEP_S = 0.005
    LOOK_S = 0.02

    def __init__(self, pid: Callable[[], int]) -> None:
        self._pid = pid
        self._late: deque[tuple[float, float]] = deque(maxlen=KEPT)
        self._at: list[float] = []
        self._waited: list[float] = []
        self._lock = threading.Lock()
        self._halt = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._halt.set()

    def between(self, start: float, end: float) -> float:
        """Seconds in this span, both kinds together."""
        with self._lock:
            return self._between(start, end)

    def _between(self, start: float, end: float) -> float:
        late = 0.0
        for at, seconds in reversed(self._late):
            if at < start:
                break
            if at - seconds <= end:
                late += seconds
        if not self._at:
            return late
        first = max(0, bisect.bisect_right(self._at, start) - 1)
        last = min(len(self._at) - 1, bisect.bisect_left(self._at, end))
        return late + self._waited[last] - self._waited[first]

    def worst(self) -> float:
        return max((late for _, late in self._late), default=0.0)

    def _run(self) -> None:
        before, known, total = time.monotonic(), (0, 0.0), 0.0
        while not self._halt.wait(self.STEP_S):
            now = time.monotonic()
            if (late := now - before - self.STEP_S) > self.STEP_S:
                with self._lock:
                    self._late.append((now, late))
            before = now
            if self._at and now - self._at[-1] < self.LOOK_S:
                continue
            pid = self._pid()
            waited = _run_delay(pid)
            taken = max(0.0, waited - known[1]) if pid == known[0] else waited
            # Several threads may have waited at once: no more is taken than passed.
            total += min(taken, now - (self._at[-1] if self._at else now))
            known = (pid, waited)
            with self._lock:
                self._at.append(now)
                self._waited.append(total)
                if len(self._at) > KEPT:
                    del self._at[: KEPT // 2], self._waited[: KEPT // 2]


def _run_delay(pid: int) -> float:
    """Seconds that the threads of a process were ready and not running; 0 where the kernel does not count it."""
    total = 0
    try:
        for thread in Path(f"/proc/{pid}/task").iterdir():
            with suppress(OSError, IndexError, ValueError):  # it has ended meanwhile
                total += int((thread / "schedstat").read_bytes().split()[1])
    except OSError:
        return 0.0
    return total / 1e9
