"""Keys that were used before: what is held in memory finds what the file has, whatever failed in between."""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.config import OutboxSection
from agent.core.errors import NotStored
from agent.store import outbox_known
from agent.store.outbox_file import Item, OutboxFile, Put, Receipt, Remove
from agent.store.outbox_known import Key, KnownKeys
from agent.store.outbox_page import page

SETTINGS = OutboxSection(enabled=True)

moves = st.one_of(
    st.tuples(st.just("add"), st.integers(0, 30), st.booleans()),
    st.tuples(st.just("add all"), st.lists(st.integers(0, 30), min_size=1, max_size=5)),
    st.tuples(st.just("forget"), st.integers(0, 30)),
    st.tuples(st.just("commit"), st.booleans()),
    st.tuples(st.just("purge"), st.integers(1, 30)),
    st.tuples(st.just("reload"), st.booleans()),
)


class Ledger:
    """The table and what finds its rows, beside a dictionary that says what must be found. `hidden`: a commit that
    reached the disk although it failed."""

    def __init__(self) -> None:
        self.connection = sqlite3.connect(":memory:", isolation_level=None)
        self.connection.execute(outbox_known.SCHEMA)
        self.known = KnownKeys()
        self.model: dict[str, Key] = {}
        self.committed: dict[str, Key] = {}
        self.number = 0
        self.begin()

    def begin(self) -> None:
        self.known.begin()
        self.connection.execute("BEGIN")
        self.model = dict(self.committed)

    def key(self, name: int) -> Key:
        self.number += 1
        return Key("p", str(name), f"i{self.number}", b"q", float(self.number))

    def move(self, kind: str, *details: Any) -> None:
        if kind == "add":
            key = self.key(details[0])
            before = self.known.find(self.connection, "p", key.key)
            assert before == self.model.get(key.key)
            if before is None or details[1]:  # known: only what cannot be a repeat takes its place
                self.known.add(self.connection, key, before)
                self.model[key.key] = key
        elif kind == "add all":
            keys = [self.key(name) for name in details[0]]
            names = {key.key for key in keys}
            if self.known.add_all_new(keys):
                assert len(names) == len(keys) and names.isdisjoint(self.model)
                self.model.update((key.key, key) for key in keys)
        elif kind == "forget":
            if key := self.model.pop(str(details[0]), None):
                self.known.forget(self.connection, key)
        elif kind == "purge":
            self.commit(hidden=False)
            before = self.known.oldest(details[0])
            self.connection.execute("DELETE FROM known WHERE seq < ?", (before,))
            (count,) = self.connection.execute("SELECT COUNT(*) FROM known").fetchone()
            assert count <= details[0]
            left = {row[0] for row in self.connection.execute("SELECT id FROM known")}
            self.committed = {name: key for name, key in self.committed.items() if key.id in left}
            assert len(self.committed) == count
            self.connection.execute("COMMIT")
            self.known.drop(before)
            self.begin()
        else:
            self.commit(hidden=kind == "reload" and details[0], roll_back=kind == "commit" and details[0])
            if kind == "reload":
                self.connection.execute("COMMIT")
                self.known.load(self.connection, anew=not details[0])
                self.begin()

    def commit(self, *, hidden: bool, roll_back: bool = False) -> None:
        if roll_back:
            self.connection.execute("ROLLBACK")
        else:
            self.connection.executemany("INSERT INTO known VALUES (?, ?, ?, ?, ?, ?)", self.known.rows())
            self.connection.execute("COMMIT")
            self.committed = dict(self.model)
            if not hidden:
                self.known.committed()
        self.begin()


