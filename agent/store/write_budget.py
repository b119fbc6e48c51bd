"""How much a file may write to the disk: flash wears out. Times are monotonic seconds."""

from __future__ import annotations

from pathlib import Path

DAY_S = 86_400.0
BURST_S = 3600.0
"""What was not written in this time may be written at once."""
PAGES_PER_ROW = 6
PAGE_BYTES = 4096


class WriteBudget:
    """Bytes for each day, coming back evenly. None: no limit. One write may go beyond it; the next waits for that."""

    def __init__(self, bytes_per_day: int | None, now: float) -> None:
        self.bytes_per_day = bytes_per_day
        self.written = 0
        self._per_s = (bytes_per_day or 0) / DAY_S
        self._left = self._per_s * BURST_S
        self._at = now

    def wait_s(self, now: float) -> float:
        """Before the next write; 0: now."""
        if self.bytes_per_day is None:
            return 0.0
        self._left = min(self._per_s * BURST_S, self._left + (now - self._at) * self._per_s)
        self._at = now
        return 0.0 if self._left > 0 else (1.0 - self._left) / self._per_s

    def spend(self, size: int) -> None:
        self.written += size
        self._left -= size


def written_by_thread() -> int | None:
    """Bytes that this thread has handed to the system to write; None where the kernel does not count."""
    try:
        for line in Path("/proc/thread-self/io").read_text().splitlines():
            if line.startswith("wchar:"):
                return int(line[6:])
    except (OSError, ValueError):
        pass
    return None


def written_since(before: int | None, rows: int) -> int:
    """By this thread; where the kernel does not count, what the rows may have taken: a page in the log and in the file
    for each of the trees that a row is in."""
    after = written_by_thread()
    return rows * PAGES_PER_ROW * PAGE_BYTES if before is None or after is None else after - before
