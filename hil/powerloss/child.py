"""The process that is killed: puts items into an outbox and delivers them, and writes down what it was told.

Everything it says goes through a pipe, one record in one write: what was said before the kill is known after it.
"""

from __future__ import annotations

import os
import random
import signal
import struct
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from agent.config import OutboxSection
from agent.core.clock import SystemClock
from agent.core.errors import InferenceError
from agent.store.outbox import Item, Outbox, Receipt
from agent.store.outbox_file import Stored

ITEM_BYTES = 1024
WINDOW = 96
"""Items that wait for their acknowledgement at once."""
RECORD = struct.Struct("<cQI")
"""What happened, to which item, and under which of its ids."""
TRIED, ACKNOWLEDGED, DELIVERED, DAMAGED = b"T", b"A", b"D", b"X"


def body_of(number: int) -> bytes:
    """1 KB that only this item has."""
    return random.Random(number).randbytes(ITEM_BYTES)


class Killer:
    """Ends the process at the `count`th time that a step is reached."""

    def __init__(self, step: str, count: int) -> None:
        self._step = step
        self._left = count

    def __call__(self, step: str) -> None:
        if step == self._step:
            self._left -= 1
            if self._left == 0:
                os.kill(os.getpid(), signal.SIGKILL)


def run(folder: Path, numbers: Iterator[int], attempt: int, pipe: int, step: Callable[[str], None]) -> None:
    """Never returns: it is killed. `attempt` makes the ids of this process its own."""
    settings = OutboxSection(enabled=True, commit_wait_ms=5, max_rows=10_000_000, max_bytes=1 << 40)
    outbox = Outbox(folder / "outbox.sqlite", settings, SystemClock(), step=step)
    window = threading.Semaphore(WINDOW)

    def say(what: bytes, number: int, id_: int) -> None:
        os.write(pipe, RECORD.pack(what, number, id_))

    def acknowledged(number: int, result: Receipt | InferenceError) -> None:
        if isinstance(result, Receipt):
            say(ACKNOWLEDGED, number, attempt)
        window.release()

    fresh = threading.Event()
    outbox.stored = lambda _: fresh.set()
    outbox.start()
    threading.Thread(target=_deliver, args=(outbox, fresh, say, step), daemon=True).start()
    for number in numbers:
        window.acquire()
        say(TRIED, number, attempt)
        item = Item("out", f"p{number % 3}", f"{number}-{attempt}", b"{}", body_of(number), key=str(number))
        outbox.put([item], partial(acknowledged, number))
    threading.Event().wait()


def _deliver(
    outbox: Outbox, fresh: threading.Event, say: Callable[[bytes, int, int], None], step: Callable[[str], None]
) -> None:
    """Half of the items at once; the rest stays, as behind a broker that cannot be reached."""
    after = 0
    while True:
        fresh.wait()
        fresh.clear()
        while items := outbox.page("out", after, 64):
            after = items[-1].seq
            for stored in items:
                number, attempt = parse(stored.id)
                if number % 2:
                    continue
                step("published")
                say(DELIVERED if intact(stored) else DAMAGED, number, attempt)
                step("acknowledged by the broker")
                outbox.remove(stored.seq, "delivered")


def parse(id_: str) -> tuple[int, int]:
    number, attempt = id_.split("-")
    return int(number), int(attempt)


def intact(stored: Stored) -> bool:
    return stored.whole and stored.body == body_of(parse(stored.id)[0])
