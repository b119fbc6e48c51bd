"""What the virtual board perceives: time, and the readings of its sensor."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any


class BoardClock:
    """Microseconds since boot, fast by `drift_ppm` against this machine's monotonic clock."""

    def __init__(self) -> None:
        self._drift = 0.0
        self._from_ns = time.monotonic_ns()
        self._from_us = 0.0

    def restart(self) -> None:
        """The board boots."""
        self._from_ns, self._from_us = time.monotonic_ns(), 0.0

    def drift(self, ppm: float) -> None:
        """From now on."""
        now_ns = time.monotonic_ns()
        self._from_us, self._from_ns = self._at(now_ns), now_ns
        self._drift = ppm * 1e-6

    def now_us(self) -> int:
        return int(self._at(time.monotonic_ns()))

    def command(self, request: Mapping[str, Any]) -> dict[str, float]:
        """The same moment on both clocks, in seconds: what a gateway on this machine should find out. With `drift_ppm`:
        that is its drift from now on. Raises `ValueError`."""
        if "drift_ppm" in request:
            self.drift(float(request["drift_ppm"]))
        now_ns = time.monotonic_ns()
        return {"board_s": self._at(now_ns) / 1e6, "monotonic_s": now_ns / 1e9}

    def _at(self, now_ns: int) -> float:
        return self._from_us + (now_ns - self._from_ns) / 1e3 * (1 + self._drift)


class TableSource:
    """Readings one after the other from a table, over and over: `table` is whole rows of the model's input bytes."""

    def __init__(self, table: bytes) -> None:
        self._table = table
        self._at = 0

    def read(self, _: int, size: int) -> bytes | None:
        """None if the table is of another model."""
        if not size or not self._table or len(self._table) % size:
            return None
        start = self._at % len(self._table)
        self._at = start + size
        return self._table[start : start + size]


class SyntheticSource:
    """The same pattern as `firmware/hal/synthetic.h`."""

    def __init__(self) -> None:
        self._count = 0

    def read(self, _: int, size: int) -> bytes:
        first = self._count * 37
        self._count += 1
        return bytes((first + 11 * i) & 0xFF for i in range(size))
