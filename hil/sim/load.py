"""Who asks what, and when: sensors of several kinds, and three kinds of arrivals.

The sensors of a kind are independent of each other, so what reaches the gateway is drawn as one stream whose rate is
the sum of theirs, and each arrival is given to a sensor at random: the superposition of Poisson processes is one.

poisson   a constant rate
bursts    a Markov-modulated Poisson process of two states (Fischer and Meier-Hellstern, 1993): quiet, and for
          `BURST_S` on average `BURST_FACTOR` times the mean rate; the mean over both is the constant rate
diurnal   a rate that swings by `SWING` around the mean in a sine; a run is one whole day, however long it takes
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import numpy as np

from agent.core.types import AccuracyMode, LatencyClass

Arrivals = Literal["poisson", "bursts", "diurnal"]
ARRIVALS: tuple[str, ...] = get_args(Arrivals)

BURST_FACTOR = 4.0
BURST_S = 2.0
BURST_SHARE = 0.1
"""Part of the time that is a burst."""
SWING = 0.8


@dataclass(frozen=True, slots=True)
class Kind:
    """What the sensors of one kind ask. `share` is their part of all requests; `deadline_ms` None: the class's own."""

    name: str
    family: str
    latency_class: LatencyClass
    share: float
    deadline_ms: float | None = None
    priority: int = 5
    accuracy: AccuracyMode = AccuracyMode.ADAPTIVE
    allowed_regions: frozenset[str] = frozenset()
    variant: str | None = None
    max_retries: int = 5
    use_cache: bool = False


STANDARD: tuple[Kind, ...] = (
    Kind("meter", "digits", LatencyClass.REALTIME, 0.35),
    Kind("watch", "motion", LatencyClass.NEAR, 0.25),
    Kind("panel", "digits", LatencyClass.NEAR, 0.15),
    Kind("kiosk", "digits", LatencyClass.INTERACTIVE, 0.15),
    Kind("archive", "digits", LatencyClass.BATCH, 0.10, deadline_ms=2000, priority=3),
)
"""The standard mix: both shipped families, every class."""


class Ask(NamedTuple):
    """One request: of which sensor, when (seconds since the start), about which held-out sample."""

    number: int
    at_s: float
    kind: Kind
    sensor: int
    sample: int


@dataclass(frozen=True, slots=True)
class Load:
    """`sensors` together ask `sensors * rate_hz` times a second on average, for `seconds`."""

    sensors: int
    rate_hz: float
    seconds: float
    arrivals: Arrivals = "poisson"
    kinds: Sequence[Kind] = STANDARD

    def asks(self, samples: dict[str, int], rng: np.random.Generator) -> list[Ask]:
        """All requests in order. `samples`: how many held-out samples each family has; they are drawn at random."""
        shares = np.array([kind.share for kind in self.kinds])
        chosen = np.cumsum(shares / shares.sum())
        asks = []
        for number, at_s in enumerate(self._times(rng)):
            kind = self.kinds[min(int(np.searchsorted(chosen, rng.random())), len(self.kinds) - 1)]
            sensor = int(rng.integers(self.sensors))
            asks.append(Ask(number, at_s, kind, sensor, int(rng.integers(samples[kind.family]))))
        return asks

    def _times(self, rng: np.random.Generator) -> Iterator[float]:
        """By thinning (Lewis and Shedler, 1979): candidates at the highest rate, kept in proportion to the rate."""
        mean = self.sensors * self.rate_hz
        rate, highest = self._rate(mean, rng)
        at_s = rng.exponential(1.0 / highest)
        while at_s < self.seconds:
            if rng.random() * highest <= rate(at_s):
                yield float(at_s)
            at_s += rng.exponential(1.0 / highest)

    def _rate(self, mean: float, rng: np.random.Generator) -> tuple[Callable[[float], float], float]:
        """Requests per second at a moment, and the highest it gets."""
        if self.arrivals == "diurnal":
            return (lambda at: mean * (1.0 - SWING * math.cos(2 * math.pi * at / self.seconds))), mean * (1 + SWING)
        if self.arrivals == "bursts":
            quiet = mean * (1.0 - BURST_SHARE * BURST_FACTOR) / (1.0 - BURST_SHARE)
            return Bursts(quiet, mean * BURST_FACTOR, rng), mean * BURST_FACTOR
        return (lambda _: mean), mean


class Bursts:
    """The two states, walked through as time goes on: `at` never goes back."""

    def __init__(self, quiet: float, burst: float, rng: np.random.Generator) -> None:
        self._rates = (quiet, burst)
        self._lasting = (BURST_S * (1.0 - BURST_SHARE) / BURST_SHARE, BURST_S)
        self._rng = rng
        self._state = 0
        self._until = rng.exponential(self._lasting[0])

    def __call__(self, at_s: float) -> float:
        while at_s >= self._until:
            self._state = 1 - self._state
            self._until += self._rng.exponential(self._lasting[self._state])
        return self._rates[self._state]
