"""The runtime process: models run here so that a library that hangs or crashes takes nothing else along.

Started by `isolated.ProcessEngine` as `python -m agent.runtimes.process OPTIONS PARENT LIMITS FD...`. Each inherited
socket is served by one thread, one request at a time: `{"load": ...}` or `{"run": ...}`, see `channel`.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any

from agent.core.types import Tensor
from agent.runtimes import channel
from agent.runtimes.base import ModelFile, RuntimeUnavailable
from agent.runtimes.confine import confine
from agent.runtimes.litert import CHATTER
from agent.runtimes.runners import Runners, RuntimeOptions

_PR_SET_PDEATHSIG = 1  # prctl(2)


def main(arguments: list[str]) -> None:
    """Serve until the parent is gone."""
    options, parent, limits, *descriptors = arguments
    _die_with(int(parent))
    if (given := json.loads(limits)) is not None:
        confine(**given)
    # The terminal's Ctrl-C and systemd's SIGTERM reach the whole group; the daemon decides when this process ends.
    for ignored in (signal.SIGINT, signal.SIGTERM):
        signal.signal(ignored, signal.SIG_IGN)
    CHATTER.kept = True
    runners = Runners(RuntimeOptions(**json.loads(options)).runtime, time.monotonic)
    threads = [
        threading.Thread(target=_serve, args=(socket.socket(fileno=int(descriptor)), runners))
        for descriptor in descriptors
    ]
    for thread in threads:
        thread.start()


def _die_with(parent: int) -> None:
    """Have the kernel kill this process with its parent, stopped or hung as it may be."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        sys.exit(0)


def _serve(connection: socket.socket, runners: Runners) -> None:
    """Ends the process, without a word, when the parent has closed: also while this was loading or computing."""
    try:
        while True:
            start = _receive(connection, channel.HEAD.size)
            message = start + _receive(connection, channel.size(start) - len(start))
            header, tensors = channel.decode(message)
            connection.sendall(channel.encode(*_answer(header, tensors, runners)))
    except (EOFError, ConnectionError):
        os._exit(0)  # Other threads may be in a driver that never returns.


def _receive(connection: socket.socket, count: int) -> bytes:
    """Exactly `count` bytes. Raises `EOFError` or `ConnectionError`."""
    received = bytearray()
    while len(received) < count:
        part = connection.recv(count - len(received))
        if not part:
            raise EOFError
        received += part
    return bytes(received)


def _answer(
    header: dict[str, Any], tensors: dict[str, Tensor], runners: Runners
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        if "load" in header:
            path, format, sha256, size = header["load"]
            loaded = runners.load(ModelFile(Path(path), format, sha256, size))
            tensors_of = {"inputs": loaded.inputs, "outputs": loaded.outputs}
            return {
                "runtime": loaded.runtime,
                "provider": loaded.provider,
                "samples_s": loaded.samples_s,
                **tensors_of,
            }, {}
        began = time.monotonic()
        outputs = runners[header["run"]].run(tensors)
        return {"compute_s": time.monotonic() - began}, outputs
    except RuntimeUnavailable as error:
        return {"error": str(error), "unavailable": True}, {}
    except MemoryError:
        return {"error": "it takes more memory than it may"}, {}
    except (ValueError, RuntimeError, KeyError) as error:
        return {"error": str(error)}, {}


if __name__ == "__main__":
    main(sys.argv[1:])
