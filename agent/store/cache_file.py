"""The cache's file: SQLite, written behind by one thread in batches. Losing it costs computing time, never an answer.

What was put in the last moment before a SIGKILL or a power cut may be missing after it. A damaged file is set aside
and a new one begun. While it cannot be written (a full or read-only file system, another daemon that uses it), answers
wait in memory, the newest `limit` of them, and are written when it can be again; `problem` says so meanwhile.
"""

from __future__ import annotations

import logging
import sqlite3
import threading
import time
import zlib
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from agent.core.lasting import lasting_thread
from agent.store.sqlite_file import BUSY_S, FolderLock, check, is_damage, put_aside, words
from agent.store.write_budget import WriteBudget, written_by_thread, written_since

log = logging.getLogger(__name__)

SCHEMA_VERSION = 1
CHUNK = 1024
"""Rows in one transaction, so that what gathered during an outage is written in steps."""
RETRY_S = 10.0
"""While the file cannot be written: between two tries."""
GATHER_S = 0.25
"""How long the first of a batch waits for others: one commit for all of them spares the flash."""
CLOSE_S = 5.0
"""How long a close waits for the last batch."""

_COLUMNS = (
    "scope, model, digest, variant, model_sha256, label, confidence, tier, target, provider, packed, created_wall, crc"
)
_TABLES = ("entries", "last_known")


class Row(NamedTuple):
    """A stored answer. `scope` is the pinned variant (entries) or the producer (last_known)."""

    scope: str
    model: str
    digest: bytes
    variant: str
    model_sha256: str
    label: str | None
    confidence: float | None
    tier: str
    target: str
    provider: str
    packed: bytes
    created_wall: float


class Answer(Protocol):
    """What of an entry is stored."""

    @property
    def variant(self) -> str: ...
    @property
    def model_sha256(self) -> str: ...
    @property
    def label(self) -> str | None: ...
    @property
    def confidence(self) -> float | None: ...
    @property
    def tier(self) -> str: ...
    @property
    def target(self) -> str: ...
    @property
    def provider(self) -> str: ...
    @property
    def packed(self) -> bytes: ...
    @property
    def created_wall(self) -> float: ...


