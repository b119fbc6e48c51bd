"""What an attempt on a target would take now, from what attempts on it took lately.

Service and link times are kept apart, each as a window of recent samples of which the median and the 95th percentile
are taken: a mean would be spoilt by one slow outlier, an exponential average says nothing about lateness. Samples older
than `MAX_AGE_S` are dropped, so that a target that was slow is tried again.

    expected = link.p50 + service.p50 * (1 + waiting / parallel)

where `waiting` is what the target has in flight already: each of `parallel` servers must finish its share of it first.
It errs on the long side, since what is in flight has been partly served.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque
from dataclasses import dataclass
from math import ceil, inf, isfinite
from typing import Any

WINDOW = 64
"""Samples kept: enough for a 95th percentile, few enough to follow a change within a minute of light traffic."""
MAX_AGE_S = 60.0
TIMEOUT_MEMORY_S = 5.0
"""How long a timeout counts as the 95th percentile: long enough to ask others meanwhile, short enough to notice that
the target is back. Timeouts that go on are the breaker's business."""


class Window:
    """Quantiles of the last `WINDOW` samples not older than `MAX_AGE_S`. Adding costs O(log n) plus a short move."""

    __slots__ = ("_ordered", "_samples", "_usual")

    def __init__(self) -> None:
        self._samples: deque[tuple[float, float]] = deque()
        self._ordered: list[float] = []
        self._usual: tuple[float, float] | None = None

    def add(self, now: float, value: float) -> None:
        value = max(0.0, value)  # what a peer reports may be wrong: NaN counts as nothing too, and the order holds
        self._samples.append((now, value))
        insort(self._ordered, value)
        self._usual = None
        self._drop(now)

    def quantile(self, q: float, now: float) -> float | None:
        """Nearest-rank quantile, or None while there is no sample."""
        if self._samples and self._samples[0][0] < now - MAX_AGE_S:
            self._drop(now)
        if not self._ordered:
            return None
        return self._ordered[max(0, ceil(q * len(self._ordered)) - 1)]

    def usual(self, now: float) -> tuple[float, float] | None:
        """Median and 95th percentile, or None while there is no sample. Worked out once for each change: routing asks
        several times for each request."""
        if self._samples and self._samples[0][0] < now - MAX_AGE_S:
            self._drop(now)
        if self._usual is None and self._ordered:
            count = len(self._ordered)
            self._usual = self._ordered[ceil(0.5 * count) - 1], self._ordered[ceil(0.95 * count) - 1]
        return self._usual

    def __len__(self) -> int:
        return len(self._ordered)

    def _drop(self, now: float) -> None:
        samples = self._samples
        while len(samples) > WINDOW or (samples and samples[0][0] < now - MAX_AGE_S):
            _, value = samples.popleft()
            del self._ordered[bisect_left(self._ordered, value)]
            self._usual = None


@dataclass(slots=True)
class Estimate:
    """What an attempt started now would take and give.

    `p50_s` and `p95_s` are seconds until the answer, of which `service_s`, `wait_s` and `link_s` are the parts at the
    median. `success` is the chance that an answer comes at all, `accuracy` that it is right; `bytes` is what goes over
    the wire both ways. `age_s` is the time since the last measurement; infinite: there was none.
    """

    p50_s: float
    p95_s: float
    measured: bool
    success: float = 1.0
    cost_usd: float = 0.0
    bytes: int = 0
    accuracy: float = 0.0
    service_s: float = 0.0
    wait_s: float = 0.0
    link_s: float = 0.0
    age_s: float = inf

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, times in milliseconds; what is unknown is null."""
        return {
            "p50_ms": round(self.p50_s * 1e3, 3),
            "p95_ms": round(self.p95_s * 1e3, 3),
            "service_ms": round(self.service_s * 1e3, 3),
            "wait_ms": round(self.wait_s * 1e3, 3),
            "link_ms": round(self.link_s * 1e3, 3),
            "measured": self.measured,
            "success": round(self.success, 4),
            "cost_usd": self.cost_usd,
            "bytes": self.bytes,
            "accuracy": round(self.accuracy, 6),
            "age_s": round(self.age_s, 3) if isfinite(self.age_s) else None,
        }


class TargetTimes:
    """Times of one variant on one target."""

    __slots__ = ("_link", "_prior_s", "_service", "_timed_out_at", "_waited_s")

    def __init__(self, prior_s: float) -> None:
        self._prior_s = prior_s
        self._service = Window()
        self._link = Window()
        self._waited_s = 0.0
        self._timed_out_at = float("-inf")

    def observe(self, now: float, *, service_s: float, link_s: float) -> None:
        """An attempt succeeded. If it was slow that shows in its own time: earlier timeouts are forgotten."""
        self._service.add(now, service_s)
        self._link.add(now, link_s)
        self._timed_out_at = float("-inf")

    def observe_timeout(self, now: float, waited_s: float) -> None:
        """An attempt was given up after `waited_s`: it would have taken at least that long."""
        self._waited_s = max(waited_s, self._waited_s) if now - self._timed_out_at <= TIMEOUT_MEMORY_S else waited_s
        self._timed_out_at = now

    def estimate(self, now: float, in_flight: int, parallel: int) -> Estimate:
        floor_s = self._waited_s if now - self._timed_out_at <= TIMEOUT_MEMORY_S else 0.0
        service, link = self._service.usual(now), self._link.usual(now)
        if service is None or link is None:
            return Estimate(self._prior_s, max(floor_s, self._prior_s), measured=False)
        waiting = 1.0 + in_flight / parallel
        return Estimate(link[0] + service[0] * waiting, max(floor_s, link[1] + service[1] * waiting), measured=True)
