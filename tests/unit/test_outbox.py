"""The outbox: told only after the commit, bounded, known again, checked at its start, honest about a broken disk."""

from __future__ import annotations

import errno
import os
import queue
import sqlite3
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from agent.config import OutboxSection
from agent.core.clock import ManualClock
from agent.core.errors import InferenceError, InvalidRequest, NotStored, OutboxFull
from agent.durable.records import arrival_key
from agent.store.outbox import Item, Outbox, Receipt
from agent.store.outbox_file import ROW_BYTES

LIMIT_S = 10.0
YEAR_S = 365 * 86_400.0


class Box:
    """An outbox in a folder, with calls that wait."""

    def __init__(self, folder: Path, clock: ManualClock | None = None, **settings: Any) -> None:
        self.path = folder / "outbox.sqlite"
        self.clock = clock or ManualClock()
        self.steps: Callable[[str], None] = lambda name: None
        section = OutboxSection(**{"enabled": True, "commit_wait_ms": 0, **settings})
        self.outbox = Outbox(self.path, section, self.clock, step=lambda name: self.steps(name))
        self.fresh: queue.Queue[Any] = queue.Queue()
        self.outbox.stored = self.fresh.put
        self.outbox.start()

    def opened(self) -> Box:
        self.fresh.get(timeout=LIMIT_S)
        assert self.outbox.ready
        return self

    def put(self, *items: Item, replaces: int | None = None) -> Receipt | InferenceError:
        told: queue.Queue[Receipt | InferenceError] = queue.Queue()
        self.outbox.put(items, told.put, replaces=replaces)
        return told.get(timeout=LIMIT_S)

    def ids(self, route: str = "out") -> list[str]:
        return [stored.id for stored in self.outbox.page(route, 0, 1000)]

    def settle(self) -> None:
        """Until what was asked before is done: a change after it is."""
        receipt = self.put(item("settle", route="ask"))
        assert isinstance(receipt, Receipt)

    def close(self) -> None:
        self.outbox.close()


@pytest.fixture
def box(tmp_path: Path) -> Iterator[Box]:
    box = Box(tmp_path).opened()
    yield box
    box.close()


def item(id_: str, *, route: str = "out", producer: str = "p", body: bytes = b"body", **changes: Any) -> Item:
    return Item(route, producer, id_, b"{}", body, **changes)


def test_who_puts_is_told_after_the_commit(tmp_path: Path) -> None:
    box = Box(tmp_path).opened()
    seen: queue.Queue[int] = queue.Queue()

    def look(result: object) -> None:
        with sqlite3.connect(box.path) as other:
            seen.put(other.execute("SELECT COUNT(*) FROM items").fetchone()[0])

    box.outbox.put([item("a"), item("b")], look)
    assert seen.get(timeout=LIMIT_S) == 2
    box.close()


def test_commits_are_synced() -> None:
    """What `synchronous=FULL` means is SQLite's business; that it is set on the connection that writes is ours."""
    from agent.store.outbox_file import OutboxFile

    file = OutboxFile(Path(":memory:"), OutboxSection(), lambda name: None, first_seq=0, checked=False)
    assert file._connection.execute("PRAGMA synchronous").fetchone() == (2,)
    file.close()


def test_items_share_a_commit(tmp_path: Path) -> None:
    box = Box(tmp_path, commit_wait_ms=1000, commit_rows=3).opened()
    commits: list[str] = []
    box.steps = lambda name: commits.append(name) if name == "committed" else None
    told: queue.Queue[Any] = queue.Queue()
    for id_ in "abc":
        box.outbox.put([item(id_)], told.put)
    for _ in range(3):
        told.get(timeout=LIMIT_S)
    assert len(commits) == 1
    box.close()


def test_order_and_routes(box: Box) -> None:
    for number in range(20):
        box.put(item(f"a{number}", route="a"), item(f"b{number}", route="b"))
    assert box.ids("a") == [f"a{number}" for number in range(20)]
    seqs = [stored.seq for stored in box.outbox.page("b", 0, 5)]
    assert seqs == sorted(seqs)
    assert [stored.id for stored in box.outbox.page("b", seqs[-1], 2)] == ["b5", "b6"]
    assert box.outbox.rows("a") == box.outbox.rows("b") == 20


def test_a_page_is_bounded_in_bytes(box: Box) -> None:
    for number in range(10):
        box.put(item(str(number), body=bytes(10_000)))
    assert len(box.outbox.page("out", 0, 100, max_bytes=25_000)) == 3


def test_a_repeat_is_acknowledged_and_not_stored(box: Box) -> None:
    first = box.put(item("a", key="k"))
    again = box.put(item("b", key="k"))
    assert isinstance(first, Receipt)
    assert again == Receipt((), "a", True)
    assert isinstance(box.put(item("c", key="k", producer="another")), Receipt)
    assert box.ids() == ["a", "c"]


