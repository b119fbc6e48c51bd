"""Damage that a quick check does not see, and clocks that are wrong when a file is set aside."""

from __future__ import annotations

import queue
import sqlite3
import time
from pathlib import Path
from typing import Any

import pytest
from cache_fakes import answer, key, opened

from agent.config import OutboxSection
from agent.core.clock import ManualClock
from agent.core.errors import InferenceError
from agent.store import cache_file
from agent.store.budget_file import BudgetFile
from agent.store.outbox import BY_PRODUCER, Item, Outbox, Receipt
from agent.store.outbox_file import OutboxFile, Put, Remove
from agent.store.sqlite_file import KEPT_DAMAGED, put_aside

LIMIT_S = 10.0
LATER = ("29990101T000000Z", "29990102T000000Z", "29990103T000000Z")
"""When files were set aside, by a clock that is wrong now."""


class Box:
    """An outbox in a folder, open, with calls that wait."""

    def __init__(self, folder: Path, clock: ManualClock | None = None) -> None:
        self.path = folder / "outbox.sqlite"
        self.outbox = Outbox(self.path, OutboxSection(enabled=True, commit_wait_ms=0), clock or ManualClock())
        opened_: queue.Queue[Any] = queue.Queue()
        self.outbox.stored = opened_.put
        self.outbox.start()
        opened_.get(timeout=LIMIT_S)

    def put(self, *items: Item, replaces: int | None = None) -> Receipt | InferenceError:
        told: queue.Queue[Receipt | InferenceError] = queue.Queue()
        self.outbox.put(items, told.put, replaces=replaces)
        return told.get(timeout=LIMIT_S)


def question(id_: str) -> Item:
    return Item(BY_PRODUCER, "press", id_, b"{}", b"body")


def flip(path: Path, table: str, found: bytes) -> None:
    """One bit of a value in a table's row, and not in its index. Nobody has the file open."""
    with sqlite3.connect(path) as other:
        other.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        (root,) = other.execute("SELECT rootpage FROM sqlite_master WHERE name = ?", (table,)).fetchone()
        (page,) = other.execute("PRAGMA page_size").fetchone()
    other.close()
    data = bytearray(path.read_bytes())
    data[data.index(found, (root - 1) * page, root * page)] ^= 1
    path.write_bytes(data)
    with sqlite3.connect(path) as other:
        assert other.execute("PRAGMA quick_check").fetchall() == [("ok",)]
        assert other.execute("PRAGMA integrity_check").fetchall() != [("ok",)]
    other.close()


def test_a_bit_that_flips_costs_one_row_and_not_the_outbox(tmp_path: Path) -> None:
    box = Box(tmp_path)
    for name in "abcde":
        box.put(question(name))
    box.outbox.close()
    flip(box.path, "items", b"pressc")
    box = Box(tmp_path)
    box.outbox.remove(3, "damaged")
    results = [box.put(question(str(number))) for number in range(5)]
    assert all(isinstance(result, Receipt) for result in results[1:])
    assert box.outbox.set_aside is None and not box.outbox.problem()
    held = {
        stored.id for name in box.outbox.producers() for stored in box.outbox.page(BY_PRODUCER, 0, 99, producer=name)
    }
    assert held >= {"a", "b", "d", "e", "1", "4"} and "c" not in held
    assert box.outbox.rows(BY_PRODUCER) == len(held)
    box.outbox.close()


def test_a_text_that_became_bytes_is_read_as_text(tmp_path: Path) -> None:
    """One bit of a row's heading makes the one of the other, and quick_check does not mind."""
    box = Box(tmp_path)
    box.put(Item("local", "press", "a", b"{}", b"body"))
    with sqlite3.connect(box.path) as other:
        other.execute("UPDATE items SET id = CAST(id AS BLOB)")
    other.close()
    assert [(stored.id, stored.whole) for stored in box.outbox.page("local", 0, 9)] == [("a", True)]
    box.outbox.close()


