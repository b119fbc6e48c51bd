"""Of many like events the first few, then their number. Pure; times are monotonic seconds."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

BURST = 5
WINDOW_S = 60.0
KINDS = 256


class _Kind:
    __slots__ = ("begin", "count", "last")

    def __init__(self, begin: float) -> None:
        self.begin = begin
        self.count = 0
        self.last: Mapping[str, Any] = {}


class Repeats:
    """Lets `BURST` events of a kind through in each window and counts the rest. Remembers at most `KINDS` kinds."""

    def __init__(self) -> None:
        self._kinds: dict[Hashable, _Kind] = {}
        self._pushed_out: list[Mapping[str, Any]] = []

    def admit(self, kind: Hashable, fields: Mapping[str, Any], now: float) -> bool:
        """Whether this one is to be told."""
        known = self._kinds.get(kind)
        if known is None:
            if len(self._kinds) >= KINDS:
                self._pushed_out += _told(self._kinds.pop(next(iter(self._kinds))))
            known = self._kinds[kind] = _Kind(now)
        known.count += 1
        known.last = fields
        return known.count <= BURST

    def ended(self, now: float) -> list[Mapping[str, Any]]:
        """The last of each kind whose window is over, with `repeated`: how many were not told."""
        due, self._pushed_out = self._pushed_out, []
        while self._kinds:
            kind, oldest = next(iter(self._kinds.items()))  # in the order in which their windows began
            if now < oldest.begin + WINDOW_S:
                break
            due += _told(self._kinds.pop(kind))
        return due


def _told(kind: _Kind) -> list[Mapping[str, Any]]:
    return [{**kind.last, "repeated": kind.count - BURST}] if kind.count > BURST else []
