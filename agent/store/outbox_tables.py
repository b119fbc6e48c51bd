"""The outbox's tables: made, checked when the file is opened, and repaired where what is derived can be made anew.

SQLite's `quick_check` finds pages that do not fit together. One bit that flips within a value, in an index, in a total
or in the text of a table's definition is found here.
"""

from __future__ import annotations

import contextlib
import json
import logging
import sqlite3
import zlib
from pathlib import Path

from agent.store import outbox_known
from agent.store.sqlite_file import BUSY_S, check, check_header

log = logging.getLogger(__name__)

SCHEMA_VERSION = 2
ROW_BYTES = 160
"""Counted for each row on top of what it holds: its columns, and its places in the indexes."""
BY_PRODUCER = "ask"
"""The route whose items are looked for by producer. Those of every other are looked for in their order."""
ROW = (
    "seq, COALESCE(CAST(route AS TEXT), ''), COALESCE(CAST(producer AS TEXT), ''), COALESCE(CAST(id AS TEXT), ''),"
    " COALESCE(CAST(created AS REAL), 0.0), crc, COALESCE(CAST(head AS BLOB), x''), COALESCE(CAST(body AS BLOB), x'')"
)
"""Columns of `items` in their types, whatever a flipped bit made of them: the checksum shows it."""
_TABLES = (
    "CREATE TABLE IF NOT EXISTS items (seq INTEGER PRIMARY KEY, route TEXT NOT NULL, producer"
    " TEXT NOT NULL, id TEXT NOT NULL, created REAL NOT NULL, key TEXT, crc INTEGER NOT NULL,"
    " head BLOB NOT NULL, body BLOB NOT NULL)",
    f"CREATE INDEX IF NOT EXISTS items_producer ON items (producer) WHERE route = '{BY_PRODUCER}'",
    f"CREATE INDEX IF NOT EXISTS items_route ON items (route) WHERE route <> '{BY_PRODUCER}'",
    outbox_known.SCHEMA,
    "CREATE TABLE IF NOT EXISTS totals (route TEXT PRIMARY KEY, rows INTEGER NOT NULL, bytes INTEGER NOT NULL)",
    "CREATE TABLE IF NOT EXISTS clock (running_s REAL NOT NULL)",
)


def checksum(route: str, producer: str, id_: str, created: str, head: bytes, body: bytes) -> int:
    """`created`: a space, and the number as Python writes it."""
    return zlib.crc32(b"".join((f"{route} {producer} {id_}{created}".encode(), head, body)))


def connect(path: Path) -> sqlite3.Connection:
    """Letters that a flipped bit made unreadable keep no row from being read or deleted."""
    connection = sqlite3.connect(path, timeout=BUSY_S, check_same_thread=False, isolation_level=None)
    connection.text_factory = lambda text: text.decode(errors="replace")
    return connection


def open_tables(path: Path, *, checked: bool, doubted: bool) -> tuple[sqlite3.Connection, int]:
    """A connection that may write, and how many items were given up because they are damaged. `checked`: the file was
    opened before in this run; `doubted`: and was found damaged since. Raises `sqlite3.DatabaseError` if it cannot be
    repaired, other `sqlite3.Error` and `OSError` if something else is in the way."""
    if not checked:
        check_header(path)
    connection = connect(path)
    try:
        if not checked:
            check(connection, SCHEMA_VERSION, 1)
        _make(connection)
        given_up = 0
        if not checked or doubted:
            _check_definitions(connection)
            if doubted or connection.execute("PRAGMA integrity_check(1)").fetchall() != [("ok",)]:
                given_up = _repair(connection)
            _count(connection)
    except (TypeError, ValueError, OverflowError) as error:  # a name that is not UTF-8, a number that is none
        connection.close()
        raise sqlite3.DatabaseError(f"what it holds cannot be read: {error!r}") from None
    except BaseException:
        connection.close()
        raise
    return connection, given_up


def _make(connection: sqlite3.Connection) -> None:
    run = connection.execute
    run("PRAGMA journal_mode = WAL")
    run("PRAGMA synchronous = FULL")
    run("BEGIN IMMEDIATE")
    columns = [row[1] for row in run("PRAGMA table_info(known)")]
    of_version_1 = bool(columns) and "seq" not in columns  # not by its number, in which a bit may have flipped
    if of_version_1:
        run("ALTER TABLE known RENAME TO known_1")
    for statement in _TABLES:
        run(statement)
    if of_version_1:
        names = "producer, key, id, question, created"
        run(f"INSERT INTO known ({names}) SELECT {names} FROM known_1 ORDER BY created")  # noqa: S608
        run("DROP TABLE known_1")
    for _ in range(2 - run("SELECT COUNT(*) FROM clock").fetchone()[0]):  # twice: of two, a bit flips in one
        run("INSERT INTO clock SELECT COALESCE(MIN(running_s), 0) FROM clock")
    run(f"PRAGMA user_version = {SCHEMA_VERSION}")
    run("COMMIT")


def _check_definitions(connection: sqlite3.Connection) -> None:
    """A column that a flipped bit renamed, or an index that holds other rows than it should."""
    names = "SELECT type, name, tbl_name, sql FROM sqlite_schema"
    with contextlib.closing(sqlite3.connect(":memory:", isolation_level=None)) as new:
        for statement in _TABLES:
            new.execute(statement)
        if not set(new.execute(names)) <= set(connection.execute(names)):
            raise sqlite3.DatabaseError("its tables are not those that were made")


def _repair(connection: sqlite3.Connection) -> int:
    """Make anew what is derived from the rows, and give up those that are not whole: a row with another route or
    producer than it had would be looked for by nobody."""
    run = connection.execute
    run("BEGIN IMMEDIATE")
    run("REINDEX")
    damaged = [
        (seq, id_)
        for seq, route, producer, id_, created, crc, head, body in run(f"SELECT {ROW} FROM items")  # noqa: S608
        if crc != checksum(route, producer, id_, f" {created!r}", head, body)
    ]
    for seq, id_ in damaged:
        log.error("a stored item is damaged", extra={"id": id_})
        run("DELETE FROM items WHERE seq = ?", (seq,))
    ids = json.dumps([id_ for _, id_ in damaged])
    run("DELETE FROM known WHERE id IN (SELECT value FROM json_each(?))", (ids,))  # they may come again
    run(
        "DELETE FROM known WHERE typeof(producer) <> 'text' OR typeof(key) <> 'text' OR typeof(id) <> 'text'"
        " OR typeof(question) <> 'blob' OR typeof(created) <> 'real'"
    )
    run("UPDATE clock SET running_s = (SELECT COALESCE(CAST(MIN(running_s) AS REAL), 0.0) FROM clock)")
    run("DELETE FROM totals")
    run("COMMIT")
    check(connection, SCHEMA_VERSION, whole=True)
    return len(damaged)


def _count(connection: sqlite3.Connection) -> None:
    """Totals have no checksum: one bit of theirs would have whatever comes refused, or what is there dropped."""
    run = connection.execute
    there = (
        f"SELECT CAST(route AS TEXT), COUNT(*), SUM({ROW_BYTES} + COALESCE(length(head) + length(body), 0))"  # noqa: S608
        " FROM items GROUP BY 1"
    )
    if set(run(there)) != set(run("SELECT route, rows, bytes FROM totals WHERE rows <> 0")):
        run("BEGIN IMMEDIATE")
        run("DELETE FROM totals")
        run(f"INSERT INTO totals {there}")
        run("COMMIT")
