"""What an attempt on a target would take and give now, from what attempts on it came to lately. Pure.

Everything is kept for each variant on each target. `docs/routing.md` explains the formulas and works them by hand:

    service, link   median and 95th percentile (nearest rank) of the last `WINDOW` successful attempts
    ahead           max(0, in flight - parallel + 1): departures until a server is free (M/M/c; Kleinrock 1975)
    wait            service.p50 x ahead / parallel
    p50             link.p50 + service.p50 + wait
    p95             p50 + sqrt(dl^2 + ds^2 + ahead x (ds / parallel)^2), dl and ds being p95 - p50 of link and service:
                    variances of independent parts add
    few samples     below `ENOUGH` samples p95 is at least p50 x SPREAD^(1 - samples / ENOUGH)
    staleness       w = 2^-(max(0, age - FRESH_S) / HALF_LIFE_S); p50 = p50^w x cold^(1 - w), and p95 / p50 in the same
                    way draws near to SPREAD
    success         mean of a Beta posterior over outcomes that count half after `OUTCOME_HALF_LIFE_S`
    link            rtt + bytes x s_per_byte, by Theil and Sen over the variants that were measured on the target

A median does not move for one outlier as a mean does, and an exponential average says nothing about lateness.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from math import ceil, inf, isfinite, sqrt
from statistics import median
from typing import Any, NamedTuple, TypeAlias

WINDOW = 64
"""Samples kept: enough for a 95th percentile, few enough to follow a change within a minute of light traffic."""
MAX_AGE_S = 300.0
"""Samples this much older than the newest are dropped, and all of them when nothing came for so long."""
ENOUGH = 20
"""From here on the nearest-rank 95th percentile is not simply the largest sample."""
SPREAD = 2.0
"""p95 over p50 where nothing is known of it."""
FRESH_S = 10.0
HALF_LIFE_S = 30.0
"""How long a measurement counts in full, and in which time it then loses half of its weight."""
TIMEOUT_MEMORY_S = 5.0
"""How long a timeout counts as the 95th percentile: long enough to ask others meanwhile, short enough to notice that
the target is back. Timeouts that go on are the breaker's business."""
PRIOR_SUCCESSES, PRIOR_FAILURES = 20.0, 0.2
"""What a target that was never asked is taken to have done: 99 % success, worth 20 attempts."""
OUTCOME_HALF_LIFE_S = 60.0
KEEP_S = 0.25
"""How long an estimate is handed out again while nothing happens that would change it but the passing of time."""
MAX_KEPT = 8
"""Estimates of one play that are handed out again: behind other requests, of another accuracy."""

Habit: TypeAlias = tuple[str, str, bool, bool]
"""A sort of decision: latency class, accuracy mode, whether the variant was pinned, whether only some plays were let
pass."""


class Window:
    """Quantiles of the last `WINDOW` samples. Adding costs O(log n) plus a short move."""

    __slots__ = ("_ordered", "_samples", "_usual", "newest")

    def __init__(self) -> None:
        self._samples: deque[tuple[float, float]] = deque()
        self._ordered: list[float] = []
        self._usual = (0.0, 0.0)
        self.newest = -inf
        """When the newest sample was taken."""

    def add(self, now: float, value: float) -> None:
        """What a peer reports may be wrong: below 0 and NaN count as nothing."""
        value = max(0.0, value)
        samples, ordered = self._samples, self._ordered
        samples.append((now, value))
        insort(ordered, value)
        while len(samples) > WINDOW or samples[0][0] < now - MAX_AGE_S:
            _, gone = samples.popleft()
            del ordered[bisect_left(ordered, gone)]
        self.newest = now
        count = len(ordered)
        self._usual = ordered[ceil(0.5 * count) - 1], ordered[ceil(0.95 * count) - 1]

    def quantile(self, q: float) -> float | None:
        """Nearest-rank quantile, or None while there is no sample."""
        return self._ordered[max(0, ceil(q * len(self._ordered)) - 1)] if self._ordered else None

    def usual(self) -> tuple[float, float]:
        """Median and 95th percentile; (0, 0) while there is no sample."""
        return self._usual

    def __len__(self) -> int:
        return len(self._ordered)


