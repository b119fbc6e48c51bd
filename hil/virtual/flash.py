"""NOR flash in a file: a write can only clear bits, an erase sets a whole block."""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import stat
from pathlib import Path

# As of the serial flash on most boards.
ERASE_SIZE = 4096
WRITE_SIZE = 4

# Two slots of 512 KiB, and the store's directory and journal: 2 + 7 erase blocks.
FLASH_SIZE = 2 * 512 * 1024 + 9 * ERASE_SIZE

# The store's directory lies in the first two blocks. What is written there decides which model boots.
DIRECTORY_SIZE = 2 * ERASE_SIZE

# Of the directory's records, in firmware/core: what each begins with, and its size.
DIRECTORY_MAGICS = (b"EEM2", b"EEM1")
DIRECTORY_RECORD = 512

BLANK = b"\xff"


class FlashRefused(Exception):
    """The file is in use, or is something else than a flash; it was not touched."""


class FileFlash:
    """A file of FLASH_SIZE bytes, created blank, mapped into memory. Nobody else's while it is open.

    Raises FlashRefused.
    """

    size = FLASH_SIZE
    erase_size = ERASE_SIZE
    write_size = WRITE_SIZE

    def __init__(self, path: Path) -> None:
        # Not blocking: a named pipe is refused, not waited for.
        with os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK, 0o666), "r+b", 0) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise FlashRefused(f"{path} is not a file")
            try:
                # Lives as long as the mapping, which keeps the file open; the system ends it with the process.
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise FlashRefused(f"{path} is in use by another virtual microcontroller") from None
            have = os.fstat(file.fileno()).st_size
            _check(path, have, file.read(FLASH_SIZE) if have <= FLASH_SIZE else b"")
            os.pwrite(file.fileno(), BLANK * (FLASH_SIZE - have), have)
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


def _check(path: Path, size: int, content: bytes) -> None:
    """Raises FlashRefused unless it is new, a blank flash (perhaps cut short when it was made), or one of ours."""
    if not content.strip(BLANK) and size <= FLASH_SIZE:
        return
    directory = content[:DIRECTORY_SIZE]
    records = range(0, DIRECTORY_SIZE, DIRECTORY_RECORD)
    ours = any(directory.startswith(DIRECTORY_MAGICS, at) for at in records) or not directory.strip(BLANK)
    if size != FLASH_SIZE or not ours:
        raise FlashRefused(
            f"{path} holds {size} bytes that are no flash of a virtual microcontroller: name another file or remove it"
        )
