"""Frames of the serial protocol (docs/wire-protocol.md, section 1): bytes <-> frames, without any I/O.

A frame on the line is `COBS(header | payload | CRC-32)` and one zero byte.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import StrEnum
from typing import Final, NamedTuple
from zlib import crc32

from cobs import cobs

FRAGMENT: Final = 1
"""Flag: the payload is one piece of a larger message."""
RETRY: Final = 2
"""Flag: this request was sent before under the same id."""

OVERHEAD: Final = 12
"""Bytes of header and CRC around a payload."""
MIN_MAX_FRAME: Final = 256
"""What both sides take before HELLO, and the least that may be announced."""

_HEADER: Final = struct.Struct("<BBHI")
_CRC: Final = struct.Struct("<I")
_DELIMITER: Final = b"\0"
_RESIDUE: Final = crc32(_CRC.pack(crc32(b"")))
"""The CRC of anything with its own CRC behind it: one pass checks a frame without cutting it."""


def line_bytes(payload: int) -> int:
    """The most that a frame with `payload` bytes takes on the line, delimiter and all."""
    decoded = payload + OVERHEAD
    return decoded + decoded // 254 + 2


class Frame(NamedTuple):
    """One frame. `type` is any byte: a receiver must live with types that it does not know.

    A tuple, because making one takes a third of what a frozen dataclass takes, and frames are made all the time.
    """

    type: int
    flags: int
    seq: int
    id: int
    payload: bytes

    def encode(self) -> bytes:
        """The frame as it travels, with its delimiter."""
        type_, flags, seq, id_, payload = self
        body = _HEADER.pack(type_, flags, seq, id_) + payload
        encoded: bytes = cobs.encode(body + _CRC.pack(crc32(body))) + _DELIMITER
        return encoded


class Fault(StrEnum):
    """Why bytes on the line were not a frame."""

    DECODE = "decode"
    """COBS is broken."""
    SHORT = "short"
    """Fewer than 12 decoded bytes."""
    CRC = "crc"
    OVERSIZE = "oversize"
    """More than `max_frame` decoded bytes; counted once however long it is."""


@dataclass(slots=True)
class FrameCounters:
    """What a decoder has seen since it was made."""

    good: int = 0
    decode: int = 0
    short: int = 0
    crc: int = 0
    oversize: int = 0

    @property
    def bad(self) -> int:
        return self.decode + self.short + self.crc + self.oversize


class FrameDecoder:
    """Bytes in any portions -> frames and faults, in the order in which they ended (an oversize one: was noticed).

    Keeps at most one encoded frame of `max_frame` bytes between calls. A fault loses the bytes up to the next
    delimiter, never more.
    """

    def __init__(self, max_frame: int) -> None:
        if max_frame < MIN_MAX_FRAME:
            raise ValueError(f"max_frame must be at least {MIN_MAX_FRAME}, found {max_frame}")
        self.counters = FrameCounters()
        self._max_frame = max_frame
        # Anything longer, its delimiter not counted, decodes to more than max_frame bytes.
        self._max_encoded = line_bytes(max_frame - OVERHEAD) - 1
        self._partial = bytearray()
        self._skipping = False

    @property
    def buffered(self) -> int:
        """Bytes of an unfinished frame that are kept."""
        return len(self._partial)

    def feed(self, data: bytes) -> list[Frame | Fault]:
        """What `data` completed."""
        found: list[Frame | Fault] = []
        partial = self._partial
        begin = 0
        while (end := data.find(_DELIMITER, begin)) >= 0:
            if self._skipping:
                self._skipping = False
            elif partial:
                partial += data[begin:end]
                found.append(self._decode(bytes(partial)))
                partial.clear()
            elif end > begin:
                found.append(self._decode(data[begin:end]))
            begin = end + 1
        if begin < len(data) and not self._skipping:
            if len(partial) + len(data) - begin <= self._max_encoded:
                partial += data[begin:]
            else:
                partial.clear()
                self._skipping = True
                self.counters.oversize += 1
                found.append(Fault.OVERSIZE)
        return found

    def _decode(self, encoded: bytes) -> Frame | Fault:
        counters = self.counters
        if len(encoded) > self._max_encoded:
            counters.oversize += 1
            return Fault.OVERSIZE
        try:
            raw = cobs.decode(encoded)
        except cobs.DecodeError:
            counters.decode += 1
            return Fault.DECODE
        if len(raw) > self._max_frame:
            counters.oversize += 1
            return Fault.OVERSIZE
        if len(raw) < OVERHEAD:
            counters.short += 1
            return Fault.SHORT
        if crc32(raw) != _RESIDUE:
            counters.crc += 1
            return Fault.CRC
        counters.good += 1
        type_, flags, seq, id_ = _HEADER.unpack_from(raw)
        return Frame(type_, flags, seq, id_, raw[_HEADER.size : -_CRC.size])
