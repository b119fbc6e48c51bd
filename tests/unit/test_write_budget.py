"""What a file may write to flash: evenly over the day, measured where the kernel counts."""

import sqlite3
from pathlib import Path

import pytest

from agent.store import write_budget
from agent.store.write_budget import WriteBudget, written_by_thread, written_since

DAY_S = 86_400.0


def test_no_limit() -> None:
    budget = WriteBudget(None, 0.0)
    budget.spend(1 << 40)
    assert budget.wait_s(0.0) == 0.0
    assert budget.written == 1 << 40


def test_it_comes_back_evenly() -> None:
    budget = WriteBudget(86_400, 0.0)  # a byte in a second
    assert budget.wait_s(0.0) == 0.0
    budget.spend(3600 + 100)
    assert budget.wait_s(0.0) == pytest.approx(101.0)
    assert budget.wait_s(50.0) == pytest.approx(51.0)
    assert budget.wait_s(101.0) == 0.0


def test_no_more_than_the_limit_in_a_day_beyond_the_first_hour() -> None:
    budget, now = WriteBudget(1_000_000, 0.0), 0.0
    while now < DAY_S:
        wait_s = budget.wait_s(now)
        if wait_s:
            now += wait_s
            continue
        budget.spend(5000)
    assert 1_000_000 < budget.written < 1_000_000 * 25 / 24 + 5000


def test_what_a_thread_writes_is_counted(tmp_path: Path) -> None:
    before = written_by_thread()
    with sqlite3.connect(tmp_path / "x") as connection:
        connection.execute("CREATE TABLE t (b BLOB)")
        connection.execute("INSERT INTO t VALUES (zeroblob(1000000))")
    connection.close()
    assert written_since(before, 0) > 1_000_000


def test_it_is_estimated_where_the_kernel_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(write_budget, "written_by_thread", lambda: None)
    assert written_since(None, 10) == 10 * 6 * 4096
