"""A session and its model store on the emulated Cortex-M, with the face that they have in this process (board.py)."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator

import pytest
from board import Chosen, FakeEngine, MemoryFlash
from qemu import Machine, build

from hil.virtual.library import Hardware, Mcu

FORMAT, BOOT, FEED, POLL, KEEP, RESTORE = 1, 2, 3, 4, 5, 6
WORLD = struct.Struct("<QIHBB")
STATE = struct.Struct("<IIIIIBB")
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

    def power_on(self) -> None:
        super().power_on()
        self.fresh = True
        """Told to the image by the next boot; without it that is a reset under the same power."""


class RemoteEngine(FakeEngine):
    """The image's engine. Of the model that it loaded, the CRC-32 is known here."""

    crc32 = 0

    def runs_on(self, model: bytes) -> bool:
        return self.crc32 == zlib.crc32(model)


class EmulatedCore:
    """One image for all boards: the last one made is the one that is there."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._flash = RemoteFlash()
        self._engine = RemoteEngine()
        self._hardware: Hardware | None = None
        self._resets = 0

    def flash(self) -> RemoteFlash:
        self._flash = RemoteFlash()
        self._resets = 0
        self.command(FORMAT)
        return self._flash

    def engine(self) -> FakeEngine:
        self._engine = RemoteEngine()
        return self._engine

    def mcu(self, hardware: Hardware, reset_cause: int) -> Mcu:
        assert hardware.verify is None, "the image verifies no signatures"
        assert hardware.flash is self._flash, "the image has one flash"
        self._hardware = hardware
        fresh, self._flash.fresh = self._flash.fresh, False
        self.command(BOOT, bytes([reset_cause, hardware.window, hardware.engine is not None, fresh]))
        return RemoteMcu(self)

    def keep(self) -> None:
        """Notes what the flash holds, for `restore`."""
        self.command(KEEP)

    def restore(self) -> None:
        self.command(RESTORE)

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
        flash.operations, breaches, engine.runs, resets, engine.crc32, dead, pending = STATE.unpack_from(answer)
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


@pytest.fixture(scope="module", autouse=True)
def the_core(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmulatedCore]:
    """Boards of this module's tests are made on the Cortex-M."""
    folder = tmp_path_factory.mktemp("session")
    machine = Machine(build("qemu-session", folder), folder)
    core = EmulatedCore(machine)
    before, Chosen.core = Chosen.core, core
    yield core
    Chosen.core = before
    machine.close()
