"""Calls whose answers are known beforehand, so that a wrong one cannot pass for a right one."""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final, Self

import numpy as np

from agent.core.errors import LinkError, ProtocolError
from agent.link.calls import RemoteError
from agent.link.session import PING_OVERHEAD, Session
from agent.registry.catalog import Catalog, Variant
from agent.registry.tensors import pack, to_variant
from agent.wire.codes import Capability
from agent.wire.messages import MODEL_ID_BYTES
from hil.demo.players import heldout

COUNT: Final = 64
"""Different inputs: more than may be open at once, so that answers cannot be mixed up unseen."""
ARENA_BYTES: Final = 256 * 1024
TOLERANCE: Final = 1
"""Least significant bits that an int8 output may differ between two runtimes."""
PING_TRIES: Final = 8
FAILED_PAUSE_S: Final = 0.01
"""Before a lane asks again after a call that failed at once: a line that is lost fails every one of them."""


class Outcome(StrEnum):
    """What became of one call."""

    RIGHT = "right"
    WRONG = "wrong"
    LATE = "late"
    """No answer by its deadline."""
    REFUSED = "refused"
    LOST = "lost"
    """The line or the board went."""


@dataclass(frozen=True)
class Samples:
    """Inputs of one model as they travel, and what the reference runtime makes of them."""

    variant: Variant
    inputs: tuple[bytes, ...]
    expected: tuple[bytes, ...]
    runtime: str

    @classmethod
    def of(cls, catalog: Catalog, name: str) -> Self:
        """From the family's held-out data."""
        from hil.virtual.engine import open_engine

        family = catalog.family(name)
        variant = family.variant_for("edge_mcu", None)
        assert variant is not None, f"{name} has no variant for microcontrollers"
        engine = open_engine(ARENA_BYTES, b"")
        info = engine.load(catalog.path(variant).read_bytes())
        values, _ = heldout(catalog.root / family.data.heldout)
        found: dict[bytes, bytes] = {}  # output -> input: no answer that is right of one input is right of another
        for value in values:
            spec = family.inputs[0]
            tensors = to_variant({spec.name: np.asarray(value).reshape(spec.shape)}, variant)
            inputs, outputs = pack(tensors, variant.inputs), bytearray(info.output_bytes)
            engine.invoke(inputs, memoryview(outputs))
            if all(off_by(bytes(outputs), other) > 2 * TOLERANCE for other in found):
                found[bytes(outputs)] = inputs
            if len(found) == COUNT:
                break
        return cls(variant, tuple(found.values()), tuple(found), engine.name)

    @property
    def model(self) -> bytes:
        return bytes.fromhex(self.variant.sha256)[:MODEL_ID_BYTES]


def off_by(found: bytes, expected: bytes) -> int:
    """Largest difference of an int8 output; 256 for another length."""
    if len(found) != len(expected):
        return 256
    difference = np.frombuffer(found, np.int8).astype(int) - np.frombuffer(expected, np.int8).astype(int)
    return int(np.abs(difference).max(initial=0))


Call = Callable[[float], Awaitable[Outcome]]
"""One call with so many seconds; what became of it."""


