"""A session and its model store on the emulated Cortex-M, with the face that they have in this process (board.py)."""

from __future__ import annotations

import struct

from board import FakeEngine, MemoryFlash
from qemu import Machine

from hil.virtual.library import Hardware, Mcu

FORMAT, BOOT, FEED, POLL = 1, 2, 3, 4
WORLD = struct.Struct("<QIHBB")
STATE = struct.Struct("<IIIIBB")
PIECE = 1000
NEVER = 0xFFFF_FFFF


class RemoteFlash(MemoryFlash):
    """The image's flash. `memory` is not to be seen from here."""

    def __init__(self) -> None:
        self.breaches: list[str] = []
        self.address = 0
        self.size = self.erase_size = self.write_size = 0
        self.torn = 0.0
        self.power_on()


class EmulatedCore:
    """One image for all boards: the last one made is the one that is there."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._flash = RemoteFlash()
        self._engine = FakeEngine()
        self._hardware: Hardware | None = None
        self._resets = 0

    def flash(self) -> RemoteFlash:
        self._flash = RemoteFlash()
        self._resets = 0
        self.command(FORMAT)
        return self._flash

    def engine(self) -> FakeEngine:
        self._engine = FakeEngine()
        return self._engine

    def mcu(self, hardware: Hardware, reset_cause: int) -> Mcu:
        assert hardware.verify is None, "the image verifies no signatures"
        assert hardware.flash is self._flash, "the image has one flash"
        self._hardware = hardware
        self.command(BOOT, bytes([reset_cause, hardware.window, hardware.engine is not None]))
        return RemoteMcu(self)

    def command(self, number: int, body: bytes = b"") -> bool:
        """True if requests are queued."""
        flash, engine, hardware = self._flash, self._engine, self._hardware
        clock = hardware.clock_us if hardware is not None else None
        world = WORLD.pack(
            clock() if clock is not None else 0,
            NEVER if flash.cut_at is None else flash.cut_at,
            int(flash.torn * 1000),
            int(engine.load_error.result) if engine.load_error else 0,
            engine.invoke_error is not None,
        )
        answer = self._machine.ask(number, world + body).body
        flash.operations, breaches, engine.runs, resets, dead, pending = STATE.unpack_from(answer)
        flash.dead = bool(dead)
        flash.breaches += ["on the core"] * (breaches - len(flash.breaches))
        if hardware is not None:
            hardware.uart_write(answer[STATE.size :])
            for _ in range(resets - self._resets):
                hardware.request_reset()
        self._resets = resets
        return bool(pending)


class RemoteMcu(Mcu):
    def __init__(self, core: EmulatedCore) -> None:
        self._core = core

    def feed(self, data: bytes) -> bool:
        pending = False
        for at in range(0, len(data), PIECE):
            pending = self._core.command(FEED, data[at : at + PIECE])
        return pending

    def poll(self) -> bool:
        return self._core.command(POLL)

    def close(self) -> None:
        pass
