"""What the daemon's SQLite files have in common: one owner, errors in the system's words, damage set aside."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import sqlite3
import time
from pathlib import Path

log = logging.getLogger(__name__)

SPACE_NEEDED = 1 << 20
"""Bytes free below which a file system counts as full: SQLite then names other errors too."""
KEPT_DAMAGED = 3
"""Files set aside that are kept; the oldest go."""
BUSY_S = 2.0
"""How long SQLite waits for another process that has the file locked, a backup for example."""


class FolderLock:
    """A folder for this process alone, from `take` to `release`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._fd = -1

    def take(self) -> None:
        """May be called again. Raises `OSError` if another process has it."""
        if self._fd >= 0:
            return
        folder = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(folder)
            raise OSError(errno.EBUSY, f"{self._folder} is in use by another daemon") from None
        except OSError:  # A file system without locks, NFS for example: better without one than without a file.
            os.close(folder)
            return
        self._fd = folder

    def release(self) -> None:
        folder, self._fd = self._fd, -1
        if folder >= 0:
            os.close(folder)


def check_header(path: Path) -> None:
    """Raises `sqlite3.DatabaseError` if SQLite would call the file read-only for ever, because of the byte that says by
    which version it may be written. Nobody has it open in this process: closing it gives up its locks."""
    with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
        header = file.read(20)
        if len(header) == 20 and header[18] not in (1, 2):
            raise sqlite3.DatabaseError(f"write version {header[18]}")


def check(connection: sqlite3.Connection, *versions: int, whole: bool = False) -> None:
    """Raises `sqlite3.DatabaseError` if the file is damaged, or neither new nor of one of these schema versions.
    `whole`: also if rows and indexes do not fit together."""
    faults = [fault for (fault,) in connection.execute(f"PRAGMA {'integrity' if whole else 'quick'}_check(1)")]
    (found,) = connection.execute("PRAGMA user_version").fetchone()
    if faults != ["ok"] or found not in (0, *versions):
        raise sqlite3.DatabaseError(faults[0] if faults != ["ok"] else f"schema version {found}")


def is_damage(error: sqlite3.Error) -> bool:
    """Whether the file itself is at fault. Locked, full, read-only: nothing is wrong with what it holds."""
    if getattr(error, "sqlite_errorcode", 0) == sqlite3.SQLITE_ERROR:  # no such column: our own statements are right
        return True
    return isinstance(error, sqlite3.DatabaseError) and not isinstance(error, sqlite3.OperationalError)


def put_aside(path: Path, error: Exception, *, log_too: bool) -> Path:
    """Rename a damaged file, so that a new one can be begun. Returns its new path; the newest few are kept.

    `log_too`: its write-ahead log goes with it, as that may hold rows that can still be read; else it is deleted.
    """
    stem = f"{path.name}.damaged-{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}"
    aside = path.with_name(stem)
    for number in range(1, 100):  # several in one second must not overwrite each other
        if not aside.exists():
            break
        aside = path.with_name(f"{stem}-{number:02}")
    path.replace(aside)
    for suffix in ("-wal", "-shm"):
        beside = path.with_name(path.name + suffix)
        if log_too and suffix == "-wal" and beside.exists():
            beside.replace(aside.with_name(aside.name + suffix))
        else:
            beside.unlink(missing_ok=True)
    log.warning("a file is damaged and was set aside: %s", error, extra={"path": str(path), "set_aside": str(aside)})
    names = sorted(old for old in path.parent.glob(f"{path.name}.damaged-*") if not old.name.endswith("-wal"))
    names.remove(aside)  # it is the newest, whatever the clock says: a board without a battery wakes in 1970
    for old in names[: 1 - KEPT_DAMAGED]:
        old.unlink(missing_ok=True)
        old.with_name(f"{old.name}-wal").unlink(missing_ok=True)
    return aside


def words(error: sqlite3.Error | OSError, path: Path) -> str:
    """What is wrong, in the system's words where SQLite has its own for several causes. No connection is open."""
    if isinstance(error, OSError):
        return f"{error.strerror or error}{'' if error.filename is None else f': {error.filename}'}"
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF
    number = 0
    with contextlib.suppress(OSError):
        system = os.statvfs(path.parent)
        free = system.f_bavail * system.f_frsize
        if code in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN):
            number = errno.ENOSPC if free < SPACE_NEEDED or (system.f_files and not system.f_favail) else 0
        if not number and code in (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN):
            number = errno.EROFS if system.f_flag & os.ST_RDONLY else 0
    if not number and code == sqlite3.SQLITE_CANTOPEN:
        try:
            os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o644))
        except OSError as cause:
            number = cause.errno or 0
    return os.strerror(number) if number else str(error)
