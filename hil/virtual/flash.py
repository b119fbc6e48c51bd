"""NOR flash in a file: a write can only clear bits, an erase sets a whole block."""

from __future__ import annotations

import ctypes
import mmap
from pathlib import Path

# As of the serial flash on most boards.
ERASE_SIZE = 4096
WRITE_SIZE = 4

# Two slots of 512 KiB, and the store's directory and journal: 2 + 7 erase blocks.
FLASH_SIZE = 2 * 512 * 1024 + 9 * ERASE_SIZE

# The store's directory lies in the first two blocks. What is written there decides which model boots.
DIRECTORY_SIZE = 2 * ERASE_SIZE


class FileFlash:
    """A file of FLASH_SIZE bytes, created blank, mapped into memory."""

    size = FLASH_SIZE
    erase_size = ERASE_SIZE
    write_size = WRITE_SIZE

    def __init__(self, path: Path) -> None:
        with path.open("a+b") as file:
            have = file.seek(0, 2)
            if have < FLASH_SIZE:
                file.write(b"\xff" * (FLASH_SIZE - have))
                file.flush()
        with path.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), FLASH_SIZE)
        self._anchor = ctypes.c_char.from_buffer(self._map)
        self.address = ctypes.addressof(self._anchor)

    def write(self, offset: int, data: bytes) -> bool:
        end = offset + len(data)
        old = int.from_bytes(self._map[offset:end], "little")
        new = old & int.from_bytes(data, "little")
        self._sync_before(offset)
        self._map[offset:end] = new.to_bytes(len(data), "little")
        self._sync_after(offset)
        return True

    def erase(self, offset: int) -> bool:
        self._sync_before(offset)
        self._map[offset : offset + ERASE_SIZE] = b"\xff" * ERASE_SIZE
        self._sync_after(offset)
        return True

    def close(self) -> None:
        del self._anchor
        self._map.flush()
        self._map.close()

    # A directory record must not reach the disk before the image that it speaks of.
    def _sync_before(self, offset: int) -> None:
        if offset < DIRECTORY_SIZE:
            self._map.flush()

    _sync_after = _sync_before
