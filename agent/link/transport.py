"""The seam below a session: anything that carries bytes both ways. A serial port, a test's pipe."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from agent.core.errors import LinkError


class Transport(Protocol):
    """One opened line, used once. All methods are called on the event loop."""

    @property
    def name(self) -> str:
        """For messages: the port's path."""
        ...

    def start(self, on_data: Callable[[bytes], None], on_lost: Callable[[LinkError], None]) -> None:
        """Begin to deliver. `on_lost` is called at most once, and nothing is delivered after it."""
        ...

    def write(self, data: bytes) -> bool:
        """Send all of `data`, now or when the line has room. False: the bounded buffer is full, nothing was taken."""
        ...

    def close(self) -> None:
        """Release the line; `on_lost` is not called. May be called twice."""
        ...
