"""A bad serial line between the gateway and any board: a pseudo-terminal on one side, the board's port on the other.

    python -m hil.faultline /dev/ttyACM0 --link ./ttyBAD --bit-errors 1e-4 --seed 7

The gateway opens the link. PORT is a serial port, or unix:PATH for the socket of an emulator's UART. While the board's
port is gone the link is gone too, as with a pulled cable. A control socket (`--control`, client: `hil.virtual.control`)
takes `set`, `cut`, `garbage`, `stall`, `resume`, `unplug`, `plug` and `stats` while the line is in use.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import random
import selectors
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from hil.rig.damage import RATES, Damage, Faults, Wire
from hil.rig.line_ends import BoardPort, ControlSocket
from hil.virtual.port import Port

READ_BYTES: Final = 4096
QUEUE_BYTES: Final = 4096
"""What a paced direction holds before it stops reading: back-pressure, as from a driver's buffer."""
REOPEN_S: Final = 0.05
"""How often a board's port that has gone is looked for."""
OUT, IN = "out", "in"
"""To the board, and from it."""
DIRECTIONS: Final = {"both": (OUT, IN), OUT: (OUT,), IN: (IN,)}


class _Way:
    """One direction. `cut_at`: bytes after which the cable is pulled, 0 for never."""

    def __init__(self, name: str, faults: Faults, seed: int) -> None:
        self.name = name
        self.stalled = False
        self.carried = 0
        self.cut_at = 0
        self.backlog = b""  # arrived, not yet taken by whoever reads there
        self.set(faults, seed)

    def set(self, faults: Faults, seed: int) -> None:
        """From now on. Positions are counted anew."""
        self.faults, self.seed = faults, seed
        self.damage = Damage(faults, seed)
        self.wire = Wire(faults)

    def has_room(self) -> bool:
        return not self.stalled and not self.backlog and len(self.wire) < QUEUE_BYTES

    def clear(self) -> None:
        self.wire.clear()
        self.backlog = b""


