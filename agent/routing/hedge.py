"""A second target asked while the first one is late, where there is no time to ask one after the other.

Dean and Barroso, *The Tail at Scale* (2013): the second begins when the first has taken longer than its 95th
percentile, so about one request in twenty is asked twice. The first answer counts; so does what the other one cost.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeAlias

from agent.core.types import Attempt, TargetAnswer
from agent.registry.catalog import Variant
from agent.routing.attempt import Asking, TargetState, attempted

_Try: TypeAlias = asyncio.Task[tuple[TargetAnswer | None, Attempt]]

CANCELLED = "cancelled"
"""Outcome of an attempt that was given up because the other one answered."""


class Side(NamedTuple):
    """One of the two: whom to ask for what, to end by `until` (monotonic seconds)."""

    state: TargetState
    variant: Variant
    until: float


class Raced(NamedTuple):
    """What came of it: the answer, if there is one, by which side; an attempt for each side that was asked."""

    answer: TargetAnswer | None
    by: Side
    attempts: tuple[Attempt, ...]


async def race(asking: Asking, first: Side, second: Side, after_s: float, still: Callable[[], bool]) -> Raced:
    """Ask `first`; if it has not come to anything after `after_s`, and `still` says that it may be, ask `second` too.

    Returns with the first answer, or when both have failed. When this returns or raises, neither runs any more.
    """
    sides, tasks, starts = [first], [_begin(asking, first, hedge=False)], [asking.clock.monotonic()]
    try:
        await asyncio.wait(tasks, timeout=after_s)
        if not tasks[0].done() and still():
            sides.append(second)
            starts.append(asking.clock.monotonic())
            tasks.append(_begin(asking, second, hedge=True))
        running = set(tasks)
        while running and not any(map(_answered, tasks)):
            _, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
    finally:
        await _end(tasks)
    now = asking.clock.monotonic()
    answer, by = None, sides[-1]
    attempts = []
    for side, task, started in zip(sides, tasks, starts, strict=True):
        if task.cancelled():
            outcome = attempted(side.state, side.variant, CANCELLED, now - started, hedge=side is second)
        else:
            found, outcome = task.result()
            if found is not None and answer is None:
                answer, by = found, side
        attempts.append(outcome)
    return Raced(answer, by, tuple(attempts))


def _begin(asking: Asking, side: Side, *, hedge: bool) -> _Try:
    """A task begins later than it is made: its place is taken at once, or whoever decides meanwhile takes it too."""
    state, held = side.state, [True]
    state.in_flight += 1

    def release() -> None:
        if held:
            held.pop()
            state.in_flight -= 1

    async def attempt() -> tuple[TargetAnswer | None, Attempt]:
        release()
        return await asking.attempt(state, side.variant, side.until, hedge=hedge)

    def ended(_: _Try) -> None:
        release()  # it was cancelled before it began
        if state.on_free is not None:
            state.on_free()  # whoever saw the place taken waits for it, also where nothing was asked

    task = asyncio.create_task(attempt())
    task.add_done_callback(ended)
    return task


def _answered(task: _Try) -> bool:
    return task.done() and not task.cancelled() and task.result()[0] is not None


async def _end(tasks: Sequence[_Try]) -> None:
    """Cancel what still runs, and wait until it has put its own things in order."""
    running = [task for task in tasks if task.cancel()]
    if running:
        await asyncio.wait(running)
