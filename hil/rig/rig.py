"""The bench that a check works at: the board, lines to it good and bad, sessions over them, and traffic."""

from __future__ import annotations

import json
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Final

from agent.core.clock import SystemClock
from agent.link.serial import open_serial
from agent.link.session import Session
from agent.registry.catalog import Catalog
from hil.processes import Stage, StartError
from hil.rig.check import Findings
from hil.rig.damage import Faults
from hil.rig.line_ends import UNIX
from hil.rig.protocols import Driver, RigError
from hil.rig.traffic import Samples
from hil.virtual.control import Control, ControlError

OPEN_LIMIT_S: Final = 10.0
"""For the first HELLO: opening the port resets many boards, and their boot loaders wait for about 2 s."""


@dataclass(slots=True)
class Line:
    """A fault line in use. `port` is what the gateway opens."""

    port: Path
    control: Control

    def call(self, command: str, **parameters: Any) -> dict[str, Any]:
        """A command of `hil.faultline`."""
        try:
            return self.control.call(command, **parameters)
        except (OSError, ControlError) as error:
            raise RigError(f"fault line: {command}: {error}") from None

    def set(self, **faults: Any) -> None:
        self.call("set", **faults)

    def injected(self) -> int:
        """Faults so far, of every kind and in both directions; a burst counts its bytes."""
        stats = self.call("stats")
        kinds = ("bits", "dropped", "duplicated", "frames", "delimiters", "garbage")
        return sum(stats[way][kind] for way in ("out", "in") for kind in kinds)


class Rig:
    """`soak_s`: how long the soak takes. `seed` is that of every fault and every choice."""

    def __init__(self, driver: Driver, stage: Stage, catalog: Catalog, *, seed: int, soak_s: float) -> None:
        self.driver, self.stage, self.catalog = driver, stage, catalog
        self.seed, self.soak_s = seed, soak_s
        self.clock = SystemClock()
        self._lines = 0
        self._samples: dict[str, Samples] = {}

    def samples(self, family: str = "digits") -> Samples:
        """Inputs and right answers of a family's variant for microcontrollers."""
        if family not in self._samples:
            self._samples[family] = Samples.of(self.catalog, family)
        return self._samples[family]

    def soon(self, seconds: float) -> float:
        """A deadline."""
        return self.clock.monotonic() + seconds

    @contextmanager
    def line(
        self,
        findings: Findings | None = None,
        faults: Faults | None = None,
        *,
        direction: str = "both",
        cut_at: int = 0,
        port: str | None = None,
    ) -> Iterator[Line]:
        """A line to the board (or to `port`), with these faults, for as long as the block. Raises `RigError`."""
        self._lines += 1
        name, faults = f"line{self._lines}", faults or Faults()
        link, socket = self.stage.folder / f"tty{self._lines}", self.stage.folder / f"{name}.sock"
        options = [f"--{f.name.removesuffix('_s').replace('_', '-')}={getattr(faults, f.name)}" for f in fields(faults)]
        options += [f"--seed={self.seed}", f"--direction={direction}", f"--cut-at={cut_at}"]
        options += [f"--port-baud={self.driver.serial.baud}", f"--link={link}", f"--control={socket}"]
        command = [sys.executable, "-m", "hil.faultline", port or self.driver.serial.port, *options]
        process = self.stage.start(name, command)
        try:
            process.wait_for_log('"ready"')
            said = json.loads(process.tail().splitlines()[0])
            if findings is not None and said["faults"] != "clean":
                findings.lines.append(f"{said['faults']} direction={direction} seed={said['seed']}")
            with Control(socket) as control:
                yield Line(link, control)
        except (StartError, OSError) as error:
            raise RigError(f"fault line: {error}") from None
        finally:
            process.terminate()

    @contextmanager
    def direct(self) -> Iterator[Path]:
        """The shortest way to the board: its own port, or a clean line where that is no serial port."""
        if self.driver.serial.port.startswith(UNIX):
            with self.line() as line:
                yield line.port
        else:
            yield Path(self.driver.serial.port)

    @contextmanager
    def full_speed(self, findings: Findings) -> Iterator[Path]:
        """A line whose rate is that of the configuration: the board's own where it is paced, else one that is."""
        if self.driver.serial.paced:
            yield Path(self.driver.serial.port)
        else:
            with self.line(findings, Faults(baud=self.driver.serial.baud)) as line:
                yield line.port

    @asynccontextmanager
    async def session(self, port: Path, **options: Any) -> AsyncIterator[Session]:
        """An open conversation. Raises as `Session.open`."""
        session = Session(await open_serial(str(port), self.driver.serial.baud), self.clock, **options)
        try:
            await session.open(self.soon(OPEN_LIMIT_S))
            yield session
        finally:
            session.close()

    @asynccontextmanager
    async def direct_session(self, **options: Any) -> AsyncIterator[Session]:
        with self.direct() as port:
            async with self.session(port, **options) as session:
                yield session
