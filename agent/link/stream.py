"""One stream of one session: results in the order of their samples, as fast as they are taken off, and no more of them
under way than was granted."""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass
from typing import Final

from agent.core.clock import Clock
from agent.core.errors import LinkError, ProtocolError
from agent.link.calls import Incoming, RemoteError, again
from agent.link.session import Session
from agent.wire.codes import MessageType, SendInputs
from agent.wire.messages import Error
from agent.wire.stream import StreamCredit, StreamResult, StreamStart, StreamStatus, StreamStop

DEFAULT_CREDITS: Final = 16
"""Results under way or waiting here: what a board of 100 samples a second has after a pause of 160 ms."""
ASK_AFTER_S: Final = 1.0
"""Silence, beyond three intervals, after which the board is asked: the last grant may have been lost."""
ANSWER_S: Final = 1.0


@dataclass(frozen=True, slots=True)
class StreamSpec:
    """What the board is to do. `threshold`: on the highest output byte, read as i8."""

    model: bytes
    interval_ms: int
    source: int = 0
    send_inputs: SendInputs = SendInputs.NEVER
    threshold: int = -128
    credits: int = DEFAULT_CREDITS


@dataclass(frozen=True, slots=True)
class Sampled:
    """One result. Times are our monotonic seconds; `taken_at` is None while the board's clock is not known."""

    result: StreamResult
    received_at: float
    taken_at: float | None
    bound_s: float


@dataclass(slots=True)
class StreamCounters:
    results: int = 0
    lost: int = 0
    """Results that the line lost."""
    skipped: int = 0
    """Samples without a result: the board had no credit for them, or no time."""
    over_credit: int = 0
    """Results that the board sent without having been granted them."""


class BoardStream:
    """Used once: `start`, then `next` until it raises, or `stop`."""

    def __init__(self, session: Session, spec: StreamSpec, clock: Clock) -> None:
        self.counters = StreamCounters()
        self._session, self._spec, self._clock = session, spec, clock
        self._waiting: deque[tuple[StreamResult, float]] = deque()
        self._arrived = asyncio.Event()
        self._error: Exception | None = None
        self._expected = 0
        """`seq` of the next result."""
        self._skipped: int | None = None
        self._granted = 0

    async def start(self, deadline: float) -> None:
        """Raises as `Session.request`."""
        spec = self._spec
        message = StreamStart(spec.source, spec.send_inputs, spec.threshold, spec.interval_ms, spec.credits, spec.model)
        reply = await self._session.request(message, StreamStatus, deadline, windowed=False, listener=self._hear)
        self._adopt(reply.message)

    async def next(self) -> Sampled:
        """The next result. Raises `LinkError` (line lost, board reset), `RemoteError` (the board ended the stream, or
        does not know of it any more), `ProtocolError`."""
        silence_s = ASK_AFTER_S + 3 * self._spec.interval_ms / 1e3
        while not self._waiting:
            if self._error is not None:
                raise self._error
            self._arrived.clear()
            try:
                async with asyncio.timeout(silence_s):
                    await self._arrived.wait()
            except TimeoutError:
                await self._ask()
        result, received_at = self._waiting.popleft()
        self._grant()
        when = self._session.clock_sync.our_time(result.time_us / 1e6, received_at)
        taken_at, bound_s = when if when is not None else (None, 0.0)
        return Sampled(result, received_at, taken_at, bound_s)

    def close(self) -> None:
        """Hear nothing more; the board goes on as long as it has credit."""
        self._session.forget_listener(self._hear)

    async def stop(self, deadline: float) -> None:
        """End it on the board. Raises as `Session.request`."""
        self.close()
        await self._session.request(StreamStop(), StreamStatus, deadline, windowed=False)

    def _hear(self, message: Incoming | LinkError, received_at: float) -> None:
        """Called by the session with each message under the stream's id, and with the error that ends it."""
        try:
            if isinstance(message, LinkError):
                self._error = again(message)
            elif message.type == MessageType.STREAM_RESULT:
                self._take(StreamResult.from_bytes(message.body), received_at)
            elif message.type == MessageType.ERROR:
                self._error = RemoteError("stream", Error.from_bytes(message.body))
        except ProtocolError as error:
            self._error = error
        self._arrived.set()

    def _take(self, result: StreamResult, received_at: float) -> None:
        if self._skipped is None:  # the answer to STREAM_START was lost: this stream begins with this result
            self._expected, self._skipped = result.seq, result.skipped
        lost = (result.seq - self._expected) & 0xFFFFFFFF
        if lost >= 0x80000000:
            return  # of an earlier start
        self._note(lost, result.seq + 1, result.skipped)
        if len(self._waiting) >= self._spec.credits:
            self.counters.over_credit += 1
            return
        self.counters.results += 1
        self._waiting.append((result, received_at))

    def _note(self, lost: int, expected: int, skipped: int) -> None:
        self.counters.lost += lost
        self.counters.skipped += (skipped - (self._skipped or 0)) & 0xFFFFFFFF
        self._expected, self._skipped = expected & 0xFFFFFFFF, skipped

    def _adopt(self, status: StreamStatus) -> None:
        if self._skipped is None:
            self._expected, self._skipped = status.seq, status.skipped
        self._granted = status.upto

    def _grant(self) -> None:
        """Once half of the credit is used up: a grant for each result would be as many frames again."""
        upto = (self._expected + self._spec.credits - len(self._waiting)) & 0xFFFFFFFF
        if (upto - self._granted) & 0xFFFFFFFF in range((self._spec.credits + 1) // 2, 0x80000000):
            self._granted = upto
            self._session.tell(StreamCredit(upto))

    async def _ask(self) -> None:
        """Nothing came for long: learn where the board is, and grant anew what the line lost."""
        credit = StreamCredit(self._expected + self._spec.credits)
        deadline = self._clock.monotonic() + ANSWER_S
        try:
            reply = await self._session.request(credit, StreamStatus, deadline, windowed=False, repeat=False)
        except TimeoutError:
            return  # whether the board is gone is for its owner's PINGs to find out
        status = reply.message
        if not status.streams:
            await self._session.refresh(deadline)  # it may have been reset, with a HELLO that the line lost
            raise LinkError("the board's stream has ended: it was stopped, or its end was not heard")
        lost = (status.seq - self._expected) & 0xFFFFFFFF
        if not self._waiting and lost < 0x80000000:
            self._note(lost, status.seq, status.skipped)
        self._granted = status.upto
        self._grant()
