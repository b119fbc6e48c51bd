"""The result cache: against a simple model of itself, across restarts, and on file systems that fail."""

from __future__ import annotations

import contextlib
import os
import signal
import sqlite3
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.config import FallbackSection
from agent.core.clock import ManualClock
from agent.core.types import InferenceResult, LatencyClass, Tier
from agent.store import cache_file
from agent.store.cache import Freshness, Hit, ResultCache, cache_key, pack_tensors, unpack_tensors

ROOT = Path(__file__).resolve().parents[2]
SHA, OTHER_SHA = "a" * 64, "b" * 64
FRESH_S, STALE_S = 10.0, 100.0


class Models:
    def __init__(self, *known: str) -> None:
        self.known = known or (SHA,)

    def by_sha256(self, sha256: str) -> object | None:
        return sha256 if sha256 in self.known else None


def section(size: int = 10_000, *, stale: bool = True) -> FallbackSection:
    return FallbackSection(cache_ttl=FRESH_S, stale_ttl=STALE_S, max_cache_size=size, enable_stale_results=stale)


def answer(value: float = 1.0, *, variant: str = "v1", sha256: str = SHA) -> InferenceResult:
    return InferenceResult(
        request_id="r",
        model="digits",
        variant=variant,
        model_sha256=sha256,
        outputs={"probabilities": np.array([[value, 1 - value]], np.float32)},
        label="3",
        confidence=0.75,
        tier=Tier.EDGE_GPU,
        origin_tier=Tier.EDGE_GPU,
        target="edge_gpu",
        provider="litert 2.3.0/xnnpack",
        latency_class=LatencyClass.NEAR,
        queue_s=0,
        link_s=0,
        compute_s=0,
        total_s=0,
        deadline_met=True,
        cost_usd=0,
        cached=False,
        stale=False,
        age_s=0,
        attempts=(),
        reasons=(),
    )


def key(n: float, model: str = "digits", variant: str | None = None) -> tuple[str, str, bytes]:
    return cache_key(model, variant, {"image": np.full((1, 4), n, np.float32)})


def value_of(hit: Hit | None) -> float | None:
    return None if hit is None else float(hit.entry.outputs["probabilities"][0, 0])


def opened(path: Path | None, clock: ManualClock, size: int = 10_000, **options: Any) -> ResultCache:
    cache = ResultCache(section(size, **options), path, Models(), clock)
    cache.open()
    return cache


def test_fresh_stale_expired() -> None:
    clock = ManualClock()
    cache = opened(None, clock)
    assert cache.get(key(1)) is None
    cache.put(key(1), "sensor", answer(0.25))
    hit = cache.get(key(1))
    assert hit is not None and hit.state is Freshness.FRESH and hit.age_s == 0
    entry = hit.entry
    assert (entry.variant, entry.model_sha256, entry.label, entry.confidence) == ("v1", SHA, "3", 0.75)
    assert (entry.tier, entry.target, entry.provider) == (Tier.EDGE_GPU, "edge_gpu", "litert 2.3.0/xnnpack")
    np.testing.assert_array_equal(entry.outputs["probabilities"], np.array([[0.25, 0.75]], np.float32))
    clock.advance(FRESH_S)
    assert cache.get(key(1)).state is Freshness.FRESH  # type: ignore[union-attr]
    clock.advance(0.001)
    stale = cache.get(key(1))
    assert stale is not None and stale.state is Freshness.STALE and stale.age_s == pytest.approx(FRESH_S + 0.001)
    clock.advance(STALE_S)
    assert cache.get(key(1)) is None
    assert cache.last_known("sensor", "digits") is None
    assert cache.stats() == {
        "entries": 0, "last_known": 0, "limit": 10_000,
        "fresh": 2, "stale": 1, "missed": 2, "expired": 1, "evicted": 0, "file": None,
    }  # fmt: skip


