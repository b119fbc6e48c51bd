"""Real brokers for tests: each on a free loopback port, with its own temporary directory, killed at the end."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from hil.processes import free_port

START_S = 15.0


@dataclass
class Broker:
    """A broker in a child process. `kill` is SIGKILL: the clients get no goodbye."""

    command: list[str]
    port: int
    kind: str
    log: Path
    process: subprocess.Popen[bytes] | None = field(default=None, repr=False)

    @property
    def url(self) -> str:
        return f"mqtt://127.0.0.1:{self.port}"

    def start(self) -> Broker:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(self.command, stdin=subprocess.PIPE, stdout=log, stderr=log)
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise RuntimeError(f"{self.kind} ended with {self.process.returncode}: {self.log.read_text()[-2000:]}")
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), timeout=0.2):
                return self
            time.sleep(0.01)
        self.kill()
        raise RuntimeError(f"{self.kind} does not listen on port {self.port}: {self.log.read_text()[-2000:]}")

    def kill(self, sig: int = signal.SIGKILL) -> None:
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                self.process.send_signal(sig)
            self.process.wait(10)
            if self.process.stdin is not None:
                self.process.stdin.close()
            self.process = None


MOSQUITTO = shutil.which("mosquitto") or shutil.which("mosquitto", path=os.defpath + ":/usr/sbin:/usr/local/sbin")


def mosquitto(tmp_path: Path, extra: str = "", port: int | None = None) -> Broker:
    """Not started yet. `extra` is added to the configuration."""
    if MOSQUITTO is None:
        raise RuntimeError("mosquitto is not installed")
    port = port or free_port()
    anonymous = "" if "allow_anonymous" in extra else "allow_anonymous true\n"
    config = tmp_path / f"mosquitto-{port}.conf"
    listener = "" if "listener" in extra else f"listener {port} 127.0.0.1\n"
    config.write_text(f"{listener}{anonymous}set_tcp_nodelay true\npersistence false\nlog_dest stderr\n{extra}\n")
    return Broker([MOSQUITTO, "-c", str(config)], port, "mosquitto", tmp_path / f"mosquitto-{port}.log")


def rumqttd(tmp_path: Path, port: int | None = None) -> Broker:
    """The Rust broker in the `iotcore` wheel. Not started yet."""
    port = port or free_port()
    command = [sys.executable, "-m", "hil.rumqttd", "--port", str(port)]
    return Broker(command, port, "rumqttd", tmp_path / f"rumqttd-{port}.log")


def has_rumqttd() -> bool:
    return importlib.util.find_spec("iotcore") is not None


@contextlib.contextmanager
def running(broker: Broker) -> Iterator[Broker]:
    try:
        yield broker.start()
    finally:
        broker.kill()


async def until(condition: Callable[[], object], within_s: float = 10.0, what: str = "") -> None:
    """Return as soon as the condition holds; fail if that takes longer than `within_s`."""
    deadline = time.monotonic() + within_s
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {within_s:g} s: {what or condition}")
        await asyncio.sleep(0.002)


class SilentServer:
    """Accepts TCP connections and never says a word."""

    def __init__(self) -> None:
        self._server = socket.create_server(("127.0.0.1", 0))
        self.url = f"mqtt://127.0.0.1:{self._server.getsockname()[1]}"

    def close(self) -> None:
        self._server.close()
