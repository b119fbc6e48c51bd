"""Messages of the serial protocol (docs/wire-protocol.md, section 3): bodies <-> frozen dataclasses. Those of a model
update are in `agent.wire.update`.

`from_bytes` ignores bytes behind the last field that it knows, and raises `ProtocolError` and nothing else when a body
is too short or contradicts itself. `to_bytes` raises `struct.error` on a field that is out of its range: that is a
defect of the caller.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Final, Self

from agent.core.errors import ProtocolError
from agent.wire.body import SHA256_BYTES, NoBody, Reader, exactly, str8, text_of
from agent.wire.codes import (
    TRIAL_MINOR,
    Capability,
    ErrorCode,
    LogLevel,
    MessageType,
    ResetCause,
    Rollback,
    SlotState,
    StatId,
    known,
    name_of,
)
from agent.wire.frame import MIN_MAX_FRAME

MODEL_ID_BYTES: Final = 8
"""How much of a model's SHA-256 names it in INFER and RESULT."""


@dataclass(frozen=True, slots=True)
class HelloReq:
    TYPE: ClassVar = MessageType.HELLO_REQ
    _LAYOUT: ClassVar = struct.Struct("<BBH")

    major: int
    minor: int
    max_frame: int

    def to_bytes(self) -> bytes:
        return self._LAYOUT.pack(self.major, self.minor, self.max_frame)

    @classmethod
    def from_bytes(cls, body: bytes) -> Self:
        return cls(*Reader("HELLO_REQ", body).unpack(cls._LAYOUT, "max_frame"))


@dataclass(frozen=True, slots=True)
class Slot:
    """One of the MCU's model slots, as HELLO shows it. Sizes are bytes."""

    _HEAD: ClassVar = struct.Struct("<BBI")
    _TAIL: ClassVar = struct.Struct("<IIII")

    index: int
    state: int
    length: int
    sha256: bytes
    counter: int
    input_bytes: int
    output_bytes: int
    arena_used: int

    @property
    def runs(self) -> bool:
        """Whether this is the model that INFER runs."""
        return self.state in (SlotState.ACTIVE, SlotState.TRIAL)

    def to_bytes(self) -> bytes:
        return (
            self._HEAD.pack(self.index, self.state, self.length)
            + exactly(self.sha256, SHA256_BYTES, "sha256")
            + self._TAIL.pack(self.counter, self.input_bytes, self.output_bytes, self.arena_used)
        )

    @classmethod
    def read(cls, reader: Reader) -> Self:
        index, state, length = reader.unpack(cls._HEAD, "slots")
        sha256 = reader.take(SHA256_BYTES, "slots")
        return cls(index, known(SlotState, state), length, sha256, *reader.unpack(cls._TAIL, "slots"))


@dataclass(frozen=True, slots=True)
class Hello:
    """What the MCU is, has and holds. Sizes are bytes.

    `rollback`: why its last trial was taken back. `trial_s`: how long a trial may last there, in seconds; 0 where a new
    model is active at once (minor version 0).
    """

    TYPE: ClassVar = MessageType.HELLO
    _LAYOUT: ClassVar = struct.Struct("<BBHIBBQIIIQ")
    _TRIAL: ClassVar = struct.Struct("<BH")

    major: int
    minor: int
    max_frame: int
    max_message: int
    window: int
    reset_cause: int
    boot_id: int
    capabilities: Capability
    arena: int
    slot_size: int
    uid: int
    board: str
    build: str
    engine: str
    operators: tuple[int, ...]
    slots: tuple[Slot, ...]
    rollback: int = Rollback.NONE
    trial_s: int = 0

    @property
    def active(self) -> Slot | None:
        """The slot whose model INFER runs."""
        return next((slot for slot in self.slots if slot.runs), None)

    @property
    def trial(self) -> Slot | None:
        """The same, if it was not confirmed yet."""
        return next((slot for slot in self.slots if slot.state == SlotState.TRIAL), None)

    def to_bytes(self) -> bytes:
        head = self._LAYOUT.pack(
            self.major,
            self.minor,
            self.max_frame,
            self.max_message,
            self.window,
            self.reset_cause,
            self.boot_id,
            self.capabilities,
            self.arena,
            self.slot_size,
            self.uid,
        )
        texts = str8(self.board) + str8(self.build) + str8(self.engine)
        operators = bytes([len(self.operators), *self.operators])
        slots = bytes([len(self.slots)]) + b"".join(slot.to_bytes() for slot in self.slots)
        trial = self._TRIAL.pack(self.rollback, self.trial_s) if self.minor >= TRIAL_MINOR else b""
        return head + texts + operators + slots + trial

    @classmethod
    def from_bytes(cls, body: bytes) -> Self:
        """Also refuses what the page rules out: a `max_frame` under 256, a window of 0, two models active at once."""
        reader = Reader("HELLO", body)
        major, minor, max_frame, max_message, window, cause, boot_id, capabilities, arena, slot_size, uid = (
            reader.unpack(cls._LAYOUT, "uid")
        )
        board, build, engine = reader.text8("board"), reader.text8("build"), reader.text8("engine")
        operators = tuple(reader.take(reader.u8("operators"), "operators"))
        slots = tuple(Slot.read(reader) for _ in range(reader.u8("slots")))
        rollback, trial_s = (0, 0) if reader.ended else reader.unpack(cls._TRIAL, "trial_s")
        if max_frame < MIN_MAX_FRAME or window < 1:
            raise ProtocolError(
                f"HELLO announces max_frame {max_frame} and window {window}; the least are {MIN_MAX_FRAME} and 1"
            )
        if sum(slot.runs for slot in slots) > 1:
            raise ProtocolError("HELLO shows more than one active slot")
        return cls(
            major,
            minor,
            max_frame,
            max_message,
            window,
            known(ResetCause, cause),
            boot_id,
            Capability(capabilities),
            arena,
            slot_size,
            uid,
            board,
            build,
            engine,
            operators,
            slots,
            known(Rollback, rollback),
            trial_s,
        )