class Caller:
    """Asks a board: INFER where it has an engine, else PING of as many bytes, whose echo proves the line as well."""

    def __init__(self, session: Session, samples: Samples, seed: int) -> None:
        self._session, self._samples = session, samples
        self._turn = itertools.cycle(range(len(samples.inputs)))
        self._rng = random.Random(seed)
        self.infers = bool(session.hello.capabilities & Capability.ENGINE)
        self.payload = len(samples.inputs[0])
        self.what = "INFER" if self.infers else "PING (the board has no engine)"
        self.most_off = 0
        self._usual_s = 0.0  # round trip of a PING
        self.compute_us: list[int] = []
        self.refusals: Counter[str] = Counter()
        self.wrongs: list[str] = []

    @property
    def lanes(self) -> int:
        """How many calls keep the line busy."""
        return self._session.window if self.infers else max(8, self._session.window)

    async def __call__(self, seconds: float) -> Outcome:
        deadline = time.monotonic() + seconds
        try:
            return await (self._infer(deadline) if self.infers else self._ping(deadline))
        except TimeoutError:
            return Outcome.LATE
        except RemoteError as error:
            self.refusals[error.text or str(error.code)] += 1
            return Outcome.REFUSED
        except LinkError:
            return Outcome.LOST
        except ProtocolError as error:
            self.wrongs.append(str(error))
            return Outcome.WRONG

    async def _infer(self, deadline: float) -> Outcome:
        index = next(self._turn)
        reply = await self._session.infer(self._samples.model, self._samples.inputs[index], deadline)
        self.compute_us.append(reply.message.compute_us)
        off = off_by(reply.message.outputs, self._samples.expected[index])
        if reply.message.model != self._samples.model or off > TOLERANCE:
            self.wrongs.append(f"sample {index}: {reply.message.outputs.hex()} is off by {off}")
            return Outcome.WRONG
        self.most_off = max(self.most_off, off)
        return Outcome.RIGHT

    async def _ping(self, deadline: float) -> Outcome:
        """The session repeats no PING, as none must be late; here it stands for a call that is repeated."""
        data = self._rng.randbytes(min(self.payload, self._session.hello.max_frame - PING_OVERHEAD))
        patience_s = max((deadline - time.monotonic()) / PING_TRIES, 2 * self._usual_s)
        while True:
            try:
                pinged = await self._session.ping(data, min(deadline, time.monotonic() + patience_s))
                self._usual_s += (pinged.round_trip_s - self._usual_s) / PING_TRIES
                return Outcome.RIGHT
            except TimeoutError:
                if time.monotonic() >= deadline - patience_s / 2:
                    raise


@dataclass(slots=True)
class Tally:
    """What became of many calls."""

    outcomes: Counter[Outcome] = field(default_factory=Counter)
    took_s: list[float] = field(default_factory=list)
    """Of those that were answered rightly."""
    overdue_s: float = 0.0
    """The most that any call ended after its deadline."""
    seconds: float = 0.0

    @property
    def total(self) -> int:
        return self.outcomes.total()

    @property
    def right(self) -> int:
        return self.outcomes[Outcome.RIGHT]

    @property
    def wrong(self) -> int:
        return self.outcomes[Outcome.WRONG]

    @property
    def rate(self) -> float:
        """Right answers per second."""
        return self.right / self.seconds if self.seconds else 0.0

    def add(self, other: Tally) -> None:
        """What came of further calls of the same kind."""
        self.outcomes += other.outcomes
        self.took_s += other.took_s
        self.overdue_s = max(self.overdue_s, other.overdue_s)
        self.seconds += other.seconds

    def text(self) -> str:
        return ", ".join(f"{count} {outcome}" for outcome, count in sorted(self.outcomes.items())) or "no calls"


async def drive(call: Call, *, lanes: int, deadline_s: float, seconds: float = 0.0, count: int = 0) -> Tally:
    """Call from so many lanes at once, each its next when the last has ended: for `seconds`, or `count` calls."""
    tally = Tally()
    began = time.monotonic()  # an event loop's own time may be as coarse as a millisecond
    left = itertools.count(count, -1)

    async def lane() -> None:
        while next(left) > 0 if count else time.monotonic() < began + seconds:
            asked = time.monotonic()
            outcome = await call(deadline_s)
            took = time.monotonic() - asked
            tally.outcomes[outcome] += 1
            tally.overdue_s = max(tally.overdue_s, took - deadline_s)
            if outcome is Outcome.RIGHT:
                tally.took_s.append(took)
            elif outcome is not Outcome.LATE:
                await asyncio.sleep(FAILED_PAUSE_S)

    await asyncio.gather(*(lane() for _ in range(lanes)))
    tally.seconds = time.monotonic() - began
    return tally
