"""The result cache in memory, against a simple model of itself."""

from __future__ import annotations

import contextlib
from collections import OrderedDict

import numpy as np
import pytest
from cache_fakes import FRESH_S, OTHER_SHA, SHA, STALE_S, answer, key, opened, value_of
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.core.clock import ManualClock
from agent.core.types import Tier
from agent.store.cache import Freshness, cache_key, pack_tensors, unpack_tensors


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
        "lookups": {"fresh": 2, "stale": 1, "missed": 2}, "expired": 1, "evicted": 0, "file": None,
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


@settings(deadline=None)
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


@settings(deadline=None)
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
