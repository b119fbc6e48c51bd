"""What goes wrong in a simulation, and when.

    cloud-slow      every time of the cloud lane is ten times what it was
    cloud-outage    the link is cut: silence until the daemon notices, then no lane
    mcu-flap        the boards reset every two seconds and are away for half a second; what they were doing is lost
    runtime-dead    the gateway's runtime hangs: silence until the daemon notices, then no runtime

A fault lasts from 30 % to 70 % of the run, or as `NAME@START-END` says, in seconds.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from agent.core.types import Tier

FAULTS = ("cloud-slow", "cloud-outage", "mcu-flap", "runtime-dead")
DEFAULT_SPAN = (0.3, 0.7)
SLOW_FACTOR = 10.0
NOTICE_S = 1.0
"""How long silence lasts before the daemon calls a lane or a runtime gone."""
FLAP_EVERY_S, FLAP_AWAY_S = 2.0, 0.5
_SPELLED = re.compile(r"([a-z-]+)(?:@(\d+(?:\.\d+)?)-(\d+(?:\.\d+)?))?")


@dataclass(frozen=True, slots=True)
class Fault:
    """One of `FAULTS`, from `start_s` to `end_s` of the run."""

    name: str
    start_s: float
    end_s: float


def parse(text: str, seconds: float) -> tuple[Fault, ...]:
    """`cloud-slow,mcu-flap@10-20`. Raises `ValueError` that says what is allowed."""
    found = []
    for part in filter(None, (piece.strip() for piece in text.split(","))):
        match = _SPELLED.fullmatch(part)
        if match is None or match[1] not in FAULTS:
            raise ValueError(f"must be {', '.join(FAULTS)}, each with @START-END if need be, found {part!r}")
        start, end = (share * seconds for share in DEFAULT_SPAN)
        if match[2] is not None:
            start, end = float(match[2]), float(match[3])
        if not start < end:
            raise ValueError(f"{part}: must end after it starts")
        found.append(Fault(match[1], start, end))
    return tuple(found)


class Spells:
    """Spans of time, seconds, that do not overlap."""

    def __init__(self, spans: Iterable[tuple[float, float]]) -> None:
        self._spans = sorted(spans)
        self._starts = [start for start, _ in self._spans]

    def holds(self, now: float) -> bool:
        at = bisect_right(self._starts, now) - 1
        return at >= 0 and now < self._spans[at][1]

    def next_start(self, now: float) -> float:
        """When the next one begins; infinity if none does."""
        at = bisect_right(self._starts, now)
        return self._starts[at] if at < len(self._starts) else float("inf")


class Weather:
    """How one target fares over the run."""

    def __init__(self, gone: Spells, silent: Spells | None = None, slow: Spells | None = None) -> None:
        self._gone, self._silent, self._slow = gone, silent or Spells(()), slow or Spells(())

    @classmethod
    def of(cls, tier: Tier, faults: Sequence[Fault]) -> Weather:
        """What faults do to a tier."""
        gone: list[tuple[float, float]] = []
        silent: list[tuple[float, float]] = []
        slow: list[tuple[float, float]] = []
        for fault in faults:
            span = (fault.start_s, fault.end_s)
            if fault.name == "cloud-slow" and tier.is_cloud:
                slow.append(span)
            elif fault.name == "mcu-flap" and tier is Tier.EDGE_MCU:
                gone += _flaps(*span)
            elif (fault.name == "cloud-outage" and tier.is_cloud) or (
                fault.name == "runtime-dead" and tier is Tier.EDGE_GPU
            ):
                noticed = min(span[0] + NOTICE_S, span[1])
                silent.append((span[0], noticed))
                gone.append((noticed, span[1]))
        return cls(Spells(gone), Spells(silent), Spells(slow))

    def gone(self, now: float) -> bool:
        """It cannot be asked, and the daemon knows."""
        return self._gone.holds(now)

    def silent(self, now: float) -> bool:
        """Nothing comes back, and the daemon does not know yet."""
        return self._silent.holds(now)

    def lost_at(self, now: float) -> float:
        """When what is in flight now will be lost."""
        return min(self._gone.next_start(now), self._silent.next_start(now))

    def factor(self, now: float) -> float:
        """By what every time is multiplied."""
        return SLOW_FACTOR if self._slow.holds(now) else 1.0


def _flaps(start_s: float, end_s: float) -> list[tuple[float, float]]:
    count = int((end_s - start_s) / FLAP_EVERY_S) + 1
    starts = (start_s + number * FLAP_EVERY_S for number in range(count))
    return [(start, min(start + FLAP_AWAY_S, end_s)) for start in starts if start < end_s]
