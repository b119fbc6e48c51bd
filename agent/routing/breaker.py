"""Circuit breaker for one target (Nygard, *Release It!*): pure, takes `now` and its random source as arguments.

closed     everything passes; `failures` in a row, or an error rate over the last `window` outcomes, open it
open       nothing passes until the back-off is over
half open  one probe passes; its success closes the breaker, its failure opens it again for longer
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable
from enum import StrEnum

from agent.config import BreakerSection

BACKOFF_FACTOR = 2.0
JITTER = 0.2
"""Share by which a back-off is shortened at random, so that many gateways do not return at the same moment."""


class BreakerState(StrEnum):
    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half_open"


class Breaker:
    """State of one target. Ask `allows` before an attempt; tell `began`, then `succeeded`, `failed` or `released`."""

    def __init__(self, settings: BreakerSection, uniform: Callable[[float, float], float] = random.uniform) -> None:
        self._settings = settings
        self._uniform = uniform
        self._outcomes: deque[bool] = deque(maxlen=settings.window)
        self._openings = 0
        self._probing = False
        self.state = BreakerState.CLOSED
        self.consecutive_failures = 0
        self.retry_at = 0.0

    def allows(self, now: float) -> bool:
        """Whether an attempt may start now."""
        if self.state is BreakerState.CLOSED:
            return True
        return now >= self.retry_at and not self._probing

    def began(self, now: float) -> None:
        """An attempt starts. In an open breaker whose time has come it is the probe."""
        if self.state is not BreakerState.CLOSED and now >= self.retry_at:
            self.state = BreakerState.HALF_OPEN
            self._probing = True

    def succeeded(self) -> None:
        self._outcomes.append(True)
        self.consecutive_failures = 0
        self._openings = 0
        self._probing = False
        if self.state is not BreakerState.CLOSED:
            self._outcomes.clear()
            self.state = BreakerState.CLOSED

    def failed(self, now: float, *, permanent: bool = False) -> None:
        self._outcomes.append(False)
        self.consecutive_failures += 1
        settings = self._settings
        was_probe, self._probing = self._probing, False
        rate = self._outcomes.count(False) / settings.window if len(self._outcomes) == settings.window else 0.0
        if (
            permanent
            or was_probe
            or self.consecutive_failures >= settings.failures
            or (self.state is BreakerState.CLOSED and rate >= settings.error_rate)
        ):
            self._open(now, permanent)

    def released(self) -> None:
        """An attempt ended without telling anything about the target (cancelled, refused as busy)."""
        self._probing = False

    def came_back(self, now: float) -> None:
        """The target was replugged or reconnected: probe it at once instead of waiting for the back-off to end."""
        if self.state is BreakerState.OPEN:
            self.retry_at = min(self.retry_at, now)

    def _open(self, now: float, permanent: bool) -> None:
        settings = self._settings
        if self.state is BreakerState.OPEN and now < self.retry_at and not permanent:
            return  # an attempt that began before the breaker opened; its failure is no news
        backoff = settings.backoff_max_s
        if not permanent:
            backoff = min(backoff, settings.backoff_initial_s * BACKOFF_FACTOR**self._openings)
            self._openings = min(self._openings + 1, 32)
        self.state = BreakerState.OPEN
        self.retry_at = now + backoff * self._uniform(1.0 - JITTER, 1.0)