def test_a_repeat_is_known_after_delivery_and_after_a_restart(tmp_path: Path) -> None:
    box = Box(tmp_path).opened()
    receipt = box.put(item("a", key="k"))
    assert isinstance(receipt, Receipt)
    box.outbox.remove(receipt.seqs[0], "delivered")
    box.close()
    box = Box(tmp_path).opened()
    assert box.put(item("b", key="k")) == Receipt((), "a", True)
    box.close()


def test_a_key_used_for_another_question_is_refused(box: Box) -> None:
    box.put(item("a", key="k", question=b"1"))
    refusal = box.put(item("b", key="k", question=b"2"))
    assert isinstance(refusal, InvalidRequest)
    assert refusal.field == "idempotency_key"
    assert box.ids() == ["a"]


def test_one_producer_among_many(box: Box) -> None:
    for number in range(30):
        asked = item(str(number), route="ask", producer=f"p{number % 3}")
        box.put(asked, item(f"o{number}", route="other", producer="o"))
    assert box.outbox.producers() == ["p0", "p1", "p2"]
    found = box.outbox.page("ask", 0, 3, producer="p1")
    assert [stored.id for stored in found] == ["1", "4", "7"]
    assert box.outbox.page("ask", found[-1].seq, 1, producer="p1")[0].id == "10"


def test_keys_are_remembered_in_a_bounded_number_and_time(tmp_path: Path) -> None:
    box = Box(tmp_path, max_rows=40, max_age_s=100).opened()
    for number in range(1000):
        receipt = box.put(item(str(number), key=str(number)))
        assert isinstance(receipt, Receipt)
        box.outbox.remove(receipt.seqs[0], "delivered")
        box.clock.advance(0.1)
    with sqlite3.connect(box.path) as other:
        (count,) = other.execute("SELECT COUNT(*) FROM known").fetchone()
    other.close()
    assert 4 * 40 <= count <= 4 * 40 + 4 * 40 // 16 + 1
    assert box.put(item("again", key="900")) == Receipt((), "900", True)
    box.clock.advance(300)
    for number in range(11):
        box.put(item(f"new {number}", key=f"new {number}"))
    assert box.put(item("again", key="900")) != Receipt((), "900", True)
    box.close()


def test_what_cannot_be_a_repeat_is_stored(box: Box) -> None:
    box.put(item("a", key="k"))
    assert box.put(item("b", key="k", repeat=False)) == Receipt((2,), "b")
    assert box.put(item("c", key="k")) == Receipt((), "b", True)


def test_an_answer_takes_the_place_of_its_question(box: Box) -> None:
    asked = box.put(item("q", route="ask", key="k"))
    assert isinstance(asked, Receipt)
    answered = box.put(item("q", route="local"), item("q", route="uplink"), replaces=asked.seqs[0])
    assert isinstance(answered, Receipt)
    assert len(answered.seqs) == 2
    assert (box.ids("ask"), box.ids("local"), box.ids("uplink")) == ([], ["q"], ["q"])
    assert box.put(item("again", route="ask", key="k")) == Receipt((), "q", True)
    assert box.put(item("late", route="local"), replaces=asked.seqs[0]) == Receipt((), "late")
    assert box.ids("local") == ["q"]


def test_full_and_refused(tmp_path: Path) -> None:
    box = Box(tmp_path, max_rows=2).opened()
    asked = box.put(item("a", route="ask"))
    box.put(item("b"))
    refusal = box.put(item("c"))
    assert isinstance(refusal, OutboxFull)
    assert "holds 2 items" in refusal.message
    assert isinstance(asked, Receipt)
    assert isinstance(box.put(item("a"), item("a2"), replaces=asked.seqs[0]), Receipt)  # an answer is never refused
    happened = {what: count for what, count in box.outbox.stats()["events"].items() if count}
    assert happened == {"accepted": 2, "refused": 1, "answered": 1}
    box.close()


def test_full_and_the_oldest_dropped(tmp_path: Path) -> None:
    box = Box(tmp_path, max_rows=2, full="drop_oldest").opened()
    for id_ in "abc":
        box.put(item(id_, key=id_))
    assert box.ids() == ["b", "c"]
    assert box.outbox.stats()["events"]["dropped"] == 1
    assert isinstance(box.put(item("a", key="a")), Receipt)  # what was dropped is no repeat: it was not delivered
    assert box.ids() == ["c", "a"]
    assert box.put(item("c", key="c")) == Receipt((), "c", True)  # a repeat drops nobody
    assert box.ids() == ["c", "a"]
    box.close()


