"""What the daemon's process holds over time, and whether it is flat."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import numpy as np
import psutil

WARM_UP = 0.2
"""Share of a run that is not judged: caches fill, allocators find their size."""
MEMORY_SHARE, MEMORY_MB = 0.03, 4.0
"""Memory may rise by the larger of the two, from the first third of what is judged to its last."""
REFUSED_SHARE = 0.01
"""By so much the share of refusals may rise: who refuses everybody holds little, and is quick."""
P99_RATIO = 1.5
"""p99 of a minute is noisy; a leak that costs time shows as a multiple in an hour."""


@dataclass(frozen=True)
class Sample:
    """One interval. Sizes in MB, times in ms; `children` is the memory of the daemon's own children."""

    at_s: float
    memory_mb: float
    children_mb: float
    descriptors: int
    threads: int
    answered: int
    refused: int
    lost: int
    p50_ms: float
    p99_ms: float
    realtime_p99_ms: float
    state_mb: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def held(process: psutil.Process) -> tuple[float, float, int, int]:
    """Resident memory of the process and of its children in MB, descriptors, threads."""
    with process.oneshot():
        memory, descriptors, threads = process.memory_info().rss, process.num_fds(), process.num_threads()
    children = 0
    for child in process.children(recursive=True):
        try:
            children += child.memory_info().rss
        except psutil.NoSuchProcess:
            continue
    return memory / 1e6, children / 1e6, descriptors, threads


def quantile(values: Sequence[float], share: float) -> float:
    return float(np.quantile(values, share)) if values else float("nan")


def verdict(samples: Sequence[Sample]) -> list[tuple[str, float, float, bool]]:
    """(what, before, after, whether it is flat) between the first and the last third of what is judged: medians, and of
    descriptors and threads the least."""
    judged = samples[int(len(samples) * WARM_UP) :]
    third = max(1, len(judged) // 3)
    first, last = judged[:third], judged[-third:]

    def both(of: Callable[[Sample], float]) -> tuple[float, float]:
        return median(map(of, first)), median(map(of, last))

    lines = []
    for what, of in (("memory, MB", _memory), ("children, MB", _children)):
        before, after = both(of)
        lines.append((what, before, after, after - before <= max(MEMORY_MB, MEMORY_SHARE * before)))
    for what, of in (("descriptors", _descriptors), ("threads", _threads)):
        before, after = min(map(of, first)), min(map(of, last))  # a connection more at this moment is no leak
        lines.append((what, before, after, after <= before))
    before, after = both(lambda sample: sample.p99_ms)
    lines.append(("p99, ms", before, after, after <= P99_RATIO * before))
    before, after = _refused(first), _refused(last)
    lines.append(("refused, %", 100 * before, 100 * after, after - before <= REFUSED_SHARE))
    lost = sum(sample.lost for sample in samples)
    lines.append(("lost requests", 0.0, float(lost), lost == 0))
    return lines


def _refused(samples: Sequence[Sample]) -> float:
    """The share of what was answered at all."""
    return sum(sample.refused for sample in samples) / max(1, sum(sample.answered for sample in samples))


def _memory(sample: Sample) -> float:
    return sample.memory_mb


def _children(sample: Sample) -> float:
    return sample.children_mb


def _descriptors(sample: Sample) -> float:
    return float(sample.descriptors)


def _threads(sample: Sample) -> float:
    return float(sample.threads)


class Ticker:
    """Waits for the next of equal intervals, whatever the work between took."""

    def __init__(self, interval_s: float, clock: Callable[[], float]) -> None:
        self._interval_s = interval_s
        self._clock = clock
        self._due = clock()
        self._never = threading.Event()

    def next(self) -> None:
        self._due += self._interval_s
        self._never.wait(max(0.0, self._due - self._clock()))
