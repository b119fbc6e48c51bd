"""Reads a FlatBuffer of unknown origin, as `firmware/core/flatbuffer.h` does.

Every access is checked against the buffer; after the first that does not fit, `Buffer.ok` is False and everything
reads as zero or empty. Nothing raises, nothing recurses, and nothing is copied.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

MAX_TABLE_FIELDS: Final = 64
"""The schema's widest table has 13; bounds the time that a crafted file takes."""
MAX_BYTES: Final = 0x7FFF_FFFF
"""Positions are 32 bits wide in the firmware: a larger file does not fit them."""


class Buffer:
    """The file, and whether all that was read lay in it."""

    __slots__ = ("data", "ok", "size")

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.size = len(data)
        self.ok = len(data) <= MAX_BYTES

    def fail(self) -> None:
        self.ok = False

    def inside(self, at: int, count: int, width: int) -> bool:
        """Whether `count` items of `width` bytes fit at `at`; False from the first time on that any did not."""
        if at < 0 or at + count * width > self.size:
            self.ok = False
        return self.ok

    def scalar(self, at: int, width: int) -> int:
        """Unsigned."""
        return int.from_bytes(self.data[at : at + width], "little") if self.inside(at, 1, width) else 0

    def follow(self, at: int) -> int:
        """Where the offset at `at` points to, 0 if that is outside."""
        relative = self.scalar(at, 4)
        return at + relative if self.inside(at, relative, 1) else 0


class Vector:
    """A vector of scalars or of offsets to tables. Absent reads as empty."""

    __slots__ = ("_buffer", "_width", "position", "size")

    def __init__(self, buffer: Buffer, at: int, width: int) -> None:
        self._buffer, self._width = buffer, width
        self.position, self.size = at + 4, 0
        if at == 0:
            return
        if at % 4 != 0:
            buffer.fail()
        size = buffer.scalar(at, 4)
        if buffer.inside(self.position, size, width):
            self.size = size

    def __getitem__(self, index: int) -> int:
        """Unsigned; 0 behind the end."""
        return self._buffer.scalar(self.position + index * self._width, self._width) if index < self.size else 0

    def __iter__(self) -> Iterator[int]:
        return (self[index] for index in range(self.size))

    def table_at(self, index: int) -> int:
        """Where the table at `index` begins, 0 if there is none."""
        return self._buffer.follow(self.position + index * 4) if index < self.size else 0


class Table:
    """A table whose fields all lie within it, or the buffer is not ok."""

    __slots__ = ("_buffer", "_size", "_vtable", "_vtable_size", "at")

    def __init__(self, buffer: Buffer, at: int) -> None:
        self._buffer, self.at = buffer, at
        if at % 4 != 0:
            buffer.fail()
        vtable = (at - buffer.scalar(at, 4)) & 0xFFFF_FFFF  # a signed distance; outside, if it wraps around
        if vtable % 2 != 0:
            buffer.fail()
        self._vtable = vtable if buffer.ok else 0
        self._vtable_size = buffer.scalar(self._vtable, 2)
        self._size = buffer.scalar(self._vtable + 2, 2)
        widest = 4 + 2 * MAX_TABLE_FIELDS
        sane = 4 <= self._vtable_size <= widest and self._vtable_size % 2 == 0 and self._size >= 4
        if not sane or not buffer.inside(self._vtable, self._vtable_size, 1) or not buffer.inside(at, self._size, 1):
            buffer.fail()
        for entry in range(4, self._vtable_size if buffer.ok else 0, 2):
            offset = buffer.scalar(self._vtable + entry, 2)
            if offset != 0 and not 4 <= offset < self._size:
                buffer.fail()

    @property
    def end(self) -> int:
        return self.at + self._size

    def has(self, field: int) -> bool:
        return self._offset(field) != 0

    def scalar(self, field: int, width: int) -> int:
        """Unsigned; 0 if it is absent."""
        at = self._place(field, width)
        return self._buffer.scalar(at, width) if at else 0

    def vector(self, field: int, width: int) -> Vector:
        return Vector(self._buffer, self.target(field), width)

    def target(self, field: int) -> int:
        """Where a table or vector field points to, 0 if it is absent."""
        at = self._place(field, 4)
        if at == 0:
            return 0
        to = self._buffer.follow(at)
        if to == at:
            self._buffer.fail()
        return to if self._buffer.ok else 0

    def _place(self, field: int, width: int) -> int:
        offset = self._offset(field)
        if offset == 0:
            return 0
        if offset + width > self._size:
            self._buffer.fail()
        return self.at + offset

    def _offset(self, field: int) -> int:
        entry = 4 + 2 * field
        if not self._buffer.ok or entry + 2 > self._vtable_size:
            return 0
        return self._buffer.scalar(self._vtable + entry, 2)
