"""The Cortex-M image on qemu-system-arm; its UART is a Unix socket, its reset button the machine monitor."""

from __future__ import annotations

import json
import shutil
import socket
from pathlib import Path
from typing import Any, Final

from hil.processes import Process, Stage, StartError
from hil.rig.boards import QemuBoard
from hil.rig.protocols import RigError

QEMU: Final = "qemu-system-arm"
ROOT: Final = Path(__file__).resolve().parents[3]
ANSWER_LIMIT_S: Final = 10.0


class QemuDriver:
    """Power is the process: its flash is RAM, so what it holds is lost with the power, and kept over a reset."""

    paced = False
    clock = None

    def __init__(self, name: str, board: QemuBoard, stage: Stage) -> None:
        self.name = name
        self.baud = board.baud
        self._board, self._stage = board, stage
        self._image = board.image if board.image.is_absolute() else ROOT / board.image
        self._uart, self._monitor = stage.folder / "uart.sock", stage.folder / "monitor.sock"
        self._process: Process | None = None

    @property
    def serial(self) -> QemuDriver:
        return self

    power = console = serial

    @property
    def reset(self) -> _SystemReset:
        return _SystemReset(self._monitor)

    @property
    def port(self) -> str:
        return f"unix:{self._uart}"

    def missing(self) -> str:
        if shutil.which(QEMU) is None:
            return f"{QEMU} is not installed"
        if not self._image.is_file():
            return f"{self._board.image} has not been built: script/firmware qemu"
        return ""

    def on(self) -> None:
        if self._process is not None and self._process.alive():
            return
        for path in (self._uart, self._monitor):
            path.unlink(missing_ok=True)
        command = [
            *(QEMU, "-machine", self._board.machine, "-kernel", str(self._image)),
            *("-display", "none", "-nodefaults", *self._board.options),
            *("-chardev", f"socket,id=uart,path={self._uart},server=on,wait=off", "-serial", "chardev:uart"),
            *("-qmp", f"unix:{self._monitor},server=on,wait=off"),
        ]
        self._process = self._stage.start("qemu", command)
        try:
            self._process.wait_until(lambda: self._uart.exists() and self._monitor.exists(), "UART socket")
        except StartError as error:
            raise RigError(str(error)) from None

    def off(self) -> None:
        if self._process is not None:
            self._process.terminate()

    def tail(self) -> str:
        return self._process.tail() if self._process is not None else ""


class _SystemReset:
    """QEMU's machine protocol: a greeting, `qmp_capabilities`, then commands."""

    def __init__(self, monitor: Path) -> None:
        self._monitor = monitor

    def reset(self) -> None:
        try:
            with socket.socket(socket.AF_UNIX) as connection:
                connection.settimeout(ANSWER_LIMIT_S)
                connection.connect(str(self._monitor))
                with connection.makefile("rwb") as lines:
                    lines.readline()
                    for command in ("qmp_capabilities", "system_reset"):
                        lines.write(json.dumps({"execute": command}).encode() + b"\n")
                        lines.flush()
                        self._answer(lines)
        except OSError as error:
            raise RigError(f"{self._monitor}: {error}") from None

    def _answer(self, lines: Any) -> None:
        while line := lines.readline():
            answer = json.loads(line)
            if "error" in answer:
                raise RigError(f"{self._monitor}: {answer['error'].get('desc', answer['error'])}")
            if "return" in answer:
                return
        raise RigError(f"{self._monitor}: closed")
