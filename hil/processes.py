"""Real processes for the demonstration, the benchmarks and the tests: brokers, workers, the virtual microcontroller and
the daemon, each of which can be killed, stopped and continued."""

from __future__ import annotations

import ctypes
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

import yaml

START_LIMIT_S = 20.0
"""The slowest of them, the virtual microcontroller's first inference, takes about two seconds on a small machine."""
STOP_LIMIT_S = 8.0
POLL_S = 0.02
LOG_TAIL = 2000
PORTS = range(20000, 32768)
PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None)
_claims: list[socket.socket] = []


class StartError(Exception):
    """A process did not become ready. The message ends with the tail of its log."""


def free_port() -> int:
    """A TCP port on loopback that nobody listens on, and that stays ours until this process ends, also while what
    listens there is restarted: it is below the ports of outgoing connections (Linux begins them at 32768), and claimed
    among all processes that ask here, by a name that the kernel gives to one of them only (unix(7), abstract)."""
    for port in random.sample(PORTS, len(PORTS)):
        claim = socket.socket(socket.AF_UNIX)
        try:
            claim.bind(f"\0edge-agent-port-{port}")
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", port))
        except OSError:
            claim.close()
            continue
        _claims.append(claim)
        return port
    raise StartError(f"no free port from {PORTS.start} to {PORTS.stop - 1}")


class Process:
    """One child process and its log file."""

    def __init__(self, name: str, command: Sequence[str], log: Path, environ: Mapping[str, str] | None = None) -> None:
        self.name = name
        self.log = log
        with log.open("ab") as sink:
            self._child = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=subprocess.STDOUT,
                env={**os.environ, **(environ or {})},
                start_new_session=True,
                preexec_fn=_die_with_parent,
            )

    @property
    def pid(self) -> int:
        return self._child.pid

    def alive(self) -> bool:
        return self._child.poll() is None

    def kill(self) -> None:
        """SIGKILL: no chance to say goodbye."""
        self._child.kill()
        self._child.wait()

    def pause(self) -> None:
        """SIGSTOP: alive, connected, and silent."""
        self._child.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._child.send_signal(signal.SIGCONT)

    def terminate(self, limit_s: float = STOP_LIMIT_S) -> int:
        """SIGTERM, then SIGKILL after `limit_s`. Returns the exit code."""
        if self.alive():
            self._child.send_signal(signal.SIGCONT)
            self._child.terminate()
            try:
                self._child.wait(limit_s)
            except subprocess.TimeoutExpired:
                self._child.kill()
        return self._child.wait()

    def wait_for_log(self, text: str, limit_s: float = START_LIMIT_S) -> None:
        """Until its log holds `text`. Raises `StartError`."""
        self.wait_until(lambda: text in self.tail(1 << 20), f"{text!r} in its log", limit_s)

    def wait_until(self, condition: object, what: str, limit_s: float = START_LIMIT_S) -> None:
        """Until `condition()` is true. Raises `StartError` when the process ends or the time is over."""
        assert callable(condition)
        end = time.monotonic() + limit_s
        while not condition():
            if not self.alive():
                raise StartError(f"{self.name} ended with code {self._child.returncode}:\n{self.tail()}")
            if time.monotonic() > end:
                raise StartError(f"{self.name}: no {what} after {limit_s:.0f} s:\n{self.tail()}")
            time.sleep(POLL_S)

    def tail(self, size: int = LOG_TAIL) -> str:
        with self.log.open("rb") as log:
            log.seek(max(0, self.log.stat().st_size - size))
            return log.read().decode("utf-8", "replace")


