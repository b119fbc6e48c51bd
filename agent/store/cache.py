"""Answers that were given before: fresh ones save an inference, stale ones are better than none.

Memory decides; the file (`cache_file`) only lets it survive a restart. Ages are monotonic as long as the machine runs,
over restarts of the daemon too, so no jump of the wall clock changes one. After a reboot an age is the difference of
wall times, and never negative: a wall clock that was set back meanwhile makes an answer look younger by as much.
"""

from __future__ import annotations

import hashlib
import struct
from collections import OrderedDict
from enum import StrEnum
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeAlias

import numpy as np

from agent.config import FallbackSection
from agent.core.clock import Clock
from agent.core.types import InferenceResult, Tensor, Tensors, Tier
from agent.store.cache_file import CacheFile, Row

CacheKey: TypeAlias = tuple[str, str, bytes]
"""Model family, pinned variant or `""` for any, digest of the canonical inputs."""

DIGEST_BYTES = 16
"""128 bits: two inputs of one model that collide by chance are not to be expected."""


class Models(Protocol):
    """What the cache asks of the catalogue."""

    def by_sha256(self, sha256: str) -> object | None: ...


class Freshness(StrEnum):
    FRESH = "fresh"
    STALE = "stale"


class Entry(NamedTuple):
    """An answer as it was given. `created` is monotonic seconds, `created_wall` Unix time without the jumps that the
    wall clock made since the machine was started."""

    variant: str
    model_sha256: str
    label: str | None
    confidence: float | None
    tier: Tier
    target: str
    provider: str
    packed: bytes
    created: float
    created_wall: float

    @property
    def outputs(self) -> dict[str, Tensor]:
        """Canonical tensors, read-only."""
        return unpack_tensors(self.packed)


class Hit(NamedTuple):
    """A cached answer that may be served."""

    entry: Entry
    age_s: float
    state: Freshness


def cache_key(model: str, variant: str | None, inputs: Tensors) -> CacheKey:
    """Equal for equal questions: names, dtypes, shapes and bytes of the canonical inputs, in whatever order."""
    digest = hashlib.blake2b(digest_size=DIGEST_BYTES)
    for name in inputs if len(inputs) == 1 else sorted(inputs):
        value = inputs[name]
        digest.update(_heading(name, value.dtype, value.shape))
        digest.update(value.data if value.flags.c_contiguous else value.tobytes())
    return model, variant or "", digest.digest()


