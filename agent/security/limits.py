"""Token buckets: how often somebody may ask. Pure; times are monotonic seconds."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping

from agent.config import RateSection


class _Bucket:
    __slots__ = ("at", "tokens")

    def __init__(self, tokens: float, at: float) -> None:
        self.tokens = tokens
        self.at = at


class Buckets:
    """One bucket for each key, at most `tracked` of them: the least recently used is forgotten, and begins full again.

    Whoever is forgotten gains at most one burst, so a stranger with many names pushes out others without harm to them.
    """

    def __init__(self, rate: RateSection, tracked: int, own: Mapping[str, RateSection] | None = None) -> None:
        self._rate = rate
        self._own = own or {}
        self._tracked = tracked
        self._buckets: OrderedDict[str, _Bucket] = OrderedDict()
        self.refused = 0

    def __len__(self) -> int:
        return len(self._buckets)

    def take(self, key: str, now: float) -> float:
        """Take one token: 0. If there is none: the seconds until there will be."""
        wait_s = self.wait_s(key, now)
        if wait_s:
            self.refused += 1
        else:
            self._buckets[key].tokens -= 1.0
        return wait_s

    def wait_s(self, key: str, now: float) -> float:
        """Seconds until there is a token; takes none."""
        rate = self._own.get(key, self._rate)
        bucket = self._buckets.get(key)
        if bucket is None:
            if len(self._buckets) >= self._tracked:
                self._buckets.popitem(last=False)
            bucket = self._buckets[key] = _Bucket(rate.burst, now)
        else:
            self._buckets.move_to_end(key)
            bucket.tokens = min(rate.burst, bucket.tokens + max(0.0, now - bucket.at) * rate.per_s)
            bucket.at = now
        return 0.0 if bucket.tokens >= 1.0 else (1.0 - bucket.tokens) / rate.per_s
