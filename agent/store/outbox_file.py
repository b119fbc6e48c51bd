"""The outbox's file: SQLite with a write-ahead log, synced at every commit. One thread writes, another may read.

Each batch of changes is one transaction. Rows carry a checksum, as SQLite checks its own structure only. Ages are
counted in running time of the daemon, which is stored with every commit: no wall clock takes part.
"""

from __future__ import annotations

import contextlib
import sqlite3
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import NamedTuple, TypeAlias

from agent.config import OutboxSection
from agent.core.errors import InvalidRequest, NotStored, OutboxFull
from agent.store.outbox_known import Key, KnownKeys
from agent.store.outbox_tables import BY_PRODUCER, ROW_BYTES, checksum, open_tables

REMEMBERED_PER_ROW = 4
"""Keys remembered for each row that the outbox may hold, so that a repeat is known after its item was delivered."""
PURGE_SHARE = 16
"""The remembered keys are looked through after this part of them was added."""
ARRIVAL_S = 600.0
"""How long a message that the broker sends again is known by its packet identifier and content, in running time: the
identifier is another message's later on, and a sensor may well say the same again."""
AT_ONCE = 512
"""Rows of one statement where as many are to be inserted: 4,608 values, of the 32,766 that SQLite binds."""
Step: TypeAlias = Callable[[str], None]


class Item(NamedTuple):
    """What is to be kept. `head` says what is to be done with `body`; the outbox reads neither.

    `key`: how a repeat of it is known, for this producer; None: it is never one. `repeat` False says that it cannot be
    a repeat, whatever is remembered of the key.
    """

    route: str
    producer: str
    id: str
    head: bytes
    body: bytes
    key: str | None = None
    repeat: bool = True
    question: bytes = b""
    """What was asked under the key, in short: another question under the same key is refused."""

    @property
    def size(self) -> int:
        return ROW_BYTES + len(self.head) + len(self.body)


class Stored(NamedTuple):
    """An item in its place. `created` is in running time. `whole`: its checksum is right."""

    seq: int
    route: str
    producer: str
    id: str
    head: bytes
    body: bytes
    created: float
    whole: bool

    @property
    def size(self) -> int:
        return ROW_BYTES + len(self.head) + len(self.body)


class Receipt(NamedTuple):
    """`seqs` are where the items are, in their order. `id` is the one under which it was first stored, `duplicate`
    says that this was before. Empty and no duplicate: what was to be replaced is there no more, so nothing was stored.
    """

    seqs: tuple[int, ...]
    id: str
    duplicate: bool = False


@dataclass(slots=True)
class Put:
    """Store items, all or none of them. `replaces`: in place of that row, whose id they have and whose key the first
    one inherits. `in_turn`: not while the producer has an earlier row on the route `BY_PRODUCER`."""

    items: Sequence[Item]
    replaces: int | None = None
    in_turn: bool = False


@dataclass(slots=True)
class Remove:
    """Delete a row. `why` is counted: `delivered`, `undeliverable`, `damaged`."""

    seq: int
    why: str


@dataclass(slots=True)
class Expire:
    """Delete rows of a route (not of `BY_PRODUCER`) created before `before`, at most `limit` of them."""

    route: str
    before: float
    limit: int = 1000


Change: TypeAlias = Put | Remove | Expire
Outcome: TypeAlias = Receipt | OutboxFull | NotStored | InvalidRequest | None


@dataclass(slots=True)
class Tally:
    """What the file holds, by route, and what has happened to it."""

    rows: Counter[str] = field(default_factory=Counter)
    bytes: Counter[str] = field(default_factory=Counter)
    events: Counter[str] = field(default_factory=Counter)

    def copy(self) -> Tally:
        return Tally(self.rows.copy(), self.bytes.copy(), self.events.copy())