class Outcomes:
    """Chance that an attempt succeeds: a Beta posterior whose counts halve every `OUTCOME_HALF_LIFE_S`."""

    __slots__ = ("_at", "_bad", "_good")

    def __init__(self) -> None:
        self._good = self._bad = 0.0
        self._at = 0.0

    def add(self, now: float, *, ok: bool) -> None:
        faded = self._faded(now)
        self._good, self._bad, self._at = self._good * faded + ok, self._bad * faded + (not ok), now

    def mean(self, now: float) -> float:
        faded = self._faded(now)
        good, bad = PRIOR_SUCCESSES + self._good * faded, PRIOR_FAILURES + self._bad * faded
        return good / (good + bad)

    def _faded(self, now: float) -> float:
        return float(0.5 ** (max(0.0, now - self._at) / OUTCOME_HALF_LIFE_S))


class Link(NamedTuple):
    """Time on the wire: `rtt_s + bytes x s_per_byte`."""

    rtt_s: float
    s_per_byte: float

    def takes(self, bytes: int) -> float:
        return self.rtt_s + bytes * self.s_per_byte


def fit_link(points: Sequence[tuple[int, float]], prior: Link) -> Link:
    """The line through (bytes, seconds) points: median of the slopes between all pairs, median of what the slope leaves
    (Theil 1950, Sen 1968). One point off does not move it. With points of one size only, the slope is the prior's; with
    none, so is the round trip."""
    if not points:
        return prior
    slopes = [(t2 - t1) / (b2 - b1) for (b1, t1), (b2, t2) in combinations(points, 2) if b1 != b2]
    slope = max(0.0, median(slopes)) if slopes else prior.s_per_byte
    return Link(max(0.0, median(seconds - slope * size for size, seconds in points)), slope)


class Cold(NamedTuple):
    """What is assumed of a play before anything was measured: seconds of computing and of the link."""

    service_s: float
    link_s: float = 0.0


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

    @property
    def idle_s(self) -> float:
        """The median if nothing were in flight."""
        return self.service_s + self.link_s

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