class Stage:
    """A folder and the processes started in it. Leaving the `with` block stops them in reverse order."""

    def __init__(self, keep: Path | None = None) -> None:
        self._temporary = None if keep else tempfile.TemporaryDirectory(prefix="edge-agent-")
        self.folder = keep.resolve() if keep else Path(self._temporary.name if self._temporary else ".")
        self.folder.mkdir(parents=True, exist_ok=True)
        self._processes: list[Process] = []
        self._over = False
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with _uninterrupted():
            with self._lock:
                self._over = True
            for process in reversed(self._processes):
                process.terminate()
            if self._temporary:
                self._temporary.cleanup()

    def start(self, name: str, command: Sequence[str], environ: Mapping[str, str] | None = None) -> Process:
        """From any thread. Raises `StartError` once the stage is over: what began then, nobody would stop."""
        with self._lock:
            if self._over:
                raise StartError(f"{name}: everything was stopped")
            process = Process(name, command, self.folder / f"{name}.log", environ)
            self._processes.append(process)
        return process

    def broker(self, name: str, port: int, persistent: bool = False) -> Process:
        """A broker on loopback: mosquitto if it is installed, else the rumqttd wheel. `persistent`: mosquitto writes
        what it keeps to a file after every change."""
        executable = shutil.which("mosquitto") or shutil.which("mosquitto", path="/usr/sbin:/usr/local/sbin")
        if executable:
            config = self.folder / f"{name}.conf"
            # Started by root, mosquitto would become another user, and with that forget to end with its parent.
            user = "user root\n" if os.geteuid() == 0 else ""
            kept = (
                f"persistence true\npersistence_file {name}.db\npersistence_location {self.folder}/\n"
                "autosave_on_changes true\nautosave_interval 1\nmax_queued_messages 0\n"
            )
            config.write_text(
                f"listener {port} 127.0.0.1\nallow_anonymous true\nset_tcp_nodelay true\n{user}"
                f"{kept if persistent else 'persistence false'}\n"
            )
            command = [executable, "-c", str(config)]
        else:
            command = [sys.executable, "-m", "hil.rumqttd", "--port", str(port)]
        process = self.start(name, command)
        process.wait_until(lambda: _listens(port), f"listener on port {port}")
        return process

    def virtual_mcu(self, link: Path, *options: str, name: str = "mcu") -> Process:
        """A virtual microcontroller whose port is `link`."""
        command = [
            sys.executable,
            "-m",
            "hil.virtual",
            "--link",
            str(link),
            "--flash",
            str(self.folder / f"{name}.flash"),
        ]
        process = self.start(name, [*command, *options])
        process.wait_for_log('"ready"')
        return process

    def worker(self, name: str, broker: str, topic: str, *options: str) -> Process:
        """A cloud worker, serving when this returns."""
        command = [sys.executable, "-m", "agent.cli", "worker", "--broker", broker, "--topic", topic, "--id", name]
        process = self.start(name, [*command, *options])
        process.wait_for_log("link up")
        return process

    def daemon(
        self,
        config: Mapping[str, object],
        name: str = "daemon",
        module: str = "agent.cli",
        environ: Mapping[str, str] | None = None,
        limit_s: float = START_LIMIT_S,
    ) -> Process:
        """The daemon; returns when it has said READY the way systemd hears it. Raises `StartError`; it has ended then,
        as nobody could end it."""
        path = self.folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(dict(config), sort_keys=False))
        notify = self.folder / f"{name}.notify"
        notify.unlink(missing_ok=True)
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
            listener.bind(str(notify))
            listener.settimeout(POLL_S)
            process = self.start(
                name,
                [sys.executable, "-m", module, "run", "--config", str(path)],
                {"NOTIFY_SOCKET": str(notify), "PYTHONUNBUFFERED": "1", **(environ or {})},
            )
            try:
                process.wait_until(lambda: _ready(listener), "READY=1", limit_s)
            except StartError:
                process.kill()
                raise
        return process


@contextmanager
def interruptible() -> Iterator[None]:
    """A closed terminal and a SIGTERM end the block like Ctrl-C does, so that what was started is stopped."""

    def interrupt(_number: int, _frame: object) -> None:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGHUP, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Impatience must not leave processes behind: a second Ctrl-C waits until they are stopped."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {
        number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM)
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _die_with_parent() -> None:
    """In the child: SIGTERM when whoever started it is gone, however it went (prctl(2), PR_SET_PDEATHSIG)."""
    _LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _ready(listener: socket.socket) -> bool:
    try:
        return b"READY=1" in listener.recv(4096)
    except TimeoutError:
        return False


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1.0)
        return probe.connect_ex(("127.0.0.1", port)) == 0
