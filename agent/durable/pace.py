"""At most so many in a second, with a small burst. Times are monotonic seconds."""

from __future__ import annotations

BURST_S = 0.05
"""What may be used at once of what was not used before."""


class Pace:
    def __init__(self, per_s: float) -> None:
        self._per_s = per_s
        self._burst = max(1.0, per_s * BURST_S)
        self._left = self._burst
        self._at: float | None = None

    def take(self, now: float) -> bool:
        """One now, or not yet."""
        if self._at is not None:
            self._left = min(self._burst, self._left + (now - self._at) * self._per_s)
        self._at = now
        if self._left < 1.0:
            return False
        self._left -= 1.0
        return True

    def wait_s(self) -> float:
        """Until `take` succeeds, after it did not."""
        return max(0.0, 1.0 - self._left) / self._per_s