class ResultCache:
    """Bounded by `settings.max_cache_size`; the least recently used answer goes first.

    An answer of a model that `models` does not know is not served. `path` None: nothing survives a restart.
    """

    def __init__(self, settings: FallbackSection, path: Path | None, models: Models, clock: Clock) -> None:
        self._settings = settings
        self._models = models
        self._known: dict[str, bool] = {}
        self._clock = clock
        self._fresh_s = settings.cache_ttl
        self._keep_s = settings.stale_ttl if settings.enable_stale_results else settings.cache_ttl
        self._entries: OrderedDict[CacheKey, Entry] = OrderedDict()
        self._last: OrderedDict[tuple[str, str], Entry] = OrderedDict()
        self._offset = clock.wall() - clock.monotonic()
        size = settings.max_cache_size
        self._file = CacheFile(path, size, settings.write_bytes_per_day) if path is not None else None
        # What was found, whether or not the pipeline could use it; what was served, `counters` and the metrics tell.
        self._lookups = {"fresh": 0, "stale": 0, "missed": 0}
        self._counts = {"expired": 0, "evicted": 0}

    def open(self) -> None:
        """Load what the file has. Never raises for a bad file: `stats` tells."""
        if self._file is None:
            return
        now, clock = self._clock.monotonic(), self._clock
        entries, last, self._offset = self._file.open(now, clock.wall(), clock.boot(), self._keep_s)
        wall = now + self._offset
        for row in entries:
            self._entries[row.model, row.scope, row.digest] = _from_row(row, now, wall)
        for row in last:
            self._last[row.scope, row.model] = _from_row(row, now, wall)

    def close(self) -> None:
        """Write what is pending, as long as that takes no more than a few seconds. Blocking."""
        if self._file is not None:
            self._file.close()

    def flush(self) -> bool:
        """Wait until everything put so far is in the file. Blocking. False if it could not be written."""
        return self._file is None or self._file.flush()

    def get(self, key: CacheKey) -> Hit | None:
        """The answer to the same question, fresh or stale; None if there is none, or it is too old."""
        hit = self.again(key)
        self._lookups["missed" if hit is None else hit.state] += 1
        return hit

    def again(self, key: CacheKey) -> Hit | None:
        """The same for a request whose look-up was counted."""
        entry = self._entries.get(key)
        if entry is None:
            return None
        hit = self._hit(entry)
        if hit is None:
            del self._entries[key]
            self._counts["expired"] += 1
            return None
        self._entries.move_to_end(key)
        return hit

    def last_known(self, producer: str, model: str, variant: str | None = None) -> Hit | None:
        """The producer's latest answer, to whatever input; None if stale answers are not wanted at all."""
        entry = self._last.get((producer, model))
        if entry is None or not self._settings.enable_stale_results:
            return None
        hit = self._hit(entry)
        if hit is None:
            del self._last[producer, model]
            return None
        return hit if variant is None or variant == entry.variant else None

    def put(self, key: CacheKey, producer: str, result: InferenceResult) -> None:
        """Remember an answer that was just computed. Never raises and never waits for the file."""
        now = self._clock.monotonic()
        entry = Entry(
            result.variant,
            result.model_sha256,
            result.label,
            result.confidence,
            result.tier,
            result.target,
            result.provider,
            pack_tensors(result.outputs),
            now,
            now + self._offset,
        )
        last_key = (producer, key[0])
        self._counts["evicted"] += _put(self._entries, key, entry, self._settings.max_cache_size)
        _put(self._last, last_key, entry, self._settings.max_cache_size)
        if self._file is not None:
            self._file.put(key, last_key, entry)

    def problem(self) -> str:
        """Why answers would not survive a restart, for people; empty if they would, or need not."""
        return "" if self._file is None else self._file.problem()

    def stats(self) -> dict[str, Any]:
        """For `/status`: plain JSON types."""
        return {
            "entries": len(self._entries),
            "last_known": len(self._last),
            "limit": self._settings.max_cache_size,
            "lookups": dict(self._lookups),
            **self._counts,
            "file": None if self._file is None else self._file.stats(),
        }

    def _hit(self, entry: Entry) -> Hit | None:
        age_s = self._clock.monotonic() - entry.created
        known = self._known.get(entry.model_sha256)
        if known is None:
            known = self._known[entry.model_sha256] = self._models.by_sha256(entry.model_sha256) is not None
        if age_s > self._keep_s or not known:
            return None
        return Hit(entry, age_s, Freshness.FRESH if age_s <= self._fresh_s else Freshness.STALE)


def pack_tensors(tensors: Tensors) -> bytes:
    """Each tensor as: length of the heading (u16), heading `name dtype sizes`, length of the data (u32), data."""
    parts: list[bytes] = []
    for name, value in tensors.items():
        data = value.tobytes()
        parts += (_heading(name, value.dtype, value.shape), len(data).to_bytes(4, "little"), data)
    return b"".join(parts)


def unpack_tensors(packed: bytes) -> dict[str, Tensor]:
    """Inverse of `pack_tensors`; the arrays are views of `packed`. Raises `ValueError`."""
    tensors: dict[str, Tensor] = {}
    at = 0
    try:
        while at < len(packed):
            (length,) = struct.unpack_from("<H", packed, at)
            name, dtype, *sizes = packed[at + 2 : at + 2 + length].decode().split(" ")
            at += 2 + length
            (length,) = struct.unpack_from("<I", packed, at)
            count = length // np.dtype(dtype).itemsize
            tensors[name] = np.frombuffer(packed, dtype, count, at + 4).reshape([int(size) for size in sizes])
            at += 4 + length
    except (struct.error, TypeError) as error:
        raise ValueError(f"packed tensors are damaged: {error}") from None
    return tensors


@lru_cache(maxsize=256)  # A few for each model; making one takes longer than all else in a look-up.
def _heading(name: str, dtype: np.dtype[Any], shape: tuple[int, ...]) -> bytes:
    heading = f"{name} {dtype.str} {' '.join(map(str, shape))}".encode()
    return len(heading).to_bytes(2, "little") + heading


def _put(table: OrderedDict[Any, Entry], key: Any, entry: Entry, limit: int) -> int:
    """Insert as the most recent; returns how many had to go."""
    table[key] = entry
    table.move_to_end(key)
    if len(table) <= limit:
        return 0
    table.popitem(last=False)
    return 1


def _from_row(row: Row, now: float, wall: float) -> Entry:
    return Entry(
        row.variant,
        row.model_sha256,
        row.label,
        row.confidence,
        Tier(row.tier),
        row.target,
        row.provider,
        row.packed,
        now - max(0.0, wall - row.created_wall),
        row.created_wall,
    )
