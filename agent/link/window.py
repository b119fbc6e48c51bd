"""How many requests may be open at once, where the limit may change and a wait may be cancelled."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable


class Window:
    """First come, first served. Whoever entered leaves exactly once; a cancelled wait never holds a place."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._used = 0
        self._waiting: deque[asyncio.Future[None]] = deque()

    @property
    def used(self) -> int:
        return self._used

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    def resize(self, limit: int) -> None:
        """A lower limit is reached as places are left."""
        self._limit = limit
        self._wake()

    def try_enter(self) -> bool:
        if self._used >= self._limit or self._waiting:
            return False
        self._used += 1
        return True

    async def enter(self) -> None:
        """Wait for a place. Raises what `fail` was given."""
        if self.try_enter():
            return
        turn = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled() and turn.exception() is None:
                self.leave()
            raise
        finally:
            if turn in self._waiting:
                self._waiting.remove(turn)

    def leave(self) -> None:
        self._used -= 1
        self._wake()

    def fail(self, make: Callable[[], Exception]) -> None:
        """Send everyone who waits away, each with an error of its own."""
        while self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_exception(make())

    def _wake(self) -> None:
        while self._waiting and self._used < self._limit:
            turn = self._waiting.popleft()
            if not turn.done():
                self._used += 1
                turn.set_result(None)
