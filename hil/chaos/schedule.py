"""What goes wrong when: a pure function of a seed and a length, so that a run can be had again."""

from __future__ import annotations

import random
from collections.abc import Collection
from dataclasses import dataclass
from typing import Final

CALM_S: Final = 4.0
"""At the beginning nothing goes wrong: everything is to have worked once."""
GAP_S: Final = (0.5, 3.5)
"""Between the starts of two faults. Faults of different parts overlap."""


@dataclass(frozen=True)
class Kind:
    """A fault. `part`: two faults of one part never overlap. `lasts`: seconds, least and most. `needs`: what this
    machine must have for it."""

    name: str
    part: str
    lasts: tuple[float, float]
    what: str
    needs: str = ""


@dataclass(frozen=True)
class Fault:
    """One fault of a run. `chance` is a number from 0 to 1 for whatever else the fault has to choose."""

    at_s: float
    kind: str
    lasts_s: float
    chance: float

    @property
    def ends_s(self) -> float:
        return self.at_s + self.lasts_s


KINDS: Final = {
    kind.name: kind
    for kind in (
        Kind("daemon killed", "daemon", (0.2, 2), "SIGKILL; started again"),
        Kind("daemon stopped", "daemon", (0.3, 2.5), "SIGSTOP; continued"),
        Kind("daemon terminated", "daemon", (0.2, 1), "SIGTERM under load; started again"),
        Kind("cache damaged", "daemon", (0.2, 0.5), "SIGKILL; pages of the cache's file overwritten; started again"),
        Kind("outbox damaged", "daemon", (0.2, 0.5), "SIGKILL; pages of the outbox overwritten; started again"),
        Kind("runtime killed", "runtime", (0.5, 1), "SIGKILL of the process that runs the gateway's models"),
        Kind("runtime stopped", "runtime", (1, 6), "SIGSTOP of the process that runs the gateway's models"),
        Kind("broker killed", "broker", (0.3, 3), "SIGKILL of the gateway's broker; started again"),
        Kind("broker stopped", "broker", (0.5, 4), "SIGSTOP of the gateway's broker"),
        Kind("cloud broker killed", "cloud broker", (0.3, 4), "SIGKILL; started again"),
        Kind("cloud broker stopped", "cloud broker", (0.5, 6), "SIGSTOP"),
        Kind("worker killed", "worker", (0.5, 4), "SIGKILL of one of two cloud workers; started again"),
        Kind("worker stopped", "worker", (1, 6), "SIGSTOP of one of two cloud workers"),
        Kind("worker slow", "other worker", (3, 6), "a third worker takes its share, and 3 s for each"),
        Kind("worker lying", "other worker", (3, 6), "a third worker takes its share, and answers nonsense"),
        Kind("board killed", "board", (0.5, 3), "SIGKILL of the virtual microcontroller; started again"),
        Kind("board stopped", "board", (0.5, 4), "SIGSTOP of the virtual microcontroller"),
        Kind("board reset", "board", (0.1, 0.5), "its reset button"),
        Kind("board unplugged", "board", (0.5, 3), "the cable pulled, and plugged in again"),
        Kind("board hangs", "board", (0.5, 3), "it stops reading and computing"),
        Kind("line noisy", "board", (2, 5), "bit errors on the serial line, 1e-4"),
        Kind("cloud slow", "cloud link", (2, 5), "200 ms each way on the way to the cloud"),
        Kind("cloud narrow", "cloud link", (2, 5), "2 kB/s on the way to the cloud"),
        Kind("cloud reset", "cloud link", (0.1, 0.3), "connections to the cloud reset (RST)"),
        Kind("cloud black hole", "cloud link", (2, 8), "nothing passes to the cloud, and nothing is refused"),
        Kind("local slow", "local link", (2, 4), "100 ms each way to the gateway's broker"),
        Kind("local reset", "local link", (0.1, 0.3), "connections to the gateway's broker reset (RST)"),
        Kind("local black hole", "local link", (1, 5), "nothing passes to the gateway's broker"),
        Kind("disk full", "disk", (1, 5), "the file system with the daemon's state is filled up", "tmpfs"),
        Kind("clock a year on", "clock", (2, 4), "the wall clock of the daemon jumps a year on, and back", "compiler"),
        Kind(
            "clock a year back", "clock", (2, 4), "the wall clock of the daemon jumps a year back, and on", "compiler"
        ),
    )
}


def schedule(seed: int, seconds: float, kinds: Collection[str] = tuple(KINDS)) -> tuple[Fault, ...]:
    """Faults that begin and end within `seconds`: every kind once in an order of chance, then again in another order,
    and so on. Equal arguments, equal faults."""
    chance = random.Random(seed)
    faults: list[Fault] = []
    busy: dict[str, float] = {}
    deck: list[str] = []
    at = CALM_S
    while True:
        if not deck:
            deck = sorted(kinds)
            chance.shuffle(deck)
        kind = KINDS[deck.pop()]
        starts = max(at, busy.get(kind.part, 0.0) + 1.0)
        fault = Fault(round(starts, 3), kind.name, round(chance.uniform(*kind.lasts), 3), chance.random())
        if fault.ends_s > seconds:
            return tuple(sorted(faults, key=lambda fault: fault.at_s))
        faults.append(fault)
        busy[kind.part] = fault.ends_s
        at += chance.uniform(*GAP_S)
