"""What can be done to a board. A driver offers each of these, or None where its board has no such thing."""

from __future__ import annotations

from typing import Protocol


class Serial(Protocol):
    """Where the board's protocol is spoken."""

    @property
    def port(self) -> str:
        """A serial port, or `unix:PATH`."""
        ...

    @property
    def baud(self) -> int: ...

    @property
    def paced(self) -> bool:
        """Whether the line itself limits the rate to `baud`: a UART does, USB and pseudo-terminals do not."""
        ...


class Power(Protocol):
    """Both return when it is done; `on` when the board can be greeted. Raise `RigError`."""

    def on(self) -> None: ...

    def off(self) -> None: ...


class Reset(Protocol):
    def reset(self) -> None:
        """Restart the board from outside, without its help. Raises `RigError`."""
        ...


class Console(Protocol):
    def tail(self) -> str:
        """The end of what the board said besides its protocol."""
        ...


class BoardClock(Protocol):
    """A board's clock, read without the line. Raises `RigError`."""

    def read(self) -> tuple[float, float]:
        """One moment on the board's clock and on this machine's monotonic one, seconds."""
        ...

    def drift(self, ppm: float) -> None:
        """From now on it gains so much."""
        ...


class Driver(Protocol):
    """One board and the way to it. Nothing is started before `power.on()`."""

    @property
    def name(self) -> str: ...

    @property
    def serial(self) -> Serial: ...

    @property
    def power(self) -> Power: ...

    @property
    def reset(self) -> Reset | None: ...

    @property
    def console(self) -> Console | None: ...

    @property
    def clock(self) -> BoardClock | None: ...

    def missing(self) -> str:
        """Why the board cannot be used here; empty when it can."""
        ...


class RigError(Exception):
    """The rig itself could not do something: no fault of the board's firmware."""
