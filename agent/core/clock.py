"""Time as an argument: parts take a `Clock`, so that tests can pass their own.

Deadlines, ages and back-off use `monotonic()`, which no operator and no NTP step can move. `wall()` is for what people
and other machines read, and for ages that must survive a restart.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Protocol


def _boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


class Clock(Protocol):
    """Both kinds of time, in seconds."""

    def monotonic(self) -> float:
        """Seconds since an arbitrary start; never goes back."""
        ...

    def wall(self) -> float:
        """Unix time in seconds; may jump."""
        ...

    def boot(self) -> str:
        """What tells this run of the machine from others: within one, `monotonic` goes on over restarts of the daemon.
        Empty: not known."""
        ...


class SystemClock:
    """The machine's clocks. `monotonic` is the clock that asyncio's event loop uses."""

    monotonic = staticmethod(time.monotonic)
    wall = staticmethod(time.time)
    boot = staticmethod(_boot_id)


class ManualClock:
    """A clock that moves only when told to."""

    def __init__(self, monotonic: float = 1000.0, wall: float = 1_700_000_000.0, boot: str = "") -> None:
        self._monotonic = monotonic
        self._wall = wall
        self._boot = boot

    def monotonic(self) -> float:
        return self._monotonic

    def wall(self) -> float:
        return self._wall

    def boot(self) -> str:
        return self._boot

    def advance(self, seconds: float) -> None:
        """Let time pass on both clocks."""
        self._monotonic += seconds
        self._wall += seconds

    def jump(self, seconds: float) -> None:
        """Set the wall clock only, as an operator or NTP does."""
        self._wall += seconds
