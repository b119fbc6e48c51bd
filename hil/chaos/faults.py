"""How each kind of fault is brought about, and undone."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress

from hil.chaos.schedule import Fault
from hil.chaos.site import Site
from hil.processes import Process
from hil.virtual.control import Control, ControlError

YEAR_S = 365 * 86400
NOISE = 1e-4
How = Callable[[Site, Fault], AbstractContextManager[None]]


def bring_about(site: Site, fault: Fault) -> None:
    """The fault, for as long as it lasts, and back. Blocks; notes what was away when."""
    begun = time.monotonic()
    with _HOW[fault.kind](site, fault):
        threading.Event().wait(fault.lasts_s)
    with (site.stage.folder / "faults.log").open("a") as log:
        log.write(f"{begun:.3f} to {time.monotonic():.3f}: {fault.kind}\n")


@contextmanager
def _daemon_ends(site: Site, end: Callable[[], object], damaged: str = "") -> Iterator[None]:
    """`end` ends the daemon there is once nobody else has it, which need not be the one that there is now."""
    with site.daemon_lock:
        begun = time.monotonic()
        end()
        said = site.daemon.log.stat().st_size
        try:
            if damaged:
                site.damage(site.state / damaged)
            yield
        finally:
            try:
                site.start_daemon()
            finally:
                site.windows.add("daemon", begun, time.monotonic())
    site.linked()
    site.windows.add("door", begun, time.monotonic())
    site.named(said)


@contextmanager
def _daemon_stopped(site: Site) -> Iterator[None]:
    with site.daemon_lock:
        begun = time.monotonic()
        site.daemon.pause()
        try:
            yield
        finally:
            site.daemon.resume()
            site.windows.add("daemon", begun, time.monotonic())
    site.linked()
    site.windows.add("door", begun, time.monotonic())


@contextmanager
def _broker(site: Site, kill: bool) -> Iterator[None]:
    """The gateway's own; away until the daemon has it again."""
    begun = time.monotonic()
    if kill:
        site.windows.add("broker killed", begun, begun)
        site.broker.kill()
    else:
        site.broker.pause()
    try:
        yield
    finally:
        if kill:
            site.start_broker()
        else:
            site.broker.resume()
        site.linked()
        site.windows.add("broker", begun, time.monotonic())


@contextmanager
def _local_link(site: Site, begin: Callable[[], object], end: Callable[[], object]) -> Iterator[None]:
    begun = time.monotonic()
    begin()
    try:
        yield
    finally:
        end()
        site.linked()
        site.windows.add("local link", begun, time.monotonic())


@contextmanager
def _killed(process: Process, again: Callable[[], object]) -> Iterator[None]:
    process.kill()
    try:
        yield
    finally:
        again()


@contextmanager
def _paused(process: Process) -> Iterator[None]:
    process.pause()
    try:
        yield
    finally:
        process.resume()


@contextmanager
def _runtime(site: Site, number: signal.Signals) -> Iterator[None]:
    pid = site.runtime_pid()
    if pid is not None:
        _signal(pid, number)
    try:
        yield
    finally:
        if pid is not None and number is signal.SIGSTOP:
            _signal(pid, signal.SIGCONT)


def _signal(pid: int, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, number)


@contextmanager
def _extra(process: Process) -> Iterator[None]:
    try:
        yield
    finally:
        process.terminate()


@contextmanager
def _board(site: Site, begin: Callable[[Control], object], end: Callable[[Control], object] | None) -> Iterator[None]:
    def do(what: Callable[[Control], object]) -> None:
        with suppress(OSError, ControlError), site.control() as control:
            what(control)

    do(begin)
    try:
        yield
    finally:
        if end is not None:
            do(end)


@contextmanager
def _set(begin: Callable[[], object], end: Callable[[], object]) -> Iterator[None]:
    begin()
    try:
        yield
    finally:
        end()


@contextmanager
def _disk_full(site: Site) -> Iterator[None]:
    ballast = site.fill()
    try:
        yield
    finally:
        ballast.unlink()


def _delay(link: str, seconds: float) -> How:
    def how(site: Site, _fault: Fault) -> AbstractContextManager[None]:
        relay = getattr(site, link)
        begin, end = (lambda: setattr(relay, "delay_s", seconds)), (lambda: setattr(relay, "delay_s", 0.0))
        return _local_link(site, begin, end) if link == "local_link" else _set(begin, end)

    return how


def _worker(fault: Fault) -> str:
    return "worker-1" if fault.chance < 0.5 else "worker-2"


def _the_worker(site: Site, fault: Fault) -> Process:
    return site.workers[_worker(fault)]


_HOW: dict[str, How] = {
    "daemon killed": lambda site, _: _daemon_ends(site, lambda: site.daemon.kill()),
    "daemon stopped": lambda site, _: _daemon_stopped(site),
    "daemon terminated": lambda site, _: _daemon_ends(site, site.terminate_daemon),
    "cache damaged": lambda site, _: _daemon_ends(site, lambda: site.daemon.kill(), "cache.sqlite"),
    "outbox damaged": lambda site, _: _daemon_ends(site, lambda: site.daemon.kill(), "outbox/outbox.sqlite"),
    "runtime killed": lambda site, _: _runtime(site, signal.SIGKILL),
    "runtime stopped": lambda site, _: _runtime(site, signal.SIGSTOP),
    "broker killed": lambda site, _: _broker(site, kill=True),
    "broker stopped": lambda site, _: _broker(site, kill=False),
    "cloud broker killed": lambda site, _: _killed(site.cloud_broker, site.start_cloud_broker),
    "cloud broker stopped": lambda site, _: _paused(site.cloud_broker),
    "worker killed": lambda site, fault: _killed(_the_worker(site, fault), lambda: site.start_worker(_worker(fault))),
    "worker stopped": lambda site, fault: _paused(_the_worker(site, fault)),
    "worker slow": lambda site, _: _extra(site.start_worker("worker-3", "--delay-ms", "3000")),
    "worker lying": lambda site, _: _extra(site.start_liar()),
    "board killed": lambda site, _: _killed(site.board, site.start_board),
    "board stopped": lambda site, _: _paused(site.board),
    "board reset": lambda site, _: _board(site, Control.reset, None),
    "board unplugged": lambda site, _: _board(site, Control.unplug, Control.plug),
    "board hangs": lambda site, _: _board(site, Control.stall, Control.resume),
    "line noisy": lambda site, fault: _board(
        site, lambda control: control.noise(NOISE, int(fault.chance * 1e6)), lambda control: control.noise(0.0)
    ),
    "cloud slow": _delay("cloud_link", 0.2),
    "cloud narrow": lambda site, _: _set(
        lambda: setattr(site.cloud_link, "bytes_per_s", 2000.0), lambda: setattr(site.cloud_link, "bytes_per_s", 0.0)
    ),
    "cloud reset": lambda site, _: _set(lambda: site.reset(site.cloud_link), lambda: None),
    "cloud black hole": lambda site, _: _set(site.cloud_link.cut, lambda: site.mend(site.cloud_link)),
    "local slow": _delay("local_link", 0.1),
    "local reset": lambda site, _: _local_link(site, lambda: site.reset(site.local_link), lambda: None),
    "local black hole": lambda site, _: _local_link(site, site.local_link.cut, lambda: site.mend(site.local_link)),
    "disk full": lambda site, _: _disk_full(site),
    "clock a year on": lambda site, _: _set(lambda: site.set_clock(YEAR_S), lambda: site.set_clock(0)),
    "clock a year back": lambda site, _: _set(lambda: site.set_clock(-YEAR_S), lambda: site.set_clock(0)),
}
