"""The virtual MCU's one loop: line -> firmware -> line, and the control socket."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .engine import Engine
from .flash import FileFlash
from .library import Hardware, Mcu
from .port import Noise, Pacer, Port
from .senses import BoardClock, SyntheticSource, TableSource

# One read takes what a pseudo-terminal holds.
READ_SIZE = 4096

# Bytes that wait for a gateway that does not read. Above it the board stops reading: back-pressure, as from a UART
# with flow control. What one read can make the firmware answer comes on top.
MAX_WAITING = 64 * 1024

# A command is a short line of JSON; whoever sends more is no client of ours.
MAX_COMMAND = 4096

# An idle firmware is asked this often whether time has come for something: it has a trial to end.
TICK_S = 0.5

RESET_POWER_ON = 1
RESET_PIN = 2
RESET_SOFTWARE = 3


@dataclass(frozen=True, slots=True)
class Settings:
    link: Path
    control: Path | None
    baud: int | None
    window: int
    unique_id: int
    samples: bytes = b""
    """What its sensor reads (`TableSource`); empty: a synthetic pattern."""
    verify: Callable[[bytes, bytes], bool] | None = None
    """Ed25519: (message, signature)."""


class Machine:
    """Board, line and control socket. `run` returns after `stop` (a signal handler may call it)."""

    def __init__(self, settings: Settings, flash: FileFlash, engine: Engine) -> None:
        self._settings = settings
        self._clock = BoardClock()
        source = TableSource(settings.samples) if settings.samples else SyntheticSource()
        self._hardware = Hardware(
            flash=flash,
            engine=engine,
            uart_write=self._uart_write,
            request_reset=self._request_reset,
            clock_us=self._clock.now_us,
            sample=source.read,
            unique_id=settings.unique_id,
            window=settings.window,
            verify=settings.verify,
        )
        self._poller = select.epoll()
        self._handlers: dict[int, Callable[[int], None]] = {}
        self._port: Port | None = None
        self._port_events = 0
        self._mcu: Mcu | None = None
        self._reset_wanted: int | None = None
        self._running = True
        self._stalled = False
        self._busy = False  # the firmware has requests queued
        self._tick_at = 0.0

        self._received = bytearray()  # from the line, not yet carried: only with a baud rate
        self._sending = bytearray()
        self._noise: tuple[Noise, Noise] | None = None
        self._rx_pacer, self._tx_pacer = Pacer(settings.baud), Pacer(settings.baud)
        self._counts = {"bytes_in": 0, "bytes_out": 0, "boots": 0}

        self._wake_read, self._wake_write = socket.socketpair()
        self._wake_write.setblocking(False)
        self._wake_read.setblocking(False)
        self._watch(self._wake_read.fileno(), select.EPOLLIN, self._on_wake)
        self._control = ControlServer(settings.control, self) if settings.control else None
        try:
            self._plug()
        except BaseException:
            self.close()
            raise

    # -- life --------------------------------------------------------------------------------------------------------

    def stop_on_signals(self) -> None:
        signal.set_wakeup_fd(self._wake_write.fileno())
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: self.stop())

    def stop(self) -> None:
        self._running = False

    def run(self) -> None:
        while self._running:
            for fd, events in self._wait():
                if handler := self._handlers.get(fd):
                    handler(events)
            self._work()

    def _wait(self) -> list[tuple[int, int]]:
        """File descriptors and their events, when there are some or it is time for something."""
        timeout_s = self._timeout_s()
        if self._settings.baud:
            # Waits for less than a millisecond, which epoll does not: a short frame takes 0.15 ms at 921,600 baud.
            select.select([self._poller], [], [], timeout_s)
            timeout_s = 0
        return self._poller.poll(timeout_s)

    def close(self) -> None:
        self._unplug()
        if self._control:
            self._control.close()
        self._poller.close()
        self._wake_read.close()
        self._wake_write.close()

    def _work(self) -> None:
        if self._reset_wanted is not None:
            self._boot(self._reset_wanted)
        if self._received:
            self._feed_carried()
        if self._mcu and not self._stalled and self._due():
            self._busy = self._mcu.poll()
            self._tick_at = time.monotonic() + TICK_S
        if self._sending:
            self._flush()
        self._update_interest()

    def _timeout_s(self) -> float:
        if self._reset_wanted is not None or (self._busy and not self._stalled):
            return 0
        now = time.monotonic()
        waits = [self._rx_pacer.wait_s(self._received, now), self._tx_pacer.wait_s(self._sending, now)]
        if self._mcu and not self._stalled:
            waits.append(self._mcu.idle_s())
        return min([TICK_S, *(wait for wait in waits if wait is not None)])

    def _due(self) -> bool:
        """Whether the firmware has something to do."""
        assert self._mcu is not None
        return self._busy or self._mcu.idle_s() == 0 or time.monotonic() >= self._tick_at

    # -- the board ---------------------------------------------------------------------------------------------------

    def _boot(self, cause: int) -> None:
        if self._mcu:
            self._mcu.close()
        self._received.clear()
        if cause != RESET_SOFTWARE:  # else what waits was sent before: the firmware flushes its line first
            self._sending.clear()
        self._busy = False
        self._reset_wanted = None
        self._counts["boots"] += 1
        self._clock.restart()
        self._mcu = Mcu(self._hardware, cause)

    def _request_reset(self) -> None:
        # Called from inside the instance that is to be destroyed: the loop does it.
        self._reset_wanted = RESET_SOFTWARE

    def _uart_write(self, data: bytes) -> None:
        if self._noise:
            data = self._noise[1].apply(data)
        if self._sending or self._settings.baud:
            self._sending += data
        else:
            self._sending += data[self._write(data) :]

    # -- the line ----------------------------------------------------------------------------------------------------

    def _plug(self) -> None:
        if self._port is None:
            self._port = Port(self._settings.link)
            self._port_events = select.EPOLLIN
            self._watch(self._port.master, select.EPOLLIN, self._on_port)
            self._boot(RESET_POWER_ON)

    def _unplug(self) -> None:
        if self._port:
            self._unwatch(self._port.master)
            self._port.close()
            self._port = None
        if self._mcu:
            self._mcu.close()
            self._mcu = None
        self._received.clear()
        self._sending.clear()
        self._busy = False

    def _on_port(self, events: int) -> None:
        if not events & select.EPOLLIN or self._port is None or self._mcu is None:
            return
        try:
            data = os.read(self._port.master, READ_SIZE)
        except BlockingIOError:
            return
        self._counts["bytes_in"] += len(data)
        if self._noise:
            data = self._noise[0].apply(data)
        if self._settings.baud:
            self._received += data
        else:
            self._busy = self._mcu.feed(data)

    def _feed_carried(self) -> None:
        count = self._rx_pacer.carried(len(self._received), time.monotonic())
        if count and self._mcu:
            data = bytes(self._received[:count])
            del self._received[:count]
            self._busy = self._mcu.feed(data)

    def _flush(self) -> None:
        count = self._tx_pacer.carried(len(self._sending), time.monotonic())
        if not count or self._port is None:
            return
        sent = self._write(self._sending[:count] if count < len(self._sending) else self._sending)
        del self._sending[:sent]

    def _write(self, data: bytes | bytearray) -> int:
        """Bytes that the pseudo-terminal took."""
        if self._port is None:
            return 0
        try:
            sent = os.write(self._port.master, data)
        except BlockingIOError:
            return 0
        self._counts["bytes_out"] += sent
        return sent

    def _update_interest(self) -> None:
        if self._port is None:
            return
        room = len(self._sending) < MAX_WAITING and len(self._received) < READ_SIZE
        events = select.EPOLLIN if room and not self._stalled else 0
        # With a baud rate the clock decides when to write, not the pseudo-terminal.
        if self._sending and not self._settings.baud:
            events |= select.EPOLLOUT
        if events != self._port_events:
            self._poller.modify(self._port.master, events)
            self._port_events = events

    # -- control -----------------------------------------------------------------------------------------------------

    def command(self, request: dict[str, Any]) -> dict[str, Any]:
        """Carries out one command of the control socket. Raises ValueError if it cannot."""
        match request.get("command"):
            case "reset":
                if self._port is None:
                    raise ValueError("unplugged")
                self._boot(int(request.get("cause", RESET_PIN)))
            case "unplug":
                self._unplug()
            case "plug":
                self._plug()
            case "noise":
                rate, seed = float(request.get("rate", 0)), int(request.get("seed", 0))
                self._noise = (Noise(rate, seed), Noise(rate, seed + 1)) if rate else None
            case "stall":
                self._stalled = True
            case "resume":
                self._stalled = False
            case "clock":
                return self._clock.command(request)
            case "stats":
                return {
                    **self._counts,
                    "waiting": len(self._sending),
                    "plugged": self._port is not None,
                    "stalled": self._stalled,
                }
            case other:
                raise ValueError(f"unknown command {other!r}")
        return {"ok": True}

    # -- the loop's bookkeeping --------------------------------------------------------------------------------------

    def _watch(self, fd: int, events: int, handler: Callable[[int], None]) -> None:
        self._poller.register(fd, events)
        self._handlers[fd] = handler

    def _unwatch(self, fd: int) -> None:
        self._poller.unregister(fd)
        del self._handlers[fd]

    def _on_wake(self, _: int) -> None:
        self._wake_read.recv(64)


class ControlServer:
    """Unix socket, one JSON object a line each way."""

    def __init__(self, path: Path, machine: Machine) -> None:
        if path.is_socket():
            _remove_stale(path)
        self._path = path
        self._machine = machine
        self._clients: dict[int, tuple[socket.socket, bytearray]] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        self._listener.setblocking(False)
        machine._watch(self._listener.fileno(), select.EPOLLIN, self._on_listener)

    def close(self) -> None:
        for fd in list(self._clients):
            self._drop(fd)
        self._machine._unwatch(self._listener.fileno())
        self._listener.close()
        self._path.unlink(missing_ok=True)

    def _on_listener(self, _: int) -> None:
        with contextlib.suppress(BlockingIOError):
            client, _address = self._listener.accept()
            client.setblocking(False)
            self._clients[client.fileno()] = (client, bytearray())
            fd = client.fileno()
            self._machine._watch(fd, select.EPOLLIN, lambda _: self._on_client(fd))

    def _on_client(self, fd: int) -> None:
        client, pending = self._clients[fd]
        try:
            data = client.recv(MAX_COMMAND)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        pending += data
        if not data or len(pending) > MAX_COMMAND:
            self._drop(fd)
            return
        while b"\n" in pending:
            line, _, rest = pending.partition(b"\n")
            pending[:] = rest
            try:
                answer = self._machine.command(dict(json.loads(line)))
            except (ValueError, TypeError, OSError) as err:
                answer = {"error": str(err)}
            try:
                client.sendall(json.dumps(answer).encode() + b"\n")
            except OSError:  # gone, or not reading its answers
                self._drop(fd)
                return

    def _drop(self, fd: int) -> None:
        self._machine._unwatch(fd)
        self._clients.pop(fd)[0].close()


def _remove_stale(path: Path) -> None:
    """Removes a socket left by one that was killed. Raises FileExistsError if somebody listens there."""
    with socket.socket(socket.AF_UNIX) as probe:
        probe.setblocking(False)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink()
            return
        except BlockingIOError:
            pass  # a full queue of clients
    raise FileExistsError(f"{path} is in use")