class TrackRecord:
    """What attempts with one variant on one target came to. `cold` says what to assume where nothing was measured, at a
    given time; `bytes` is taken to go over the wire both ways."""

    __slots__ = (
        "_bytes",
        "_cold",
        "_kept",
        "_kept_from",
        "_kept_until",
        "_link",
        "_outcomes",
        "_service",
        "_timed_out_at",
        "_waited_s",
        "chosen",
        "passed_over",
    )

    def __init__(self, cold: Callable[[float], Cold], bytes: int = 0) -> None:
        self._cold = cold
        self._service = Window()
        self._link = Window()
        self._bytes = bytes
        self._outcomes = Outcomes()
        self._waited_s = 0.0
        self._timed_out_at = -inf
        self._kept: dict[tuple[int, int, float, float], Estimate] = {}
        self._kept_from = self._kept_until = 0.0
        self.chosen: dict[Habit, int] = {}
        """The number of the latest decision of each sort that put it first."""
        self.passed_over = 0
        """Requests that could have asked it since it was asked last."""

    def observe(self, now: float, *, service_s: float, link_s: float, bytes: int = 0) -> None:
        """An attempt succeeded. If it was slow that shows in its own time: earlier timeouts are forgotten."""
        self._service.add(now, service_s)
        self._link.add(now, link_s)
        if bytes:
            self._bytes = bytes
        self._outcomes.add(now, ok=True)
        self._timed_out_at = -inf
        self._kept.clear()

    def observe_failure(self, now: float) -> None:
        """An attempt failed by the target's fault."""
        self._outcomes.add(now, ok=False)
        self._kept.clear()

    def observe_timeout(self, now: float, waited_s: float) -> None:
        """An attempt was given up after `waited_s`: it would have taken at least that long."""
        self._waited_s = max(waited_s, self._waited_s) if now - self._timed_out_at <= TIMEOUT_MEMORY_S else waited_s
        self._timed_out_at = now
        self._kept.clear()

    def came_back(self) -> None:
        """The target was away and is there again: that it failed while it went is no reason to distrust it now."""
        self._outcomes = Outcomes()
        self._timed_out_at = -inf
        self._kept.clear()

    def link_point(self, now: float) -> tuple[int, float] | None:
        """Bytes and the median of link times, for the target's line; None if nothing was measured lately."""
        if now - self._link.newest > MAX_AGE_S:
            return None
        return self._bytes, self._link.usual()[0]

    def estimate(
        self, now: float, in_flight: int, parallel: int, cost_usd: float = 0.0, accuracy: float = 0.0
    ) -> Estimate:
        """Of an attempt that starts now behind `in_flight` others on `parallel` servers. Not to be changed: it may be
        handed out again."""
        asked = (in_flight, parallel, cost_usd, accuracy)
        if not self._kept or len(self._kept) > MAX_KEPT or not self._kept_from <= now < self._kept_until:
            self._kept.clear()
            ends = self._timed_out_at + TIMEOUT_MEMORY_S
            self._kept_from, self._kept_until = now, min(now + KEEP_S, ends) if now <= ends else now + KEEP_S
        estimate = self._kept.get(asked)
        if estimate is None:
            estimate = self._kept[asked] = self._made(now, in_flight, parallel, cost_usd, accuracy)
        return estimate

    def _made(self, now: float, in_flight: int, parallel: int, cost_usd: float, accuracy: float) -> Estimate:
        ahead = max(0, in_flight - parallel + 1)
        age_s = now - self._service.newest
        measured = age_s <= MAX_AGE_S
        weight = 0.0
        if measured:
            (service_s, late_service_s), (link_s, late_link_s) = self._service.usual(), self._link.usual()
            wait_s = service_s * ahead / parallel
            p50_s = link_s + service_s + wait_s
            slower_s, further_s = late_service_s - service_s, late_link_s - link_s
            p95_s = p50_s + sqrt(further_s**2 + slower_s**2 * (1.0 + ahead / parallel**2))
            count = len(self._service)
            if count < ENOUGH:
                p95_s = max(p95_s, p50_s * SPREAD ** (1.0 - count / ENOUGH))
            weight = 1.0 if age_s <= FRESH_S else 0.5 ** ((age_s - FRESH_S) / HALF_LIFE_S)
        if weight < 1.0:
            cold = self._cold(now)
            cold_wait_s = cold.service_s * ahead / parallel
            cold_s = cold.link_s + cold.service_s + cold_wait_s
            if measured:
                spread = p95_s / p50_s if p50_s > 0 else 1.0
                moved = (cold_s / p50_s) ** (1.0 - weight) if p50_s > 0 else 1.0
                service_s, wait_s, link_s, p50_s = service_s * moved, wait_s * moved, link_s * moved, p50_s * moved
                p95_s = p50_s * spread**weight * SPREAD ** (1.0 - weight)
            else:
                service_s, wait_s, link_s = cold.service_s, cold_wait_s, cold.link_s
                p50_s, p95_s = cold_s, cold_s * SPREAD
        if now - self._timed_out_at <= TIMEOUT_MEMORY_S:
            p95_s = max(p95_s, self._waited_s)
        return Estimate(
            p50_s,
            p95_s,
            measured,
            self._outcomes.mean(now),
            cost_usd,
            self._bytes,
            accuracy,
            service_s,
            wait_s,
            link_s,
            age_s,
        )
