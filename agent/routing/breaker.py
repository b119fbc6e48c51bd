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
MAX_OPENINGS = 32
"""Beyond this the back-off has long reached any maximum."""


class BreakerState(StrEnum):
    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half_open"


class Breaker:
    """State of one target.

    Ask `allows` before an attempt; tell `began`, which says whether the attempt is the probe; then tell `succeeded`,
    `failed` or `released`, and hand that back. What other attempts, begun before the breaker opened, come to meanwhile
    neither ends the probe nor lets a second one start.
    """

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

    def began(self, now: float) -> bool:
        """An attempt starts. In an open breaker whose time has come it is the probe: True."""
        if self.state is BreakerState.CLOSED or now < self.retry_at or self._probing:
            return False
        self.state = BreakerState.HALF_OPEN
        self._probing = True
        return True

    def succeeded(self) -> None:
        self._outcomes.append(True)
        self.consecutive_failures = 0
        self._openings = 0
        self._probing = False
        if self.state is not BreakerState.CLOSED:
            self._outcomes.clear()
            self.state = BreakerState.CLOSED

    def failed(self, now: float, *, probe: bool = False, permanent: bool = False) -> None:
        self._outcomes.append(False)
        self.consecutive_failures += 1
        was_probe = probe and self._probing  # or the breaker was closed or opened again while it ran
        if permanent or was_probe or (self.state is BreakerState.CLOSED and self._too_many_failures()):
            self._open(now, permanent)

    def released(self, *, probe: bool = False) -> None:
        """An attempt ended without telling anything about the target (cancelled, refused as busy)."""
        if probe:
            self._probing = False

    def came_back(self, now: float) -> None:
        """The target was replugged or reconnected: probe it at once instead of waiting for the back-off to end."""
        if self.state is BreakerState.OPEN:
            self.retry_at = min(self.retry_at, now)

    def _too_many_failures(self) -> bool:
        settings = self._settings
        if self.consecutive_failures >= settings.failures:
            return True
        full = len(self._outcomes) == settings.window
        return full and self._outcomes.count(False) / settings.window >= settings.error_rate

    def _open(self, now: float, permanent: bool) -> None:
        settings = self._settings
        backoff = settings.backoff_max_s
        if not permanent:
            backoff = min(backoff, settings.backoff_initial_s * BACKOFF_FACTOR**self._openings)
            self._openings = min(self._openings + 1, MAX_OPENINGS)
        self.state = BreakerState.OPEN
        self._probing = False
        self.retry_at = now + backoff * self._uniform(1.0 - JITTER, 1.0)
