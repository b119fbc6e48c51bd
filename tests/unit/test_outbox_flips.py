"""One bit that flips in the outbox's file: it goes on, with a new file if it must, and everybody is told."""

from __future__ import annotations

import random
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from agent.config import OutboxSection
from agent.core.clock import ManualClock
from agent.core.errors import NotStored
from agent.store.outbox import BY_PRODUCER, Expire, Item, Outbox, Put, Receipt, Remove
from agent.store.outbox_file import OutboxFile

SETTINGS = OutboxSection(enabled=True, max_rows=50)
ROUTES = ("local", "ask", "uplink")


def filled(path: Path) -> set[str]:
    """Six rows, of which two are gone. Returns the ids of the others."""
    file = OutboxFile(path, SETTINGS, lambda name: None, first_seq=0, checked=False)
    for number in range(6):
        item = Item(ROUTES[number % 3], f"p{number % 2}", f"id{number}", b'{"h":1}', b"body", f"key{number}")
        file.apply([Put([item])], 1.5 * number)
    file.apply([Remove(1, "delivered"), Remove(3, "delivered")], 9.0)
    file.close()
    return {"id1", "id3", "id4", "id5"}


def commit(outbox: Outbox, change: Any) -> Any:
    """As the thread does, in this one."""
    told: list[Any] = []
    outbox._at_hand = batch = [(change, told.append)]
    outbox._commit(batch)
    outbox._at_hand = ()
    return told[0] if told else None


def one_round(outbox: Outbox, number: int) -> tuple[bool, set[str]]:
    """Everything that the daemon does with it. Whether all of it went well, and what could be delivered."""
    if outbox._suspect:
        outbox._suspect, outbox._checked, outbox._doubted = False, False, True
        outbox._disconnect()
    if outbox._file is None:
        outbox._open()
    found = set()
    items = [Item(route, "p0", f"new{number}", b"{}", b"x", f"new {route} {number}") for route in ("local", "ask")]
    receipts = [commit(outbox, Put([item])) for item in items]
    well = all(isinstance(receipt, Receipt) for receipt in receipts)
    try:
        for route in ROUTES:
            producers = outbox.producers() if route == BY_PRODUCER else [None]
            for producer in producers:
                for stored in outbox.page(route, 0, 100, producer=producer):
                    assert outbox.age_s(stored) is not None
                    found |= {stored.id} if stored.whole else set()
                    commit(outbox, Remove(stored.seq, "delivered" if stored.whole else "damaged"))
        for route in list(outbox.stats()["rows"]):
            commit(outbox, Expire(route, -1.0))
    except NotStored:
        return False, found
    return well and not outbox._suspect, found


@pytest.mark.parametrize("when", ["while it was closed", "while it was open"])
def test_a_flipped_bit_stops_nothing_for_ever(tmp_path: Path, when: str) -> None:
    """Of all bits of a small file, some hundred, others in each run of the suite only if this line changes."""
    path = tmp_path / "outbox.sqlite"
    there = filled(path)
    data = path.read_bytes()
    used = [place for place, byte in enumerate(data) if byte]
    for place in random.Random(8).sample(used, 150):
        for old in tmp_path.iterdir():
            old.unlink()
        path.write_bytes(data)
        outbox = Outbox(path, SETTINGS, ManualClock())
        if when == "while it was open":
            outbox._open()
            outbox._disconnect()
        bit = random.Random(place).randrange(8)
        path.write_bytes(data[:place] + bytes([data[place] ^ 1 << bit]) + data[place + 1 :])
        found: set[str] = set()
        for number in range(4):
            well, more = one_round(outbox, number)
            found |= more
            if well:
                break
        where = f"bit {bit} of byte {place}"
        assert well, f"{where}: {outbox.problem()}"
        told = outbox.stats()["events"]["damaged"] or outbox.set_aside or when == "while it was open"
        assert found >= there or told, f"{where}: {there - found} is gone, and nobody was told"
        assert outbox.running_s() < 1e6, where
        outbox._disconnect()
        outbox._lock.release()


def change(path: Path, statement: str) -> None:
    with sqlite3.connect(path) as other:
        other.execute(statement)
    other.close()


def test_totals_are_counted_anew_at_the_start(tmp_path: Path) -> None:
    path = tmp_path / "outbox.sqlite"
    filled(path)
    change(path, "UPDATE totals SET bytes = bytes + (1 << 28), rows = ''")
    settings = SETTINGS.model_copy(update={"full": "drop_oldest"})
    file = OutboxFile(path, settings, lambda name: None, first_seq=0, checked=False)
    file.apply([Put([Item("local", "p", "new", b"{}", b"x", "new")])], 9.0)
    assert file.tally.rows.total() == 5 and not file.tally.events["dropped"]
    file.close()


def test_a_clock_of_which_a_bit_flipped_makes_nothing_older(tmp_path: Path) -> None:
    path = tmp_path / "outbox.sqlite"
    filled(path)
    change(path, "UPDATE clock SET running_s = 1.16e80 WHERE rowid = 1")
    file = OutboxFile(path, SETTINGS, lambda name: None, first_seq=0, checked=False)
    assert file.running_s == 9.0
    file.close()


def test_a_row_that_nobody_would_look_for_is_given_up_and_may_come_again(tmp_path: Path) -> None:
    path = tmp_path / "outbox.sqlite"
    filled(path)
    change(path, "UPDATE items SET route = 'locam' WHERE id = 'id3'")
    change(path, "UPDATE items SET producer = 'q' WHERE id = 'id5'")
    file = OutboxFile(path, SETTINGS, lambda name: None, first_seq=0, checked=False, doubted=True)
    assert file.tally.events["damaged"] == 2
    assert file.tally.rows.total() == 2
    again = Item("local", "p1", "id3 again", b"{}", b"body", "key3")
    assert file.apply([Put([again])], 10.0) == [Receipt((6,), "id3 again")]
    file.close()


def test_forgotten_keys_do_not_crowd_out_those_that_are_known(tmp_path: Path) -> None:
    """An outage with `drop_oldest`: what was dropped may come again, what was delivered is known."""
    settings = OutboxSection(enabled=True, max_rows=10, full="drop_oldest")
    file = OutboxFile(tmp_path / "outbox.sqlite", settings, lambda name: None, first_seq=0, checked=False)
    (receipt,) = file.apply([Put([Item("out", "p", "a", b"", b"", "delivered")])], 0.0)
    assert isinstance(receipt, Receipt)
    file.apply([Remove(receipt.seqs[0], "delivered")], 0.0)
    for number in range(200):
        file.apply([Put([Item("out", "p", str(number), b"", b"", str(number))])], 1.0)
    assert file.apply([Put([Item("out", "p", "b", b"", b"", "delivered")])], 2.0) == [Receipt((), "a", True)]
    file.close()


def test_keys_are_bounded_however_often_the_file_is_opened_again(tmp_path: Path) -> None:
    path, settings = tmp_path / "outbox.sqlite", OutboxSection(enabled=True, max_rows=100)
    outbox = Outbox(path, settings, ManualClock())
    for number in range(1000):
        receipt = commit(outbox, Put([Item("out", "p", str(number), b"", b"", str(number))]))
        commit(outbox, Remove(receipt.seqs[0], "delivered"))
        if number % 20 == 0:
            outbox._failed(sqlite3.OperationalError("disk I/O error"))
    outbox._disconnect()
    with sqlite3.connect(path) as other:
        (count,) = other.execute("SELECT COUNT(*) FROM known").fetchone()
    other.close()
    assert 400 <= count <= 440