@dataclass(frozen=True, slots=True)
class Ping:
    TYPE: ClassVar = MessageType.PING

    data: bytes = b""

    def to_bytes(self) -> bytes:
        return self.data

    @classmethod
    def from_bytes(cls, body: bytes) -> Self:
        return cls(body)


@dataclass(frozen=True, slots=True)
class Pong:
    """`t_rx` and `t_tx`: MCU microseconds since boot when the PING was received and the PONG sent."""

    TYPE: ClassVar = MessageType.PONG
    _LAYOUT: ClassVar = struct.Struct("<QQ")

    t_rx: int
    t_tx: int
    data: bytes

    def to_bytes(self) -> bytes:
        return self._LAYOUT.pack(self.t_rx, self.t_tx) + self.data

    @classmethod
    def from_bytes(cls, body: bytes) -> Self:
        reader = Reader("PONG", body)
        t_rx, t_tx = reader.unpack(cls._LAYOUT, "t_tx")
        return cls(t_rx, t_tx, reader.rest())


@dataclass(frozen=True, slots=True)
class Infer:
    """`model`: first 8 bytes of the SHA-256 of the model meant. `budget_ms` 0: no deadline."""

    TYPE: ClassVar = MessageType.INFER
    _LAYOUT: ClassVar = struct.Struct("<I")

    model: bytes
    budget_ms: int
    inputs: bytes

    def to_bytes(self) -> bytes:
        return exactly(self.model, MODEL_ID_BYTES, "model") + self._LAYOUT.pack(self.budget_ms) + self.inputs

    @classmethod
    def from_bytes(cls, body: bytes) -> Self:
        reader = Reader("INFER", body)
        model = reader.take(MODEL_ID_BYTES, "model")
        (budget_ms,) = reader.unpack(cls._LAYOUT, "budget_ms")
        return cls(model, budget_ms, reader.rest())


@dataclass(frozen=True, slots=True)
class Result:
    """`queue_us` and `compute_us`: waiting and running time at the MCU, microseconds."""

    TYPE: ClassVar = MessageType.RESULT
    _LAYOUT: ClassVar = struct.Struct("<II")

    model: bytes
    queue_us: int
    compute_us: int
    outputs: bytes

    def to_bytes(self) -> bytes:
        times = self._LAYOUT.pack(self.queue_us, self.compute_us)
        return exactly(self.model, MODEL_ID_BYTES, "model") + times + self.outputs

    @classmethod
    def from_bytes(cls, body: bytes) -> Self:
        reader = Reader("RESULT", body)
        model = reader.take(MODEL_ID_BYTES, "model")
        queue_us, compute_us = reader.unpack(cls._LAYOUT, "compute_us")
        return cls(model, queue_us, compute_us, reader.rest())


@dataclass(frozen=True, slots=True)
class Cancel(NoBody):
    """Travels under the id of the request that is no longer wanted."""

    TYPE: ClassVar = MessageType.CANCEL


@dataclass(frozen=True, slots=True)
class Reset(NoBody):
    TYPE: ClassVar = MessageType.RESET


@dataclass(frozen=True, slots=True)
class StatsReq(NoBody):
    TYPE: ClassVar = MessageType.STATS_REQ


@dataclass(frozen=True, slots=True)
class Stats:
    """Pairs of id and value; ids that this version does not know are kept as numbers."""

    TYPE: ClassVar = MessageType.STATS
    _LAYOUT: ClassVar = struct.Struct("<BQ")

    values: tuple[tuple[int, int], ...]

    def by_name(self) -> Mapping[str, int]:
        """`{"uptime_us": 123, ...}`, without unknown ids."""
        return {id_.name.lower(): value for id_, value in self.values if isinstance(id_, StatId)}

    def to_bytes(self) -> bytes:
        return bytes([len(self.values)]) + b"".join(self._LAYOUT.pack(*pair) for pair in self.values)

    @classmethod
    def from_bytes(cls, body: bytes) -> Self:
        reader = Reader("STATS", body)
        count = reader.u8("count")
        pairs = cls._LAYOUT.iter_unpack(reader.take(count * cls._LAYOUT.size, "values"))
        return cls(tuple((known(StatId, id_), value) for id_, value in pairs))


@dataclass(frozen=True, slots=True)
class Log:
    TYPE: ClassVar = MessageType.LOG

    level: int
    text: str

    def to_bytes(self) -> bytes:
        return bytes([self.level]) + self.text.encode()

    @classmethod
    def from_bytes(cls, body: bytes) -> Self:
        reader = Reader("LOG", body)
        return cls(known(LogLevel, reader.u8("level")), text_of(reader.rest()))


@dataclass(frozen=True, slots=True)
class Error:
    """The MCU's refusal of a request; `text` is for people and may be empty."""

    TYPE: ClassVar = MessageType.ERROR
    _LAYOUT: ClassVar = struct.Struct("<H")

    code: int
    text: str

    def __str__(self) -> str:
        return f"{name_of(self.code)}: {self.text}" if self.text else name_of(self.code)

    def to_bytes(self) -> bytes:
        return self._LAYOUT.pack(self.code) + self.text.encode()

    @classmethod
    def from_bytes(cls, body: bytes) -> Self:
        reader = Reader("ERROR", body)
        (code,) = reader.unpack(cls._LAYOUT, "code")
        return cls(known(ErrorCode, code), text_of(reader.rest()))
