"""An image on the emulated Cortex-M4F: its UART as a socket, its reset button, and a debugger's hand on the core."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from board import ROOT, Hello, Image, Message, Receiver, line

RUN = ROOT / "firmware/boards/mps2/run"
TOOLS = {"qemu-system-arm": "qemu-system-arm", "arm-none-eabi-g++": "gcc-arm-none-eabi"}
ANSWER_LIMIT_S = 30.0
BUILD_LIMIT_S = 300
LIBRARY_LIMIT_S = 3600


def need_tools() -> None:
    """Skips where the emulator or the compiler is missing; in CI that is a failure."""
    missing = [package for command, package in TOOLS.items() if shutil.which(command) is None]
    if not missing:
        return
    if os.environ.get("CI"):
        pytest.fail(f"missing in CI: {', '.join(missing)}")
    pytest.skip(f"not installed: {', '.join(missing)}")


def script(*arguments: str, library: str | None = None) -> str:
    """What script/firmware prints, with or without TensorFlow Lite Micro."""
    need_tools()
    variables = {name: value for name, value in os.environ.items() if name != "TFLM_LIB_DIR"}
    if library:
        variables["TFLM_LIB_DIR"] = library
    done = subprocess.run(
        [ROOT / "script/firmware", *arguments],
        env={**variables, "VENV": sys.prefix},
        capture_output=True,
        text=True,
        timeout=LIBRARY_LIMIT_S if library else BUILD_LIMIT_S,
    )
    if "lacks platformio" in done.stderr and not os.environ.get("CI"):
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def build(environment: str, folder: Path, library: str | None = None) -> Path:
    """A copy in `folder` of the image that script/firmware builds."""
    script(environment, library=library)
    built = Path(os.environ.get("PLATFORMIO_BUILD_DIR", ROOT / "firmware/.pio/build")) / environment / "firmware.elf"
    return Path(shutil.copy(built, folder / f"{environment}.elf"))


class Machine:
    """One emulated board, switched on. The line keeps what arrives; `ask` is one exchange."""

    def __init__(self, image: Path, folder: Path) -> None:
        self.image = image
        self.line = Receiver()
        self._id = 0
        self._sockets = {name: folder / name for name in ("uart", "gdb", "qmp")}
        # It waits for its UART's other end, so that the HELLO of the boot is not lost.
        options = [
            *("-chardev", f"socket,id=gdb,path={self._sockets['gdb']},server=on,wait=off", "-gdb", "chardev:gdb"),
            *("-qmp", f"unix:{self._sockets['qmp']},server=on,wait=off"),
        ]
        self._process = subprocess.Popen(
            [RUN, image, *options],
            env={**os.environ, "EDGE_QEMU_SERIAL": f"unix:{self._sockets['uart']},server=on,wait=on"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self._uart = self._connect("uart")

    def close(self) -> None:
        self._uart.close()
        self._process.terminate()
        self._process.communicate(timeout=10)

    def _connect(self, name: str) -> socket.socket:
        end = time.monotonic() + 10
        while True:
            connection = socket.socket(socket.AF_UNIX)
            try:
                connection.connect(str(self._sockets[name]))
                return connection
            except OSError:
                connection.close()
                if self._process.poll() is not None:
                    raise AssertionError(self._process.communicate()[0]) from None
                assert time.monotonic() < end, f"no {name} socket"
                time.sleep(0.02)

    # -- the line ------------------------------------------------------------------------------------------------------

    def send(self, data: bytes) -> None:
        self._uart.settimeout(ANSWER_LIMIT_S)
        self._uart.sendall(data)

    def _receive(self, limit_s: float) -> None:
        self._uart.settimeout(max(limit_s, 0.001))
        try:
            data = self._uart.recv(65536)
        except TimeoutError:
            return
        assert data, "the emulator closed the line"
        self.line.push(data)

    def wait_for(self, id_: int, limit_s: float = ANSWER_LIMIT_S, type_: str | None = None) -> Message:
        """The next message with this id, and of this type if one is given. Takes all that came before it."""
        end = time.monotonic() + limit_s
        while True:
            for at, message in enumerate(self.line.messages):
                if message.id == id_ and type_ in (None, message.type):
                    del self.line.messages[: at + 1]
                    return message
            left = end - time.monotonic()
            assert left > 0, f"no message {id_} in {limit_s} s, only {self.line.messages}"
            self._receive(left)

    def ask(self, type_: str | int, body: bytes = b"") -> Message:
        self._id += 1
        self.send(line(type_, body, self._id))
        return self.wait_for(self._id)

    def hello(self) -> Hello:
        return Hello.parse(self.ask("HELLO_REQ", struct.pack("<BBH", 1, 0, 4096)).body)

    def booted(self, limit_s: float = ANSWER_LIMIT_S) -> Hello:
        """The HELLO that a reset sends unasked."""
        return Hello.parse(self.wait_for(0, limit_s, "HELLO").body)

    def stats(self) -> dict[int, int]:
        body = self.ask("STATS_REQ").body
        return dict(struct.unpack_from("<BQ", body, 1 + 9 * i) for i in range(body[0]))

    def system_reset(self) -> None:
        """The reset button, through the emulator's machine protocol."""
        with self._connect("qmp") as monitor, monitor.makefile("rwb") as lines:
            monitor.settimeout(10)
            lines.readline()
            for command in ("qmp_capabilities", "system_reset"):
                lines.write(json.dumps({"execute": command}).encode() + b"\n")
                lines.flush()
                while "return" not in (answer := json.loads(lines.readline())):
                    assert "error" not in answer, answer  # else an event

    def push(self, image: Image, chunk: int = 1024, trial: bool = False) -> Message:
        """A whole update; the answer to its commit, or the first error."""
        answer = self.ask("MODEL_BEGIN", image.begin(chunk))
        for at in range(0, len(image.data), chunk):
            if answer.code:
                return answer
            answer = self.ask("MODEL_CHUNK", struct.pack("<I", at) + image.data[at : at + chunk])
        return answer if answer.code else self.ask("MODEL_COMMIT", b"\1" if trial else b"")

    # -- the core ------------------------------------------------------------------------------------------------------

    def jump(self, address: int, at: int | None = None, then: Callable[[], None] = lambda: None) -> None:
        """Sends the core to `address`, as a debugger does (GDB's remote protocol; connecting stops the core).

        With `at`: when it comes by there, which what `then` does makes it do.
        """
        with self._connect("gdb") as debugger:
            debugger.settimeout(ANSWER_LIMIT_S)
            # The emulator has no registers before it was asked for them.
            _debug(debugger, "qXfer:features:read:target.xml:0,ffb")
            if at is not None:
                _debug(debugger, f"Z1,{at & ~1:x},2")
                debugger.sendall(_packet("c"))
                then()
                _wait_for(debugger, rb"\$T05[^#]*#..")
                debugger.sendall(b"+")
                _debug(debugger, f"z1,{at & ~1:x},2")
            _debug(debugger, f"Pf={address.to_bytes(4, 'little').hex()}")  # register 15
            _debug(debugger, "D")  # lets go

    def symbol(self, name: str) -> int:
        table = subprocess.run(["arm-none-eabi-nm", self.image], check=True, capture_output=True, text=True).stdout
        (address,) = [row.split()[0] for row in table.splitlines() if row.split()[-1] == name]
        return int(address, 16)


def _packet(command: str) -> bytes:
    return f"${command}#{sum(command.encode()) & 0xFF:02x}".encode()


def _debug(debugger: socket.socket, command: str) -> None:
    debugger.sendall(_packet(command))
    # "$T..." only tells that the core has stopped.
    answer = _wait_for(debugger, rb"\$([^#T][^#]*)#..")
    assert answer == b"OK" or b"<?xml" in answer, (command, answer)
    debugger.sendall(b"+")


def _wait_for(debugger: socket.socket, pattern: bytes) -> bytes:
    """The pattern's group, or all of it."""
    received = b""
    while not (found := re.search(pattern, received)):
        data = debugger.recv(4096)
        assert data, f"nothing like {pattern!r} in {received!r}"
        received += data
    return found[found.re.groups]