def test_bounded_in_bytes(tmp_path: Path) -> None:
    box = Box(tmp_path, max_bytes=4096).opened()
    assert isinstance(box.put(item("a", body=bytes(3000))), Receipt)
    assert isinstance(box.put(item("b", body=bytes(3000))), OutboxFull)
    refusal = box.put(item("c", body=bytes(5000)))
    assert isinstance(refusal, OutboxFull)
    assert refusal.retry_after_s is None  # it never fits
    assert box.outbox.stats()["bytes"] == ROW_BYTES + 3002
    box.close()


def test_too_many_wait_for_the_disk(tmp_path: Path) -> None:
    box = Box(tmp_path, max_waiting=4, commit_rows=1).opened()
    held, entered = threading.Event(), threading.Event()

    def hold(name: str) -> None:
        if name == "begun":
            entered.set()
            assert held.wait(LIMIT_S)

    box.steps = hold
    told: queue.Queue[Any] = queue.Queue()
    box.outbox.put([item("0")], told.put)
    assert entered.wait(LIMIT_S)
    for number in range(1, 6):
        box.outbox.put([item(str(number))], told.put)
    assert isinstance(told.get(timeout=LIMIT_S), OutboxFull)
    held.set()
    assert all(isinstance(told.get(timeout=LIMIT_S), Receipt) for _ in range(5))
    box.close()


def test_age_is_running_time(tmp_path: Path) -> None:
    box = Box(tmp_path, max_age_s=100).opened()
    box.put(item("old", key="k"))
    for jump in (YEAR_S, -2 * YEAR_S):
        box.clock.jump(jump)
        box.outbox.expire()
        box.settle()
        assert box.ids() == ["old"]
    box.clock.advance(60)
    assert box.outbox.age_s(box.outbox.page("out", 0, 1)[0]) == 60
    box.put(item("young"))
    box.close()
    box = Box(tmp_path, ManualClock(5.0, YEAR_S), max_age_s=100).opened()  # another boot, and another year
    assert box.outbox.age_s(box.outbox.page("out", 0, 1)[0]) == 60
    box.clock.advance(50)
    box.outbox.expire()
    box.settle()
    assert box.ids() == ["young"]
    assert box.outbox.stats()["events"]["expired"] == 1
    assert isinstance(box.put(item("old", key="k")), Receipt)  # it was not delivered, so it is no repeat
    box.close()


def test_a_damaged_file_is_set_aside_and_named(tmp_path: Path) -> None:
    box = Box(tmp_path).opened()
    box.put(*(item(str(number), body=os.urandom(2000)) for number in range(50)))
    box.close()
    with box.path.open("r+b") as file:
        file.seek(4096)
        file.write(os.urandom(8192))
    box = Box(tmp_path).opened()
    assert box.ids() == []
    aside = box.outbox.set_aside
    assert aside is not None
    assert aside in box.outbox.problem()
    assert (tmp_path / aside).stat().st_size > 50 * 2000
    assert isinstance(box.put(item("new")), Receipt)
    box.close()


def test_damage_found_while_it_runs(box: Box) -> None:
    box.put(*(item(str(number), body=os.urandom(2000)) for number in range(200)))
    with sqlite3.connect(box.path) as other:
        other.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        assert other.execute("SELECT MAX(seq) FROM items").fetchone() == (200,)
    other.close()
    size = box.path.stat().st_size
    with box.path.open("r+b") as file:
        file.seek(4096)
        file.write(os.urandom(size - 8192))
    receipt: Receipt | InferenceError = NotStored("not asked yet")
    for _ in range(20):  # each try may meet the damage in another place; the caches of SQLite hide some of it
        receipt = box.put(item("new", body=os.urandom(100_000)))
        if box.outbox.set_aside is not None and isinstance(receipt, Receipt):
            break
    assert isinstance(receipt, Receipt)
    assert receipt.seqs[0] > 200  # so that no late acknowledgement of an old row deletes a new one


def test_a_damaged_row_is_seen(box: Box) -> None:
    box.put(item("a"), item("b"))
    with sqlite3.connect(box.path) as other:
        other.execute("UPDATE items SET body = 'bodY' WHERE id = 'a'")
    other.close()
    assert [(stored.id, stored.whole) for stored in box.outbox.page("out", 0, 9)] == [("a", False), ("b", True)]


def test_a_full_disk_refuses_and_recovers(box: Box) -> None:
    assert isinstance(box.put(item("a")), Receipt)
    file = box.outbox._file
    assert file is not None
    (pages,) = file._connection.execute("PRAGMA page_count").fetchone()
    file._connection.execute(f"PRAGMA max_page_count = {pages}")
    refusal = box.put(item("b", body=bytes(100_000), key="b"))
    assert isinstance(refusal, NotStored)
    assert "full" in refusal.message
    assert refusal.retry_after_s is not None
    assert isinstance(box.put(item("b", body=bytes(100_000), key="b")), Receipt)  # opened anew, without the limit
    assert box.ids() == ["a", "b"]
    assert box.outbox.problem() == ""
    assert box.outbox.stats()["events"]["failed"] == 1


