"""Messages of a model update (docs/wire-protocol.md, section 3.6). Same contract as `agent.wire.messages`."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar, Final, Self

from agent.core.errors import ProtocolError
from agent.wire.body import SHA256_BYTES, NoBody, Reader, exactly, text_of
from agent.wire.codes import MessageType, SignatureKind, SlotState, known

MANIFEST_FORMAT: Final = 2
MANIFEST_FORMAT_MINOR_0: Final = 1
"""Without `board` and `operators`: what boards of minor version 0 take."""
ALLOW_LOWER_COUNTER: Final = 1
"""MODEL_BEGIN flag."""
COMMIT_TRIAL: Final = 1
"""MODEL_COMMIT flag: the model is to be in trial until MODEL_CONFIRM."""
CHUNK_OVERHEAD: Final = 4
"""Bytes of a MODEL_CHUNK body before its data."""
CHUNK_UNIT: Final = 16
"""Chunks are a multiple of this, so that no two share a flash word."""
BITMAP_BYTES: Final = 32
SIGNATURE_BYTES: Final = 64
BOARD_BYTES: Final = 16
"""Longest name of a board in a manifest."""
OPERATOR_BYTES: Final = 16
MODEL_TAG_BYTES: Final = 8
"""How much of a model's SHA-256 names it."""


@dataclass(frozen=True, slots=True)
class ModelBegin:
    """The manifest of an image. Lengths and `arena` are bytes.

    `board`: `HELLO.board` of those that may take it, empty: any. `operators`: builtin operator codes (below 128) that
    it needs; empty: it does not say. Format 1 has neither.
    """

    TYPE: ClassVar = MessageType.MODEL_BEGIN
    _LAYOUT: ClassVar = struct.Struct("<BBHIIIIB")

    format: int
    flags: int
    chunk: int
    model_length: int
    selftest_length: int
    counter: int
    arena: int
    selftest_tolerance: int
    model_sha256: bytes
    image_sha256: bytes
    signature_kind: int = SignatureKind.NONE
    signature: bytes = b""
    board: str = ""
    operators: tuple[int, ...] = ()

    def signed(self) -> bytes:
        """What an Ed25519 signature covers: all up to `signature_kind`, with `chunk` as 0."""
        return replace(self, chunk=0)._covered()

    def with_signature(self, kind: SignatureKind, signature: bytes) -> Self:
        return replace(self, signature_kind=kind, signature=signature)

    def _covered(self) -> bytes:
        return (
            self._LAYOUT.pack(
                self.format,
                self.flags,
                self.chunk,
                self.model_length,
                self.selftest_length,
                self.counter,
                self.arena,
                self.selftest_tolerance,
            )
            + exactly(self.model_sha256, SHA256_BYTES, "model_sha256")
            + exactly(self.image_sha256, SHA256_BYTES, "image_sha256")
            + (self._requirements() if self.format >= MANIFEST_FORMAT else b"")
        )

    def _requirements(self) -> bytes:
        bits = sum(1 << code for code in self.operators)
        board = self.board.encode().ljust(BOARD_BYTES, b"\0")
        return exactly(board, BOARD_BYTES, "board") + bits.to_bytes(OPERATOR_BYTES, "little")

    def to_bytes(self) -> bytes:
        length = SIGNATURE_BYTES if self.signature_kind == SignatureKind.ED25519 else 0
        return self._covered() + bytes([self.signature_kind]) + exactly(self.signature, length, "signature")

    @classmethod
    def from_bytes(cls, body: bytes) -> Self:
        reader = Reader("MODEL_BEGIN", body)
        format_, flags, chunk, model_length, selftest_length, counter, arena, tolerance = reader.unpack(
            cls._LAYOUT, "selftest_tolerance"
        )
        model_sha256 = reader.take(SHA256_BYTES, "model_sha256")
        image_sha256 = reader.take(SHA256_BYTES, "image_sha256")
        board, bits = "", 0
        if format_ >= MANIFEST_FORMAT:
            board = text_of(reader.take(BOARD_BYTES, "board").rstrip(b"\0"))
            bits = int.from_bytes(reader.take(OPERATOR_BYTES, "operators"), "little")
        kind = reader.u8("signature_kind")
        if kind not in (SignatureKind.NONE, SignatureKind.ED25519):
            raise ProtocolError(f"MODEL_BEGIN has signature_kind {kind}; known are 0 and 1")
        signature = reader.take(SIGNATURE_BYTES, "signature") if kind == SignatureKind.ED25519 else b""
        return cls(
            format_,
            flags,
            chunk,
            model_length,
            selftest_length,
            counter,
            arena,
            tolerance,
            model_sha256,
            image_sha256,
            SignatureKind(kind),
            signature,
            board,
            tuple(code for code in range(8 * OPERATOR_BYTES) if bits >> code & 1),
        )