def test_without_stale_results_only_fresh_ones_are_served() -> None:
    clock = ManualClock()
    cache = opened(None, clock, stale=False)
    cache.put(key(1), "sensor", answer())
    assert cache.get(key(1)) is not None
    assert cache.last_known("sensor", "digits") is None
    clock.advance(FRESH_S + 1)
    assert cache.get(key(1)) is None


def test_what_is_asked_makes_the_key() -> None:
    image = np.arange(8, dtype=np.float32).reshape(2, 4)
    same = cache_key("digits", None, {"image": image.copy()})
    assert cache_key("digits", None, {"image": image}) == same
    assert cache_key("digits", None, {"image": np.asfortranarray(image)}) == same
    different = [
        cache_key("motion", None, {"image": image}),
        cache_key("digits", "v1", {"image": image}),
        cache_key("digits", None, {"other": image}),
        cache_key("digits", None, {"image": image.reshape(4, 2)}),
        cache_key("digits", None, {"image": image.view(np.int32)}),
        cache_key("digits", None, {"image": image + 1}),
        cache_key("digits", None, {"image": image, "more": image}),
    ]
    assert len({same, *different}) == 1 + len(different)
    two = {"a": image, "b": image + 1}
    assert cache_key("digits", None, two) == cache_key("digits", None, dict(reversed(two.items())))


def test_the_least_recently_used_goes_first() -> None:
    cache = opened(None, ManualClock(), size=2)
    cache.put(key(1), "s", answer())
    cache.put(key(2), "s", answer())
    cache.get(key(1))
    cache.put(key(3), "s", answer())
    assert [cache.get(key(n)) is not None for n in (1, 2, 3)] == [True, False, True]
    assert cache.stats()["evicted"] == 1


def test_last_known_is_by_producer_and_model() -> None:
    cache = opened(None, ManualClock(), size=2)
    cache.put(key(1), "a", answer(0.1))
    cache.put(key(2), "a", answer(0.2, variant="v2"))
    cache.put(key(3, "motion"), "a", answer(0.3))
    assert value_of(cache.last_known("a", "digits")) == pytest.approx(0.2)
    assert value_of(cache.last_known("a", "digits", "v2")) == pytest.approx(0.2)
    assert cache.last_known("a", "digits", "v1") is None
    assert cache.last_known("b", "digits") is None
    cache.put(key(4), "b", answer())
    assert cache.stats()["last_known"] == 2, "bounded like the entries"


def test_answers_of_a_model_that_left_the_catalogue_are_not_served() -> None:
    cache = opened(None, ManualClock())
    cache.put(key(1), "s", answer(sha256=OTHER_SHA))
    assert cache.get(key(1)) is None
    assert cache.last_known("s", "digits") is None


def test_cached_outputs_cannot_be_changed() -> None:
    cache = opened(None, ManualClock())
    result = answer(0.5)
    cache.put(key(1), "s", result)
    result.outputs["probabilities"][:] = 9
    assert value_of(cache.get(key(1))) == 0.5
    with pytest.raises(ValueError, match="read-only"):
        cache.get(key(1)).entry.outputs["probabilities"][:] = 9  # type: ignore[union-attr]


@given(st.binary(max_size=64))
def test_unpacking_damaged_bytes_raises_nothing_but_value_errors(data: bytes) -> None:
    packed = pack_tensors({"p": np.ones((1, 2), np.float32)})
    for damaged in (data, packed[: len(data)], packed[:4] + data):
        with contextlib.suppress(ValueError):
            unpack_tensors(damaged)


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8", "uint8", "int16", "int32", "int64"])
def test_tensors_survive_packing(dtype: str) -> None:
    tensors = {"one": np.arange(6).reshape(1, 6).astype(dtype), "two": np.zeros((1, 2, 3), dtype)}
    unpacked = unpack_tensors(pack_tensors(tensors))
    assert list(unpacked) == ["one", "two"]
    for name, value in tensors.items():
        assert unpacked[name].dtype == value.dtype
        np.testing.assert_array_equal(unpacked[name], value)


