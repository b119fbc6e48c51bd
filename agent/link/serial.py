"""A serial port as a `Transport`: pyserial opens and configures it, the event loop reads and writes its descriptor.

pyserial's own reading costs milliseconds for a kilobyte; a reader on the descriptor costs what the kernel costs.
"""

from __future__ import annotations

import asyncio
import errno
import os
import termios
from asyncio import AbstractEventLoop, Future
from collections.abc import Callable
from contextlib import suppress
from typing import Final

import serial

from agent.core.errors import LinkError

READ_BYTES: Final = 65_536
"""The most that one read takes: more than a tty's buffer holds, so one call empties it."""
WRITE_BUFFER_BYTES: Final = 262_144
"""What may wait for the line: a full window of the largest messages, 3 s at 921,600 baud."""


async def open_serial(port: str, baud: int) -> SerialTransport:
    """Open a port for this process alone, 8N1 without flow control; the wait for the device is spent in a thread.

    Raises `LinkError`; it is `permanent` where trying again cannot help (no permission, not a serial port, bad baud).
    """
    loop = asyncio.get_running_loop()
    opening = loop.run_in_executor(None, _open, port, baud)
    try:
        device = await asyncio.shield(opening)
    except asyncio.CancelledError:
        opening.add_done_callback(_close_unwanted)
        raise
    return SerialTransport(device, loop)


def _open(port: str, baud: int) -> serial.Serial:
    try:
        device = serial.Serial(port, baud, timeout=0, write_timeout=0, exclusive=True)
    except (serial.SerialException, OSError) as error:
        cause = error.__context__  # where pyserial leaves the number when configuring fails
        code = cause.args[0] if isinstance(cause, termios.error) else error.errno
        raise _explained(port, code, error) from None
    except (ValueError, termios.error) as error:
        raise LinkError(f"{port}: cannot be configured: {error}", permanent=True) from None
    # Without this an FTDI adapter holds received bytes back for 16 ms. Other drivers, and ptys, have no such flag.
    with suppress(ValueError, OSError):
        device.set_low_latency_mode(True)
    return device


def _explained(port: str, code: int | None, error: Exception) -> LinkError:
    if code in (errno.ENOENT, errno.ENXIO, errno.ENODEV):
        return LinkError(f"{port}: unplugged: no such device")
    if code in (errno.EAGAIN, errno.EBUSY):
        return LinkError(f"{port}: in use by another program")
    if code in (errno.EACCES, errno.EPERM):
        return LinkError(f"{port}: no permission: is the user in the port's group?", permanent=True)
    if code in (errno.ENOTTY, errno.EISDIR, errno.EINVAL):
        return LinkError(f"{port}: not a serial port", permanent=True)
    return LinkError(f"{port}: cannot be opened: {error}")


def _close_unwanted(opening: Future[serial.Serial]) -> None:
    if not opening.cancelled() and opening.exception() is None:
        opening.result().close()


class SerialTransport:
    """An open port. Every failure of it becomes one `LinkError`, here."""

    def __init__(self, device: serial.Serial, loop: AbstractEventLoop) -> None:
        self._device = device
        self._loop = loop
        self._fd: int = device.fileno()
        self._name = str(device.port)
        self._pending = bytearray()
        self._on_data: Callable[[bytes], None] | None = None
        self._on_lost: Callable[[LinkError], None] | None = None
        self._open = True

    @property
    def name(self) -> str:
        return self._name

    @property
    def pending(self) -> int:
        """Bytes that wait for the line."""
        return len(self._pending)

    def start(self, on_data: Callable[[bytes], None], on_lost: Callable[[LinkError], None]) -> None:
        self._on_data = on_data
        self._on_lost = on_lost
        self._loop.add_reader(self._fd, self._readable)

    def write(self, data: bytes) -> bool:
        if not self._open or (self._pending and len(self._pending) + len(data) > WRITE_BUFFER_BYTES):
            return False
        if self._pending:
            self._pending += data
            return True
        sent = self._write_now(data)
        if sent < len(data) and self._open:
            self._pending += data[sent:]
            self._loop.add_writer(self._fd, self._writable)
        return True

    def close(self) -> None:
        if not self._open:
            return
        self._open = False
        self._loop.remove_reader(self._fd)
        self._loop.remove_writer(self._fd)
        self._pending.clear()
        # Bytes that a stalled line still holds would keep close() waiting for up to 30 s.
        with suppress(termios.error):
            termios.tcflush(self._fd, termios.TCOFLUSH)
        self._device.close()

    def _readable(self) -> None:
        try:
            data = os.read(self._fd, READ_BYTES)
        except BlockingIOError:
            return
        except OSError as error:
            self._lose(f"{self._name}: unplugged: {error.strerror}")
            return
        if not data:
            self._lose(f"{self._name}: unplugged: end of file")
        elif self._on_data is not None:
            self._on_data(data)

    def _writable(self) -> None:
        sent = self._write_now(self._pending)
        del self._pending[:sent]
        if not self._pending and self._open:
            self._loop.remove_writer(self._fd)

    def _write_now(self, data: bytes | bytearray) -> int:
        try:
            return os.write(self._fd, data)
        except BlockingIOError:
            return 0
        except OSError as error:
            self._lose(f"{self._name}: unplugged: {error.strerror}")
            return 0

    def _lose(self, reason: str) -> None:
        self.close()
        if self._on_lost is not None:
            self._on_lost(LinkError(reason))