@dataclass(frozen=True, slots=True)
class ModelChunk:
    """`offset`: bytes from the image's start, a multiple of the transfer's chunk."""

    TYPE: ClassVar = MessageType.MODEL_CHUNK
    _LAYOUT: ClassVar = struct.Struct("<I")

    offset: int
    data: bytes

    def to_bytes(self) -> bytes:
        return self._LAYOUT.pack(self.offset) + self.data

    @classmethod
    def from_bytes(cls, body: bytes) -> Self:
        reader = Reader("MODEL_CHUNK", body)
        (offset,) = reader.unpack(cls._LAYOUT, "offset")
        return cls(offset, reader.rest())


@dataclass(frozen=True, slots=True)
class ModelCommit:
    """`flags`: 0, or `COMMIT_TRIAL`, which boards of minor version 0 do not look at."""

    TYPE: ClassVar = MessageType.MODEL_COMMIT

    flags: int = 0

    def to_bytes(self) -> bytes:
        return bytes([self.flags]) if self.flags else b""

    @classmethod
    def from_bytes(cls, body: bytes) -> Self:
        return cls(body[0] if body else 0)


@dataclass(frozen=True, slots=True)
class ModelAbort(NoBody):
    TYPE: ClassVar = MessageType.MODEL_ABORT


@dataclass(frozen=True, slots=True)
class ModelQuery(NoBody):
    TYPE: ClassVar = MessageType.MODEL_QUERY


@dataclass(frozen=True, slots=True)
class _OfModel:
    """`model`: first 8 bytes of its SHA-256, so that a late message never decides about another model."""

    TYPE: ClassVar[MessageType]

    model: bytes

    def to_bytes(self) -> bytes:
        return exactly(self.model, MODEL_TAG_BYTES, "model")

    @classmethod
    def from_bytes(cls, body: bytes) -> Self:
        return cls(Reader(cls.TYPE.name, body).take(MODEL_TAG_BYTES, "model"))


@dataclass(frozen=True, slots=True)
class ModelConfirm(_OfModel):
    """The model in trial is to stay."""

    TYPE: ClassVar = MessageType.MODEL_CONFIRM


@dataclass(frozen=True, slots=True)
class ModelRollback(_OfModel):
    """The model in trial is to go, and the former one to come back."""

    TYPE: ClassVar = MessageType.MODEL_ROLLBACK


@dataclass(frozen=True, slots=True)
class ModelStatus:
    """How far a transfer is. Lengths and offsets are bytes of the image."""

    TYPE: ClassVar = MessageType.MODEL_STATUS
    _LAYOUT: ClassVar = struct.Struct("<BBHIII")

    slot: int
    state: int
    chunk: int
    length: int
    received: int
    next: int
    bitmap: bytes
    image_sha256: bytes

    @property
    def complete(self) -> bool:
        return self.next >= self.length

    def missing(self) -> Iterator[int]:
        """Offsets of the chunks that the MCU lacks, as far as the bitmap shows; all of those behind it."""
        for index, offset in enumerate(range(self.next, self.length, self.chunk or 1)):
            byte, bit = divmod(index, 8)
            if byte >= BITMAP_BYTES or not self.bitmap[byte] >> bit & 1:
                yield offset

    def to_bytes(self) -> bytes:
        return (
            self._LAYOUT.pack(self.slot, self.state, self.chunk, self.length, self.received, self.next)
            + exactly(self.bitmap, BITMAP_BYTES, "bitmap")
            + exactly(self.image_sha256, SHA256_BYTES, "image_sha256")
        )

    @classmethod
    def from_bytes(cls, body: bytes) -> Self:
        """Also refuses an unfinished transfer without a chunk size."""
        reader = Reader("MODEL_STATUS", body)
        slot, state, chunk, length, received, following = reader.unpack(cls._LAYOUT, "next")
        bitmap = reader.take(BITMAP_BYTES, "bitmap")
        image_sha256 = reader.take(SHA256_BYTES, "image_sha256")
        if chunk == 0 and following < length:
            raise ProtocolError("MODEL_STATUS shows a transfer with chunks of 0 bytes")
        return cls(slot, known(SlotState, state), chunk, length, received, following, bitmap, image_sha256)
