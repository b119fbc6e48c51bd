"""`script/powerloss`: SIGKILL at random instants and at every step of an item's life, and a ledger that must balance.

A child process puts 1 KB items into an outbox and delivers every second one. It is killed; its successor opens the same
file, is asked to put again what had not been acknowledged, and is killed too. At the end everything is delivered. The
ledger balances when every acknowledged item was delivered whole, and no item under two ids: a receiver that knows an id
again then sees each item once.
"""

from __future__ import annotations

import argparse
import os
import random
import select
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import chain, count
from pathlib import Path
from typing import NoReturn

from agent.config import OutboxSection
from agent.core.clock import SystemClock
from agent.core.errors import NotStored
from agent.store.outbox import Outbox
from hil.powerloss.child import ACKNOWLEDGED, DAMAGED, DELIVERED, RECORD, TRIED, Killer, intact, parse, run
from hil.processes import interruptible

STEPS = (
    "gathered",
    "begun",
    "inserted",
    "written",
    "committed",
    "told",
    "published",
    "acknowledged by the broker",
)
"""Of an item's life, in order: what `Outbox` and the child's deliverer call `step` with."""
STEP_RUNS = 3
LONGEST_S = 0.12
"""The latest instant of a kill, counted from the child's first word."""
STUCK_S = 20.0


@dataclass
class Ledger:
    """What the children said before they were killed, and what was found at the end."""

    kills: int = 0
    tried: set[int] = field(default_factory=set)
    acknowledged: set[int] = field(default_factory=set)
    delivered: dict[int, list[int]] = field(default_factory=dict)
    damaged: int = 0
    unreached: list[str] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)
    """Children that ended otherwise than by their kill."""

    def note(self, what: bytes, number: int, id_: int) -> None:
        if what == TRIED:
            self.tried.add(number)
        elif what == ACKNOWLEDGED:
            self.acknowledged.add(number)
        elif what == DELIVERED:
            self.delivered.setdefault(number, []).append(id_)
        elif what == DAMAGED:
            self.damaged += 1

    @property
    def lost(self) -> set[int]:
        """Acknowledged and never delivered."""
        return self.acknowledged - self.delivered.keys()

    @property
    def twice(self) -> set[int]:
        """Delivered under more than one id: no receiver can know them for the same."""
        return {number for number, ids in self.delivered.items() if len(set(ids)) > 1}

    @property
    def repeated(self) -> int:
        """Deliveries that a receiver suppresses, because it knows the id."""
        return sum(len(ids) - len(set(ids)) for ids in self.delivered.values())

    @property
    def balances(self) -> bool:
        """Where nothing was acknowledged, nothing was shown."""
        faults = self.lost or self.twice or self.damaged or self.unreached or self.broken
        return bool(self.acknowledged) and not faults

    def summary(self) -> str:
        return (
            f"{self.kills} kills; {len(self.tried)} items of 1 KB tried, {len(self.acknowledged)} acknowledged, "
            f"{len(self.delivered)} delivered\n"
            f"acknowledged and lost: {len(self.lost)}\n"
            f"seen twice: {len(self.twice)} (repeats under the same id, suppressed: {self.repeated})\n"
            f"damaged: {self.damaged}"
            + "".join(f"\nnever reached: {step}" for step in self.unreached)
            + "".join(f"\nended without a kill: {how}" for how in self.broken)
        )


def powerloss(folder: Path, runs: int, seed: int, *, steps: bool = True) -> Ledger:
    """`runs` kills at random instants, then some at each step; then deliver what is left."""
    rng, ledger, numbers = random.Random(seed), Ledger(), count(1)
    for _ in range(runs):
        _life(folder, ledger, numbers, lambda step: None, rng.uniform(0.0, LONGEST_S))
    for step in STEPS if steps else ():
        for time_ in range(1, STEP_RUNS + 1):
            if not _life(folder, ledger, numbers, Killer(step, time_ * rng.randint(1, 5)), None):
                ledger.unreached.append(f"{step} ({time_})")
    _drain(folder, ledger)
    return ledger


