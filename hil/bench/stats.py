"""Samples taken in interleaved blocks, and what is said of them.

The sides of a comparison take turns, A B A B ..., so that a noisy neighbour hits both. A block's figure is its median;
a side's figure is the median of its blocks' medians, which one bad moment of the machine does not move.
"""

from __future__ import annotations

import math
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import TypeAlias, TypeVar

T = TypeVar("T")

BLOCKS = 9
"""Turns of each side: enough for a median that three bad ones do not move."""

Sampler: TypeAlias = Callable[[float], Sequence[float]]
"""Measures for about that many seconds; returns at least one sample."""


def quantile(samples: Sequence[float], share: float) -> float:
    """Nearest rank: the smallest sample that at least `share` of all do not exceed. Raises `ValueError` if empty."""
    if not samples:
        raise ValueError("no samples")
    return sorted(samples)[max(0, math.ceil(share * len(samples)) - 1)]


@dataclass(frozen=True, slots=True)
class Summary:
    """One side of a comparison: medians over its blocks, and how many samples there were in all."""

    count: int
    p50: float
    p95: float

    def scaled(self, factor: float) -> Summary:
        """In another unit."""
        return Summary(self.count, self.p50 * factor, self.p95 * factor)


def summarise(blocks: Sequence[Sequence[float]]) -> Summary:
    """Raises `ValueError` if there is no block, or an empty one."""
    if not blocks:
        raise ValueError("no blocks")
    return Summary(
        count=sum(map(len, blocks)),
        p50=median(quantile(block, 0.5) for block in blocks),
        p95=median(quantile(block, 0.95) for block in blocks),
    )


def alternate(sides: Mapping[str, Sampler], seconds: float, blocks: int = BLOCKS) -> dict[str, Summary]:
    """Let the sides take turns, `blocks` times each, for `seconds` each. Every other round goes backwards, so that no
    side always follows the same other one."""
    taken: dict[str, list[Sequence[float]]] = {name: [] for name in sides}
    order = list(sides)
    for turn in range(blocks):
        for name in order if turn % 2 == 0 else reversed(order):
            taken[name].append(sides[name](seconds / blocks))
    return {name: summarise(side) for name, side in taken.items()}


def timed(call: Callable[[T], object], arguments: Iterator[T]) -> Sampler:
    """Seconds of each call. Taking its argument is not counted; nor is the first call of a block, which brings code and
    data back into the processor's caches."""

    def sample(seconds: float) -> Sequence[float]:
        samples: list[float] = []
        end = time.perf_counter() + seconds
        call(next(arguments))
        while True:
            argument = next(arguments)
            began = time.perf_counter()
            call(argument)
            now = time.perf_counter()
            samples.append(now - began)
            if now >= end:
                return samples

    return sample


async def timed_async(call: Callable[[T], Awaitable[object]], arguments: Iterator[T], seconds: float) -> list[float]:
    """As `timed`, one after the other on the running event loop."""
    samples: list[float] = []
    end = time.perf_counter() + seconds
    await call(next(arguments))
    while True:
        argument = next(arguments)
        began = time.perf_counter()
        await call(argument)
        now = time.perf_counter()
        samples.append(now - began)
        if now >= end:
            return samples