def test_what_waits_grows_older_in_a_run_that_commits_nothing(tmp_path: Path) -> None:
    clock = ManualClock()
    box = Box(tmp_path, clock)
    box.put(question("a"))
    for _ in range(3):
        clock.advance(50_000)
        box.outbox.close()
        box = Box(tmp_path, clock)
    (stored,) = box.outbox.page(BY_PRODUCER, 0, 9)
    assert box.outbox.age_s(stored) == 150_000
    box.outbox.close()


def test_keys_of_many_short_runs_are_bounded_in_number(tmp_path: Path) -> None:
    path, settings = tmp_path / "outbox.sqlite", OutboxSection(max_rows=100)
    number = 0
    for _ in range(50):
        file = OutboxFile(path, settings, lambda name: None, first_seq=0, checked=False)
        keys = [str(number := number + 1) for _ in range(20)]  # fewer than would have them looked through
        receipts = file.apply([Put([Item("local", "p", key_, b"{}", b"x", key_)]) for key_ in keys], float(number))
        seqs = [seq for receipt in receipts if isinstance(receipt, Receipt) for seq in receipt.seqs]
        file.apply([Remove(seq, "delivered") for seq in seqs], float(number))
        file.close()
    with sqlite3.connect(path) as other:
        (count,) = other.execute("SELECT COUNT(*) FROM known").fetchone()
    other.close()
    assert 400 <= count <= 440


def test_a_cache_that_cannot_be_written_because_of_damage_begins_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_file, "RETRY_S", 0.01)
    path, clock = tmp_path / "cache.sqlite", ManualClock()
    cache = opened(path, clock, 6)
    for number in range(6):
        cache.put(key(number), f"press{number}", answer())
    cache.close()
    flip(path, "last_known", b"press2")
    cache = opened(path, clock, 6)
    until = time.monotonic() + LIMIT_S
    for number in range(10_000):
        clock.advance(0.001)
        cache.put(key(number), f"new{number}", answer())
        cache.flush()
        if cache.stats()["file"]["set_aside"] or time.monotonic() > until:
            break
    assert cache.stats()["file"]["set_aside"]
    assert cache.flush() or cache.flush()
    assert not cache.problem()
    cache.close()


def test_a_damaged_cache_that_somebody_takes_away_begins_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_file, "RETRY_S", 0.01)
    cache = opened(tmp_path / "cache.sqlite", ManualClock(), 6)
    cache.put(key(1), "press", answer())
    assert cache.flush() and cache._file is not None
    cache._file._failed(sqlite3.DatabaseError("database disk image is malformed"))
    for path in tmp_path.glob("cache.sqlite*"):
        path.unlink()
    cache.put(key(2), "press", answer())
    assert cache.flush() or cache.flush()
    assert not cache.problem() and cache._file._damage is None
    cache.close()


def test_what_is_set_aside_is_kept_whatever_the_clock_says(tmp_path: Path) -> None:
    path = tmp_path / "outbox.sqlite"
    for when in LATER:
        path.with_name(f"{path.name}.damaged-{when}").write_bytes(b"")
    path.write_bytes(b"rows that somebody may want")
    aside = put_aside(path, ValueError("damaged"), log_too=True)
    assert aside.read_bytes() == b"rows that somebody may want"
    assert len(list(tmp_path.glob("*.damaged-*"))) == KEPT_DAMAGED


def test_a_budget_that_is_set_aside_is_kept_whatever_the_clock_says(tmp_path: Path) -> None:
    path = tmp_path / "budgets.json"
    for when in LATER:
        path.with_name(f"{path.name}.damaged-{when}").write_bytes(b"")
    path.write_bytes(b"damaged")
    assert (tmp_path / BudgetFile(path)._put_aside()).read_bytes() == b"damaged"
    assert len(list(tmp_path.glob("*.damaged-*"))) == KEPT_DAMAGED