def _life(
    folder: Path, ledger: Ledger, numbers: Iterator[int], step: Callable[[str], None], after_s: float | None
) -> bool:
    """One child, from its start to its kill. False: it did not kill itself although it was to."""
    again = sorted(ledger.tried - ledger.acknowledged)
    first = next(numbers)
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        _live(folder, chain(again, count(first)), ledger.kills, (reading, writing), step)
    os.close(writing)
    try:
        killed_itself = _listen(reading, ledger, child, after_s)
    except BaseException:  # whoever interrupts leaves no child behind
        os.kill(child, signal.SIGKILL)
        raise
    finally:
        os.close(reading)
        _, status = os.waitpid(child, 0)
    if (code := os.waitstatus_to_exitcode(status)) != -signal.SIGKILL:
        ledger.broken.append(f"child {ledger.kills}: code {code}")
    ledger.kills += 1
    for _ in range(first, max(ledger.tried, default=0)):
        next(numbers)
    return after_s is not None or killed_itself


def _live(
    folder: Path, numbers: Iterator[int], attempt: int, pipe: tuple[int, int], step: Callable[[str], None]
) -> NoReturn:
    """In the child, which never returns to what its parent was doing: not by an error, nor by Ctrl-C."""
    try:
        for number in (signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.close(pipe[0])
        run(folder, numbers, attempt, pipe[1], step)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(1)


def _listen(reading: int, ledger: Ledger, child: int, after_s: float | None) -> bool:
    """Note what the child says until it is dead. Kills it `after_s` after its first word. True: it ended by itself."""
    end: float | None = time.monotonic() + STUCK_S
    killed, started, rest = False, False, b""
    while True:
        left = max(0.0, (end or 0.0) - time.monotonic())
        if not killed and not select.select([reading], [], [], left)[0]:
            os.kill(child, signal.SIGKILL)
            killed = True
            if after_s is not None and not started:
                ledger.unreached.append("a child's first word")
        data = os.read(reading, RECORD.size * 4096)
        if not data:
            return not killed
        if not started and after_s is not None:
            started, end = True, time.monotonic() + after_s
        if not killed and end is not None and time.monotonic() >= end:
            os.kill(child, signal.SIGKILL)
            killed = True
        rest += data
        whole = len(rest) - len(rest) % RECORD.size
        for record in RECORD.iter_unpack(rest[:whole]):
            ledger.note(*record)
        rest = rest[whole:]


def _drain(folder: Path, ledger: Ledger) -> None:
    """Deliver what is left, without a kill."""
    outbox = Outbox(folder / "outbox.sqlite", OutboxSection(enabled=True), SystemClock())
    outbox.start()
    end = time.monotonic() + STUCK_S
    while not outbox.ready:
        if time.monotonic() > end:
            raise NotStored(f"the outbox does not open: {outbox.problem()}")
        time.sleep(0.005)
    after = 0
    while items := outbox.page("out", after, 256):
        after = items[-1].seq
        for stored in items:
            number, attempt = parse(stored.id)
            ledger.note(DELIVERED if intact(stored) else DAMAGED, number, attempt)
            outbox.remove(stored.seq, "delivered")
    if outbox.set_aside is not None:
        ledger.damaged += 1
    outbox.close()


def main(argv: list[str] | None = None) -> int:
    """0: the ledger balances."""
    parser = argparse.ArgumentParser(prog="script/powerloss", description=__doc__)
    parser.add_argument("--runs", type=int, default=200, metavar="N", help="kills at random instants (default 200)")
    parser.add_argument("--seed", type=int, default=1, metavar="S", help="of the instants (default 1)")
    parser.add_argument("--folder", type=Path, metavar="DIR", help="on the file system to try; default: temporary")
    parser.add_argument("--no-steps", action="store_true", help="leave out the kills at each step")
    args = parser.parse_args(argv)
    began = time.monotonic()
    try:
        with interruptible(), tempfile.TemporaryDirectory(prefix="powerloss-", dir=args.folder) as folder:
            ledger = powerloss(Path(folder), args.runs, args.seed, steps=not args.no_steps)
    except KeyboardInterrupt:
        print("script/powerloss: interrupted")
        return 130
    print(f"seed {args.seed}, {time.monotonic() - began:.0f} s: {ledger.summary()}")
    print("the ledger balances" if ledger.balances else "the ledger does NOT balance")
    return 0 if ledger.balances else 1


if __name__ == "__main__":
    sys.exit(main())
