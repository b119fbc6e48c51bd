"""A board's clock against this machine's, from PING and PONG: pure, and every estimate with its error bound.

One exchange gives the offset to within half of its time on the line (RFC 5905, section 8): an interval that holds it
for certain. The estimate is what those of the last exchanges have in common, each carried on with the drift that two
good ones far apart show. One exchange that was quick on its way there and another that was quick on its way back
thus bound the offset better than either.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from typing import Final

SAMPLES: Final = 32
"""Exchanges kept: with one in 5 s, the drift is taken over a minute or two."""
TOLERANCE: Final = 100e-6
"""Drift that must be reckoned with before it is known: two crystals of 50 ppm each."""
MAX_TOLERANCE: Final = 0.02
"""A board that runs from an RC oscillator."""
WANDER: Final = 5e-6
"""How far a known drift may change, with temperature, while its samples are kept."""
RESOLUTION_S: Final = 1e-6
"""Board stamps are whole microseconds."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """Board clock less ours at one moment, in seconds, within `bound_s` either way."""

    offset_s: float
    bound_s: float


@dataclass(frozen=True, slots=True)
class _Sample:
    at: float
    offset_s: float
    bound_s: float


class ClockSync:
    """`at`, `now`: our monotonic seconds. Nothing is known before the first `note`."""

    def __init__(self) -> None:
        self._samples: deque[_Sample] = deque(maxlen=SAMPLES)
        self._tolerance = TOLERANCE
        self._drift = 0.0
        self._uncertainty = TOLERANCE
        self.steps = 0
        """Exchanges that contradicted all before them: the clock was set, or runs worse than was reckoned with."""

    @property
    def drift(self) -> float:
        """Seconds that the board's clock gains in one of ours; 0 until it is known."""
        return self._drift

    def clear(self) -> None:
        """The board was reset: its clock began anew."""
        self._samples.clear()
        self._drift, self._uncertainty = 0.0, self._tolerance

    def note(self, at: float, offset_s: float, line_s: float) -> None:
        """One exchange: offset as in RFC 5905, and its round trip less the board's own part."""
        sample = _Sample(at, offset_s, max(0.0, line_s) / 2 + RESOLUTION_S)
        known = self.estimate(at)
        if known is not None and abs(known.offset_s - offset_s) > known.bound_s + sample.bound_s:
            self.steps += 1
            self._tolerance = min(4 * self._tolerance, MAX_TOLERANCE)
            self.clear()
        self._samples.append(sample)
        self._learn_drift()

    def estimate(self, now: float) -> Estimate | None:
        """The offset at `now`, also a little before or after the samples. None: nothing is known."""
        best: Estimate | None = None
        least, most = -math.inf, math.inf
        for sample in self._samples:
            passed = now - sample.at
            offset_s = sample.offset_s + self._drift * passed
            bound_s = sample.bound_s + self._uncertainty * abs(passed)
            least, most = max(least, offset_s - bound_s), min(most, offset_s + bound_s)
            if best is None or bound_s <= best.bound_s:
                best = Estimate(offset_s, bound_s)
        if best is None or least > most:  # nothing in common: the drift has changed more than was reckoned with
            return best
        return Estimate((least + most) / 2, (most - least) / 2)

    def our_time(self, board_s: float, now: float) -> tuple[float, float] | None:
        """When the board's clock showed `board_s`, on ours, and within how many seconds. `now` is near it."""
        near = self.estimate(now)
        if near is None:
            return None
        then = self.estimate(board_s - near.offset_s)
        assert then is not None
        return board_s - then.offset_s, then.bound_s

    def _learn_drift(self) -> None:
        """From the best exchange of the older half and that of the newer: each end is known to within its bound."""
        half = len(self._samples) // 2
        if not half:
            return
        samples = list(self._samples)
        old = min(samples[:half], key=lambda sample: sample.bound_s)
        new = min(samples[half:], key=lambda sample: sample.bound_s)
        span = new.at - old.at
        uncertainty = (old.bound_s + new.bound_s) / span + WANDER if span > 0 else self._tolerance
        if uncertainty < self._tolerance:
            self._drift, self._uncertainty = (new.offset_s - old.offset_s) / span, uncertainty
        else:
            self._drift, self._uncertainty = 0.0, self._tolerance
