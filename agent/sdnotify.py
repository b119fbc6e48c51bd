"""Tell systemd how the service fares: the protocol of sd_notify(3), in datagrams to `NOTIFY_SOCKET`.

Without systemd every call does nothing and returns False. A send never blocks and never raises: a service that cannot
reach its manager goes on serving.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping

MAX_STATUS = 200


class Notifier:
    """Sends state to the service manager named in the environment."""

    def __init__(self, environ: Mapping[str, str] | None = None) -> None:
        environ = os.environ if environ is None else environ
        path = environ.get("NOTIFY_SOCKET", "")
        self._address = f"\0{path[1:]}" if path.startswith("@") else path if path.startswith("/") else None
        self.watchdog_s = _watchdog(environ)
        """The manager kills the service when it hears no `watchdog()` for this long; None: it does not watch."""

    def ready(self, status: str = "") -> bool:
        """Start-up, or a reload, is complete."""
        return self._send("READY=1", status)

    def status(self, text: str) -> bool:
        """One line for `systemctl status`."""
        return self._send("", text)

    def watchdog(self) -> bool:
        """Alive. Send it from the loop that does the work, at half of `watchdog_s`."""
        return self._send("WATCHDOG=1")

    def reloading(self) -> bool:
        """The configuration is being read again; `ready()` must follow."""
        return self._send(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")

    def stopping(self, status: str = "") -> bool:
        """Shutdown has begun."""
        return self._send("STOPPING=1", status)

    def _send(self, state: str, status: str = "") -> bool:
        if self._address is None:
            return False
        text = " ".join(status.split())[:MAX_STATUS]
        message = "\n".join(part for part in (state, f"STATUS={text}" if text else "") if part)
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC) as sock:
                sock.connect(self._address)
                sock.send(message.encode())
        except OSError:
            return False
        return True


def _watchdog(environ: Mapping[str, str]) -> float | None:
    microseconds = environ.get("WATCHDOG_USEC", "")
    pid = environ.get("WATCHDOG_PID", "")
    if not microseconds.isdecimal() or int(microseconds) == 0 or (pid and pid != str(os.getpid())):
        return None
    return int(microseconds) / 1e6
