"""A bound on further attempts at cloud lanes: a part of the traffic, so that a cloud that fails is not asked twice as
much because it fails (Beyer et al., *Site Reliability Engineering*, 2016, ch. 21, "Client-side throttling"; the form is
that of Finagle's `RetryBudget`: a share of the requests of a window, and a floor for those who ask rarely).

Pure: times are arguments, monotonic seconds.
"""

from __future__ import annotations

from collections import deque

from agent.config import RetryBudgetSection

SLOT_S = 1.0


class RetryBudget:
    """Further attempts in the last `window_s` are at most `ratio` of the requests in it and `min_per_s` a second."""

    def __init__(self, settings: RetryBudgetSection) -> None:
        self._settings = settings
        self._slots: deque[list[float]] = deque()
        """Start, requests, retries of each second of the window."""
        self._requests = self._retries = 0.0
        self.granted = self.refused = self.taken_over = 0

    def requested(self, now: float) -> None:
        """A request is being answered."""
        self._slot(now)[1] += 1
        self._requests += 1

    def take(self, now: float) -> bool:
        """Whether one more attempt may be made; if so, it counts."""
        slot = self._slot(now)
        if self._retries + 1 > self._limit():
            self.refused += 1
            return False
        slot[2] += 1
        self._retries += 1
        self.granted += 1
        return True

    def took_over(self) -> None:
        """A further attempt that needs no grant, because whoever failed is not asked any more."""
        self.taken_over += 1

    def status(self, now: float) -> dict[str, float]:
        """For `/status`: of the window, and since the start."""
        self._slot(now)
        left = max(0.0, self._limit() - self._retries)
        return {"left": round(left, 3), "granted": self.granted, "refused": self.refused, "taken_over": self.taken_over}

    def _limit(self) -> float:
        return self._settings.ratio * self._requests + self._settings.min_per_s * self._settings.window_s

    def _slot(self, now: float) -> list[float]:
        """The slot of this moment; those that have left the window are forgotten."""
        while self._slots and self._slots[0][0] <= now - self._settings.window_s:
            _, requests, retries = self._slots.popleft()
            self._requests -= requests
            self._retries -= retries
        if not self._slots or now - self._slots[-1][0] >= SLOT_S:
            self._slots.append([now, 0, 0])
        return self._slots[-1]
