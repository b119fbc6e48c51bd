"""What a session's calls are made of."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Final, Generic, TypeVar

from agent.core.errors import EdgeAgentError, LinkError
from agent.wire.body import Message
from agent.wire.codes import MessageType
from agent.wire.messages import Error

M = TypeVar("M", bound=Message)


class RemoteError(EdgeAgentError):
    """The MCU answered a request with ERROR. `code` is an `ErrorCode`, or a number that this version does not know."""

    def __init__(self, where: str, error: Error) -> None:
        super().__init__(f"{where}: {error}")
        self.code = error.code
        self.text = error.text


def again(error: LinkError) -> LinkError:
    """One for each who is told: a raised exception collects the traces of all who raise it."""
    return LinkError(str(error), permanent=error.permanent)


@dataclass(frozen=True, slots=True)
class Reply(Generic[M]):
    """An answer. Times are monotonic seconds: of the first sending, and of the arrival of the last byte."""

    message: M
    sent_at: float
    received_at: float
    bytes_sent: int
    bytes_received: int

    @property
    def round_trip_s(self) -> float:
        return self.received_at - self.sent_at


@dataclass(frozen=True, slots=True)
class Pinged:
    """`offset_s`: MCU clock (seconds since its boot) less ours (monotonic), as in NTP. `mcu_s`: the MCU's own part."""

    round_trip_s: float
    offset_s: float
    mcu_s: float


@dataclass(frozen=True, slots=True)
class Incoming:
    """One whole message, not yet parsed. `line_bytes`: what it took on the line, all pieces together."""

    type: int
    id: int
    body: bytes
    line_bytes: int


@dataclass(slots=True)
class Call:
    """One request under way. `settled`: the MCU holds it no longer, as far as anybody can know."""

    id: int
    make: Callable[[], Message]
    deadline: float
    windowed: bool
    repeat: bool
    future: asyncio.Future[Incoming]
    type: MessageType = MessageType.ERROR
    sent_at: float = 0.0
    received_at: float = 0.0
    bytes_sent: int = 0
    repeated: bool = False
    patience_s: float = 0.0
    """How long it waits for its answer until it is sent again."""
    settled: bool = True
    timer: asyncio.TimerHandle | None = None

    def answer(self, message: Incoming, received_at: float) -> None:
        self.settled = True
        if not self.future.done():
            self.received_at = received_at
            self.future.set_result(message)

    def fail(self, error: Exception) -> None:
        self.settled = True
        if not self.future.done():
            self.future.set_exception(error)

    def discard(self) -> None:
        """Nobody waits any more."""
        if self.timer is not None:
            self.timer.cancel()
        if self.future.done() and not self.future.cancelled():
            self.future.exception()  # seen, so that asyncio does not report it


def overtaken(calls: Mapping[int, Call], answered: Call, type_: int) -> list[Call]:
    """Calls that were lost on the line, or whose answers were. `calls` are in the order of their last sending.

    The MCU serves its window in order, so what was sent before a request of the same type that has its answer should
    have one too. The answer to a repeated call says nothing, as it may come from the answer store, nor does ERROR: BUSY
    comes at once.
    """
    if not answered.windowed or answered.repeated or type_ == MessageType.ERROR:
        return []
    before = itertools.takewhile(lambda call: call is not answered, calls.values())
    return [call for call in before if call.type == answered.type and call.repeat and not call.future.done()]


class Typical:
    """Smoothed round trip of each type of request, in seconds."""

    SMOOTHING: Final = 0.125
    """Weight of a new sample (RFC 6298)."""

    def __init__(self) -> None:
        self._smoothed: dict[int, float] = {}

    def note(self, type_: int, took_s: float) -> None:
        before = self._smoothed.get(type_, took_s)
        self._smoothed[type_] = before + self.SMOOTHING * (took_s - before)

    def of(self, type_: int) -> float:
        """0 before the first."""
        return self._smoothed.get(type_, 0.0)


@dataclass(slots=True)
class Counters:
    """What a session has seen since it was opened."""

    frames_sent: int = 0
    frames_received: int = 0
    bytes_sent: int = 0
    bytes_received: int = 0
    lost_frames: int = 0
    """Gaps in the MCU's `seq`."""
    late: int = 0
    """Answers that nobody waited for any more."""
    unknown: int = 0
    """Good frames of a type that this version does not know."""
    malformed: int = 0
    """Good frames whose body made no sense."""
    repeats: int = 0
    cancels: int = 0
    timeouts: int = 0
    resets: int = 0
    """New boot ids after the first."""

    def as_dict(self) -> dict[str, int]:
        return asdict(self)
