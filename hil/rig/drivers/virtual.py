"""The virtual microcontroller: a process, its pseudo-terminal, and the socket through which a hand reaches it."""

from __future__ import annotations

from importlib import util
from typing import Any

from hil.processes import Process, Stage, StartError
from hil.rig.boards import VirtualBoard
from hil.rig.protocols import RigError
from hil.virtual.control import Control, ControlError


class VirtualDriver:
    """Serial, power, reset and console in one."""

    paced = False

    def __init__(self, name: str, board: VirtualBoard, stage: Stage) -> None:
        self.name = name
        self.baud = board.baud
        self._board, self._stage = board, stage
        self._link, self._socket = stage.folder / "ttyBoard", stage.folder / "board.sock"
        self._process: Process | None = None

    @property
    def serial(self) -> VirtualDriver:
        return self

    power = console = serial

    @property
    def port(self) -> str:
        return str(self._link)

    @property
    def reset(self) -> _ResetButton:
        return _ResetButton(self)

    @property
    def clock(self) -> _Clock:
        return _Clock(self)

    def missing(self) -> str:
        from hil.virtual.library import LibraryMissing, known_operators

        if not any(util.find_spec(name) for name in ("tflite_micro", "ai_edge_litert")):
            return "neither tflite-micro nor ai-edge-litert is installed"
        try:
            known_operators()
        except LibraryMissing as error:
            return str(error)
        return ""

    def on(self) -> None:
        """Plug it in; its flash is kept from the last time."""
        try:
            if self._process is None or not self._process.alive():
                options = ["--control", str(self._socket), "--window", str(self._board.window)]
                self._process = self._stage.virtual_mcu(self._link, *options, "--arena", str(self._board.arena))
            else:
                self._call("plug")
        except StartError as error:
            raise RigError(str(error)) from None

    def off(self) -> None:
        """Pull its cable, which is its power too."""
        if self._process is not None and self._process.alive():
            self._call("unplug")

    def press(self) -> None:
        self._call("reset")

    def tail(self) -> str:
        return self._process.tail() if self._process is not None else ""

    def _call(self, command: str, **parameters: float) -> dict[str, Any]:
        try:
            with Control(self._socket) as control:
                return control.call(command, **parameters)
        except (OSError, ControlError) as error:
            raise RigError(f"{self.name}: {command}: {error}") from None


class _Clock:
    def __init__(self, driver: VirtualDriver) -> None:
        self._driver = driver

    def read(self) -> tuple[float, float]:
        answer = self._driver._call("clock")
        return answer["board_s"], answer["monotonic_s"]

    def drift(self, ppm: float) -> None:
        self._driver._call("clock", drift_ppm=ppm)


class _ResetButton:
    def __init__(self, driver: VirtualDriver) -> None:
        self._driver = driver

    def reset(self) -> None:
        self._driver.press()
