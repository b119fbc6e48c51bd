"""Messages of a stream, in which the board samples its own sensor (docs/wire-protocol.md, section 3.8). Contract as in
`agent.wire.messages`."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import ClassVar, Final, Self

from agent.wire.body import NoBody, Reader, exactly
from agent.wire.codes import MessageType, SendInputs, known
from agent.wire.messages import MODEL_ID_BYTES

MAX_INTERVAL_MS: Final = 3_600_000


@dataclass(frozen=True, slots=True)
class StreamStart:
    """`threshold`: an output byte, read as i8; the highest one below it is low confidence. `credits`: results that may
    be sent until STREAM_CREDIT grants more."""

    TYPE: ClassVar = MessageType.STREAM_START
    _LAYOUT: ClassVar = struct.Struct("<BBbII")

    source: int
    send_inputs: int
    threshold: int
    interval_ms: int
    credits: int
    model: bytes

    def to_bytes(self) -> bytes:
        head = self._LAYOUT.pack(self.source, self.send_inputs, self.threshold, self.interval_ms, self.credits)
        return head + exactly(self.model, MODEL_ID_BYTES, "model")

    @classmethod
    def from_bytes(cls, body: bytes) -> Self:
        reader = Reader("STREAM_START", body)
        source, send_inputs, threshold, interval_ms, credits = reader.unpack(cls._LAYOUT, "credits")
        model = reader.take(MODEL_ID_BYTES, "model")
        return cls(source, known(SendInputs, send_inputs), threshold, interval_ms, credits, model)


@dataclass(frozen=True, slots=True)
class StreamCredit:
    """Results with a `seq` below `upto` may be sent. Under id 0 it is not answered."""

    TYPE: ClassVar = MessageType.STREAM_CREDIT
    _LAYOUT: ClassVar = struct.Struct("<I")

    upto: int

    def to_bytes(self) -> bytes:
        return self._LAYOUT.pack(self.upto & 0xFFFFFFFF)

    @classmethod
    def from_bytes(cls, body: bytes) -> Self:
        return cls(*Reader("STREAM_CREDIT", body).unpack(cls._LAYOUT, "upto"))


@dataclass(frozen=True, slots=True)
class StreamStop(NoBody):
    TYPE: ClassVar = MessageType.STREAM_STOP


@dataclass(frozen=True, slots=True)
class StreamStatus:
    """`seq`: of the next result. `skipped` as in STREAM_RESULT."""

    TYPE: ClassVar = MessageType.STREAM_STATUS
    _LAYOUT: ClassVar = struct.Struct("<BIII")

    state: int
    seq: int
    skipped: int
    upto: int

    @property
    def streams(self) -> bool:
        return self.state == 1

    def to_bytes(self) -> bytes:
        return self._LAYOUT.pack(self.state, self.seq, self.skipped, self.upto)

    @classmethod
    def from_bytes(cls, body: bytes) -> Self:
        return cls(*Reader("STREAM_STATUS", body).unpack(cls._LAYOUT, "upto"))


@dataclass(frozen=True, slots=True)
class StreamResult:
    """One sample's result. `time_us`: board clock when the sample was taken. `skipped`: samples since the board's reset
    that were due and have no result: taken without credit, or missed while the board was busy. `inputs` may be empty.
    """

    TYPE: ClassVar = MessageType.STREAM_RESULT
    _LAYOUT: ClassVar = struct.Struct("<IIQIH")

    seq: int
    skipped: int
    time_us: int
    compute_us: int
    outputs: bytes
    inputs: bytes

    def to_bytes(self) -> bytes:
        head = self._LAYOUT.pack(self.seq, self.skipped, self.time_us, self.compute_us, len(self.outputs))
        return head + self.outputs + self.inputs

    @classmethod
    def from_bytes(cls, body: bytes) -> Self:
        reader = Reader("STREAM_RESULT", body)
        seq, skipped, time_us, compute_us, length = reader.unpack(cls._LAYOUT, "output_bytes")
        return cls(seq, skipped, time_us, compute_us, reader.take(length, "outputs"), reader.rest())
