"""Reading the outbox's file: the next items of a route, and who has any."""

from __future__ import annotations

import sqlite3

from agent.store.outbox_file import Stored
from agent.store.outbox_tables import BY_PRODUCER, ROW, checksum


def page(
    connection: sqlite3.Connection, route: str, after: int, rows: int, max_bytes: int, producer: str | None = None
) -> list[Stored]:
    """The next items of a route, or of one producer on it, oldest first: at most `rows`, and not many more than
    `max_bytes`."""
    found, size = [], 0
    # A single range of an index, whose entries end with seq: nothing is sorted, however much there is.
    if route != BY_PRODUCER:
        among = f"INDEXED BY items_route WHERE route <> '{BY_PRODUCER}' AND route = ?1"
    elif producer is not None:
        among = f"INDEXED BY items_producer WHERE route = '{BY_PRODUCER}'"
    else:
        among = "WHERE route = ?1"
    if producer is not None:
        among += " AND producer = ?2"
    for seq, way, name, id_, created, crc, head, body in connection.execute(
        f"SELECT {ROW} FROM items {among} AND seq > ?3 ORDER BY seq LIMIT ?4",  # noqa: S608
        (route, producer, after, rows),
    ):
        whole = crc == checksum(way, name, id_, f" {created!r}", head, body)
        found.append(Stored(seq, route, name, id_, head, body, created, whole))
        size += found[-1].size
        if size >= max_bytes:
            break
    return found


def producers(connection: sqlite3.Connection) -> list[str]:
    """Everybody who has an item on the route `BY_PRODUCER`. One step in the index for each, however many they have."""
    among = f"items INDEXED BY items_producer WHERE route = '{BY_PRODUCER}'"
    rows = connection.execute(
        f"WITH RECURSIVE each(name) AS (SELECT MIN(producer) FROM {among} UNION ALL"  # noqa: S608
        f" SELECT (SELECT MIN(producer) FROM {among} AND producer > name) FROM each"
        " WHERE name IS NOT NULL) SELECT name FROM each WHERE name IS NOT NULL"
    )
    return [name for (name,) in rows]
