"""Round trips to the virtual microcontroller through the daemon's own session, beside a pseudo-terminal that echoes.

The floor is a process that does nothing but answer as many bytes, asked by blocking reads and writes on the bare file
descriptor; a second one is asked through the daemon's own serial transport on its event loop, without a session.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import sys
import termios
import tty
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from statistics import median

from agent.core.clock import SystemClock
from agent.link.serial import SerialTransport, open_serial
from agent.link.session import Session
from agent.registry.catalog import Catalog, load_catalog
from agent.registry.locate import catalog_path
from agent.registry.tensors import pack, to_variant
from agent.wire.messages import MODEL_ID_BYTES
from hil.bench import loops
from hil.bench.bare import canonical_inputs
from hil.bench.report import Aim, Line
from hil.bench.stats import Sampler, alternate, timed, timed_async
from hil.processes import Stage

AIM = 1.5
PING_BYTES = 1024
FAMILY, VARIANT = "digits", "mcu-int8"
BAUD = 921_600
DEADLINE_S = 10.0
READ_BYTES = 65_536


def measure(seconds: float) -> list[Line]:
    catalog = load_catalog(catalog_path(None))
    with Stage() as stage, loops.runner() as runner:
        board = stage.folder / "ttyMCU"
        model = catalog.root / catalog.family(FAMILY).variants[VARIANT].path
        stage.virtual_mcu(board, "--model", str(model))
        line = runner.run(_Line.open(board, catalog))
        try:
            return [*_ping(stage, runner, line, seconds), *_infer(stage, runner, line, seconds)]
        finally:
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
        self._model = bytes.fromhex(variant.sha256)[:MODEL_ID_BYTES]
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
        reply = await self._session.infer(self._model, next(self._inputs), self._deadline())
        self.bytes_sent, self.bytes_received = reply.bytes_sent, reply.bytes_received
        self.compute_s.append(reply.message.compute_us / 1e6)

    async def close(self) -> None:
        self._session.close()

    def _deadline(self) -> float:
        return self._clock.monotonic() + DEADLINE_S


def _ping(stage: Stage, runner: asyncio.Runner, line: _Line, seconds: float) -> Sequence[Line]:
    before = _traffic(line)
    runner.run(line.ping())
    taken, given = (after - earlier for earlier, after in zip(before, _traffic(line), strict=True))
    name = f"PING of {PING_BYTES} bytes"
    return _beside_echoes(stage, runner, line.ping, "ping", (taken, given), seconds, name, lambda: (0.0, ""))


def _infer(stage: Stage, runner: asyncio.Runner, line: _Line, seconds: float) -> Sequence[Line]:
    runner.run(line.infer())

    def invoke() -> tuple[float, str]:
        return median(line.compute_s) * 1e6, "the invoke"

    name = f"INFER {FAMILY}/{VARIANT}"
    sizes = line.bytes_sent, line.bytes_received
    return _beside_echoes(stage, runner, line.infer, "infer", sizes, seconds, name, invoke)


def _traffic(line: _Line) -> tuple[int, int]:
    counters = line._session.status()
    return counters["bytes_sent"], counters["bytes_received"]


def _beside_echoes(
    stage: Stage,
    runner: asyncio.Runner,
    call: Callable[[None], Awaitable[None]],
    key: str,
    sizes: tuple[int, int],
    seconds: float,
    name: str,
    allowance: Callable[[], tuple[float, str]],
) -> Sequence[Line]:
    take, give = sizes
    port = stage.folder / f"ttyEcho-{key}"
    command = [sys.executable, "-m", "hil.bench.peer_pty", "--link", str(port)]
    echo = stage.start(f"echo-{key}", [*command, "--take", str(take), "--give", str(give)])
    echo.wait_for_log("serving")
    bare = _BareEcho(port, take, give)
    through_loop = _LoopEcho(take, give)
    nothing = itertools.repeat(None)
    try:
        sides: dict[str, Sampler] = {
            "ours": lambda block: runner.run(timed_async(call, nothing, block)),
            "bare": timed(bare.exchange, nothing),
            "loop": lambda block: runner.run(through_loop.sample(port, block)),
        }
        found = {side: summary.scaled(1e6) for side, summary in alternate(sides, seconds).items()}
    finally:
        bare.close()
    invoke_us, what = allowance()
    note = f"{take} bytes out, {give} back" + (f"; {invoke_us:.0f} us are the model" if what else "")
    aim = Aim(AIM, allowance=invoke_us, allowance_name=what)
    return [
        Line("mcu", name, "us", found["ours"], "pty echo, blocking", found["bare"], aim, note),
        Line("mcu", name, "us", found["ours"], "pty echo, our transport", found["loop"]),
    ]


class _BareEcho:
    """Blocking writes and reads on the port's descriptor."""

    def __init__(self, port: Path, take: int, give: int) -> None:
        self._fd = os.open(port, os.O_RDWR | os.O_NOCTTY)
        tty.setraw(self._fd, termios.TCSANOW)
        self._request, self._give = bytes(take), give

    def close(self) -> None:
        os.close(self._fd)

    def exchange(self, _: None) -> None:
        sent = 0
        while sent < len(self._request):
            sent += os.write(self._fd, self._request[sent:])
        left = self._give
        while left > 0:
            left -= len(os.read(self._fd, READ_BYTES))


class _LoopEcho:
    """The same through `SerialTransport`, on the event loop."""

    def __init__(self, take: int, give: int) -> None:
        self._request, self._give = bytes(take), give
        self._left = 0
        self._answered: asyncio.Future[None] | None = None

    async def sample(self, port: Path, seconds: float) -> list[float]:
        transport = await open_serial(str(port), BAUD)
        transport.start(self._on_data, lambda error: None)
        try:
            return await timed_async(self._exchange, itertools.repeat(transport), seconds)
        finally:
            transport.close()

    def _exchange(self, transport: SerialTransport) -> asyncio.Future[None]:
        self._left = self._give
        self._answered = asyncio.get_running_loop().create_future()
        transport.write(self._request)
        return self._answered

    def _on_data(self, data: bytes) -> None:
        self._left -= len(data)
        if self._left <= 0 and self._answered is not None:
            self._answered.set_result(None)
            self._answered = None
