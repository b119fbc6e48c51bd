"""The outbox: how fast items of 1 KB are accepted, and delivered, and what a full one costs at the start.

Accepting stands beside bare SQLite with the same durability: head and body in a table of their own, without a key, an
index or a checksum, write-ahead log, `synchronous=FULL`, on the same file system; a commit for every 64 rows, and for
as many as the outbox commits at once when so many wait. Delivering stands beside the same messages
published by the same link from memory. A start with 100,000 items stands beside one with none.
"""

from __future__ import annotations

import asyncio
import gc
import queue
import sqlite3
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import Any

from agent.config import OutboxSection
from agent.core.clock import SystemClock
from agent.core.errors import InferenceError, LinkError
from agent.durable.records import ASK, LOCAL
from agent.durable.sender import Sender
from agent.link.mqtt import LinkFull, LinkOptions, MessageProperties, MqttLink
from agent.store import outbox as outbox_module
from agent.store.outbox import Item, Outbox, Receipt
from agent.store.outbox_file import OutboxFile, Put
from hil.bench import rig
from hil.bench.report import Aim, CannotMeasure, Line
from hil.bench.stats import Sampler, alternate, summarise
from hil.processes import Stage, free_port

ITEM_BYTES = 1024
BATCH = 64
WINDOW = 1024
"""Items that wait for their acknowledgement at once: a quarter of what may (`outbox.max_waiting`)."""
FASTEST_S = 5e-6
"""No item is accepted in less: so many are made ready."""
ACCEPT_AIM = 2.0
"""Times what bare SQLite takes: half its rate."""
DRAIN_AIM_US = 500.0
"""Of one message: 2,000 in a second."""
READY_AIM_S = 2.0
QUEUED = 100_000
DRAINED = 4000
ROUNDS = 3
LIMIT_S = 60.0
BODY = bytes(range(256)) * (ITEM_BYTES // 256)
HEAD = b'{"topic":"bench/out","status":"ok","correlation":null}'
SETTINGS = OutboxSection(enabled=True, max_rows=10_000_000, max_bytes=1 << 40, drain_per_s=1_000_000)


def measure(seconds: float) -> list[Line]:
    with Stage() as stage, tempfile.TemporaryDirectory(dir=stage.folder) as folder:
        return [*_accepting(Path(folder), seconds), *_draining(stage), *_starting(stage)]


def _accepting(folder: Path, seconds: float) -> list[Line]:
    steps: Counter[str] = Counter()
    outbox = Outbox(folder / "accept.sqlite", SETTINGS, SystemClock(), step=lambda name: steps.update((name,)))
    outbox.start()
    refused: list[InferenceError] = []
    found = alternate(
        {
            "ours": _accepted(outbox, refused),
            "peer": _bare(folder / "bare.sqlite", BATCH),
            "same": _bare(folder / "same.sqlite", outbox_module.BATCH),
        },
        max(seconds, 2.0),
    )
    accepted = outbox.stats()["events"]["accepted"]
    outbox.close()
    if refused:
        raise CannotMeasure(f"the outbox refused an item: {refused[0].message}")
    note = (
        f"an item with a random key, by which a repeat would be known; {accepted / steps['committed']:.0f} in a commit"
    )
    same = f"bare SQLite, FULL, {outbox_module.BATCH} in a commit"
    return [
        Line(
            "outbox",
            "accepting, each item",
            "us",
            found["ours"],
            f"bare SQLite, FULL, {BATCH} in a commit",
            found["peer"],
            Aim(ACCEPT_AIM),
            note,
        ),
        Line("outbox", "the same, beside larger commits", "us", found["ours"], same, found["same"]),
    ]


def _accepted(outbox: Outbox, refused: list[InferenceError]) -> Sampler:
    """Acknowledgements while as many items as `WINDOW` wait for theirs all the time: from the first ones on, and
    without the last, which wait for company that does not come. The items are there before, as the rows of bare SQLite
    are."""
    random = Random(1)
    window: queue.SimpleQueue[None] = queue.SimpleQueue()
    acknowledged = 0

    def done(result: Receipt | InferenceError) -> None:
        nonlocal acknowledged
        acknowledged += 1
        if isinstance(result, InferenceError):
            refused.append(result)
        window.put(None)

    def sample(seconds: float) -> Sequence[float]:
        keys = [f"{random.getrandbits(128):032x}" for _ in range(WINDOW + int(seconds / FASTEST_S))]
        items = [[Item(ASK, "bench", key, HEAD, BODY, key=key)] for key in keys]
        gc.collect()
        gc.freeze()  # nor are they looked through while the outbox is at work
        for item in items[:WINDOW]:
            outbox.put(item, done)
        window.get()
        began, before = time.perf_counter(), acknowledged
        for item in items[WINDOW:]:
            outbox.put(item, done)
            window.get()
            if time.perf_counter() - began > seconds:
                break
        took, count = time.perf_counter() - began, acknowledged - before
        for _ in range(WINDOW - 1):  # of the first ones, one was taken before
            window.get()
        gc.unfreeze()
        return [took / count * 1e6]

    return sample


def _bare(path: Path, batch: int) -> Sampler:
    """SQLite alone, with the same durability."""
    bare = sqlite3.connect(path, isolation_level=None)
    bare.execute("PRAGMA journal_mode = WAL")
    bare.execute("PRAGMA synchronous = FULL")
    bare.execute("CREATE TABLE items (seq INTEGER PRIMARY KEY, head BLOB, body BLOB)")

    def peer(seconds: float) -> Sequence[float]:
        began, count = time.perf_counter(), 0
        while time.perf_counter() - began < seconds:
            bare.execute("BEGIN IMMEDIATE")
            bare.executemany("INSERT INTO items (head, body) VALUES (?, ?)", [(HEAD, BODY)] * batch)
            bare.execute("COMMIT")
            count += batch
        return [(time.perf_counter() - began) / count * 1e6]

    return peer


def filled(path: Path, rows: int) -> None:
    """An outbox with messages for the gateway's broker."""
    file = OutboxFile(path, SETTINGS, lambda name: None, first_seq=0, checked=False)
    for start in range(0, rows, 1000):
        items = [
            Put([Item(LOCAL, f"p{number % 7}", str(number), HEAD, BODY)])
            for number in range(start, min(rows, start + 1000))
        ]
        file.apply(items, 0.0)
    file.close()


def _draining(stage: Stage) -> list[Line]:
    port = free_port()
    stage.broker("outbox-broker", port)
    options = LinkOptions(f"mqtt://127.0.0.1:{port}", "bench-outbox", max_unacknowledged=SETTINGS.max_in_flight)
    ours, peer = [], []
    for number in range(ROUNDS):
        filled(stage.folder / f"drain-{number}.sqlite", DRAINED)
        ours.append([asyncio.run(_drain(stage.folder / f"drain-{number}.sqlite", options)) / DRAINED * 1e6])
        peer.append([asyncio.run(_publish(options)) / DRAINED * 1e6])
    return [
        Line(
            "outbox",
            "delivering, each message of 1 KB at QoS 1",
            "us",
            summarise(ours),
            "the same link, from memory",
            summarise(peer),
            Aim(DRAIN_AIM_US, "figure"),
            f"{DRAINED} messages, read, published, acknowledged and deleted",
        )
    ]


async def _drain(path: Path, options: LinkOptions) -> float:
    """Seconds from the first to the last."""
    loop = asyncio.get_running_loop()
    clock = SystemClock()
    outbox = Outbox(path, SETTINGS, clock, deliver=lambda call: _hand_over(loop, call))
    link = MqttLink(options, clock)
    sender = Sender(LOCAL, outbox, link, SETTINGS, clock)
    outbox.start()
    await _until(lambda: outbox.ready)
    began = time.perf_counter()
    await link.start()
    work = asyncio.create_task(sender.work())
    await _until(lambda: outbox.rows(LOCAL) == 0)
    took = time.perf_counter() - began
    work.cancel()
    await link.stop()
    await asyncio.to_thread(outbox.close)
    return took


async def _publish(options: LinkOptions) -> float:
    link, acknowledged, room = MqttLink(options), 0, asyncio.Event()
    properties = MessageProperties("application/json", user=(("status", "ok"), ("idempotency-key", "0" * 32)))

    def done(_result: int | LinkError) -> None:
        nonlocal acknowledged
        acknowledged += 1
        room.set()

    await link.start()
    await _until(lambda: link.connected)
    began = time.perf_counter()
    for _ in range(DRAINED):
        while True:
            try:
                link.publish("bench/out", BODY, qos=1, properties=properties, acknowledged=done)
                break
            except LinkFull:
                room.clear()
                await room.wait()
    await _until(lambda: acknowledged == DRAINED)
    took = time.perf_counter() - began
    await link.stop()
    return took


async def _until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + LIMIT_S
    while not condition():
        if time.monotonic() > end:
            raise CannotMeasure(f"not within {LIMIT_S:.0f} s")
        await asyncio.sleep(0.001)


def _starting(stage: Stage) -> list[Line]:
    port = free_port()
    stage.broker("start-broker", port)
    full, empty = [], []
    for number in range(ROUNDS):
        full.append([_start(stage, port, f"full-{number}", QUEUED)])
        empty.append([_start(stage, port, f"empty-{number}", 0)])
    return [
        Line(
            "outbox",
            f"exec to READY, {QUEUED:,} items queued",
            "s",
            summarise(full),
            "none queued",
            summarise(empty),
            Aim(READY_AIM_S, "figure"),
        )
    ]


def _start(stage: Stage, port: int, name: str, rows: int) -> float:
    folder = stage.folder / name
    path = folder / "state" / "outbox" / "outbox.sqlite"
    path.parent.mkdir(parents=True)
    if rows:
        filled(path, rows)
    sections: dict[str, Any] = {"mqtt": {"broker": f"mqtt://127.0.0.1:{port}"}, "outbox": {"enabled": True}}
    began = time.perf_counter()
    process = stage.daemon(rig.config(folder, **sections), name)
    took = time.perf_counter() - began
    process.kill()
    path.unlink(missing_ok=True)
    return took


def _hand_over(loop: asyncio.AbstractEventLoop, call: Callable[[], None]) -> None:
    loop.call_soon_threadsafe(call)
