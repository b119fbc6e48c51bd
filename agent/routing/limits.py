"""How many attempts a target is given at once, learnt from how long they take. Pure: no clock of its own.

A gradient limiter, after Netflix' concurrency-limits (Gradient2Limit): what an attempt takes beside what such attempts
usually take tells whether a queue builds up there.

    gradient = between 0.5 and 1: tolerance * usual / took
    limit    = (1 - smoothing) * limit + smoothing * (limit * gradient + sqrt(limit))

The square root is the queue that is allowed to build up, so that the limit rises where there is room. It does not move
while less than half of it is used: then nothing was learnt about it. An attempt that timed out, or was refused because
the far end was full, multiplies it by `backoff`, as TCP halves its window, at most once for each usual time. It starts
at the ceiling, the target's `max_concurrent`, and never exceeds it.

A class may use its share of the limit (`overload.shares`); at least one place, and all but one where there are two or
more and the class is not the tightest: so batch work never holds the last place of a target.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import ceil, sqrt

from agent.config import ClassShares, LimitSection, OverloadSection
from agent.core.types import LatencyClass
from agent.targets.base import TargetTraits

STEEPEST = 0.5
"""Lowest gradient: one very slow attempt is not to close a target."""


class Shares:
    """Places that each class may take of a number of them."""

    __slots__ = ("_of",)

    def __init__(self, settings: ClassShares) -> None:
        self._of: Mapping[LatencyClass, float] = {kind: getattr(settings, kind.value) for kind in LatencyClass}

    def places(self, latency_class: LatencyClass, of: int) -> int:
        share = self._of[latency_class]
        if share >= 1.0 or of < 2:
            return of
        return max(1, min(of - 1, ceil(share * of)))


def limits_of(settings: OverloadSection) -> Callable[[TargetTraits], AdaptiveLimit]:
    """Makes the limit of each target."""
    shares = Shares(settings.shares)
    return lambda traits: AdaptiveLimit(settings.limits, shares, traits.max_concurrent)


class AdaptiveLimit:
    """Of one target: a `routing.decision.Limit`."""

    __slots__ = ("_calm_until", "_ceiling", "_floor", "_limit", "_settings", "_shares")

    def __init__(self, settings: LimitSection, shares: Shares, ceiling: int) -> None:
        self._settings = settings
        self._shares = shares
        self._ceiling = float(ceiling)
        self._floor = float(min(settings.minimum, ceiling))
        self._limit = float(ceiling)
        self._calm_until = float("-inf")

    @property
    def places(self) -> int:
        """Attempts that may be in flight."""
        return int(self._limit)

    def limit(self, now: float, latency_class: LatencyClass) -> int:
        return self._shares.places(latency_class, int(self._limit))

    def observe(self, now: float, *, latency_s: float, usual_s: float, in_flight: int, ok: bool) -> None:
        if not self._settings.adaptive:
            return
        if not ok:
            if now >= self._calm_until:
                self._calm_until = now + usual_s
                self._set(self._limit * self._settings.backoff)
        elif 2 * (in_flight + 1) >= self._limit and latency_s > 0.0 and usual_s > 0.0:
            gradient = max(STEEPEST, min(1.0, self._settings.tolerance * usual_s / latency_s))
            wanted = self._limit * gradient + sqrt(self._limit)
            smoothing = self._settings.smoothing
            self._set((1.0 - smoothing) * self._limit + smoothing * wanted)

    def _set(self, limit: float) -> None:
        self._limit = max(self._floor, min(self._ceiling, limit))
