"""The files of the audit trail: appended to, rotated by size, continued after a restart.

`audit-000000000001.jsonl` begins with line 1, `audit-000000008214.jsonl` with line 8214. Not thread-safe: one thread
writes, and a lock on the folder keeps another daemon out.
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from agent.security.chain import MAX_LINE, Head, link, read_head

PATTERN = "audit-*.jsonl"


class AuditFiles:
    """Raises `OSError` wherever the disk does."""

    def __init__(self, folder: Path, max_file_bytes: int, keep_files: int) -> None:
        self.folder = folder
        self._max_bytes = max_file_bytes
        self._keep = keep_files
        self._fd = -1
        self._lock = -1
        self._size = 0
        self._torn = False
        self.head = Head()
        self.synced = Head()
        """The last line that was forced to the disk."""
        self.deleted = 0

    def open(self) -> int:
        """Continue the chain. Returns the bytes of a torn last line that were cut off: a power cut leaves such a line.

        Raises `ValueError` if the last file does not end in a line of a chain: somebody must look before more is added.
        """
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._claim()
        if self._fd >= 0:  # of a try that failed
            os.close(self._fd)
            self._fd = -1
        files = audit_files(self.folder)
        if not files:
            self._begin()
            return 0
        self._fd = os.open(files[-1], os.O_RDWR | os.O_APPEND | os.O_CLOEXEC)
        torn = self._resume(files)
        self._sync_folder()
        return torn

    def append(self, entries: Sequence[Mapping[str, Any]]) -> None:
        """Write a batch. After an error nothing of it counts; what reached the file all the same is cut off before the
        next one."""
        head, made = self.head, bytearray()
        for fields in entries:
            line, head = link(head, fields)
            made += line
        if self._torn:
            os.ftruncate(self._fd, self._size)
            self._torn = False
        if self._fd < 0:
            self._begin()
        elif self._size and self._size + len(made) > self._max_bytes:
            self._rotate()
        self._torn = True
        left = memoryview(made)
        while left:  # of a full disk, the next try says what is wrong
            left = left[os.write(self._fd, left) :]
        self._torn = False
        self._size += len(made)
        self.head = head

    def sync(self) -> None:
        """Force to the disk what was written."""
        os.fdatasync(self._fd)
        self.synced = self.head

    def close(self) -> None:
        for fd in (self._fd, self._lock):
            if fd >= 0:
                os.close(fd)
        self._fd = self._lock = -1

    def _claim(self) -> None:
        if self._lock < 0:
            self._lock = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OSError(errno.EAGAIN, f"another daemon writes to {self.folder}") from None

    def _resume(self, files: Sequence[Path]) -> int:
        size = os.fstat(self._fd).st_size
        tail = os.pread(self._fd, 2 * MAX_LINE, max(0, size - 2 * MAX_LINE))
        whole, end, torn = tail.rpartition(b"\n")
        if not end:
            torn, whole = tail, b""
        if not whole and len(torn) == size:  # a file that was begun and never got a whole line
            whole = _last_line(files[-2]) if len(files) > 1 else b""
            head: Head | None = Head() if len(files) == 1 else read_head(whole)
        else:
            head = read_head(whole.rpartition(b"\n")[2])
        if head is None:
            raise ValueError(f"{files[-1]} does not end in a line of a chain: run `edge-agent audit verify`")
        self._size = size - len(torn)
        if torn:
            os.ftruncate(self._fd, self._size)
        self.head = self.synced = head
        return len(torn)

    def _rotate(self) -> None:
        self.sync()
        os.close(self._fd)
        self._fd = -1
        self._begin()
        for path in audit_files(self.folder)[: -self._keep]:
            path.unlink()
            self.deleted += 1

    def _begin(self) -> None:
        path = self.folder / f"audit-{self.head.seq + 1:012}.jsonl"
        self._fd = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._size = os.fstat(self._fd).st_size
        self._sync_folder()

    def _sync_folder(self) -> None:
        if self._lock >= 0:
            os.fsync(self._lock)


def audit_files(folder: Path) -> list[Path]:
    """Oldest first."""
    return sorted(folder.glob(PATTERN))


def read_lines(path: Path) -> Iterator[bytes]:
    """With their ends; a line that has none for too long comes in pieces, which `chain.check` refuses."""
    with path.open("rb") as file:
        while line := file.readline(MAX_LINE + 1):
            yield line


def _last_line(path: Path) -> bytes:
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 2 * MAX_LINE))
        return file.read().removesuffix(b"\n").rpartition(b"\n")[2]