operations = st.lists(
    st.one_of(
        st.tuples(st.just("put"), st.integers(0, 5), st.sampled_from(["a", "b"])),
        st.tuples(st.just("get"), st.integers(0, 5), st.just("")),
        st.tuples(st.just("last"), st.just(0), st.sampled_from(["a", "b"])),
        st.tuples(st.just("advance"), st.sampled_from([1, 9, 50]), st.just("")),
        st.tuples(st.just("jump"), st.sampled_from([-10_000, 10_000]), st.just("")),
    ),
    max_size=40,
)


@given(operations, st.integers(1, 4))
def test_behaves_like_a_simple_model(steps: list[tuple[str, int, str]], size: int) -> None:
    clock = ManualClock()
    cache = opened(None, clock, size=size)
    entries: OrderedDict[int, tuple[float, float]] = OrderedDict()
    last: OrderedDict[str, tuple[float, float]] = OrderedDict()
    for count, (what, n, producer) in enumerate(steps):
        now = clock.monotonic()
        if what == "put":
            cache.put(key(n), producer, answer(count))
            for table, name in ((entries, n), (last, producer)):
                table[name] = (float(count), now)  # type: ignore[index]
                table.move_to_end(name)  # type: ignore[arg-type]
                if len(table) > size:
                    table.popitem(last=False)
        elif what == "get":
            hit = cache.get(key(n))
            if n in entries and now - entries[n][1] <= STALE_S:
                value, created = entries[n]
                entries.move_to_end(n)
                assert hit is not None
                assert (value_of(hit), hit.age_s) == (value, now - created)
                assert (hit.state is Freshness.FRESH) == (now - created <= FRESH_S)
            else:
                entries.pop(n, None)
                assert hit is None
        elif what == "last":
            known = last.get(producer)
            expected = known[0] if known is not None and now - known[1] <= STALE_S else None
            if expected is None:
                last.pop(producer, None)
            assert value_of(cache.last_known(producer, "digits")) == expected
        elif what == "advance":
            clock.advance(n)
        else:
            clock.jump(n)
        assert cache.stats()["entries"] <= size


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
        "import sys; sys.path.insert(0, sys.argv[2])\n"
        "from tests.unit.test_cache import *\n"
        "cache = opened(Path(sys.argv[1]), ManualClock())\n"
        "for n in range(500): cache.put(key(n), 's', answer(n))\n"
        "assert cache.flush()\n"
        "for n in range(500, 600): cache.put(key(n), 's', answer(n))\n"
        "print('ready', flush=True)\n"
        "sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, str(path), str(ROOT)], stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True
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
    assert len(list(tmp_path.glob("*.damaged-*"))) == cache_file.KEPT_DAMAGED


def test_a_place_that_cannot_be_written_is_reported_not_raised(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    cache = opened(tmp_path / "file" / "cache.sqlite", ManualClock())
    cache.put(key(1), "s", answer(0.5))
    assert not cache.flush()
    stats = cache.stats()["file"]
    assert stats["write_errors"] >= 2 and stats["dropped"] == 2 and stats["error"]
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
    assert "full" in cache.stats()["file"]["error"]
    assert cache.get(key(499)) is not None
    cache.put(key(1000), "s", answer())  # The file is opened anew, without the limit.
    assert cache.flush()
    assert cache.stats()["file"]["error"] is None
    cache.close()


def test_what_waits_to_be_written_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_file, "MAX_PENDING", 10)
    cache = ResultCache(section(), tmp_path / "cache.sqlite", Models(), ManualClock())
    for n in range(25):
        cache.put(key(n), "s", answer(n))
    stats = cache.stats()
    assert stats["entries"] == 25
    assert stats["file"]["dropped"] == 15
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
