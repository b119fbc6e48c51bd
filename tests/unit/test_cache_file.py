"""The result cache across restarts, and on files and file systems that fail."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from cache_fakes import FRESH_S, SHA, STALE_S, Models, answer, key, opened, section, value_of
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.core.clock import ManualClock
from agent.core.types import Tier
from agent.store import cache_file, sqlite_file
from agent.store.cache import Entry as CacheEntry
from agent.store.cache import Freshness, ResultCache
from agent.store.cache_file import CacheFile

ROOT = Path(__file__).resolve().parents[2]


def test_survives_a_restart(tmp_path: Path) -> None:
    clock = ManualClock()
    path = tmp_path / "state" / "cache.sqlite"
    cache = opened(path, clock)
    cache.put(key(1), "sensor", answer(0.25))
    cache.put(key(2, variant="v1"), "sensor", answer(0.5))
    cache.close()
    later = ManualClock(monotonic=5.0, wall=clock.wall() + 30)
    again = opened(path, later)
    hit = again.get(key(1))
    assert hit is not None and value_of(hit) == 0.25
    assert hit.age_s == pytest.approx(30) and hit.state is Freshness.STALE
    assert hit.entry.tier is Tier.EDGE_GPU
    assert again.get(key(2)) is None
    assert value_of(again.get(key(2, variant="v1"))) == 0.5
    assert value_of(again.last_known("sensor", "digits")) == 0.5
    assert again.stats()["file"]["loaded"] == 3
    again.close()


def test_a_wall_clock_set_back_makes_no_negative_age(tmp_path: Path) -> None:
    clock = ManualClock()
    path = tmp_path / "cache.sqlite"
    cache = opened(path, clock)
    cache.put(key(1), "s", answer())
    cache.close()
    again = opened(path, ManualClock(wall=clock.wall() - 1e6))
    hit = again.get(key(1))
    assert hit is not None and hit.age_s == 0
    again.close()


@pytest.mark.parametrize("jump_s", [-365 * 86_400.0, 365 * 86_400.0])
def test_a_jump_of_the_wall_clock_changes_no_age_while_the_machine_runs(tmp_path: Path, jump_s: float) -> None:
    """Before an answer, after it, and while the daemon is away."""
    path = tmp_path / "cache.sqlite"
    clock = ManualClock(boot="this one")
    cache = opened(path, clock)
    cache.put(key(1), "s", answer(0.25))
    clock.jump(jump_s)
    clock.advance(3)
    cache.put(key(2), "s", answer(0.5))
    hit = cache.get(key(1))
    assert hit is not None and hit.age_s == pytest.approx(3)
    cache.close()
    clock.jump(jump_s)
    clock.advance(4)
    again = opened(path, clock)
    for number, age_s in ((1, 7), (2, 4)):
        hit = again.get(key(number))
        assert hit is not None and hit.age_s == pytest.approx(age_s)
        assert hit.state is Freshness.FRESH
    clock.advance(FRESH_S)
    hit = again.get(key(2))
    assert hit is not None and hit.state is Freshness.STALE
    again.close()


def test_writes_wait_for_their_budget(tmp_path: Path) -> None:
    file = CacheFile(tmp_path / "cache.sqlite", 100, write_bytes_per_day=1)
    file.open(0.0, 0.0, "", 100.0)
    entry = CacheEntry("v", SHA, None, None, Tier.EDGE_GPU, "t", "p", b"", 0.0, 0.0)
    file.put(("m", "", b"1"), ("s", "m"), entry)
    assert file.flush()  # who waits for it is not kept waiting
    assert file.stats()["bytes_written"] > 4096
    for number in range(200):
        file.put(("m", "", bytes([number])), ("s", "m"), entry)
    assert file.stats()["pending"] == 101  # the newest, in memory, until tomorrow
    assert file.problem() == ""
    file.close()  # and what is there at the end is written
    assert file.stats()["pending"] == 0


def test_only_the_newest_and_what_is_not_expired_is_loaded(tmp_path: Path) -> None:
    clock = ManualClock()
    path = tmp_path / "cache.sqlite"
    cache = opened(path, clock)
    for n in range(10):
        cache.put(key(n), "s", answer(n))
        clock.advance(15)
    cache.close()
    again = opened(path, clock, size=3)
    assert [value_of(again.get(key(n))) for n in range(10)] == [None] * 7 + [7.0, 8.0, 9.0]
    again.close()
    with sqlite3.connect(path) as connection:
        assert connection.execute("SELECT COUNT(*) FROM entries").fetchone() == (3,)
    connection.close()
    clock.advance(STALE_S)
    assert opened(path, clock).stats()["entries"] == 0


def test_survives_sigkill_but_for_what_was_not_flushed(tmp_path: Path) -> None:
    path = tmp_path / "cache.sqlite"
    program = (
        "import sys; sys.path[:0] = sys.argv[2:]\n"
        "from pathlib import Path\n"
        "from agent.core.clock import ManualClock\n"
        "from cache_fakes import answer, key, opened\n"
        "cache = opened(Path(sys.argv[1]), ManualClock())\n"
        "for n in range(500): cache.put(key(n), 's', answer(n))\n"
        "assert cache.flush()\n"
        "for n in range(500, 600): cache.put(key(n), 's', answer(n))\n"
        "print('ready', flush=True)\n"
        "sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, str(path), str(ROOT), str(Path(__file__).parent)],
        stdout=subprocess.PIPE,
        stdin=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGKILL)
    cache = opened(path, ManualClock())
    assert [value_of(cache.get(key(n))) for n in range(500)] == [float(n) for n in range(500)]
    assert cache.stats()["file"]["set_aside"] is None
    cache.close()


def filled(path: Path, count: int = 300) -> None:
    cache = opened(path, ManualClock())
    for n in range(count):
        cache.put(key(n), "s", answer(n))
    cache.close()


@pytest.mark.parametrize("damage", ["garbage", "header only", "half", "zeros in the middle", "other schema"])
def test_a_damaged_file_is_set_aside(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "cache.sqlite"
    filled(path)
    whole = path.read_bytes()
    if damage == "other schema":
        with sqlite3.connect(path) as connection:
            connection.execute("PRAGMA user_version = 99")
        connection.close()
    else:
        path.write_bytes(
            {
                "garbage": b"garbage" * 1000,
                "header only": whole[:100],
                "half": whole[: len(whole) // 2],
                "zeros in the middle": whole[:4096] + bytes(40960) + whole[4096 + 40960 :],
            }[damage]
        )
    cache = opened(path, ManualClock())
    stats = cache.stats()["file"]
    assert stats["set_aside"].startswith("cache.sqlite.damaged-")
    assert (tmp_path / stats["set_aside"]).exists()
    cache.put(key(1), "s", answer(0.5))
    assert cache.flush()
    cache.close()
    assert value_of(opened(path, ManualClock()).get(key(1))) == 0.5


def test_rows_that_were_garbled_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "cache.sqlite"
    filled(path, 5)
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE entries SET tier = 'nonsense' WHERE rowid = 1")
        connection.execute("UPDATE entries SET packed = x'ff' WHERE rowid = 2")
        connection.execute("UPDATE entries SET label = CAST(x'ff' AS TEXT) WHERE rowid = 3")
    connection.close()
    cache = opened(path, ManualClock())
    assert cache.stats()["entries"] == 2
    assert cache.stats()["file"]["damaged_rows"] == 3
    cache.close()


def test_only_a_few_damaged_files_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "cache.sqlite"
    for n in range(6):
        (tmp_path / f"cache.sqlite.damaged-2024010{n}T000000Z").write_bytes(b"")
    path.write_bytes(b"garbage" * 1000)
    opened(path, ManualClock()).close()
    assert len(list(tmp_path.glob("*.damaged-*"))) == sqlite_file.KEPT_DAMAGED


def test_a_place_that_cannot_be_written_is_reported_not_raised(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    cache = opened(tmp_path / "file" / "cache.sqlite", ManualClock())
    cache.put(key(1), "s", answer(0.5))
    assert not cache.flush()
    stats = cache.stats()["file"]
    assert stats["write_errors"] >= 2 and stats["pending"] == 2 and stats["error"]
    assert cache.problem() == f"File exists: {tmp_path / 'file'}: 1 answer not written"
    assert value_of(cache.get(key(1))) == 0.5
    cache.close()


def test_a_full_file_system_is_counted_and_tried_again(tmp_path: Path) -> None:
    path = tmp_path / "cache.sqlite"
    cache = opened(path, ManualClock())
    cache.put(key(0), "s", answer())
    assert cache.flush()
    file = cache._file
    assert file is not None and file._connection is not None
    pages = file._connection.execute("PRAGMA page_count").fetchone()[0]
    file._connection.execute(f"PRAGMA max_page_count = {pages}")
    for n in range(1, 500):
        cache.put(key(n), "s", answer(n))
    assert not cache.flush()
    assert cache.problem() == "database or disk is full: 499 answers not written"
    assert cache.get(key(499)) is not None
    assert cache.flush()  # The file is opened anew, without the limit; all that waited is written.
    assert (cache.problem(), cache.stats()["file"]["error"]) == ("", None)
    cache.close()
    again = opened(path, ManualClock())
    assert [value_of(again.get(key(n))) for n in range(1, 500)] == list(range(1, 500))
    again.close()


def test_it_is_tried_again_without_a_new_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_file, "RETRY_S", 0.001)
    (tmp_path / "file").write_bytes(b"")
    cache = opened(tmp_path / "file" / "cache.sqlite", ManualClock())
    assert cache.problem()
    (tmp_path / "file").unlink()
    file = cache._file
    assert file is not None
    with file._changed:
        assert file._changed.wait_for(lambda: not cache.problem(), 20)
    cache.close()


class Disk(NamedTuple):
    """What `statvfs` says of a file system that is full, or cannot be written."""

    f_bavail: int = 1 << 20
    f_frsize: int = 4096
    f_files: int = 0
    f_favail: int = 0
    f_flag: int = 0


@pytest.mark.parametrize(
    ("code", "text", "disk", "says"),
    [
        (sqlite3.SQLITE_FULL, "database or disk is full", Disk(f_bavail=0), "No space left on device"),
        (sqlite3.SQLITE_IOERR, "disk I/O error", Disk(f_bavail=0), "No space left on device"),
        (sqlite3.SQLITE_IOERR, "disk I/O error", Disk(f_files=9), "No space left on device"),
        (sqlite3.SQLITE_IOERR, "disk I/O error", Disk(), "disk I/O error"),
        (sqlite3.SQLITE_READONLY, "attempt to write a readonly database", Disk(f_flag=1), "Read-only file system"),
        (sqlite3.SQLITE_READONLY, "attempt to write a readonly database", Disk(), "attempt to write a readonly"),
        (sqlite3.SQLITE_CANTOPEN, "unable to open database file", Disk(), "Is a directory"),
    ],
)
def test_the_system_says_what_sqlite_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, text: str, disk: Disk, says: str
) -> None:
    monkeypatch.setattr(os, "statvfs", lambda path: disk)
    error = sqlite3.OperationalError(text)
    error.sqlite_errorcode = code
    (tmp_path / "cache.sqlite").mkdir()
    assert sqlite_file.words(error, tmp_path / "cache.sqlite").startswith(says)


def test_a_second_daemon_runs_without_the_file_until_the_first_has_gone(tmp_path: Path) -> None:
    path = tmp_path / "cache.sqlite"
    first, second = opened(path, ManualClock()), opened(path, ManualClock())
    assert first.problem() == ""
    assert second.problem() == f"{tmp_path} is in use by another daemon"
    second.put(key(1), "s", answer(0.5))
    assert not second.flush()
    assert second.problem() == f"{tmp_path} is in use by another daemon: 1 answer not written"
    assert value_of(second.get(key(1))) == 0.5
    first.put(key(2), "s", answer(0.25))
    first.close()
    assert second.flush()
    assert second.problem() == ""
    second.close()
    again = opened(path, ManualClock())
    assert (value_of(again.get(key(1))), value_of(again.get(key(2)))) == (0.5, 0.25)
    again.close()


def test_what_waits_to_be_written_is_bounded(tmp_path: Path) -> None:
    cache = ResultCache(section(10), tmp_path / "cache.sqlite", Models(), ManualClock())
    for n in range(25):
        cache.put(key(n), "s", answer(n))
    stats = cache.stats()
    assert (stats["entries"], stats["file"]["dropped"]) == (10, 15)
    cache.open()
    assert cache.flush()
    cache.close()


def test_the_file_stays_bounded(tmp_path: Path) -> None:
    path = tmp_path / "cache.sqlite"
    clock = ManualClock()
    cache = opened(path, clock, size=20)
    for n in range(200):
        cache.put(key(n), "s", answer(n))
        clock.advance(0.01)
        if n % 10 == 0:
            assert cache.flush()
    cache.close()
    with sqlite3.connect(path) as connection:
        assert connection.execute("SELECT COUNT(*) FROM entries").fetchone()[0] <= 20 + 20 // 4 + 10
    connection.close()


@settings(max_examples=20, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 30), st.booleans()), max_size=30))
def test_what_was_flushed_is_there_after_a_restart(tmp_path_factory: pytest.TempPathFactory, puts: Any) -> None:
    path = tmp_path_factory.mktemp("cache") / "cache.sqlite"
    clock = ManualClock()
    cache = opened(path, clock)
    expected: dict[int, float] = {}
    for count, (n, restart) in enumerate(puts):
        cache.put(key(n), "s", answer(count))
        expected[n] = float(count)
        if restart:
            cache.close()
            cache = opened(path, clock)
    assert cache.flush()
    cache.close()
    again = opened(path, clock)
    assert {n: value_of(again.get(key(n))) for n in expected} == expected
    again.close()


def test_no_thread_is_left_behind(tmp_path: Path) -> None:
    cache = opened(tmp_path / "cache.sqlite", ManualClock())
    cache.put(key(1), "s", answer())
    cache.close()
    cache.close()
    assert not (tmp_path / "cache.sqlite-wal").exists()
    assert os.listdir(tmp_path) == ["cache.sqlite"]