@settings(max_examples=300, deadline=None)
@given(todo=st.lists(moves, min_size=1, max_size=40), recent=st.integers(0, 6))
def test_what_is_found_is_what_is_there(todo: Any, recent: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(outbox_known, "RECENT", recent)
        ledger = Ledger()
        for move in todo:
            ledger.move(*move)
        for name in range(31):
            assert ledger.known.find(ledger.connection, "p", str(name)) == ledger.model.get(str(name))
            assert ledger.known.find(ledger.connection, "another", str(name)) is None
        ledger.connection.close()


def test_where_python_hashes_to_32_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 400,000 keys a score would collide: whichever came last would be the only one that is known."""
    monkeypatch.setattr(outbox_known, "_WIDE", False)
    names = {outbox_known.hashed("p", str(number)) for number in range(100_000)}
    assert len(names) == 100_000
    assert min(names) < -(2**62) and max(names) > 2**62 and max(names) < 2**63
    ledger = Ledger()
    ledger.move("add", 1, False)
    ledger.move("commit", False)
    ledger.move("reload", False)
    assert ledger.known.find(ledger.connection, "p", "1") is not None
    ledger.connection.close()


def test_a_lost_repeat_would_be_noticed() -> None:
    """The ledger above is not blind: a key that is not found again fails it."""
    ledger = Ledger()
    ledger.move("add", 1, False)
    ledger.move("commit", False)
    ledger.known.drop(ledger.known.end)
    with pytest.raises(AssertionError):
        ledger.move("add", 1, False)
    ledger.connection.close()


def opened(path: Path, known: KnownKeys | None = None, *, checked: bool = False) -> OutboxFile:
    return OutboxFile(path, SETTINGS, lambda name: None, first_seq=0, checked=checked, known=known)


def put(file: OutboxFile, id_: str, key: str) -> Any:
    (outcome,) = file.apply([Put([Item("out", "p", id_, b"{}", b"x", key)])], 1.0)
    return outcome


def test_a_file_of_the_first_version_is_taken_over(tmp_path: Path) -> None:
    path = tmp_path / "outbox.sqlite"
    file = opened(path)
    put(file, "a", "k")
    file.close()
    with sqlite3.connect(path) as old:
        old.executescript(
            "DROP TABLE known;"
            "CREATE TABLE known (producer TEXT NOT NULL, key TEXT NOT NULL, id TEXT NOT NULL, question BLOB NOT NULL,"
            " created REAL NOT NULL, PRIMARY KEY (producer, key)) WITHOUT ROWID;"
            "INSERT INTO known VALUES ('p', 'k', 'a', x'', 1.0), ('p', 'a later one', 'b', x'', 7.0),"
            " ('p', 'zz', 'c', x'', 3.0);"
            "PRAGMA user_version = 1"
        )
    old.close()
    file = opened(path)
    assert put(file, "new", "k") == Receipt((), "a", True)
    assert put(file, "new", "a later one") == Receipt((), "b", True)
    assert put(file, "new", "yet another") == Receipt((2,), "new")
    file.close()
    with sqlite3.connect(path) as now:
        assert [key for (key,) in now.execute("SELECT key FROM known ORDER BY seq")] == [
            "k",
            "zz",
            "a later one",
            "yet another",
        ]
        assert now.execute("SELECT name FROM sqlite_schema WHERE name = 'known_1'").fetchone() is None
    now.close()


def test_a_commit_that_failed_and_is_on_the_disk_is_known(tmp_path: Path) -> None:
    """A caller that was told of a failure comes again with the key; the item must not be there twice."""
    path, known = tmp_path / "outbox.sqlite", KnownKeys()
    file = opened(path, known)

    def fail(name: str) -> None:
        if name == "committed":
            raise sqlite3.OperationalError("disk I/O error")

    file._step = fail
    with pytest.raises(sqlite3.OperationalError):
        put(file, "a", "k")
    file.close()
    file = opened(path, known, checked=True)
    assert put(file, "b", "k") == Receipt((), "a", True)
    file.close()


@pytest.mark.parametrize("column", ["producer", "id", "key"])
def test_a_row_whose_letters_cannot_be_read_is_deleted_like_any_other(tmp_path: Path, column: str) -> None:
    path = tmp_path / "outbox.sqlite"
    file = opened(path)
    receipt = put(file, "the-id", "the-key")
    file.close()
    with sqlite3.connect(path) as other:
        other.execute(f"UPDATE items SET {column} = CAST(x'74ff65' AS TEXT)")
    other.close()
    file = opened(path)
    file.apply([Remove(receipt.seqs[0], "damaged")], 2.0)
    assert file.tally.rows.total() == 0
    file.close()


def test_an_answer_waits_for_those_to_earlier_questions_of_its_producer(tmp_path: Path) -> None:
    file = opened(tmp_path / "outbox.sqlite")
    questions = [Put([Item("ask", producer, id_, b"{}", b"x")]) for id_, producer in ("ap", "bq", "cp")]
    file.apply(questions, 1.0)

    def answer(id_: str, producer: str, seq: int) -> Any:
        (outcome,) = file.apply([Put([Item("local", producer, id_, b"{}", b"y")], seq, in_turn=True)], 1.0)
        return outcome

    assert isinstance(answer("c", "p", 3), NotStored)
    assert isinstance(answer("b", "q", 2), Receipt)
    assert isinstance(answer("a", "p", 1), Receipt)
    assert isinstance(answer("c", "p", 3), Receipt)
    assert [stored.id for stored in page(file._connection, "local", 0, 9, 1 << 20)] == ["b", "a", "c"]
    file.close()