class OutboxFile:
    """`first_seq` keeps numbers of a file that was set aside from being used again. `doubted`: it was found damaged
    while it was used. `known`: of the same file, opened before. Raises `sqlite3.Error`."""

    def __init__(
        self,
        path: Path,
        settings: OutboxSection,
        step: Step,
        *,
        first_seq: int,
        checked: bool,
        doubted: bool = False,
        known: KnownKeys | None = None,
    ) -> None:
        self._settings = settings
        self._step = step
        self._connection, given_up = open_tables(path, checked=checked, doubted=doubted)
        self._run = self._connection.execute
        self._known = KnownKeys() if known is None else known
        self._known.begin()
        self._purged = 0
        self._pending: list[tuple[object, ...]] = []
        self.tally = Tally()
        self.tally.events["damaged"] += given_up
        try:
            self._known.load(self._connection, anew=not checked or doubted)
            for route, rows, size in self._connection.execute("SELECT route, rows, bytes FROM totals"):
                self.tally.rows[route], self.tally.bytes[route] = rows, size
            self._rows, self._bytes = self.tally.rows.total(), self.tally.bytes.total()
            (self.running_s,) = self._connection.execute("SELECT MIN(running_s) FROM clock").fetchone()
            (highest,) = self._connection.execute("SELECT MAX(seq) FROM items").fetchone()
            self.highest = max(first_seq, highest or 0)
            if not checked:  # the keys of many short runs are too many as well
                with contextlib.suppress(sqlite3.OperationalError):  # from a full disk can be read all the same
                    self._purge(self.running_s)
                    self._known.drop(self._purged)
        except TypeError as error:  # a place or a sum that is no number any more
            self._connection.close()
            raise sqlite3.DatabaseError(f"what it holds cannot be read: {error!r}") from None
        except BaseException:
            self._connection.close()
            raise

    def close(self) -> None:
        self._connection.close()

    def apply(self, changes: Sequence[Change], running_s: float) -> list[Outcome]:
        """One transaction for all. When this returns, they are on the disk. Raises `sqlite3.Error`: none of them is."""
        run = self._connection.execute
        before, self.tally = self.tally, self.tally.copy()
        self._pending.clear()
        self._known.begin()
        self._purged, highest = 0, self.highest
        try:
            run("BEGIN IMMEDIATE")
            self._step("begun")
            if self._known.remembered * PURGE_SHARE > REMEMBERED_PER_ROW * self._settings.max_rows:
                self._purge(running_s)
            outcomes = self._all_new(changes, running_s)
            if outcomes is None:
                outcomes = [
                    self._put(change, running_s) if type(change) is Put else self._change(change) for change in changes
                ]
            self._flush()
            if remembered := self._known.rows():
                self._insert_all("known", remembered)
            run("UPDATE clock SET running_s = ?", (running_s,))
            for route, rows in self.tally.rows.items():
                if (rows, self.tally.bytes[route]) != (before.rows[route], before.bytes[route]):
                    run("INSERT OR REPLACE INTO totals VALUES (?, ?, ?)", (route, rows, self.tally.bytes[route]))
            self._step("written")
            run("COMMIT")
        except BaseException:
            self.tally, self.highest = before, highest
            self._rows, self._bytes = before.rows.total(), before.bytes.total()
            raise
        self._step("committed")
        self.running_s = running_s
        self._known.remembered = len(remembered) + (0 if self._purged else self._known.remembered)
        self._known.committed()
        if self._purged:
            self._known.drop(self._purged)
        return outcomes

    def _all_new(self, changes: Sequence[Change], running_s: float) -> list[Outcome] | None:
        """The common case in two statements instead of two for each item: nothing but new items, for all of which there
        is room. None: it is another case, and nothing was changed."""
        keys: list[Key] = []
        rows: list[tuple[object, ...]] = []
        sizes: Counter[str] = Counter()
        receipts: list[Outcome] = []
        at, created = self.highest, f" {running_s!r}"
        for change in changes:
            if type(change) is not Put or change.replaces is not None or len(change.items) != 1:
                return None
            item = change.items[0]
            route, producer, id_, head, body, key, _repeat, question = item
            if key is not None:
                keys.append(Key(producer, key, id_, question, running_s))
            at += 1
            crc = checksum(route, producer, id_, created, head, body)
            rows.append((at, route, producer, id_, running_s, key, crc, head, body))
            sizes[route] += ROW_BYTES + len(head) + len(body)
            receipts.append(Receipt((at,), id_))
        settings, count, size = self._settings, len(rows), sizes.total()
        if not rows or self._rows + count > settings.max_rows or self._bytes + size > settings.max_bytes:
            return None
        if not self._known.add_all_new(keys):
            return None
        self.tally.events["accepted"] += count
        self._pending += rows
        self.highest = at
        self.tally.rows.update(row[1] for row in rows)  # type: ignore[misc]
        self.tally.bytes.update(sizes)
        self._rows += count
        self._bytes += size
        return receipts

    def _change(self, change: Change) -> Outcome:
        if isinstance(change, Remove):
            self._delete("seq = ?", (change.seq,), change.why, forget=change.why != "delivered")
        elif isinstance(change, Expire):
            self._expire(change)
        return None

    def _put(self, put: Put, running_s: float) -> Outcome:
        first = put.items[0]
        if put.replaces is not None:
            if put.in_turn and self._earlier(first.producer, put.replaces):
                return NotStored("an earlier request of the producer has no answer on the disk", retry_after_s=1.0)
            gone = self._delete("seq = ?", (put.replaces,), "answered")
            if not gone:
                return Receipt((), first.id)
            key = gone[0]
        else:
            key = first.key
            before = self._remember(first, running_s)
            if isinstance(before, InvalidRequest):
                return before
            if before is not None:
                self.tally.events["duplicate"] += 1
                return Receipt((), before, True)
            refusal = self._make_room(put.items)
            if refusal is not None:
                self._forget(first.producer, key, first.id)
                self.tally.events["refused"] += 1
                return refusal
            self.tally.events["accepted"] += 1
        seqs = []
        for item in put.items:
            seqs.append(self._insert(item, running_s, key, item.size))
            key = None
        return Receipt(tuple(seqs), first.id)

    def _earlier(self, producer: str, seq: int) -> bool:
        self._flush()
        among = f"items INDEXED BY items_producer WHERE route = '{BY_PRODUCER}'"
        row = self._run(
            f"SELECT 1 FROM {among} AND producer = ? AND seq < ? LIMIT 1",  # noqa: S608
            (producer, seq),
        ).fetchone()
        return row is not None

    def _insert(self, item: Item, running_s: float, key: str | None, size: int) -> int:
        """Its place. It is written with others, before the next change that might look for it."""
        self.highest = seq = self.highest + 1
        crc = checksum(item.route, item.producer, item.id, f" {running_s!r}", item.head, item.body)
        self._pending.append((seq, item.route, item.producer, item.id, running_s, key, crc, item.head, item.body))
        self.tally.rows[item.route] += 1
        self.tally.bytes[item.route] += size
        self._rows += 1
        self._bytes += size
        return seq

    def _flush(self) -> None:
        if self._pending:
            self._insert_all("items", self._pending)
            self._pending.clear()
            self._step("inserted")

    def _insert_all(self, table: str, rows: Sequence[tuple[object, ...]]) -> None:
        """Many by one statement: for each the interpreter's lock is given away once, and whoever puts meanwhile would
        take it between any two rows."""
        places = f"({', '.join('?' * len(rows[0]))})"
        begin, end = f"INSERT INTO {table} VALUES ", len(rows) - len(rows) % AT_ONCE  # noqa: S608
        for start in range(0, end, AT_ONCE):
            values = list(chain.from_iterable(rows[start : start + AT_ONCE]))
            self._run(begin + ", ".join([places] * AT_ONCE), values)
        if end < len(rows):
            self._connection.executemany(begin + places, rows[end:])

    def _delete(self, where: str, values: Sequence[object], why: str, *, forget: bool = False) -> list[str | None]:
        """The keys they had. `forget`: they were not delivered, so that a repeat is to be taken again."""
        self._flush()
        rows = self._connection.execute(
            f"DELETE FROM items WHERE {where} RETURNING CAST(route AS TEXT),"  # noqa: S608
            " COALESCE(length(head) + length(body), 0), producer, key, id",
            values,
        ).fetchall()
        for route, size, producer, key, id_ in rows:
            self.tally.rows[route] -= 1
            self.tally.bytes[route] -= ROW_BYTES + size
            self._rows -= 1
            self._bytes -= ROW_BYTES + size
            self.tally.events[why] += 1
            if forget:
                self._forget(producer, key, id_)
        return [key for *_, key, _ in rows]

    def _expire(self, expire: Expire) -> None:
        self._flush()
        # Later rows are younger: what comes before the first that is young enough is too old.
        young = self._connection.execute(
            f"SELECT seq FROM items INDEXED BY items_route WHERE route <> '{BY_PRODUCER}' AND route = ?"  # noqa: S608
            " AND created >= ? ORDER BY seq LIMIT 1",
            (expire.route, expire.before),
        ).fetchone()
        old = f"SELECT seq FROM items INDEXED BY items_route WHERE route <> '{BY_PRODUCER}' AND route = ? AND seq < ?"  # noqa: S608
        where = f"seq IN ({old} ORDER BY seq LIMIT ?)"
        values = (expire.route, young[0] if young is not None else self.highest + 1, expire.limit)
        self._delete(where, values, "expired", forget=True)

    def _make_room(self, items: Sequence[Item]) -> OutboxFull | None:
        """None: there is room now, by the policy."""
        settings, size = self._settings, items[0].size if len(items) == 1 else sum(item.size for item in items)
        if size > settings.max_bytes or len(items) > settings.max_rows:
            return OutboxFull(f"{size} bytes are more than the outbox may hold ({settings.max_bytes})")
        while self._rows + len(items) > settings.max_rows or self._bytes + size > settings.max_bytes:
            if settings.full == "reject":
                held = f"{self._rows} items of {self._bytes} bytes"
                return OutboxFull(f"the outbox is full: it holds {held}", retry_after_s=10.0)
            if not self._delete("seq = (SELECT MIN(seq) FROM items)", (), "dropped", forget=True):
                break
        return None

    def _remember(self, item: Item, running_s: float) -> str | InvalidRequest | None:
        """The id under which it was stored before; None: it was not, and is remembered from now on."""
        if item.key is None:
            return None
        before = self._known.find(self._connection, item.producer, item.key)
        if before is not None and item.repeat and not _lapsed(before, running_s):
            if before.question != item.question:
                return InvalidRequest("idempotency_key: was used for another question before", field="idempotency_key")
            return before.id
        key = Key(item.producer, item.key, item.id, item.question, running_s)
        self._known.add(self._connection, key, before)
        return None

    def _forget(self, producer: str, key: str | None, id_: str) -> None:
        if key is not None:
            known = self._known.find(self._connection, producer, key)
            if known is not None and known.id == id_:  # it may be another item's meanwhile
                self._known.forget(self._connection, known)

    def _purge(self, running_s: float) -> None:
        """Keys are remembered twice as long as an item may live, and in a bounded number."""
        young = self._connection.execute(
            "SELECT seq FROM known WHERE created >= ? ORDER BY seq LIMIT 1", (running_s - 2 * self._settings.max_age_s,)
        ).fetchone()
        oldest = self._known.oldest(REMEMBERED_PER_ROW * self._settings.max_rows)
        self._purged = max(1, oldest, self._known.end if young is None else young[0])
        self._connection.execute("DELETE FROM known WHERE seq < ?", (self._purged,))


def _lapsed(key: Key, running_s: float) -> bool:
    return key.key.startswith("mqtt:") and key.created < running_s - ARRIVAL_S