class FaultLine:
    """The proxy. `run` returns after `stop`, which a signal handler may call."""

    def __init__(
        self, port: str, link: Path, faults: Faults, seed: int, *, ways: str = "both", port_baud: int = 921_600
    ) -> None:
        self._port_name, self._port_baud, self._link = port, port_baud, link
        clean = Faults(delay_s=faults.delay_s, baud=faults.baud)
        self.ways = {
            name: _Way(name, faults if name in DIRECTIONS[ways] else clean, seed + (name == IN)) for name in (OUT, IN)
        }
        self._selector = selectors.SelectSelector()  # the one that waits for less than a millisecond
        self._running = True
        self._unplugged = False
        self._port: Port | None = None
        self._board: BoardPort | None = None
        self._look_at = 0.0
        self._watched: dict[int, int] = {}
        self._device: Path | None = None
        self._wake, self._waker = socket.socketpair()
        self._waker.setblocking(False)
        self._selector.register(self._wake, selectors.EVENT_READ, lambda: self._wake.recv(64))

    def stop_on_signals(self) -> None:
        signal.set_wakeup_fd(self._waker.fileno())
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: self.stop())

    def stop(self) -> None:
        self._running = False

    def open(self) -> None:
        """Connect both sides now. Raises OSError if the board's port cannot be opened."""
        self._board = BoardPort(self._port_name, self._port_baud)
        self._port = Port(self._link, unlike=self._device)  # as after a real replug
        self._device = self._link.readlink()

    def watch(self, fd: int, handler: Callable[[], object]) -> None:
        self._selector.register(fd, selectors.EVENT_READ, handler)

    def unwatch(self, fd: int) -> None:
        self._selector.unregister(fd)

    def run(self) -> None:
        while self._running:
            self._update_interest()
            for key, events in self._selector.select(self._timeout_s()):
                if key.data is not None:
                    key.data()
                elif events & selectors.EVENT_READ:
                    self._read(key.fd)
            self._work(time.monotonic())

    def close(self) -> None:
        self._unplug()
        self._selector.close()
        self._wake.close()
        self._waker.close()

    # -- the line ------------------------------------------------------------------------------------------------------

    def _ends(self, way: _Way) -> tuple[int, int]:
        """Descriptors that this direction reads and writes."""
        assert self._port is not None and self._board is not None
        ends = self._port.master, self._board.fd
        return ends if way.name == OUT else (ends[1], ends[0])

    def _update_interest(self) -> None:
        """Watch what may be read, and what must be waited for to be written."""
        wanted: dict[int, int] = {}
        if self._port is not None:
            for way in self.ways.values():
                source, sink = self._ends(way)
                if way.has_room():
                    wanted[source] = wanted.get(source, 0) | selectors.EVENT_READ
                if way.backlog:
                    wanted[sink] = wanted.get(sink, 0) | selectors.EVENT_WRITE
        if wanted != self._watched:
            for fd in self._watched:
                self._selector.unregister(fd)
            for fd, events in wanted.items():
                self._selector.register(fd, events, None)
            self._watched = wanted

    def _timeout_s(self) -> float | None:
        if self._port is None:
            return None if self._unplugged else REOPEN_S
        times = [way.wire.wake_at() for way in self.ways.values() if not way.stalled and not way.backlog]
        due = min((at for at in times if at is not None), default=None)
        return None if due is None else max(0.0, due - time.monotonic())

    def _read(self, source: int) -> None:
        if self._port is None:  # pulled by a command of the same round
            return
        way = self.ways[OUT if source == self._port.master else IN]
        try:
            data = os.read(source, READ_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if data:
            way.wire.put(way.damage.apply(data), time.monotonic())
        else:
            self._unplug()  # the board's port has gone; `_work` looks for it

    def _work(self, now: float) -> None:
        if self._port is None:
            if not self._unplugged and now >= self._look_at:
                self._look_at = now + REOPEN_S
                with contextlib.suppress(OSError):
                    self.open()
            return
        for way in self.ways.values():
            if self._port is not None and not way.stalled:
                self._carry(way, now)

    def _carry(self, way: _Way, now: float) -> None:
        data = way.backlog or way.wire.take(now)
        if way.cut_at:
            data = data[: max(0, way.cut_at - way.carried)]
        sent = 0
        if data:
            try:
                sent = os.write(self._ends(way)[1], data)
            except BlockingIOError:
                sent = 0
            except OSError:
                self._unplug()
                return
        way.carried += sent
        way.backlog = data[sent:]
        if way.cut_at and way.carried >= way.cut_at:
            way.cut_at = 0
            self.pull()

    # -- the cable -----------------------------------------------------------------------------------------------------

    def pull(self) -> None:
        """Until `plug`."""
        self._unplugged = True
        self._unplug()

    def plug(self, link: Path | None = None) -> None:
        """Back again, behind the same link or another; the device behind it has another name than before.

        Raises OSError if the board's port cannot be opened.
        """
        if link is not None:
            self._link = link
        if self._port is None:
            self.open()
        self._unplugged = False

    def _unplug(self) -> None:
        if self._port is not None:
            for fd in self._watched:
                self._selector.unregister(fd)
            self._watched = {}
            self._port.close()
            self._port = None
        if self._board is not None:
            self._board.close()
            self._board = None
        for way in self.ways.values():
            way.clear()

    # -- control -------------------------------------------------------------------------------------------------------

    def command(self, request: dict[str, Any]) -> dict[str, Any]:
        """Carries out one command. Raises ValueError, TypeError, KeyError or OSError if it cannot."""
        parameters = dict(request)
        name = parameters.pop("command", None)
        if name == "unplug":
            self.pull()
        elif name == "plug":
            self.plug(Path(parameters["link"]) if "link" in parameters else None)
        elif name != "stats":
            for way in DIRECTIONS[parameters.pop("direction", "both")]:
                self._command(self.ways[way], name, parameters)
        return {"ok": True, "plugged": self._port is not None, "link": str(self._link), **self.stats()}

    def _command(self, way: _Way, name: Any, parameters: dict[str, Any]) -> None:
        """Of one direction."""
        match name:
            case "set":
                faults = {"baud": way.faults.baud, "delay_s": way.faults.delay_s, **parameters}
                way.set(
                    Faults(**{key: value for key, value in faults.items() if key != "seed"}), _seed(parameters, way)
                )
            case "cut":
                way.cut_at = way.carried + int(parameters["after"])
            case "garbage":
                rng = random.Random(_seed(parameters, way))
                way.wire.put(rng.randbytes(int(parameters["count"])), time.monotonic())
            case "stall" | "resume":
                way.stalled = name == "stall"
            case other:
                raise ValueError(f"unknown command {other!r}")

    def stats(self) -> dict[str, Any]:
        """Of each direction: bytes carried, bytes that wait, and what was done to them."""
        return {
            way.name: {
                "carried": way.carried,
                "waiting": len(way.wire) + len(way.backlog),
                "seed": way.seed,
                **way.damage.counts,
            }
            for way in self.ways.values()
        }


def _seed(parameters: dict[str, Any], way: _Way) -> int:
    """The two directions differ, so that they are not hit in the same places."""
    return int(parameters.get("seed", 0)) + (way.name == IN)


def parser() -> argparse.ArgumentParser:
    words = argparse.ArgumentParser(prog="python -m hil.faultline", description="A bad serial line, on purpose.")
    words.add_argument("port", metavar="PORT", help="the board's serial port, or unix:PATH")
    words.add_argument("--link", type=Path, required=True, help="symlink to the gateway's end, made and removed here")
    words.add_argument("--port-baud", type=int, default=921_600, metavar="N", help="of PORT itself (default 921600)")
    words.add_argument("--control", type=Path, metavar="SOCKET", help="Unix socket for commands while it runs")
    words.add_argument("--seed", type=int, help="of every fault; printed (default: another each time)")
    words.add_argument("--direction", choices=DIRECTIONS, default="both", help="out: to the board; in: from it")
    words.add_argument("--cut-at", type=int, default=0, metavar="N", help="pull the cable after N bytes to the board")
    defaults = Faults()
    for field in dataclasses.fields(Faults):
        kind = float if field.name in RATES or field.name == "delay_s" else int
        option = "--" + field.name.removesuffix("_s").replace("_", "-")
        words.add_argument(option, dest=field.name, type=kind, default=getattr(defaults, field.name), metavar="X")
    return words


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    seed = args.seed if args.seed is not None else random.SystemRandom().randrange(1 << 31)
    try:
        faults = Faults(**{field.name: getattr(args, field.name) for field in dataclasses.fields(Faults)})
        line = FaultLine(args.port, args.link, faults, seed, ways=args.direction, port_baud=args.port_baud)
        line.ways[OUT].cut_at = args.cut_at
        line.open()
        control = ControlSocket(args.control, line.watch, line.unwatch, line.command) if args.control else None
    except (ValueError, OSError) as error:
        print(f"fault line: {error}", file=sys.stderr)
        return 1
    line.stop_on_signals()
    print(json.dumps({"event": "ready", "link": str(args.link), "seed": seed, "faults": faults.text()}), flush=True)
    try:
        line.run()
    finally:
        if control:
            control.close()
        line.close()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
