"""The outbox: what was accepted is on the disk, and stays there until it was answered and delivered.

    put -> waits for company -> one commit for all -> whoever waits is told -> ... -> removed

One thread owns the file. Whoever puts something in is told only after the commit that holds it, or gets the reason why
there was none; a refusal may hide an item that reached the disk all the same (a failing disk), never the reverse.
Opening and checking the file happens in that thread too: a large outbox delays nobody's start.
"""

from __future__ import annotations

import contextlib
import logging
import sqlite3
import threading
from collections import Counter, deque
from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

from agent.config import OutboxSection
from agent.core.clock import Clock
from agent.core.errors import InferenceError, NotStored, OutboxFull
from agent.core.lasting import lasting_thread
from agent.store.outbox_file import (
    Change,
    Expire,
    Item,
    OutboxFile,
    Put,
    Receipt,
    Remove,
    Step,
    Stored,
)
from agent.store.outbox_known import KnownKeys
from agent.store.outbox_page import page, producers
from agent.store.outbox_tables import BY_PRODUCER, connect
from agent.store.sqlite_file import FolderLock, is_damage, put_aside, words

__all__ = ["BY_PRODUCER", "Expire", "Item", "Outbox", "Put", "Receipt", "Remove", "Stored"]

log = logging.getLogger(__name__)

Result: TypeAlias = Receipt | InferenceError
Done: TypeAlias = Callable[[Result], None]
Fresh: TypeAlias = AbstractSet[tuple[str, str]]
"""Pairs of route and producer."""
Told: TypeAlias = list[tuple[Done, Result]]
Waiting: TypeAlias = tuple[Change, Done | None]
"""A change, and who is to be told of it."""

T = TypeVar("T")

BATCH = 512
"""Changes in one transaction."""
FAILED_S = 0.01
"""Between two batches that the disk did not take."""
RETRY_S = 1.0
"""While the file cannot be used: between two tries."""
CLOSE_S = 10.0
CHECKING = "being checked"
EVENTS = (
    "accepted",
    "duplicate",
    "answered",
    "delivered",
    "refused",
    "dropped",
    "expired",
    "undeliverable",
    "damaged",
    "failed",
)
"""What happens to items: together with the rows that are there, they account for every one that was accepted."""


