"""The gateway that all this happens to: its processes, its links, its disk, its clock."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import sqlite3
import subprocess
import sys
import threading
import time
import urllib.request
from contextlib import closing, suppress
from itertools import count
from pathlib import Path
from typing import Any

from agent.registry.catalog import Catalog
from hil.chaos.ledger import Windows
from hil.linkcut import LinkCut
from hil.processes import Process, Stage, StartError, free_port
from hil.virtual.control import Control
from hil.wallclock import WallClock, compiler

GATEWAY = "chaos"
LANE = "lanes/gpu"
GROUP = "chaos"
STATE_MB = 64
STATUS_LIMIT_S = 2.0
BACK_LIMIT_S = 40.0
"""How long the daemon may take to have its links again after a fault of theirs."""
STOP_LIMIT_S = 15.0
SET_ASIDE = '"event":"a file is damaged and was set aside'
STARTS = 3
_TABLES = ("items", "known")


class Site:
    """Started by `start`. Methods may be called from any thread."""

    def __init__(self, stage: Stage, catalog: Catalog, windows: Windows, seed: int) -> None:
        self.stage = stage
        self.windows = windows
        self.seed = seed
        self._catalog = catalog
        self.ports = {name: free_port() for name in ("local", "local link", "cloud", "cloud link", "http")}
        self.local_link = LinkCut(self.ports["local link"], self.ports["local"])
        self.cloud_link = LinkCut(self.ports["cloud link"], self.ports["cloud"])
        self.state = stage.folder / "state"
        self.mcu_port = stage.folder / "ttyMCU"
        self.control_path = stage.folder / "mcu.sock"
        self._clock = WallClock(stage.folder) if compiler() else None
        self._copies = count()
        self._damaged: set[str] = set()
        self._damaged_held: set[str] = set()
        self._mounted = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self.daemon_lock = threading.RLock()
        """Held while the daemon is away on purpose."""
        self.workers: dict[str, Process] = {}
        self.set_aside: set[str] = set()
        """Ids of items that a file knew which the daemon has set aside, and named in its log."""
        self.held: set[str] = set()
        """Of these, the ones that were still in it."""
        self.deaths: list[str] = []
        """Ends of the daemon that nobody caused."""

    async def start(self) -> None:
        """Every process; returns when every tier can be asked."""
        self._loop = asyncio.get_running_loop()
        await self.local_link.start()
        await self.cloud_link.start()
        await asyncio.to_thread(self._start)

    def _start(self) -> None:
        self.state.mkdir()
        self._mounted = _mount(self.state)
        self.start_broker()
        self.start_cloud_broker()
        self.start_board()
        for name in ("worker-1", "worker-2"):
            self.start_worker(name)
        self.start_daemon()
        self.wait_for("every tier", lambda status: all(target["available"] for target in status["targets"]))

    async def stop(self) -> None:
        await self.local_link.stop()
        await self.cloud_link.stop()

    def unmount(self) -> None:
        """After the processes have ended."""
        if self._mounted:
            subprocess.run(["umount", str(self.state)], check=False, capture_output=True)

    @property
    def can(self) -> set[str]:
        """What this machine has for faults that need something."""
        return {name for name, here in (("tmpfs", self._mounted), ("compiler", self._clock is not None)) if here}

    # -- processes

    def start_broker(self) -> None:
        self.broker = self.stage.broker("broker", self.ports["local"], persistent=True)

    def start_cloud_broker(self) -> None:
        self.cloud_broker = self.stage.broker("cloud-broker", self.ports["cloud"], persistent=True)

    def start_board(self) -> None:
        model = self._catalog.path(self._catalog.family("digits").variants["mcu-int8"])
        self.board = self.stage.virtual_mcu(
            self.mcu_port, "--control", str(self.control_path), "--model", str(model), "--baud", "921600"
        )

    def start_worker(self, name: str, *options: str) -> Process:
        process = self.workers[name] = self.stage.worker(
            name, f"mqtt://127.0.0.1:{self.ports['cloud']}", LANE, "--group", GROUP, *options
        )
        return process

    def start_liar(self) -> Process:
        command = [sys.executable, "-m", "hil.chaos.liar", "--broker-port", str(self.ports["cloud"])]
        process = self.stage.start(
            "liar", [*command, "--topic", LANE, "--group", GROUP, "--seed", str(self.seed)], {"PYTHONUNBUFFERED": "1"}
        )
        process.wait_for_log("link up")
        return process

    def start_daemon(self) -> None:
        environ = self._clock.environ if self._clock else {}
        for attempt in range(STARTS):
            try:
                self.daemon = self.stage.daemon(self._config(), environ=environ)
                return
            except StartError as error:
                self.deaths.append(f"start {attempt + 1} failed: {error}")
        raise StartError("the daemon cannot be started")

    def terminate_daemon(self) -> None:
        """SIGTERM; it must end by itself, and with 0."""
        code = self.daemon.terminate(STOP_LIMIT_S)
        if code != 0:
            self.deaths.append(f"the daemon ended with {code} after SIGTERM:\n{self.daemon.tail()}")

    def set_clock(self, offset_s: int) -> None:
        """The daemon's wall clock, against the machine's."""
        if self._clock:
            self._clock.set(offset_s)

    def control(self) -> Control:
        return Control(self.control_path)

    def reset(self, link: LinkCut) -> None:
        """From whatever thread: connections belong to the event loop."""
        assert self._loop is not None
        self._loop.call_soon_threadsafe(link.reset)

    def mend(self, link: LinkCut) -> None:
        assert self._loop is not None
        self._loop.call_soon_threadsafe(link.mend)

    # -- what the daemon says

    def status(self) -> dict[str, Any]:
        """Raises `OSError` while it says nothing."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.ports['http']}/status", timeout=STATUS_LIMIT_S) as answer:
            document: dict[str, Any] = json.load(answer)
            return document

    def wait_for(self, what: str, condition: Any, limit_s: float = BACK_LIMIT_S) -> bool:
        """Until `condition(status)`; False if it does not come."""
        end = time.monotonic() + limit_s
        while time.monotonic() < end:
            try:
                if condition(self.status()):
                    return True
            except (OSError, ValueError):
                pass
            threading.Event().wait(0.1)
        self.deaths.append(f"not within {limit_s:.0f} s: {what}")
        return False

    def linked(self) -> bool:
        """Until the daemon has its own broker again."""
        return self.wait_for("the link to the gateway's broker", lambda status: _linked(status))

    def runtime_pid(self) -> int | None:
        try:
            targets = {target["name"]: target for target in self.status()["targets"]}
        except (OSError, ValueError):
            return None
        pid: int | None = targets["edge_gpu"]["detail"]["pool"]["pid"]
        return pid

    def watch(self) -> None:
        """A daemon that ended by itself is started again, as systemd would; that it did is a failure of the run.
        Nothing is done while a fault has it: what comes next must not wait for that."""
        if not self.daemon_lock.acquire(blocking=False):
            return
        try:
            if self.daemon.alive():
                return
            self.deaths.append(f"the daemon ended by itself:\n{self.daemon.tail()}")
            begun = time.monotonic()
            try:
                self.start_daemon()
            except StartError as error:
                self.deaths.append(f"and could not be started again: {error}")
            self.windows.add("daemon", begun, time.monotonic())
        finally:
            self.daemon_lock.release()

    # -- its files

    def damage(self, path: Path) -> None:
        """Overwrite two pages behind the first one of a database that nobody has open now; what it holds is noted."""
        if not path.exists():
            return
        if path.name == "outbox.sqlite":
            held, known = self._known(path)
            self._damaged_held |= held
            self._damaged |= held | known
        with suppress(sqlite3.Error), closing(sqlite3.connect(path)) as database:  # the disk may be full as well
            database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        with path.open("r+b") as file:
            file.seek(4096)
            file.write(b"\xa5" * min(8192, max(0, path.stat().st_size - 4096)))

    def _known(self, path: Path) -> tuple[set[str], set[str]]:
        """Ids of every item in an outbox, and of every one that it would know again. Read from a copy: where it lies
        there may be no room for what SQLite writes to read it."""
        copy = self.stage.folder / f"outbox-{next(self._copies)}.sqlite"
        for suffix in ("", "-wal"):
            with suppress(FileNotFoundError):
                shutil.copyfile(f"{path}{suffix}", f"{copy}{suffix}")
        with closing(sqlite3.connect(copy)) as database:
            try:
                held, known = ({row[0] for row in database.execute(f"SELECT id FROM {name}")} for name in _TABLES)
            except sqlite3.DatabaseError:  # Damaged before, and not set aside yet: its ids were noted then.
                return set(), set()
            return held, known

    def named(self, since: int) -> None:
        """What was damaged counts as set aside if the daemon's log, from this byte on, names the file."""
        with self.daemon.log.open("rb") as log:
            log.seek(since)
            lines = log.read().decode("utf-8", "replace").splitlines()
        if any(SET_ASIDE in line and "outbox.sqlite.damaged-" in line for line in lines):
            self.set_aside |= self._damaged
            self.held |= self._damaged_held
            self._damaged.clear()
            self._damaged_held.clear()

    def fill(self) -> Path:
        """Take what is left of the file system. Returns the ballast."""
        ballast = self.state / "ballast"
        with ballast.open("wb", buffering=0) as file:
            for size in (1 << 20, 4096, 64):
                try:
                    while True:
                        file.write(b"\0" * size)
                except OSError:
                    continue
        return ballast

    def handed_on(self) -> dict[str, float]:
        """From the daemon's log: when a broker acknowledged which id, monotonic seconds."""
        found: dict[str, float] = {}
        for line in self.daemon.log.read_text("utf-8", "replace").splitlines():
            if '"delivered"' not in line:
                continue
            try:
                event = json.loads(line)
                found[event["id"]] = event["monotonic_s"]
            except (ValueError, KeyError):
                continue
        return found

    def _config(self) -> dict[str, Any]:
        return {
            "gateway": {"id": GATEWAY, "state_dir": str(self.state)},
            "routing": {"breaker": {"backoff_max_s": 2.0}},
            "edge_mcu": {"port": str(self.mcu_port), "baud": 921600},
            "edge_gpu": {"isolation": "process"},
            "cloud": {
                "lanes": [{"name": "gpu", "broker": f"mqtt://127.0.0.1:{self.ports['cloud link']}", "topic": LANE}]
            },
            "mqtt": {"broker": f"mqtt://127.0.0.1:{self.ports['local link']}", "keepalive_s": 5},
            "http": {"port": self.ports["http"]},
            "outbox": {"enabled": True, "retry_max_s": 1},
            "monitoring": {"log_level": "debug"},
            "sensors": {
                "sensors/meter": {
                    "model": "digits",
                    "name": "meter",
                    "latency_class": "interactive",
                    "deadline_ms": 500,
                    "use_cache": False,
                }
            },
        }


def _linked(status: dict[str, Any]) -> bool:
    return bool(status["doors"]["mqtt"]["connected"] and status["outbox"]["routes"]["local"]["connected"])


def _mount(folder: Path) -> bool:
    """A small file system of its own, where this process may."""
    if os.geteuid() != 0:
        return False
    command = ["mount", "-t", "tmpfs", "-o", f"size={STATE_MB}m,mode=700", "tmpfs", str(folder)]
    return subprocess.run(command, check=False, capture_output=True).returncode == 0
