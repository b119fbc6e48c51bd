"""Messages larger than a frame (docs/wire-protocol.md, section 2), without any I/O."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Self

from agent.core.errors import ProtocolError
from agent.wire.body import Reader
from agent.wire.frame import FRAGMENT, OVERHEAD, Frame


@dataclass(frozen=True, slots=True)
class Fragment:
    """Payload of a frame with the FRAGMENT flag. `total` and `offset` are bytes of the whole body."""

    _LAYOUT: ClassVar = struct.Struct("<II")

    total: int
    offset: int
    data: bytes

    def to_bytes(self) -> bytes:
        return self._LAYOUT.pack(self.total, self.offset) + self.data

    @classmethod
    def from_bytes(cls, body: bytes) -> Self:
        """Raises `ProtocolError` if the piece is cut short or reaches beyond the whole."""
        reader = Reader("fragment", body)
        total, offset = reader.unpack(cls._LAYOUT, "offset")
        data = reader.rest()
        if offset + len(data) > total:
            raise ProtocolError(f"fragment at {offset} of {len(data)} bytes reaches beyond its message of {total}")
        return cls(total, offset, data)


FRAGMENT_OVERHEAD = 8
"""Bytes of `total` and `offset` in front of a piece's data."""


def split(body: bytes, max_frame: int) -> Iterator[tuple[int, bytes]]:
    """`(flags, payload)` of each frame that a body needs, in order, for a peer that takes `max_frame` decoded bytes."""
    room = max_frame - OVERHEAD
    if len(body) <= room:
        yield 0, body
        return
    step = room - FRAGMENT_OVERHEAD
    for offset in range(0, len(body), step):
        yield FRAGMENT, Fragment(len(body), offset, body[offset : offset + step]).to_bytes()


class Reassembler:
    """Puts one message at a time together again. Keeps at most `max_message` bytes."""

    def __init__(self, max_message: int) -> None:
        self._max_message = max_message
        self._key: tuple[int, int] | None = None
        self._total = 0
        self._body = bytearray()

    @property
    def buffered(self) -> int:
        return len(self._body)

    def add(self, frame: Frame) -> bytes | None:
        """The whole body when `frame` completes it.

        Raises `ProtocolError` if the piece does not continue what came before, or the message is too large. The
        partial message is then dropped.
        """
        key = (frame.type, frame.id)
        try:
            piece = Fragment.from_bytes(frame.payload)
            if piece.total > self._max_message:
                raise ProtocolError(f"message of {piece.total} bytes; at most {self._max_message} are taken")
            if piece.offset == 0:
                self._key, self._total, self._body = key, piece.total, bytearray()
            elif key != self._key or piece.total != self._total or piece.offset != len(self._body):
                raise ProtocolError(f"fragment at {piece.offset} does not continue {len(self._body)} received bytes")
        except ProtocolError:
            self.clear()
            raise
        self._body += piece.data
        if len(self._body) < self._total:
            return None
        body = bytes(self._body)
        self.clear()
        return body

    def clear(self) -> None:
        """Drop what is there of a message."""
        self._key, self._total, self._body = None, 0, bytearray()
