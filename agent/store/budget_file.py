"""The file that says what cloud lanes have used. It is on disk before it is used; losing it costs cloud, never money.

One JSON document with a checksum, replaced as a whole: written beside, flushed to the disk, renamed, and the folder
flushed. A thread does it, a few hundred times a day at most (`routing.budget` has the leases that allow for that). A
file that is damaged is set aside and everything counts as used; while it cannot be written, no new lease is granted, so
that lanes with a limit go unused once the last one is.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import json
import logging
import os
import time
import zlib
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

log = logging.getLogger(__name__)

MAX_BYTES = 1 << 20
KEPT_DAMAGED = 3
"""Files set aside that are kept; the oldest go."""
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class Kept(Protocol):
    """What the file asks of a budget."""

    def restore(self, document: Mapping[str, Any] | None, *, boot: str, now: float, wall: float) -> None: ...
    def exhaust(self, now: float) -> None: ...


class BudgetFile:
    """A `Ledger`. Its callbacks come on the event loop that `open` is called on."""

    def __init__(self, path: Path, boot_id: Path = BOOT_ID) -> None:
        self._path = path
        self._boot_id = boot_id
        self._lock = -1
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="budget-file")
        self._loop: asyncio.AbstractEventLoop | None = None
        self._problem = ""
        self.alarm = ""
        """What was wrong with the file at the start, for people; empty if nothing was."""
        self.writes = 0

    def open(self, budget: Kept, now: float, wall: float) -> None:
        """Give the budget what the file has. Blocking; call it on the event loop, before anything is spent."""
        self._loop = asyncio.get_running_loop()
        boot = ""
        with contextlib.suppress(OSError):
            boot = self._boot_id.read_text("ascii").strip()
        try:
            self._take_lock()
            budget.restore(self._load(), boot=boot, now=now, wall=wall)
        except OSError as error:
            budget.restore(None, boot=boot, now=now, wall=wall)
            self._alarm(budget, now, _words(error))
        except ValueError as error:
            budget.restore(None, boot=boot, now=now, wall=wall)
            self._alarm(budget, now, f"{error}; set aside as {self._put_aside()}")

    def write(self, document: Mapping[str, Any], done: Callable[[str], None]) -> None:
        """Have a document written. Returns at once; `done` is told an empty text, or why it is not on disk."""

        def finished(future: Future[None]) -> None:
            error = future.exception()
            problem = "" if error is None else _words(error)
            with contextlib.suppress(RuntimeError):  # the loop has ended: nobody is waiting
                assert self._loop is not None
                self._loop.call_soon_threadsafe(self._told, problem, done)

        try:
            self._thread.submit(self._save, document).add_done_callback(finished)
        except RuntimeError:  # closed: what comes now is not granted
            done("the file is closed")

    def close(self, document: Mapping[str, Any]) -> None:
        """Write the last document, which leases nothing. Blocking."""
        try:
            if self._loop is not None:  # it was opened, so the document knows what was used before
                self._thread.submit(self._save, document).result()
        except OSError as error:
            log.warning("budget file could not be written at the end", extra={"reason": _words(error)})
        self._thread.shutdown()
        lock, self._lock = self._lock, -1
        if lock >= 0:
            os.close(lock)

    def _told(self, problem: str, done: Callable[[str], None]) -> None:
        if problem != self._problem:
            if problem:
                log.error("budget file cannot be written: lanes with a budget will stop", extra={"reason": problem})
            else:
                log.info("budget file is written again", extra={"path": str(self._path)})
        self._problem = problem
        done(problem)

    def _alarm(self, budget: Kept, now: float, why: str) -> None:
        budget.exhaust(now)
        self.alarm = f"the budget file could not be used, so everything counts as used: {why}"
        log.error("budget file could not be used: everything counts as used", extra={"reason": why})

    def _take_lock(self) -> None:
        """Two daemons must not spend the same budget. Raises `OSError` if another one has it."""
        if self._lock >= 0:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        lock = os.open(self._path.with_suffix(".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            raise OSError(errno.EBUSY, f"{self._path.parent} is in use by another daemon") from None
        except OSError:  # a file system without locks: better without one than without a file
            os.close(lock)
            return
        self._lock = lock

    def _load(self) -> Mapping[str, Any] | None:
        """What the file has; None: there is no file. Raises `OSError`, and `ValueError` if it is damaged."""
        try:
            with self._path.open("rb") as file:
                data = file.read(MAX_BYTES + 1)
        except FileNotFoundError:
            return None
        try:
            whole = json.loads(data)
            document = whole["budget"]
            if whole["crc32"] != _crc(document):
                raise ValueError("wrong checksum")
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(f"{self._path.name} is damaged: {error}") from None
        if not isinstance(document, dict):
            raise ValueError(f"{self._path.name} is damaged: no document")
        return document

    def _save(self, document: Mapping[str, Any]) -> None:
        """Raises `OSError` unless it would survive a power cut."""
        self._take_lock()
        beside = self._path.with_suffix(".new")
        with beside.open("wb") as file:
            file.write(json.dumps({"crc32": _crc(document), "budget": document}, separators=(",", ":")).encode())
            file.flush()
            os.fsync(file.fileno())
        beside.replace(self._path)
        folder = os.open(self._path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
        self.writes += 1

    def _put_aside(self) -> str:
        aside = self._path.with_name(f"{self._path.name}.damaged-{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}")
        try:
            self._path.replace(aside)
            names = sorted(self._path.parent.glob(f"{self._path.name}.damaged-*"))
            names.remove(aside)  # it is the newest, whatever the clock says
            for old in names[: 1 - KEPT_DAMAGED]:
                old.unlink(missing_ok=True)
        except OSError as error:
            return f"nothing: {_words(error)}"
        return aside.name


def _crc(document: object) -> int:
    return zlib.crc32(json.dumps(document, sort_keys=True, separators=(",", ":")).encode())


def _words(error: BaseException) -> str:
    if isinstance(error, OSError):
        return f"{error.strerror or error}{'' if error.filename is None else f': {error.filename}'}"
    return f"{type(error).__name__}: {error}"
