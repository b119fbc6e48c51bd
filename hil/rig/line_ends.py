"""What the fault line holds on to: the board's port, and the control socket."""

from __future__ import annotations

import contextlib
import errno
import json
import socket
import termios
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

UNIX: Final = "unix:"
"""How the port of an emulator begins."""
LET_GO_S: Final = 3.0


class BoardPort:
    """The board's port, open and raw. Raises OSError if it cannot be opened."""

    def __init__(self, port: str, baud: int) -> None:
        self._close: Callable[[], object]
        if port.startswith(UNIX):
            connection = socket.socket(socket.AF_UNIX)
            try:
                connection.connect(port.removeprefix(UNIX))
            except OSError:
                connection.close()
                raise
            connection.setblocking(False)
            self.fd, self._close = connection.fileno(), connection.close
        else:
            import serial  # not needed for an emulator

            device = _opened(lambda: serial.Serial(port, baud, timeout=0, write_timeout=0, exclusive=True))
            self.fd, self._close = device.fileno(), device.close

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._close()


def _opened(open_port: Callable[[], Any]) -> Any:
    """Its last user may still be letting go of it: that is waited for, a little."""
    deadline_s = time.monotonic() + LET_GO_S
    while True:
        try:
            return open_port()
        except termios.error as error:  # gone while it was opened
            raise OSError(*error.args) from None
        except OSError as error:
            if error.errno != errno.EAGAIN or time.monotonic() > deadline_s:
                raise
            time.sleep(0.02)


class ControlSocket:
    """Unix socket, one JSON object a line each way, one client at a time.

    `watch` has a callable called when a descriptor can be read, `unwatch` ends that; `execute` may raise ValueError,
    TypeError, KeyError or OSError, which the client is told.
    """

    MAX_COMMAND: Final = 4096

    def __init__(
        self,
        path: Path,
        watch: Callable[[int, Callable[[], object]], None],
        unwatch: Callable[[int], None],
        execute: Callable[[dict[str, Any]], dict[str, Any]],
    ) -> None:
        self._path, self._watch, self._unwatch, self._execute = path, watch, unwatch, execute
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        self._client: socket.socket | None = None
        self._pending = b""
        watch(self._listener.fileno(), self._accept)

    def close(self) -> None:
        self._drop()
        self._unwatch(self._listener.fileno())
        self._listener.close()
        self._path.unlink(missing_ok=True)

    def _accept(self) -> None:
        client, _ = self._listener.accept()
        self._drop()
        self._client, self._pending = client, b""
        self._watch(client.fileno(), self._receive)

    def _receive(self) -> None:
        assert self._client is not None
        try:
            data = self._client.recv(self.MAX_COMMAND)
        except OSError:
            data = b""
        self._pending += data
        if not data or len(self._pending) > self.MAX_COMMAND:
            self._drop()
            return
        while b"\n" in self._pending:
            text, _, self._pending = self._pending.partition(b"\n")
            try:
                answer = self._execute(dict(json.loads(text)))
            except (ValueError, TypeError, KeyError, OSError) as error:
                answer = {"error": f"{type(error).__name__}: {error}"}
            with contextlib.suppress(OSError):
                self._client.sendall(json.dumps(answer).encode() + b"\n")

    def _drop(self) -> None:
        if self._client is not None:
            self._unwatch(self._client.fileno())
            self._client.close()
            self._client = None
