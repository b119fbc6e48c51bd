"""What the message modules share: taking fields off a body, and the seam that they all fit."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import ClassVar, Final, Protocol, Self

from agent.core.errors import ProtocolError
from agent.wire.codes import MessageType

SHA256_BYTES: Final = 32


class Message(Protocol):
    """A typed body."""

    TYPE: ClassVar[MessageType]

    def to_bytes(self) -> bytes: ...

    @classmethod
    def from_bytes(cls, body: bytes) -> Self: ...


class Reader:
    """Takes fields off the front of a body. Every method raises `ProtocolError` where the body ends too early."""

    __slots__ = ("_at", "_body", "_what")

    def __init__(self, what: str, body: bytes) -> None:
        self._what = what
        self._body = body
        self._at = 0

    def take(self, count: int, field: str) -> bytes:
        end = self._at + count
        if end > len(self._body):
            raise ProtocolError(f"{self._what} of {len(self._body)} bytes ends inside {field}, which needs {end}")
        taken = self._body[self._at : end]
        self._at = end
        return taken

    def u8(self, field: str) -> int:
        return self.take(1, field)[0]

    def unpack(self, layout: struct.Struct, fields: str) -> tuple[int, ...]:
        """Numbers only; `fields` names the last of them."""
        return layout.unpack(self.take(layout.size, fields))

    def text8(self, field: str) -> str:
        return text_of(self.take(self.u8(field), field))

    @property
    def ended(self) -> bool:
        """Nothing is left: what follows are the fields of a later minor version."""
        return self._at == len(self._body)

    def rest(self) -> bytes:
        return self._body[self._at :]


def text_of(raw: bytes) -> str:
    """Text is for people: a broken character in it is shown as such and refuses nothing."""
    return raw.decode("utf-8", "replace")


def str8(text: str) -> bytes:
    """Raises `ValueError` over 255 bytes."""
    raw = text.encode()
    return bytes([len(raw)]) + raw


def exactly(raw: bytes, length: int, field: str) -> bytes:
    """`raw`. Raises `ValueError` if it is of another length: a defect of the caller."""
    if len(raw) != length:
        raise ValueError(f"{field} must be {length} bytes, found {len(raw)}")
    return raw


@dataclass(frozen=True, slots=True)
class NoBody:
    """Base of the messages that are only a type."""

    def to_bytes(self) -> bytes:
        return b""

    @classmethod
    def from_bytes(cls, body: bytes) -> Self:
        return cls()
