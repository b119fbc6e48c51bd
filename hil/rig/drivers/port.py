"""A board on a real serial port: reset by a modem line, power by a hub that can switch, where there are such."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from pathlib import Path
from typing import Final

import serial

from hil.rig.boards import Hub, RealBoard
from hil.rig.protocols import RigError

PULSE_S: Final = 0.1
"""How long a reset line is held: boards ask for microseconds, the capacitor on it for milliseconds."""
APPEAR_LIMIT_S: Final = 15.0
"""For a port to appear after its power came on: boot loader and enumeration take up to about 5 s."""


class PortDriver:
    """Serial, and power where the configuration names a hub; without one, `on` and `off` only look."""

    clock = None

    def __init__(self, name: str, board: RealBoard) -> None:
        self.name = name
        self._board = board
        self.port, self.baud = board.port, board.baud
        self.paced = board.line == "uart"

    @property
    def serial(self) -> PortDriver:
        return self

    @property
    def power(self) -> _HubPower | _NoPower:
        return _HubPower(self._board.uhubctl, self.port) if self._board.uhubctl else _NoPower()

    @property
    def reset(self) -> _LineReset | None:
        return _LineReset(self._board) if self._board.reset != "none" else None

    @property
    def console(self) -> None:
        return None

    def missing(self) -> str:
        if self._board.uhubctl is not None:
            return "" if shutil.which("uhubctl") else "uhubctl, which switches the power, is not installed"
        if not Path(self.port).exists():
            return f"{self.port}: no such port"
        return "" if os.access(self.port, os.R_OK | os.W_OK) else f"{self.port}: no permission"


class _NoPower:
    """Nobody here can pull the plug."""

    def on(self) -> None:
        pass

    def off(self) -> None:
        pass


class _HubPower:
    def __init__(self, hub: Hub, port: str) -> None:
        self._hub, self._port = hub, Path(port)

    def on(self) -> None:
        if not self._port.exists():
            self._switch("on")
            self._wait(present=True)

    def off(self) -> None:
        self._switch("off")
        self._wait(present=False)

    def _switch(self, action: str) -> None:
        command = ["uhubctl", "-l", self._hub.location, "-p", str(self._hub.port), "-a", action]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RigError(f"{' '.join(command)}: {done.stderr.strip() or done.stdout.strip()}")

    def _wait(self, *, present: bool) -> None:
        end = time.monotonic() + APPEAR_LIMIT_S
        while self._port.exists() is not present:
            if time.monotonic() > end:
                raise RigError(f"{self._port}: still {'missing' if present else 'there'} after {APPEAR_LIMIT_S:.0f} s")
            time.sleep(0.05)


class _LineReset:
    """DTR and RTS can be set while another process has the port open, unless it holds it alone: then EBUSY is said."""

    def __init__(self, board: RealBoard) -> None:
        self._board = board

    def reset(self) -> None:
        try:
            with serial.Serial(self._board.port, self._board.baud) as port:
                # `esp`: DTR is the boot pin, which must stay high, or the boot loader starts instead of the firmware.
                port.dtr = self._board.reset == "dtr"
                port.rts = self._board.reset in ("rts", "esp")
                time.sleep(PULSE_S)
                port.dtr = port.rts = False
        except OSError as error:
            raise RigError(f"{self._board.port}: {error}") from None
