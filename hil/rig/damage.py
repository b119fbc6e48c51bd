"""What a bad line does to the bytes that it carries, without any I/O.

Where each fault falls depends on the seed and on the position in the stream alone, not on the portions in which the
bytes come: the same bytes under the same seed are damaged in the same way.
"""

from __future__ import annotations

import dataclasses
import random
from dataclasses import dataclass
from math import log
from typing import Final

DELIMITER: Final = 0


@dataclass(frozen=True, slots=True)
class Faults:
    """One direction of a line. Rates are between 0 (never) and 1; `baud` 0 is as fast as it goes."""

    bit_errors: float = 0.0
    """Of each bit: it arrives as its opposite."""
    drop: float = 0.0
    """Of each byte: it does not arrive."""
    duplicate: float = 0.0
    """Of each byte: it arrives twice."""
    drop_frames: float = 0.0
    """Of each frame: it does not arrive, its delimiter included."""
    drop_delimiters: float = 0.0
    """Of each delimiter: it does not arrive, so that two frames become one."""
    garbage_every: int = 0
    """Bytes between two bursts of random bytes; 0: no bursts."""
    garbage_bytes: int = 0
    """Length of a burst."""
    delay_s: float = 0.0
    """How much later everything arrives."""
    baud: int = 0
    """Bits per second, ten to a byte."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value < 0 or (field.name in RATES and value >= 1):
                raise ValueError(f"{field.name}: must be from 0 to below 1, found {value}")

    def text(self) -> str:
        """`bit_errors=0.0001 baud=921600`: what is not as it should be."""
        named = ((field.name, getattr(self, field.name)) for field in dataclasses.fields(self))
        return " ".join(f"{name}={value:g}" for name, value in named if value) or "clean"


RATES: Final = ("bit_errors", "drop", "duplicate", "drop_frames", "drop_delimiters")


class _Events:
    """Positions of events that happen at each place with the same chance: geometric gaps, so a quiet line costs
    nothing."""

    def __init__(self, rate: float, rng: random.Random) -> None:
        self._rng = rng
        self._scale = log(1 - rate) if rate else 0.0
        self._left = self._gap()

    def within(self, count: int) -> list[int]:
        """Which of the next `count` places are hit."""
        found = []
        at = self._left
        while at < count:
            found.append(at)
            at += 1 + self._gap()
        self._left = at - count
        return found

    def next(self) -> bool:
        """Whether the next place is hit."""
        return bool(self.within(1))

    def _gap(self) -> int:
        return int(log(1 - self._rng.random()) / self._scale) if self._scale else 1 << 62


class Damage:
    """Applies the faults of one direction to a stream."""

    def __init__(self, faults: Faults, seed: int) -> None:
        def rng(name: str) -> random.Random:
            # One source for each kind of fault: turning one on does not move the others.
            return random.Random(f"{seed}/{name}")

        self.counts = {"bits": 0, "dropped": 0, "duplicated": 0, "frames": 0, "delimiters": 0, "garbage": 0}
        self._faults = faults
        self._frames = _Events(faults.drop_frames, rng("drop_frames"))
        self._delimiters = _Events(faults.drop_delimiters, rng("drop_delimiters"))
        self._drops = _Events(faults.drop, rng("drop"))
        self._duplicates = _Events(faults.duplicate, rng("duplicate"))
        self._bits = _Events(faults.bit_errors, rng("bit_errors"))
        self._garbage = rng("garbage")
        self._to_burst = faults.garbage_every
        self._in_frame = self._losing = False

    def apply(self, data: bytes) -> bytes:
        """What arrives of `data`."""
        faults = self._faults
        if faults.drop_frames or faults.drop_delimiters:
            data = self._reframe(data)
        if faults.drop:
            data = self._without(data)
        if faults.duplicate:
            data = self._doubled(data)
        if faults.garbage_every:
            data = self._interspersed(data)
        if faults.bit_errors:
            data = self._flipped(data)
        return data

    def _reframe(self, data: bytes) -> bytes:
        out = bytearray()
        for byte in data:
            if not self._in_frame and byte != DELIMITER:
                self._in_frame, self._losing = True, self._frames.next()
                self.counts["frames"] += self._losing
            if byte == DELIMITER and self._in_frame:
                lost, self._in_frame = self._losing, False
                if not lost and self._delimiters.next():
                    self.counts["delimiters"] += 1
                    lost = True
                self._losing = False
            else:
                lost = self._losing
            if not lost:
                out.append(byte)
        return bytes(out)

    def _without(self, data: bytes) -> bytes:
        out = bytearray(data)
        for at in reversed(self._drops.within(len(data))):
            del out[at]
        self.counts["dropped"] += len(data) - len(out)
        return bytes(out)

    def _doubled(self, data: bytes) -> bytes:
        out = bytearray(data)
        for at in reversed(self._duplicates.within(len(data))):
            out.insert(at, data[at])
        self.counts["duplicated"] += len(out) - len(data)
        return bytes(out)

    def _interspersed(self, data: bytes) -> bytes:
        out = bytearray()
        while len(data) >= self._to_burst:
            out += data[: self._to_burst] + self._garbage.randbytes(self._faults.garbage_bytes)
            data = data[self._to_burst :]
            self._to_burst = self._faults.garbage_every
            self.counts["garbage"] += self._faults.garbage_bytes
        self._to_burst -= len(data)
        return bytes(out + data)

    def _flipped(self, data: bytes) -> bytes:
        out = bytearray(data)
        bits = self._bits.within(len(data) * 8)
        for bit in bits:
            out[bit // 8] ^= 1 << bit % 8
        self.counts["bits"] += len(bits)
        return bytes(out)


class Wire:
    """A line of a certain speed and length: what of the bytes put in has arrived by now.

    Times are monotonic seconds. The end of a frame arrives when its last bit has: nobody can act on less than a frame,
    so `wake_at` is the end of the first one, which keeps the pace exact without a tick for every byte.
    """

    LONGEST_NAP_S: Final = 0.004

    def __init__(self, faults: Faults) -> None:
        self._byte_s = 10 / faults.baud if faults.baud else 0.0
        self._delay_s = faults.delay_s
        self._travelling: list[tuple[float, bytes]] = []
        self._queue = bytearray()
        self._carried_until = 0.0

    def __len__(self) -> int:
        return len(self._queue) + sum(len(data) for _, data in self._travelling)

    def put(self, data: bytes, now: float) -> None:
        if data:
            self._travelling.append((now + self._delay_s, data))

    def take(self, now: float) -> bytes:
        """What has arrived since."""
        while self._travelling and self._travelling[0][0] <= now:
            at, data = self._travelling.pop(0)
            if not self._queue:
                self._carried_until = max(self._carried_until, at)
            self._queue += data
        count = len(self._queue)
        if self._byte_s:
            # A thousandth of a byte of grace: a wake-up computed from the same numbers must not come too early.
            count = min(count, int((now - self._carried_until) / self._byte_s + 1e-3))
            self._carried_until += count * self._byte_s
        out = bytes(self._queue[:count])
        del self._queue[:count]
        return out

    def wake_at(self) -> float | None:
        """When to ask again; None: not before the next `put`."""
        if self._queue:
            if not self._byte_s:
                return self._carried_until
            end = self._queue.find(DELIMITER) + 1 or len(self._queue)
            return self._carried_until + min(end * self._byte_s, self.LONGEST_NAP_S)
        return self._travelling[0][0] if self._travelling else None

    def clear(self) -> None:
        """The bytes under way are lost."""
        self._travelling.clear()
        self._queue.clear()
