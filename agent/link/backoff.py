"""How long to wait before the next try: exponential with full jitter (Brooker, "Exponential Backoff And Jitter", 2015).

Pure: the random source and the time are arguments. Used for the serial ports, MQTT and the circuit breakers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

_MAX_DOUBLINGS: Final = 60
"""Beyond this a float overflows before any sensible maximum is reached."""


class Backoff:
    """The n-th wait in a row is uniform in 0 .. min(`max_s`, `initial_s` x 2^n); a permanent failure waits `max_s`.

    `random` returns floats in 0 .. 1. Times are monotonic seconds.
    """

    def __init__(self, initial_s: float, max_s: float, random: Callable[[], float]) -> None:
        if not 0 < initial_s <= max_s:
            raise ValueError(f"need 0 < initial_s <= max_s, found {initial_s} and {max_s}")
        self._initial_s = initial_s
        self._max_s = max_s
        self._random = random
        self._failures = 0
        self._retry_at = float("-inf")

    @property
    def failures(self) -> int:
        """Failures since the last success."""
        return self._failures

    @property
    def retry_at(self) -> float:
        """When the next try is due; minus infinity if nothing has failed."""
        return self._retry_at

    def failed(self, now: float, *, permanent: bool = False) -> float:
        """Note a failure. Returns the seconds to wait."""
        ceiling = min(self._max_s, self._initial_s * 2.0 ** min(self._failures, _MAX_DOUBLINGS))
        wait_s = self._max_s if permanent else self._random() * ceiling
        self._failures += 1
        self._retry_at = now + wait_s
        return wait_s

    def succeeded(self) -> None:
        """Begin anew: the next failure waits the least."""
        self._failures = 0
        self._retry_at = float("-inf")

    def due(self, now: float) -> bool:
        """Whether the next try may be made."""
        return now >= self._retry_at