@pytest.mark.parametrize(
    ("code", "number"),
    [(sqlite3.SQLITE_FULL, errno.ENOSPC), (sqlite3.SQLITE_READONLY, errno.EROFS), (sqlite3.SQLITE_IOERR, 0)],
)
def test_a_commit_that_fails_is_no_acknowledgement(
    box: Box, monkeypatch: pytest.MonkeyPatch, code: int, number: int
) -> None:
    error = sqlite3.OperationalError("disk I/O error")
    error.sqlite_errorcode = code

    def fail(name: str) -> None:
        if name == "written":
            raise error

    free = os.statvfs(box.path.parent)
    disk = list(free)
    disk[4] = 0 if number == errno.ENOSPC else free.f_bavail  # f_bavail
    disk[8] = os.ST_RDONLY if number == errno.EROFS else 0  # f_flag
    told = os.statvfs_result(tuple(disk))
    monkeypatch.setattr(os, "statvfs", lambda path: told)
    first = box.put(item("kept"))
    assert isinstance(first, Receipt)
    box.steps = fail
    refusal = box.put(item("refused", key="r"))
    assert isinstance(refusal, NotStored)
    assert (os.strerror(number) if number else "disk I/O error") in refusal.message
    box.outbox.remove(first.seqs[0], "delivered")  # cannot be written either, and must not be forgotten
    assert isinstance(box.put(item("refused", key="r")), NotStored)
    assert box.outbox.problem()
    box.steps = lambda name: None
    assert isinstance(box.put(item("refused", key="r")), Receipt)
    assert box.ids() == ["refused"]
    assert box.outbox.problem() == ""


def test_another_daemon_has_it(tmp_path: Path) -> None:
    first = Box(tmp_path).opened()
    second = Box(tmp_path)
    refusal = second.put(item("a"))
    assert isinstance(refusal, NotStored)
    assert "in use by another daemon" in refusal.message
    with pytest.raises(NotStored):
        second.outbox.page("out", 0, 1)
    first.close()
    assert isinstance(second.put(item("a")), Receipt)
    second.close()


def test_closing_writes_what_waits(tmp_path: Path) -> None:
    box = Box(tmp_path, commit_wait_ms=1000).opened()
    told: queue.Queue[Any] = queue.Queue()
    box.outbox.put([item("a")], told.put)
    box.close()
    assert isinstance(told.get_nowait(), Receipt)
    box.outbox.put([item("b")], told.put)
    assert isinstance(told.get_nowait(), NotStored)
    box = Box(tmp_path).opened()
    assert box.ids() == ["a"]
    box.close()


def test_a_thread_that_fails_goes_on_and_nobody_waits_for_ever(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever it is that nobody thought of: who waited is told, what is to be deleted is deleted later."""
    box = Box(tmp_path).opened()
    kept = box.put(item("kept"))
    assert isinstance(kept, Receipt)
    failing = [True]

    def fail(name: str) -> None:
        if name == "gathered" and failing.pop():
            raise RuntimeError("nobody thought of this")

    box.steps = lambda name: fail(name) if failing else None
    box.outbox.remove(kept.seqs[0], "delivered")
    told = box.put(item("tried"))
    assert isinstance(told, Receipt | NotStored)  # stored, if the removal was gathered before it came
    assert isinstance(box.put(item("after")), Receipt)
    box.settle()
    assert box.ids() == (["tried", "after"] if isinstance(told, Receipt) else ["after"])
    assert any("nobody thought of this" in (record.exc_text or str(record.exc_info)) for record in caplog.records)
    with sqlite3.connect(box.path) as other:
        assert other.execute("SELECT COUNT(*) FROM items WHERE id = 'kept'").fetchone() == (0,)
    box.close()


def test_a_packet_identifier_is_another_messages_later(box: Box) -> None:
    """The broker marks a message as sent again that never arrived; the identifier and the content were seen before."""
    key = arrival_key("plant/parts/7", b"[0,0,0,0]", None, 5)
    assert isinstance(box.put(item("a", key=key, repeat=False)), Receipt)
    box.clock.advance(60)
    assert box.put(item("a", key=key, repeat=True)) == Receipt((), "a", True), "sent again after a short outage"
    box.clock.advance(86_400)
    later = box.put(item("b", key=key, repeat=True))
    assert isinstance(later, Receipt) and later.id == "b" and not later.duplicate
    assert box.put(item("b", key=key, repeat=True)) == Receipt((), "b", True)
    callers = box.put(item("c", key="their own", repeat=True))
    box.clock.advance(86_400)
    assert isinstance(callers, Receipt) and box.put(item("d", key="their own")) == Receipt((), "c", True)
