"""The serial transport over a real pseudo-terminal."""

from __future__ import annotations

import asyncio
import os
import pty
import tty
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent.core.errors import LinkError
from agent.link import serial as serial_module
from agent.link.serial import WRITE_BUFFER_BYTES, SerialTransport, open_serial

BAUD = 921_600


class Wire:
    """A pty: `port` is what the gateway opens, `far` the other end's descriptor."""

    def __init__(self) -> None:
        self.far, self._near = pty.openpty()
        tty.setraw(self._near)
        self.port = os.ttyname(self._near)

    def hang_up(self) -> None:
        for name in ("far", "_near"):
            fd = getattr(self, name)
            if fd >= 0:
                os.close(fd)
                setattr(self, name, -1)


@pytest.fixture
def wire() -> Iterator[Wire]:
    wire = Wire()
    yield wire
    wire.hang_up()


class Ear:
    """Keeps what a transport delivers, and wakes who waits for so much of it."""

    def __init__(self) -> None:
        self.data = bytearray()
        self.lost: list[LinkError] = []
        self._changed = asyncio.Event()

    def on_data(self, data: bytes) -> None:
        self.data += data
        self._changed.set()

    def on_lost(self, error: LinkError) -> None:
        self.lost.append(error)
        self._changed.set()

    async def until(self, count: int = 1 << 30) -> None:
        """Until `count` bytes arrived or the line was lost."""
        async with asyncio.timeout(10):
            while len(self.data) < count and not self.lost:
                self._changed.clear()
                await self._changed.wait()


async def opened(wire: Wire) -> tuple[SerialTransport, Ear]:
    transport, ear = await open_serial(wire.port, BAUD), Ear()
    transport.start(ear.on_data, ear.on_lost)
    return transport, ear


async def test_bytes_travel_unchanged_both_ways(wire: Wire) -> None:
    transport, ear = await opened(wire)
    everything = bytes(range(256)) * 3
    os.write(wire.far, everything)
    await ear.until(len(everything))
    assert ear.data == everything
    assert transport.write(everything)
    assert os.read(wire.far, 4096) == everything
    transport.close()
    transport.close()
    assert not ear.lost
    assert not transport.write(b"x")


async def test_more_than_the_kernel_holds_waits_and_arrives_in_order(wire: Wire) -> None:
    transport, _ = await opened(wire)
    sent = bytes(i * 7 % 251 for i in range(100_000))
    for at in range(0, len(sent), 1000):
        assert transport.write(sent[at : at + 1000])
    assert transport.pending > 0
    got = bytearray()
    loop, done = asyncio.get_running_loop(), asyncio.Event()

    def readable() -> None:
        got.extend(os.read(wire.far, 65_536))
        if len(got) >= len(sent):
            done.set()

    loop.add_reader(wire.far, readable)
    async with asyncio.timeout(10):
        await done.wait()
    loop.remove_reader(wire.far)
    assert got == sent
    assert transport.pending == 0
    transport.close()


async def test_the_write_buffer_is_bounded(wire: Wire) -> None:
    transport, _ = await opened(wire)
    taken = 0
    while transport.write(bytes(10_000)):
        taken += 10_000
        assert transport.pending <= WRITE_BUFFER_BYTES
    assert taken >= WRITE_BUFFER_BYTES - 10_000
    transport.close()
    assert transport.pending == 0


async def test_a_hang_up_is_one_link_error(wire: Wire) -> None:
    transport, ear = await opened(wire)
    wire.hang_up()
    await ear.until()
    assert len(ear.lost) == 1
    assert "unplugged" in str(ear.lost[0])
    assert not ear.lost[0].permanent
    assert not transport.write(b"x")


async def test_a_failing_write_is_the_same_link_error(wire: Wire, monkeypatch: pytest.MonkeyPatch) -> None:
    transport, ear = await opened(wire)

    def failing(fd: int, data: bytes) -> int:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(serial_module.os, "write", failing)
    transport.write(b"x")
    monkeypatch.undo()
    assert [str(error) for error in ear.lost] == [f"{wire.port}: unplugged: Input/output error"]


async def test_a_port_is_opened_once(wire: Wire) -> None:
    transport, _ = await opened(wire)
    with pytest.raises(LinkError, match="in use") as caught:
        await open_serial(wire.port, BAUD)
    assert not caught.value.permanent
    transport.close()
    (await open_serial(wire.port, BAUD)).close()


async def test_a_missing_port_may_come_back_and_a_file_is_no_port(tmp_path: Path) -> None:
    with pytest.raises(LinkError, match="unplugged") as caught:
        await open_serial(str(tmp_path / "ttyACM0"), BAUD)
    assert not caught.value.permanent
    (tmp_path / "file").touch()
    with pytest.raises(LinkError, match="not a serial port") as caught:
        await open_serial(str(tmp_path / "file"), BAUD)
    assert caught.value.permanent


async def test_a_symlink_may_move_to_another_port(tmp_path: Path) -> None:
    link = tmp_path / "ttyMCU"
    for _ in range(2):
        wire = Wire()
        link.symlink_to(wire.port)
        transport, ear = await open_serial(str(link), BAUD), Ear()
        transport.start(ear.on_data, ear.on_lost)
        os.write(wire.far, b"hello")
        await ear.until(5)
        assert transport.name == str(link)
        link.unlink()
        wire.hang_up()
        await ear.until()
        assert ear.lost


async def test_a_cancelled_opening_leaves_nothing_open(wire: Wire) -> None:
    opening = asyncio.create_task(open_serial(wire.port, BAUD))
    await asyncio.sleep(0)
    opening.cancel()
    with pytest.raises(asyncio.CancelledError):
        await opening
    async with asyncio.timeout(10):
        while True:
            try:
                transport = await open_serial(wire.port, BAUD)
                break
            except LinkError as error:
                assert "in use" in str(error)  # until the thread is through
    transport.close()