class Outbox:
    """`deliver` hands a list of callbacks and their results to where they are to be called; by default the thread calls
    them itself. `stored` is called the same way with who has something new where, and with None when the file was
    opened, so that anybody may. `step` is told each step of an item's life, for tests that end the process there.
    `events` goes on being counted in."""

    def __init__(
        self,
        path: Path,
        settings: OutboxSection,
        clock: Clock,
        *,
        deliver: Callable[[Callable[[], None]], None] = lambda call: call(),
        step: Step = lambda name: None,
        events: Counter[str] | None = None,
    ) -> None:
        self._path = path
        self._settings = settings
        self._clock = clock
        self._deliver = deliver
        self._step = step
        self.stored: Callable[[Fresh | None], None] = lambda fresh: None
        self._queue: deque[Waiting] = deque()
        self._leaving: set[int] = set()
        self._puts = 0
        self._mutex = threading.Lock()
        self._changed = threading.Condition(self._mutex)
        self._closing = False
        self._hurry = False
        self._thread: threading.Thread | None = None
        self._lock = FolderLock(path.parent)
        self._file: OutboxFile | None = None
        self._known = KnownKeys()
        self._reader: sqlite3.Connection | None = None
        self._reading = threading.Lock()
        self._checked = False
        self._suspect = False
        self._doubted = False
        self._opened_at = 0.0
        self._running_s = 0.0
        self._highest = 0
        self._at_hand: Sequence[Waiting] = ()
        self._error: str | None = CHECKING
        self._events: Counter[str] = Counter() if events is None else events
        self._events.update(dict.fromkeys(EVENTS, 0))
        self._rows: Counter[str] = Counter()
        self._bytes: Counter[str] = Counter()
        self.set_aside: str | None = None

    # --- what others ask -----------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin to open the file; returns at once."""
        self._thread = lasting_thread("outbox", self._run)

    def put(self, items: Sequence[Item], done: Done, *, replaces: int | None = None, in_turn: bool = False) -> None:
        """Store all of them or none, and call `done` with a `Receipt` when they are on the disk, else with the reason
        why not: `OutboxFull` or `NotStored`. `replaces`, `in_turn`: as in `Put`. Of any thread; never waits."""
        with self._mutex:  # the same lock as the condition's, taken in a third of the time
            refusal = self._refusal(replaces)
            if refusal is None:
                self._queue.append((Put(items, replaces, in_turn), done))
                self._puts += 1
                if self._puts in (1, self._settings.commit_rows):  # what the thread may be waiting for
                    self._changed.notify_all()
        if refusal is not None:
            done(refusal)

    def remove(self, seq: int, why: str) -> None:
        """Have a row deleted with the next commit, or with one after it if that fails. `page` shows it no more."""
        self._leaving.add(seq)
        self._also(Remove(seq, why))

    def expire(self) -> None:
        """Have rows deleted that are older than `max_age_s`, of every route but `BY_PRODUCER`."""
        for route, rows in self._rows.items():
            if rows and route != BY_PRODUCER:
                self._also(Expire(route, self.running_s() - self._settings.max_age_s))

    def page(
        self, route: str, after: int, rows: int, max_bytes: int = 4 << 20, producer: str | None = None
    ) -> list[Stored]:
        """The next items of a route, or of one producer on it, oldest first. Blocking. Raises `NotStored` while the
        file cannot be read."""
        leaving = self._leaving.copy()
        while True:
            found = self._read(lambda reader: page(reader, route, after, rows, max_bytes, producer))  # noqa: B023
            staying = [stored for stored in found if stored.seq not in leaving]
            if staying or not found:  # a page of nothing but those that leave is not the end
                return staying
            after = found[-1].seq

    def producers(self) -> list[str]:
        """Everybody who has an item on the route `BY_PRODUCER`. Blocking. Raises as `page` does."""
        return self._read(producers)

    def _read(self, read: Callable[[sqlite3.Connection], list[T]]) -> list[T]:
        with self._reading:
            try:
                if not self.ready:
                    raise NotStored(f"the outbox cannot be read: {self._error}")
                if self._reader is None:
                    self._reader = connect(self._path)
                    self._reader.execute("PRAGMA query_only = TRUE")
                return read(self._reader)
            except sqlite3.Error as error:
                self._close_reader()
                self._suspect = is_damage(error)
                self.flush()
                raise NotStored(f"the outbox cannot be read: {words(error, self._path)}") from None

    @property
    def ready(self) -> bool:
        """Whether the file is open."""
        return self._file is not None

    @property
    def checking(self) -> bool:
        """Whether the file is being opened and checked for the first time."""
        return self._error == CHECKING

    def rows(self, route: str) -> int:
        return self._rows[route]

    def running_s(self) -> float:
        """How long a daemon has run with this outbox, over all its starts."""
        return self._running_s + (self._clock.monotonic() - self._opened_at if self.ready else 0.0)

    def age_s(self, stored: Stored) -> float:
        """In running time: no wall clock takes part."""
        return self.running_s() - stored.created

    def problem(self) -> str:
        """Why nothing can be accepted now, in the system's words, or that a file was set aside; empty: all is well."""
        if self._error is not None:
            return self._error
        return "" if self.set_aside is None else f"a damaged file was set aside: {self.set_aside}"

    def stats(self) -> dict[str, Any]:
        """For `/status`: plain JSON types."""
        return {
            "path": str(self._path),
            "rows": {route: count for route, count in self._rows.items() if count},
            "bytes": self._bytes.total(),
            "max_rows": self._settings.max_rows,
            "max_bytes": self._settings.max_bytes,
            "full": self._settings.full,
            "waiting": len(self._queue),
            "events": dict(self._events),
            "error": self._error,
            "set_aside": self.set_aside,
        }

    def flush(self) -> None:
        """Have what waits committed now."""
        with self._changed:
            self._hurry = True
            self._changed.notify_all()

    def close(self, timeout_s: float = CLOSE_S) -> None:
        """Commit what waits and end the thread. Blocking, for at most `timeout_s`."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join(timeout_s)
            self._thread = None

    def _refusal(self, replaces: int | None) -> InferenceError | None:
        """Why nothing is taken now. The lock is held."""
        if self._closing:
            return NotStored("the outbox is closed")
        if replaces is None and self._puts >= self._settings.max_waiting:
            return OutboxFull(f"{self._puts} items wait for the disk already", retry_after_s=1.0)
        return None

    def _also(self, change: Change) -> None:
        with self._changed:
            self._queue.append((change, None))
            if len(self._queue) == 1:
                self._changed.notify_all()

    # --- the thread ----------------------------------------------------------------------------------------------

    def _run(self) -> None:
        """The thread's work, until it is closed. Called again if it raised: the file is opened anew then, and who waits
        for what was at hand is told that nobody knows."""
        if self._at_hand:
            self._disconnect()
            self._checked, self._doubted = False, True
            self._error = "it failed, and is opened again"
            self._not_taken(self._at_hand, NotStored("the outbox failed while it was being written", retry_after_s=1.0))
            self._at_hand = ()
        while True:
            if self._suspect:
                self._suspect, self._checked, self._doubted = False, False, True
                self._disconnect()
            if self._file is None:
                self._open()
            with self._changed:
                if self._file is None and not self._puts:
                    self._changed.wait_for(lambda: self._puts or self._closing, RETRY_S)
                elif not self._queue:
                    self._changed.wait_for(lambda: self._queue or self._closing or self._suspect)
                if self._file is not None:
                    self._changed.wait_for(self._enough, self._settings.commit_wait_ms / 1e3)
                batch = [self._queue.popleft() for _ in range(min(BATCH, len(self._queue)))]
                self._puts -= sum(done is not None for _, done in batch)
                self._hurry = False
                ending = self._closing and (not self._queue or self._file is None)
            self._at_hand = batch
            failed = bool(batch) and not self._commit(batch)
            self._at_hand = ()
            if ending:
                break
            if failed:  # A try for each batch, but not thousands of them in a second.
                threading.Event().wait(FAILED_S)
        closed = NotStored("the outbox was closed before it could be written")
        self._tell([(done, closed) for _, done in self._queue if done])
        self._keep_time()
        self._disconnect()
        self._lock.release()

    def _keep_time(self) -> None:
        """How long it ran, also where nothing was committed of late: or what waits would grow no older by it."""
        if self._file is not None and self._file.tally.rows.total():
            with contextlib.suppress(sqlite3.Error):
                self._file.apply([], self.running_s())

    def _enough(self) -> bool:
        return self._puts >= self._settings.commit_rows or len(self._queue) >= BATCH or self._hurry or self._closing

    def _commit(self, batch: Sequence[Waiting]) -> bool:
        """False: it failed, and whoever waited was told."""
        self._step("gathered")
        try:
            if self._file is None:
                self._open(fail=True)
            assert self._file is not None
            outcomes = self._file.apply([change for change, _ in batch], self.running_s())
        except (sqlite3.Error, OSError) as error:
            why = self._failed(error)
            self._not_taken(batch, NotStored(f"the disk did not take it: {why}", retry_after_s=10.0))
            return False
        self._publish_tally()
        told: Told = []
        fresh: set[tuple[str, str]] = set()
        for (change, done), outcome in zip(batch, outcomes, strict=True):
            if type(change) is Remove:
                self._leaving.discard(change.seq)
            elif done is not None and outcome is not None:
                told.append((done, outcome))
                if type(change) is Put and type(outcome) is Receipt and outcome.seqs:
                    for item in change.items:
                        fresh.add((item.route, item.producer))
        self._tell(told)
        self._step("told")
        if fresh:
            self._deliver(lambda: self.stored(fresh))
        return True

    def _not_taken(self, batch: Sequence[Waiting], why: NotStored) -> None:
        """Tell who waited. What was only to be deleted is deleted later: it is not to be sent again."""
        self._events["failed"] += sum(done is not None for _, done in batch)
        with self._changed:
            self._queue.extendleft(reversed([waiting for waiting in batch if isinstance(waiting[0], Remove)]))
        self._tell([(done, why) for _, done in batch if done])

    def _tell(self, told: Told) -> None:
        if told:
            self._deliver(lambda: _call(told))

    def _publish_tally(self) -> None:
        assert self._file is not None
        tally = self._file.tally
        self._rows, self._bytes = tally.rows.copy(), tally.bytes.copy()
        self._events.update(tally.events)
        tally.events.clear()
        self._highest = max(self._highest, self._file.highest)

    def _open(self, *, fail: bool = False) -> None:
        """Open the file, or a new one if it is damaged. `fail`: raise rather than note why that is impossible."""
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._lock.take()
            try:
                file = self._new_file()
            except sqlite3.DatabaseError as error:
                if not is_damage(error):
                    raise
                self.set_aside = put_aside(self._path, error, log_too=True).name
                self._checked = self._doubted = False
                file = self._new_file()
        except (sqlite3.Error, OSError) as error:
            if fail:
                raise
            self._failed(error)
            return
        self._checked, self._doubted = True, False
        self._running_s = max(file.running_s, self.running_s())
        self._opened_at = self._clock.monotonic()
        if self._error is not None:
            log.info("outbox open", extra={"path": str(self._path), "rows": file.tally.rows.total()})
        self._file, self._error = file, None
        self._publish_tally()
        self._deliver(lambda: self.stored(None))

    def _new_file(self) -> OutboxFile:
        return OutboxFile(
            self._path,
            self._settings,
            self._step,
            first_seq=self._highest,
            checked=self._checked,
            doubted=self._doubted,
            known=self._known,
        )

    def _failed(self, error: sqlite3.Error | OSError) -> str:
        if isinstance(error, sqlite3.Error) and is_damage(error):
            self._checked, self._doubted = False, True
        self._disconnect()
        why = words(error, self._path)
        if why != self._error:
            log.error("outbox cannot be used: %s", why, extra={"path": str(self._path)})
        self._error = why
        return why

    def _disconnect(self) -> None:
        running_s = self.running_s()
        file, self._file = self._file, None
        self._running_s = running_s  # not before: who asks meanwhile would add the time since the file was opened again
        if file is not None:
            file.close()
        with self._reading:
            self._close_reader()

    def _close_reader(self) -> None:
        reader, self._reader = self._reader, None
        if reader is not None:
            reader.close()


def _call(told: Told) -> None:
    for done, result in told:
        try:
            done(result)
        except Exception:
            log.exception("a callback of the outbox failed")
