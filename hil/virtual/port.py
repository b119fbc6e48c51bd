"""The virtual MCU's serial port: a pseudo-terminal behind a symlink, with the faults of a real line."""

from __future__ import annotations

import contextlib
import hashlib
import os
import pty
import random
import socket
import tty
from collections.abc import Iterator
from math import log
from pathlib import Path

BITS_PER_BYTE = 10  # start bit, eight data bits, stop bit


PSEUDO_TERMINALS = "/dev/pts/"


class LinkRefused(OSError):
    """The link is in use, or something that is not ours has its name; nothing was touched."""


class LinkClaim:
    """The right to make `link` until `close`, or the end of the process however it ends. Raises LinkRefused.

    A bound abstract socket: it needs no file, and so leaves none behind.
    """

    def __init__(self, link: Path) -> None:
        check_link(link)
        if not link.parent.is_dir():
            raise LinkRefused(f"{link}: no such folder: {link.parent}")
        if not os.access(link.parent, os.W_OK | os.X_OK):
            raise LinkRefused(f"{link}: no permission to make a link in {link.parent}")
        name = hashlib.sha256(os.fsencode(link.parent.resolve() / link.name)).hexdigest()
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        try:
            self._socket.bind(f"\0edge-agent-virtual-{name}")
        except OSError:
            self._socket.close()
            raise LinkRefused(f"{link} is in use by another virtual microcontroller") from None

    def close(self) -> None:
        self._socket.close()


def check_link(link: Path) -> None:
    """Raises LinkRefused if there is something that did not come from here."""
    if link.is_symlink():
        if not str(target := link.readlink()).startswith(PSEUDO_TERMINALS):
            raise LinkRefused(f"{link} exists and is a link to {target}, which is no pseudo-terminal")
    elif link.exists():
        raise LinkRefused(f"{link} exists and is not a symlink")


class Port:
    """A pseudo-terminal in raw mode. `link` points to what the gateway opens, which never is `unlike`."""

    def __init__(self, link: Path, *, unlike: Path | None = None) -> None:
        check_link(link)
        self.link = link
        self.master, self._slave = pty.openpty()
        if os.ttyname(self._slave) == str(unlike):  # that number was free again
            taken = self.master, self._slave
            self.master, self._slave = pty.openpty()
            for fd in taken:
                os.close(fd)
        # The slave stays open here too: the master never sees a hang-up when the gateway closes its end.
        tty.setraw(self._slave)
        os.set_blocking(self.master, False)
        self._name = os.ttyname(self._slave)
        link.parent.mkdir(parents=True, exist_ok=True)
        fresh = link.with_name(f".{link.name}.{os.getpid()}")
        with contextlib.suppress(FileNotFoundError):
            fresh.unlink()
        fresh.symlink_to(self._name)
        fresh.replace(link)

    def close(self) -> None:
        # Another virtual MCU may have taken the link over in the meantime.
        with contextlib.suppress(OSError):
            if str(self.link.readlink()) == self._name:
                self.link.unlink()
        os.close(self.master)
        os.close(self._slave)


class Noise:
    """Bit errors at a rate per bit, the same for the same seed."""

    def __init__(self, rate: float, seed: int) -> None:
        if not 0 < rate < 1:
            raise ValueError(f"rate must be between 0 and 1, not {rate}")
        self._scale = log(1 - rate)
        self._random = random.Random(seed)
        self._until_next = self._gap()

    def apply(self, data: bytes) -> bytes:
        out = bytearray(data)
        for bit in self._errors(len(data) * 8):
            out[bit // 8] ^= 1 << bit % 8
        return bytes(out)

    def _errors(self, bits: int) -> Iterator[int]:
        while self._until_next < bits:
            yield self._until_next
            self._until_next += 1 + self._gap()
        self._until_next -= bits

    def _gap(self) -> int:
        """Good bits before the next bad one: geometric, so that a quiet line costs nothing per bit."""
        return int(log(1 - self._random.random()) / self._scale)


class Pacer:
    """How many of the waiting bytes a line of `baud` has carried by `now` (monotonic seconds). Without a rate: all."""

    LONGEST_NAP_S = 0.004

    def __init__(self, baud: int | None) -> None:
        self._byte_s = BITS_PER_BYTE / baud if baud else 0.0
        self._since: float | None = None

    def carried(self, waiting: int, now: float) -> int:
        if not self._byte_s or not waiting:
            self._since = None
            return waiting
        if self._since is None:
            self._since = now
        # A thousandth of a byte of grace: a wake-up computed from the same numbers must not come too early.
        count = min(waiting, int((now - self._since) / self._byte_s + 1e-3))
        self._since += count * self._byte_s
        if count == waiting:
            self._since = None
        return count

    def wait_s(self, waiting: bytearray, now: float) -> float | None:
        """Until the first frame has been carried, as nobody can act on less; None if nothing waits or is paced."""
        if not self._byte_s or not waiting:
            return None
        end = waiting.find(0) + 1 or len(waiting)
        since = now if self._since is None else self._since
        return max(0.0, min(since + end * self._byte_s - now, self.LONGEST_NAP_S))
