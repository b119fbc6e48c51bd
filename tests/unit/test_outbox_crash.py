"""The ledger of the outbox under crashes: a model of what must be there, and the files as a crash leaves them.

A copy of the database and its log, taken at a step, is what the next process would find after SIGKILL at that step.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from agent.config import OutboxSection
from agent.store.outbox_file import Change, Expire, Item, OutboxFile, Put, Remove
from agent.store.outbox_page import page
from hil.powerloss.main import STEPS, powerloss

SETTINGS = OutboxSection(enabled=True, max_rows=6)
MAX_AGE_S = 40.0

changes = st.one_of(
    st.tuples(st.just("put"), st.integers(0, 9), st.integers(0, 3000), st.sampled_from(["ask", "out"])),
    st.tuples(st.just("answer"), st.integers(0, 9), st.booleans()),
    st.tuples(st.just("remove"), st.integers(0, 9)),
    st.just(("expire",)),
)


class Model:
    """What the outbox must hold: rows by number, and the id under which each key is remembered."""

    def __init__(self, full: str) -> None:
        self.rows: dict[int, tuple[str, str, int, float]] = {}
        self.known: dict[str, str] = {}
        self.by_row: dict[int, str] = {}
        self.next = 1
        self.full = full

    def copy(self) -> Model:
        other = Model(self.full)
        other.rows, other.known, other.by_row = dict(self.rows), dict(self.known), dict(self.by_row)
        other.next = self.next
        return other

    def _drop(self, seq: int, *, forget: bool) -> str | None:
        del self.rows[seq]
        key = self.by_row.pop(seq, None)
        if forget and key is not None:
            del self.known[key]
        return key

    def _add(self, route: str, id_: str, size: int, now: float, key: str | None) -> None:
        self.rows[self.next] = (route, id_, size, now)
        if key is not None:
            self.by_row[self.next] = key
        self.next += 1

    def put(self, item: Item, now: float) -> None:
        assert item.key is not None
        if item.key in self.known:
            return
        if len(self.rows) >= SETTINGS.max_rows:
            if self.full == "reject":
                return
            while len(self.rows) >= SETTINGS.max_rows:
                self._drop(min(self.rows), forget=True)
        self.known[item.key] = item.id
        self._add(item.route, item.id, len(item.body), now, item.key)

    def answer(self, seq: int, items: list[Item], now: float) -> None:
        if seq in self.rows:
            key = self._drop(seq, forget=False)
            for item in items:
                self._add(item.route, item.id, len(item.body), now, key)
                key = None

    def remove(self, seq: int) -> None:
        if seq in self.rows:
            self._drop(seq, forget=False)

    def expire(self, now: float) -> None:
        for seq, (route, *_, created) in list(self.rows.items()):
            if route == "out" and created < now - MAX_AGE_S:
                self._drop(seq, forget=True)


def found(path: Path) -> dict[int, tuple[str, str, int, float]]:
    """What a new process finds; fails if a row is not whole, or the totals are not those of the rows."""
    file = OutboxFile(path, SETTINGS, lambda name: None, first_seq=0, checked=False)
    rows = {}
    for route in ("ask", "out"):
        stored = page(file._connection, route, 0, 1000, 1 << 30)
        assert all(one.whole for one in stored)
        assert file.tally.rows[route] == len(stored)
        assert file.tally.bytes[route] == sum(one.size for one in stored)
        rows |= {one.seq: (one.route, one.id, len(one.body), one.created) for one in stored}
    file.close()
    return rows


def perform(model: Model, batch: list[Any], number: int, now: float) -> list[Change]:
    """Change the model, and return the changes that should do the same to the file."""
    todo: list[Change] = []
    for kind, *details in batch:
        rows = sorted(model.rows)
        if kind == "put":
            key, size, route = details
            item = Item(route, "p", f"i{number}-{len(todo)}", b"{}", bytes(size), key=str(key))
            todo.append(Put([item]))
            model.put(item, now)
        elif kind == "expire":
            todo.append(Expire("out", now - MAX_AGE_S))
            model.expire(now)
        else:
            seq = rows[details[0] % len(rows)] if rows else 10_000
            if kind == "answer":
                id_ = model.rows[seq][1] if rows else "none"
                answers = [Item("out", "p", id_, b"", b"r")] * (2 if details[1] else 1)
                todo.append(Put(answers, seq))
                model.answer(seq, answers, now)
            else:
                todo.append(Remove(seq, "delivered"))
                model.remove(seq)
    return todo


class Camera:
    """Copies the files when the step with the number `at` is reached."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.copy = folder, folder / "copy"
        self.steps, self.at = 0, -1

    def __call__(self, name: str) -> None:
        self.steps += 1
        if self.steps == self.at:
            self.copy.mkdir()
            for source in self.folder.glob("outbox.sqlite*"):
                if not source.name.endswith("-shm"):  # it is built anew from the log
                    shutil.copyfile(source, self.copy / source.name)


@settings(max_examples=40, deadline=None)
@given(
    batches=st.lists(st.lists(changes, min_size=1, max_size=6), min_size=1, max_size=8),
    full=st.sampled_from(["reject", "drop_oldest"]),
    data=st.data(),
)
def test_whatever_was_acknowledged_is_there_after_a_crash(batches: Any, full: Any, data: Any) -> None:
    crash_in = data.draw(st.integers(0, len(batches) - 1))
    crash_after = data.draw(st.integers(1, 12))
    with tempfile.TemporaryDirectory() as folder:
        path, camera, model = Path(folder) / "outbox.sqlite", Camera(Path(folder)), Model(full)
        file = OutboxFile(path, SETTINGS.model_copy(update={"full": full}), camera, first_seq=0, checked=False)
        for number, batch in enumerate(batches):
            now, before = 15.0 * number, model.copy()
            todo = perform(model, batch, number, now)
            camera.at = camera.steps + crash_after if number == crash_in else -1
            file.apply(todo, now)
            if camera.copy.exists():
                committed = camera.steps == camera.at  # the last step of all
                assert found(camera.copy / path.name) == (model.rows if committed else before.rows)
                shutil.rmtree(camera.copy)
        assert dict(file._connection.execute("SELECT key, id FROM known").fetchall()) == model.known
        file.close()
        assert found(path) == model.rows


def test_the_ledger_balances_after_real_kills(tmp_path: Path) -> None:
    """A short run of `script/powerloss`: random instants, then every step."""
    ledger = powerloss(tmp_path, runs=8, seed=3)
    assert ledger.balances, ledger.summary()
    assert ledger.kills == 8 + 3 * len(STEPS)
    assert len(ledger.acknowledged) > 100
