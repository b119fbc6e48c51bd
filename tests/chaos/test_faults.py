"""Faults that come while another one lasts, and what a damaged outbox is allowed to excuse."""

from __future__ import annotations

import asyncio
import sqlite3
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from agent.registry.catalog import load_catalog
from agent.registry.locate import catalog_path
from hil.chaos import main
from hil.chaos.faults import bring_about
from hil.chaos.ledger import Windows
from hil.chaos.schedule import Fault
from hil.chaos.site import Site
from hil.processes import Stage

LIMIT_S = 60.0


class Daemon:
    def __init__(self, log: Path) -> None:
        self.log = log
        self.kills = 0
        log.touch()

    def kill(self) -> None:
        self.kills += 1


class Lock:
    """Says when somebody comes to wait for it."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.asked = threading.Event()

    def __enter__(self) -> None:
        self.asked.set()
        self.lock.acquire()

    def __exit__(self, *_: object) -> None:
        self.lock.release()


class OneDaemon:
    """What `bring_about` needs of a site; its daemon is another one after each start."""

    def __init__(self, folder: Path) -> None:
        self.stage = SimpleNamespace(folder=folder)
        self.windows = Windows()
        self.daemon_lock = Lock()
        self.daemon = Daemon(folder / "daemon.log")

    def start_daemon(self) -> None:
        self.daemon = Daemon(self.daemon.log)

    def linked(self) -> bool:
        return True

    def named(self, since: int) -> None:
        pass


def test_a_fault_that_waited_ends_the_daemon_that_is_there_then(tmp_path: Path) -> None:
    site = OneDaemon(tmp_path)
    former, fault = site.daemon, Fault(0.0, "daemon killed", 0.0, 0.5)
    site.daemon_lock.lock.acquire()
    thread = threading.Thread(target=bring_about, args=(cast(Any, site), fault))
    thread.start()
    assert site.daemon_lock.asked.wait(LIMIT_S)
    site.start_daemon()  # by the fault that has it
    now = site.daemon
    site.daemon_lock.lock.release()
    thread.join(LIMIT_S)
    assert (former.kills, now.kills) == (0, 1)
    assert site.daemon is not now


def test_faults_of_one_part_follow_each_other_and_others_do_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    board_was_reset = threading.Event()

    def play(_site: object, fault: Fault) -> None:
        order.append(f"{fault.kind} begins")
        if fault.kind == "daemon killed":
            assert board_was_reset.wait(LIMIT_S)
        if fault.kind == "board reset":
            board_was_reset.set()
        order.append(f"{fault.kind} ends")

    monkeypatch.setattr(main, "bring_about", play)
    faults = tuple(
        Fault(at, kind, 0.0, 0.5)
        for at, kind in ((0.0, "daemon killed"), (0.0, "daemon stopped"), (0.0, "board reset"))
    )
    site = SimpleNamespace(watch=lambda: None, deaths=[])
    asyncio.run(main._play(cast(Site, site), faults, 0.1))
    assert site.deaths == []
    assert order.index("daemon killed ends") < order.index("daemon stopped begins")
    assert order.index("board reset begins") < order.index("daemon killed ends")


@pytest.fixture
def site(tmp_path: Path) -> Site:
    site = Site(Stage(tmp_path), load_catalog(catalog_path(None)), Windows(), 1)
    (site.state / "outbox").mkdir(parents=True)
    with sqlite3.connect(site.state / "outbox" / "outbox.sqlite") as database:
        database.execute("CREATE TABLE items (id TEXT, body BLOB)")
        database.execute("CREATE TABLE known (id TEXT)")
        database.execute("INSERT INTO items VALUES ('waits', zeroblob(20000))")
        database.execute("INSERT INTO known VALUES ('waits'), ('delivered before')")
    site.daemon = cast(Any, Daemon(tmp_path / "daemon.log"))
    return site


def test_a_damaged_outbox_excuses_what_it_knew_once_the_daemon_names_it(site: Site) -> None:
    path = site.state / "outbox" / "outbox.sqlite"
    site.damage(path)
    with pytest.raises(sqlite3.DatabaseError):
        sqlite3.connect(path).execute("SELECT sum(length(body)) FROM items").fetchone()
    line = '{"event":"a file is damaged and was set aside: why","set_aside":"state/NAME.sqlite.damaged-1"}\n'
    site.daemon.log.write_text(line.replace("NAME", "outbox"))
    said = site.daemon.log.stat().st_size
    with site.daemon.log.open("a") as log:
        log.write(line.replace("NAME", "cache"))
    site.named(said)
    assert site.set_aside == set(), "neither an earlier file's name nor the cache's"
    site.named(0)
    assert site.set_aside == {"waits", "delivered before"}
    assert site.held == {"waits"}, "what was delivered before was not in it any more"


def test_a_run_with_some_kinds_is_had_again_with_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async def run(seed: int, minutes: float, kinds: tuple[str, ...], folder: Path) -> main.Summary:
        nothing: Any = main.Counter()
        return main.Summary(seed, minutes, nothing, {}, nothing, nothing, 0, 0.0, ["of some kind"])

    monkeypatch.setattr(main, "_run", run)
    assert main.main(["--seed", "5", "--only", "disk full", "--only", "board reset", "--keep", str(tmp_path)]) == 1
    assert "again: script/chaos --minutes 2 --seed 5 --only 'disk full' --only 'board reset'" in capsys.readouterr().out
