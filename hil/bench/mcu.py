"""Round trips to the virtual microcontroller through the daemon's own session, beside a pseudo-terminal that echoes.

The floor is a process that does nothing but answer as many bytes, asked by blocking reads and writes on the bare file
descriptor. The virtual board, which is Python around the firmware, costs more than that by itself: so a second board
is asked the same way, with frames made beforehand. What our figure is above that one is the session's own cost.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import select
import sys
import termios
import tty
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median

from agent.core.clock import SystemClock
from agent.link.serial import open_serial
from agent.link.session import Session
from agent.registry.catalog import Catalog, load_catalog
from agent.registry.locate import catalog_path
from agent.registry.tensors import pack, to_variant
from agent.wire.body import Message
from agent.wire.frame import Frame
from agent.wire.messages import MODEL_ID_BYTES, Infer, Ping
from hil.bench import loops
from hil.bench.bare import canonical_inputs
from hil.bench.report import Aim, CannotMeasure, Line
from hil.bench.stats import Sampler, Summary, alternate, timed, timed_async
from hil.processes import Stage

AIM = 1.5
PING_BYTES = 1024
FAMILY, VARIANT = "digits", "mcu-int8"
BAUD = 921_600
DEADLINE_S = 10.0
READ_BYTES = 65_536
IDS = 4096
QUIET_S = 0.02
"""A line on which nothing came for so long is quiet."""


def measure(seconds: float) -> list[Line]:
    catalog = load_catalog(catalog_path(None))
    with Stage() as stage, loops.runner() as runner:
        board = stage.folder / "ttyMCU"
        model = catalog.root / catalog.family(FAMILY).variants[VARIANT].path
        stage.virtual_mcu(board, "--model", str(model))
        other = stage.folder / "ttyBare"
        stage.virtual_mcu(other, "--model", str(model), name="bare")
        line = runner.run(_Line.open(board, catalog))
        bare = _BareLine(other)
        try:
            return [*_ping(stage, runner, line, bare, seconds), *_infer(stage, runner, line, bare, seconds)]
        finally:
            bare.close()
            runner.run(line.close())


class _Line:
    """An open session with the virtual microcontroller, and what was last seen on its line."""

    def __init__(self, session: Session, catalog: Catalog) -> None:
        self._session = session
        self._clock = SystemClock()
        family = catalog.family(FAMILY)
        variant = family.variants[VARIANT]
        name = family.inputs[0].name
        values = canonical_inputs(catalog, family)
        tensors = [pack(to_variant({name: value}, variant), variant.inputs) for value in values]
        self._inputs = itertools.cycle(tensors)
        self.sample = tensors[0]
        self.model = bytes.fromhex(variant.sha256)[:MODEL_ID_BYTES]
        self.bytes_sent = self.bytes_received = 0
        self.compute_s: list[float] = []

    @classmethod
    async def open(cls, port: Path, catalog: Catalog) -> _Line:
        session = Session(await open_serial(str(port), BAUD), SystemClock())
        line = cls(session, catalog)
        await session.open(line._deadline())
        return line

    async def ping(self, _: None = None) -> None:
        await self._session.ping(bytes(PING_BYTES), self._deadline())

    async def infer(self, _: None = None) -> None:
        reply = await self._session.infer(self.model, next(self._inputs), self._deadline())
        self.bytes_sent, self.bytes_received = reply.bytes_sent, reply.bytes_received
        self.compute_s.append(reply.message.compute_us / 1e6)

    def traffic(self) -> tuple[int, int]:
        """Bytes sent and received since the session was opened."""
        counters = self._session.status()
        return counters["bytes_sent"], counters["bytes_received"]

    async def close(self) -> None:
        self._session.close()

    def _deadline(self) -> float:
        return self._clock.monotonic() + DEADLINE_S


def _ping(stage: Stage, runner: asyncio.Runner, line: _Line, bare: _BareLine, seconds: float) -> Sequence[Line]:
    before = line.traffic()
    runner.run(line.ping())
    sent, received = (after - earlier for earlier, after in zip(before, line.traffic(), strict=True))
    frames = _frames(Ping(bytes(PING_BYTES)))
    found = _sides(stage, runner, line.ping, bare, frames, (sent, received), seconds)
    return _lines(f"PING of {PING_BYTES} bytes", found, f"{sent} bytes out, {received} back", Aim(AIM))


def _infer(stage: Stage, runner: asyncio.Runner, line: _Line, bare: _BareLine, seconds: float) -> Sequence[Line]:
    runner.run(line.infer())
    frames = _frames(Infer(line.model, int(DEADLINE_S * 1e3), line.sample))
    sizes = line.bytes_sent, line.bytes_received
    found = _sides(stage, runner, line.infer, bare, frames, sizes, seconds)
    invoke_us = median(line.compute_s) * 1e6
    note = f"{sizes[0]} bytes out, {sizes[1]} back; {invoke_us:.0f} us are the model"
    aim = Aim(AIM, allowance=invoke_us, allowance_name="the invoke")
    return _lines(f"INFER {FAMILY}/{VARIANT}", found, note, aim)


def _frames(message: Message) -> Iterator[bytes]:
    """The same message under one id after the other: a board runs an id that it has just seen only once."""
    body = message.to_bytes()
    return itertools.cycle([Frame(message.TYPE, 0, id_, id_, body).encode() for id_ in range(1, IDS)])


def _sides(
    stage: Stage,
    runner: asyncio.Runner,
    call: Callable[[None], Awaitable[None]],
    bare: _BareLine,
    frames: Iterator[bytes],
    sizes: tuple[int, int],
    seconds: float,
) -> Mapping[str, Summary]:
    take, give = sizes
    key = f"echo-{take}-{give}"
    port = stage.folder / key
    command = [sys.executable, "-m", "hil.bench.peer_pty", "--link", str(port)]
    process = stage.start(key, [*command, "--take", str(take), "--give", str(give)])
    process.wait_for_log("serving")
    echo = _BareLine(port)
    try:
        sides: dict[str, Sampler] = {
            "ours": lambda block: runner.run(timed_async(call, itertools.repeat(None), block)),
            "echo": echo.in_step(timed(lambda request: echo.count(request, give), itertools.repeat(bytes(take)))),
            "board": bare.in_step(timed(lambda request: bare.count(request, give), frames)),
        }
        return {side: summary.scaled(1e6) for side, summary in alternate(sides, seconds).items()}
    finally:
        echo.close()


def _lines(name: str, found: Mapping[str, Summary], note: str, aim: Aim) -> Sequence[Line]:
    return [
        Line("mcu", name, "us", found["ours"], "pty echo, blocking", found["echo"], aim, note),
        Line("mcu", name, "us", found["ours"], "virtual board, bare frames", found["board"]),
    ]


class _BareLine:
    """Blocking writes and reads on a port's descriptor."""

    def __init__(self, port: Path) -> None:
        self._fd = os.open(port, os.O_RDWR | os.O_NOCTTY)
        tty.setraw(self._fd, termios.TCSANOW)

    def close(self) -> None:
        os.close(self._fd)

    def drain(self) -> int:
        """Take what nobody asked for: a board greets when it boots. Returns how many bytes that were."""
        taken = 0
        while select.select([self._fd], [], [], QUIET_S)[0]:
            taken += len(os.read(self._fd, READ_BYTES))
        return taken

    def count(self, request: bytes, give: int) -> None:
        """Send the request; take `give` bytes."""
        self._send(request)
        while give > 0:
            give -= len(os.read(self._fd, READ_BYTES))

    def in_step(self, sampler: Sampler) -> Sampler:
        """The same sampler. Raises `CannotMeasure` if the line was not quiet after it: then an answer was taken for
        that to the request after it, and the figure is none."""

        def sample(seconds: float) -> Sequence[float]:
            self.drain()
            samples = sampler(seconds)
            if left := self.drain():
                raise CannotMeasure(f"requests and answers are out of step: {left} bytes were left")
            return samples

        return sample

    def _send(self, request: bytes) -> None:
        sent = 0
        while sent < len(request):
            sent += os.write(self._fd, request[sent:])
