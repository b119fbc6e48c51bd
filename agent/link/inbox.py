"""The receiving half of a session without its I/O: bytes in any portions -> whole messages, everything else counted."""

from __future__ import annotations

from typing import Final

from agent.core.errors import ProtocolError
from agent.link.calls import Counters, Incoming
from agent.wire.codes import MessageType
from agent.wire.fragments import Reassembler
from agent.wire.frame import FRAGMENT, Frame, FrameDecoder, line_bytes

MAX_FRAME: Final = 4096
"""What the gateway announces: any board's answer in one frame, and a page of buffer."""
MAX_MESSAGE: Final = 1 << 20
"""The largest reassembled answer that is taken: far above any output of a model that fits a microcontroller."""


class Inbox:
    """Decodes, joins fragments, and counts gaps in the MCU's `seq`."""

    def __init__(self, counters: Counters) -> None:
        self._counters = counters
        self._decoder = FrameDecoder(MAX_FRAME)
        self._reassembler = Reassembler(MAX_MESSAGE)
        self._expected_seq: int | None = None
        self._pieces_bytes = 0

    @property
    def buffered(self) -> int:
        """Bytes that are kept of unfinished frames and messages."""
        return self._decoder.buffered + self._reassembler.buffered

    def faults(self) -> dict[str, int]:
        """Bytes that were no frames, by kind."""
        faults = self._decoder.counters
        return {"bad_crc": faults.crc, "undecodable": faults.decode + faults.short, "oversize": faults.oversize}

    def silence(self) -> str:
        """Why nobody has answered, as far as what came tells."""
        damaged = sum(self.faults().values())
        if damaged and not self._counters.frames_received:
            return f"no HELLO, only {damaged} damaged frames: is the baud rate right?"
        return "no HELLO: is there a microcontroller with our firmware?"

    def clear(self) -> None:
        """Forget a partial message: its sender was reset."""
        self._reassembler.clear()

    def feed(self, data: bytes) -> list[Incoming]:
        """What `data` completed."""
        self._counters.bytes_received += len(data)
        messages = []
        for frame in self._decoder.feed(data):
            if not isinstance(frame, Frame):
                continue
            self._count(frame)
            if not frame.flags & FRAGMENT:
                messages.append(Incoming(frame.type, frame.id, frame.payload, line_bytes(len(frame.payload))))
            elif (joined := self._join(frame)) is not None:
                messages.append(joined)
        return messages

    def _count(self, frame: Frame) -> None:
        self._counters.frames_received += 1
        booted = frame.type == MessageType.HELLO and frame.id == 0
        if self._expected_seq is not None and not booted:
            self._counters.lost_frames += (frame.seq - self._expected_seq) & 0xFFFF
        self._expected_seq = (frame.seq + 1) & 0xFFFF

    def _join(self, frame: Frame) -> Incoming | None:
        if not self._reassembler.buffered:
            self._pieces_bytes = 0
        self._pieces_bytes += line_bytes(len(frame.payload))
        try:
            body = self._reassembler.add(frame)
        except ProtocolError:
            self._counters.malformed += 1
            return None
        return None if body is None else Incoming(frame.type, frame.id, body, self._pieces_bytes)