class CacheFile:
    """Holds at most `limit` rows in each table. Rows are written by a thread of its own."""

    def __init__(self, path: Path, limit: int, write_bytes_per_day: int | None = None) -> None:
        self._path = path
        self._budget = WriteBudget(write_bytes_per_day, time.monotonic())
        self._limit = limit
        self._entries: dict[tuple[str, str, bytes], Answer] = {}
        self._last: dict[tuple[str, str], Answer] = {}
        self._changed = threading.Condition()
        self._hurry = False
        self._closing = False
        self._batches = 0
        self._writing = False
        self._thread: threading.Thread | None = None
        self._connection: sqlite3.Connection | None = None
        self._lock = FolderLock(path.parent)
        self._since_prune = 0
        self._lost = 0
        self._counts = {"loaded": 0, "damaged_rows": 0, "written": 0, "dropped": 0, "write_errors": 0}
        self._error: str | None = None
        self._set_aside: str | None = None
        self._damage: sqlite3.DatabaseError | None = None
        """Found while the file was used: whatever a quick check says, it is to be set aside."""

    def open(self, now: float, wall: float, boot: str, keep_s: float) -> tuple[Sequence[Row], Sequence[Row], float]:
        """Rows of the last `keep_s`, oldest first, from both tables, and what to add to monotonic time to get the wall
        time that ages are counted by; then begin to write. Of one boot of the machine that wall time is the first one
        seen, so that no jump of the clock between two starts of the daemon changes an age."""
        tables: tuple[Sequence[Row], ...] = ((), ())
        offset = wall - now
        try:
            connection = self._connect()
            offset = _anchor(connection, boot, offset)
            oldest_wall = now + offset - keep_s
            tables = tuple(self._load(connection, table, oldest_wall) for table in _TABLES)
            self._prune(connection, oldest_wall)
        except (sqlite3.Error, OSError) as error:
            self._failed(error)
        self._disconnect()
        self._counts["loaded"] = sum(map(len, tables))
        self._thread = lasting_thread("cache-writer", self._write_behind)
        return tables[0], tables[1], offset

    def put(self, key: tuple[str, str, bytes], last_key: tuple[str, str], answer: Answer) -> None:
        """Have the answer written, under its key and as the producer's last one."""
        with self._changed:
            wake = not self._entries
            self._entries[key] = answer
            self._last[last_key] = answer
            self._bound()
            if wake:
                self._changed.notify_all()

    def flush(self, timeout_s: float = CLOSE_S) -> bool:
        """Wait until what is pending now is written. False: it was not."""
        with self._changed:
            if self._thread is None:
                return False
            errors = self._counts["write_errors"]
            goal = self._batches + 1 + self._writing
            if not self._pending():
                return True
            self._hurry = True
            self._changed.notify_all()
            done = self._changed.wait_for(lambda: self._batches >= goal or not self._pending(), timeout_s)
            return done and self._counts["write_errors"] == errors

    def close(self) -> None:
        """Write what is pending and end the thread."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join(CLOSE_S)
            self._thread = None

    def problem(self) -> str:
        """Why answers are not written now, in the system's words, and how many; empty if they are."""
        error, count = self._error, len(self._entries) + self._lost
        if error is None or not count:
            return error or ""
        return f"{error}: {count} answer{'' if count == 1 else 's'} not written"

    def stats(self) -> dict[str, Any]:
        return {
            "path": str(self._path),
            "pending": len(self._entries) + len(self._last),
            **self._counts,
            "bytes_written": self._budget.written,
            "bytes_per_day": self._budget.bytes_per_day,
            "error": self._error,
            "set_aside": self._set_aside,
        }

    def _pending(self) -> bool:
        return bool(self._entries or self._writing)

    def _bound(self) -> None:
        """Let the oldest of what waits go. The lock is held."""
        while len(self._entries) > self._limit:
            del self._entries[next(iter(self._entries))]
            self._counts["dropped"] += 1
            self._lost += 1
        while len(self._last) > self._limit:
            del self._last[next(iter(self._last))]

    def _write_behind(self) -> None:
        while True:
            with self._changed:
                if self._error is None:
                    self._changed.wait_for(lambda: self._entries or self._closing)
                wait_s = GATHER_S if self._error is None else RETRY_S
                self._changed.wait_for(lambda: self._hurry or self._closing, wait_s)
                while not (self._hurry or self._closing) and (wait_s := self._budget.wait_s(time.monotonic())):
                    self._changed.wait_for(lambda: self._hurry or self._closing, wait_s)
                entries, self._entries = self._entries, {}
                last, self._last = self._last, {}
                self._hurry = False
                self._writing = True
                closing = self._closing
            before = written_by_thread()
            written = self._write(entries, last)
            self._budget.spend(written_since(before, len(entries) + len(last)))
            with self._changed:
                if not written:  # The newer answer to the same question is the one to keep.
                    self._entries = {**entries, **self._entries}
                    self._last = {**last, **self._last}
                    self._bound()
                self._writing = False
                self._batches += 1
                self._changed.notify_all()
            if closing:
                self._disconnect()
                self._lock.release()
                return

    def _write(self, entries: Mapping[tuple[str, str, bytes], Answer], last: Mapping[tuple[str, str], Answer]) -> bool:
        """Write in a few transactions. False: not all of it, and `_failed` knows why."""
        try:
            if self._connection is None:
                self._connection = self._connect()
            rows = ((scope, model, digest, answer) for (model, scope, digest), answer in entries.items())
            self._insert("entries", rows)
            self._insert("last_known", ((scope, model, b"", answer) for (scope, model), answer in last.items()))
            if self._since_prune > self._limit // 4:  # The file may be a quarter over its limit between two prunings.
                self._since_prune = 0
                self._prune(self._connection, None)
        except (sqlite3.Error, OSError) as error:
            self._failed(error)
            return False
        if self._error is not None:
            log.info("cache file is written again", extra={"path": str(self._path), "answers": len(entries)})
            self._error = None
        self._lost = 0
        return True

    def _insert(self, table: str, rows: Iterable[tuple[str, str, bytes, Answer]]) -> None:
        assert self._connection is not None
        left = iter(rows)
        while chunk := list(islice(left, CHUNK)):
            with self._connection:
                _insert(self._connection, table, chunk)
            self._counts["written"] += len(chunk)
            self._since_prune += len(chunk)

    def _failed(self, error: sqlite3.Error | OSError) -> None:
        self._counts["write_errors"] += 1
        self._disconnect()
        if type(error) is sqlite3.DatabaseError:
            self._damage = error
        why = words(error, self._path)
        if why != self._error:
            log.warning("cache file cannot be used: %s", why, extra={"path": str(self._path)})
        self._error = why

    def _disconnect(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _connect(self) -> sqlite3.Connection:
        """Open the file, or a new one if it is damaged. Raises `sqlite3.Error` or `OSError`."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._lock.take()
        try:
            if self._damage is not None and self._path.exists():  # or somebody took it away meanwhile
                raise self._damage
            self._connection = self._prepare()
        except sqlite3.DatabaseError as error:
            if not is_damage(error):
                raise
            self._set_aside = put_aside(self._path, error, log_too=False).name
            self._damage = None
            self._connection = self._prepare()
        self._damage = None
        return self._connection

    def _prepare(self) -> sqlite3.Connection:
        connection = sqlite3.connect(self._path, timeout=BUSY_S, check_same_thread=False)
        connection.text_factory = _decode
        try:
            check(connection, SCHEMA_VERSION)
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = NORMAL")
            with connection:
                for table in _TABLES:
                    connection.execute(
                        f"CREATE TABLE IF NOT EXISTS {table} (scope TEXT NOT NULL, model TEXT NOT NULL,"
                        " digest BLOB NOT NULL, variant TEXT NOT NULL, model_sha256 TEXT NOT NULL, label TEXT,"
                        " confidence REAL, tier TEXT NOT NULL, target TEXT NOT NULL, provider TEXT NOT NULL,"
                        " packed BLOB NOT NULL, created_wall REAL NOT NULL, crc INTEGER NOT NULL,"
                        " PRIMARY KEY (scope, model, digest))"
                    )
                    connection.execute(f"CREATE INDEX IF NOT EXISTS {table}_age ON {table} (created_wall)")
                connection.execute("CREATE TABLE IF NOT EXISTS anchor (boot TEXT NOT NULL, offset REAL NOT NULL)")
                connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
        except BaseException:
            connection.close()
            raise
        return connection

    def _load(self, connection: sqlite3.Connection, table: str, oldest_wall: float) -> Sequence[Row]:
        rows = connection.execute(
            f"SELECT {_COLUMNS} FROM {table} WHERE created_wall >= ? ORDER BY created_wall DESC LIMIT ?",  # noqa: S608
            (oldest_wall, self._limit),
        ).fetchall()
        rows.reverse()
        whole = [Row._make(row[:-1]) for row in rows if row[-1] == _crc(row[:-1])]
        self._counts["damaged_rows"] += len(rows) - len(whole)
        return whole

    def _prune(self, connection: sqlite3.Connection, oldest_wall: float | None) -> None:
        """Delete what is over the limit, and what is older than `oldest_wall`."""
        with connection:
            for table in _TABLES:
                connection.execute(
                    f"DELETE FROM {table} WHERE rowid IN (SELECT rowid FROM {table}"  # noqa: S608
                    " ORDER BY created_wall DESC LIMIT -1 OFFSET ?)",
                    (self._limit,),
                )
                if oldest_wall is not None:
                    connection.execute(f"DELETE FROM {table} WHERE created_wall < ?", (oldest_wall,))  # noqa: S608


def _anchor(connection: sqlite3.Connection, boot: str, offset: float) -> float:
    """The offset of wall time to monotonic time that was stored in this boot of the machine, else this one."""
    found = connection.execute("SELECT offset FROM anchor WHERE boot = ?", (boot,)).fetchone()
    if found is not None and boot:
        return float(found[0])
    with connection:
        connection.execute("DELETE FROM anchor")
        connection.execute("INSERT INTO anchor VALUES (?, ?)", (boot, offset))
    return offset


def _crc(row: tuple[Any, ...]) -> int:
    """SQLite checks its own structure, not what the rows hold."""
    return zlib.crc32(repr(row).encode())


def _decode(text: bytes) -> str:
    """A damaged row must not keep the others from being read; its checksum shows it."""
    return text.decode(errors="replace")


def _insert(connection: sqlite3.Connection, table: str, rows: Iterable[tuple[str, str, bytes, Answer]]) -> None:
    places = ", ".join("?" * (len(Row._fields) + 1))
    stored = (
        (
            scope,
            model,
            digest,
            answer.variant,
            answer.model_sha256,
            answer.label,
            answer.confidence,
            str(answer.tier),
            answer.target,
            answer.provider,
            answer.packed,
            answer.created_wall,
        )
        for scope, model, digest, answer in rows
    )
    connection.executemany(
        f"INSERT OR REPLACE INTO {table} ({_COLUMNS}) VALUES ({places})",  # noqa: S608
        ((*row, _crc(row)) for row in stored),
    )
