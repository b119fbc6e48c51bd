"""What holds up the event loop: how long, how often, and what it was doing.

A task beats at a steady rate; a thread looks whether it does. A beat that is later than `LIMIT_S` is a block: the
thread has then already looked at where the loop's thread stands. Time during which that thread was ready to run and
the machine ran others (`run_delay` of schedstat) is counted apart: no code of ours explains it.
"""

from __future__ import annotations

import asyncio
import logging
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

log = logging.getLogger(__name__)

PERIOD_S = 0.05
LIMIT_S = 0.05
"""A beat may be this late."""
FRAMES = 6
"""Innermost calls that are named."""
RECENT_S = 10.0
"""For which the latest lag is shown."""


class LoopWatch:
    """Watches the event loop that `run` runs on. Times are seconds; `now` is monotonic."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._due = 0.0
        self._seen = ""
        self._thread: int | None = None
        self._starved = 0.0
        self._recent: list[tuple[float, float]] = []
        self.blocks = 0
        self.longest_s = 0.0
        self.starved_s = 0.0
        self.latest: dict[str, Any] | None = None

    async def run(self, beat: Callable[[], None] = lambda: None) -> None:
        """Until cancelled. `beat` is called each time round."""
        self._thread = threading.get_native_id()
        self._starved = _run_delay(self._thread)
        self._due = self._now() + PERIOD_S
        halt = threading.Event()
        looker = threading.Thread(target=self._look, args=(threading.get_ident(), halt), name="loop-watch", daemon=True)
        looker.start()
        try:
            while True:
                await asyncio.sleep(max(0.0, self._due - self._now()))
                self.beaten(self._now())
                beat()
        finally:
            halt.set()

    def beaten(self, now: float) -> None:
        """A beat came, at this moment."""
        late_s = now - self._due
        self._recent = [(at, late) for at, late in self._recent if now - at < RECENT_S and late > late_s]
        self._recent.append((now, max(0.0, late_s)))
        seen, self._seen = self._seen, ""
        self._due = now + PERIOD_S
        if late_s > LIMIT_S:
            self._blocked(late_s, seen)
        elif self._thread is not None:
            self._starved = _run_delay(self._thread)

    def status(self) -> dict[str, Any]:
        """For `load` of `/status`; milliseconds. `loop_lag_ms`: the worst of the last ten seconds."""
        now = self._now()
        overdue = max(0.0, now - self._due) if self._due else 0.0
        recent = max((late for at, late in self._recent if now - at < RECENT_S), default=0.0)
        return {
            "loop_lag_ms": round(1e3 * max(overdue, recent), 3),
            "loop_blocks": self.blocks,
            "loop_longest_block_ms": round(1e3 * self.longest_s, 3),
            "loop_starved_ms": round(1e3 * self.starved_s, 3),
            "loop_last_block": self.latest,
        }

    def _blocked(self, late_s: float, seen: str) -> None:
        starved = 0.0 if self._thread is None else _run_delay(self._thread)
        taken_s = min(late_s, max(0.0, starved - self._starved))
        self._starved = starved
        self.starved_s += taken_s
        if late_s - taken_s <= LIMIT_S:
            return
        self.blocks += 1
        self.longest_s = max(self.longest_s, late_s - taken_s)
        self.latest = {"ms": round(1e3 * late_s, 1), "starved_ms": round(1e3 * taken_s, 1), "where": seen}
        log.warning("event loop blocked", extra=self.latest)

    def _look(self, ident: int, halt: threading.Event) -> None:
        """In a thread: where the loop's thread stands when a beat is due and does not come."""
        while not halt.wait(PERIOD_S):
            if not self._seen and self._now() - self._due > LIMIT_S / 2:
                self._seen = _where(sys._current_frames().get(ident))


def _where(frame: FrameType | None) -> str:
    """The innermost calls, the last one first: `file:line function`."""
    calls: list[str] = []
    while frame is not None and len(calls) < FRAMES:
        path = Path(frame.f_code.co_filename)
        calls.append(f"{path.parent.name}/{path.name}:{frame.f_lineno} {frame.f_code.co_name}")
        frame = frame.f_back
    return " < ".join(calls)


def _run_delay(thread: int) -> float:
    """Seconds that a thread of this process was ready and not running; 0 where the kernel does not count it."""
    try:
        with open(f"/proc/self/task/{thread}/schedstat", "rb") as file:  # noqa: PTH123 - twenty times a second
            return int(file.read().split()[1]) / 1e9
    except (OSError, IndexError, ValueError):
        return 0.0
