"""An asyncio event loop whose time is virtual: when nothing is ready, time jumps to the next timer.

Everything that waits by the loop's timers (`asyncio.sleep`, `asyncio.timeout`, `loop.call_at`) runs as it does in the
daemon, in the same order, without waiting. The same program on the same seed gives the same run: there is no other
source of events. Sockets, threads and processes have no place on such a loop.
"""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Coroutine, Mapping
from typing import Any, TypeVar

T = TypeVar("T")

START_WALL = 1_700_000_000.0
"""Unix time at which a simulation begins."""


class Stuck(RuntimeError):
    """Somebody waits for what no timer and no task will ever bring about."""


class VirtualLoop(asyncio.SelectorEventLoop):
    """Starts at time 0."""

    def __init__(self) -> None:
        self.now = 0.0
        super().__init__(_Jump(self))

    def time(self) -> float:
        return self.now


class VirtualClock:
    """A `Clock` that shows the loop's time."""

    def __init__(self, loop: VirtualLoop) -> None:
        self._loop = loop

    def monotonic(self) -> float:
        return self._loop.now

    def wall(self) -> float:
        return START_WALL + self._loop.now

    def boot(self) -> str:
        return ""


class _Jump(selectors.BaseSelector):
    """Instead of waiting `timeout` for a file, lets that time pass. The loop's own wake-up pipe is all it is given."""

    def __init__(self, loop: VirtualLoop) -> None:
        self._loop = loop
        self._keys: dict[int, selectors.SelectorKey] = {}

    def register(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        fd = fileobj if isinstance(fileobj, int) else fileobj.fileno()
        key = self._keys[fd] = selectors.SelectorKey(fileobj, fd, events, data)
        return key

    def unregister(self, fileobj: Any) -> selectors.SelectorKey:
        return self._keys.pop(fileobj if isinstance(fileobj, int) else fileobj.fileno())

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None:
            raise Stuck("nothing is left that could happen, and the simulation is not over")
        if timeout > 0:
            self._loop.now += timeout
        return []

    def get_map(self) -> Mapping[Any, selectors.SelectorKey]:
        return self._keys


def run_virtual(main: Coroutine[Any, Any, T]) -> T:
    """`asyncio.run` on a virtual loop. Raises `Stuck` when nothing can happen any more before `main` has returned."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(main)
