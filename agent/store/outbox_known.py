"""Which keys were used before, so that a repeat is known after its item was delivered.

Keys are as good as random, and a random place in a B-tree is a page to write for each. So their rows are only ever
appended, and found through what is held in memory: a hash and a place for each, 16 bytes, in an array sorted by hash.
"""

from __future__ import annotations

import hashlib
import os
import sqlite3
import sys
from array import array
from bisect import bisect_left
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

RECENT = 8192
"""Places in a dictionary, before they are merged into the arrays."""
COLUMNS = "seq INTEGER PRIMARY KEY, producer TEXT NOT NULL, key TEXT NOT NULL, id TEXT NOT NULL, question BLOB NOT NULL"
SCHEMA = f"CREATE TABLE IF NOT EXISTS known ({COLUMNS}, created REAL NOT NULL)"


_WIDE = sys.hash_info.width >= 64
_SECRET = os.urandom(16)


class Key(NamedTuple):
    """A key, the item it was used for, and when, in running time."""

    producer: str
    key: str
    id: str
    question: bytes
    created: float


def hashed(producer: str, key: str) -> int:
    """64 bits, with the process's own secret: nobody can choose keys that collide."""
    if _WIDE:
        return hash((producer, key))
    digest = hashlib.blake2b(f"{producer}\0{key}".encode(errors="replace"), digest_size=8, key=_SECRET).digest()
    return int.from_bytes(digest, "little", signed=True)


class KnownKeys:
    """What was added since `begin` counts from `committed` on, and not at all without it. Of a hash that is there more
    than once, the last place counts; a place whose row is gone, or is another key's, is none."""

    def __init__(self) -> None:
        self._hashes: NDArray[np.int64] = np.empty(0, np.int64)
        self._places: NDArray[np.int64] = np.empty(0, np.int64)
        self._recent: dict[int, int] = {}
        self._new: dict[int, Key] = {}
        self._gone: list[int] = []
        self._dead: list[int] = []
        self._highest = 0
        self.remembered = 0
        """Keys added since the last purge, also if the file was opened again since."""

    @property
    def end(self) -> int:
        """The place of the next key."""
        return self._highest + 1

    def load(self, connection: sqlite3.Connection, *, anew: bool) -> None:
        """Read where every key is. Not `anew`: only if the file has others than were committed here, as after a commit
        that failed and reached the disk all the same."""
        highest = connection.execute("SELECT COALESCE(MAX(seq), 0) FROM known").fetchone()[0]
        if not anew and highest == self._highest:
            return
        hashes, places = array("q"), array("q")
        for place, producer, key in connection.execute("SELECT seq, producer, key FROM known ORDER BY seq"):
            hashes.append(hashed(producer, key))
            places.append(place)
        order = np.argsort(np.asarray(hashes), kind="stable")
        self._hashes, self._places = np.asarray(hashes)[order], np.asarray(places)[order]
        self._recent.clear()
        self._dead.clear()
        self._highest = highest

    def begin(self) -> None:
        self._new.clear()
        self._gone.clear()

    def add_all_new(self, keys: Sequence[Key]) -> bool:
        """Remember all of them; none, and False, if one may be known or is there twice."""
        new = {hashed(key.producer, key.key): key for key in keys}
        if len(new) < len(keys) or not self._new.keys().isdisjoint(new) or not self._recent.keys().isdisjoint(new):
            return False
        hashes, end = self._hashes.data, len(self._hashes)
        for name in new:
            at = bisect_left(hashes, name)
            if at < end and hashes[at] == name:
                return False
        self._new.update(new)
        return True

    def find(self, connection: sqlite3.Connection, producer: str, key: str) -> Key | None:
        """How it was used last; None: it is not known."""
        name = hashed(producer, key)
        found = self._new.get(name)
        if found is None and (place := self._place(name)):
            row = connection.execute(
                "SELECT producer, key, COALESCE(CAST(id AS TEXT), ''), COALESCE(CAST(question AS BLOB), x''),"
                " COALESCE(CAST(created AS REAL), 0.0) FROM known WHERE seq = ?",
                (place,),
            ).fetchone()
            found = None if row is None else Key._make(row)
        return found if found is not None and (found.producer, found.key) == (producer, key) else None

    def add(self, connection: sqlite3.Connection, key: Key, before: Key | None) -> None:
        """Remember a key, in place of how it was used `before`."""
        if before is not None:
            self.forget(connection, before)
        self._new[hashed(key.producer, key.key)] = key

    def forget(self, connection: sqlite3.Connection, key: Key) -> None:
        """As it was found."""
        name = hashed(key.producer, key.key)
        if self._new.pop(name, None) is None:
            self._gone.append(self._place(name))
            connection.execute("DELETE FROM known WHERE seq = ?", self._gone[-1:])

    def rows(self) -> list[tuple[object, ...]]:
        """What is to be inserted before the commit."""
        return [(place, *key) for place, key in enumerate(self._new.values(), self._highest + 1)]

    def committed(self) -> None:
        for name in self._new:
            self._highest += 1
            self._recent[name] = self._highest
        self._new.clear()
        self._dead += self._gone
        self._gone.clear()
        if len(self._recent) > RECENT:
            self._merge()

    def oldest(self, keep: int) -> int:
        """The place from which on there are `keep` keys at most, of those committed; `keep` is 1 or more."""
        self._merge()
        if self._dead:  # forgotten: they count no more
            stay = ~np.isin(self._places, self._dead)
            self._hashes, self._places = self._hashes[stay], self._places[stay]
            self._dead.clear()
        surplus = len(self._places) - keep
        return 0 if surplus <= 0 else int(np.partition(self._places, surplus)[surplus])

    def drop(self, before: int) -> None:
        """Keys at earlier places are gone."""
        stay = self._places >= before
        self._hashes, self._places = self._hashes[stay], self._places[stay]
        self._recent = {name: place for name, place in self._recent.items() if place >= before}

    def _place(self, name: int) -> int:
        place = self._recent.get(name, 0)
        if not place and len(self._hashes):
            at = int(np.searchsorted(self._hashes, name, side="right")) - 1  # of several, the last one
            if at >= 0 and self._hashes[at] == name:
                place = int(self._places[at])
        return place

    def _merge(self) -> None:
        if not self._recent:
            return
        hashes = np.fromiter(self._recent, np.int64, len(self._recent))
        places = np.fromiter(self._recent.values(), np.int64, len(self._recent))
        order = np.argsort(hashes)
        at = np.searchsorted(self._hashes, hashes[order], side="right")  # after those that were there: they are older
        self._hashes = np.insert(self._hashes, at, hashes[order])
        self._places = np.insert(self._places, at, places[order])
        self._recent.clear()
