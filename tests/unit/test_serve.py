"""The daemon as a process: with what code it ends, and what its last words are."""

from __future__ import annotations

import asyncio
import gc
import logging
import socket
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from agent import serve as serve_module
from agent import supervisor
from agent.app import App
from agent.core.clock import SystemClock
from agent.ingress.http_server import HttpServer
from agent.serve import Service
from agent.settings import load_settings
from agent.supervisor import CORE_FAILURES

PATIENCE_S = 60.0


async def serve(folder: Path, port: int = 0) -> int:
    path = folder / "gateway.yaml"
    document = {"gateway": {"state_dir": str(folder / "state")}, "edge_mcu": {"enabled": False}, "http": {"port": port}}
    path.write_text(yaml.safe_dump(document | {"mqtt": {"enabled": False}}))
    async with asyncio.timeout(PATIENCE_S):
        return await Service(path).serve(load_settings(path))


def last_words(caplog: pytest.LogCaptureFixture) -> logging.LogRecord:
    """Of those that need somebody."""
    return [record for record in caplog.records if record.levelno >= logging.ERROR][-1]


async def test_a_broken_core_ends_it_with_a_code_and_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tries = 0

    async def keep(self: HttpServer, serving: Callable[[], None]) -> None:
        nonlocal tries
        tries += 1
        raise OSError("too many open files")

    monkeypatch.setattr(HttpServer, "keep", keep)
    monkeypatch.setattr(supervisor, "RESTART_INITIAL_S", 0.001)
    assert await serve(tmp_path) == 1
    assert tries >= CORE_FAILURES
    said = last_words(caplog)
    assert said.levelname == "CRITICAL"
    assert vars(said)["reason"] == "http door failed 5 times in a row: OSError: too many open files"


async def test_a_port_that_is_taken_is_told_in_one_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert await serve(tmp_path, port) == 1
    said = last_words(caplog)
    assert said.msg == "cannot start"
    assert f"cannot listen on 127.0.0.1:{port}" in vars(said)["reason"]
    assert said.exc_info is None


async def test_a_defect_at_the_start_is_told_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def start(self: HttpServer, listener: socket.socket | None = None) -> int:
        raise ZeroDivisionError("a defect")

    monkeypatch.setattr(HttpServer, "start", start)
    assert await serve(tmp_path) == 1
    said = last_words(caplog)
    assert (said.msg, vars(said)["reason"], said.exc_info) == ("cannot start", "ZeroDivisionError: a defect", None)


async def test_a_defect_in_a_reload_leaves_what_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever it is that nobody thought of: nothing has been stopped yet."""
    path = tmp_path / "gateway.yaml"
    path.write_text(yaml.safe_dump({"gateway": {"state_dir": str(tmp_path / "state")}, "mqtt": {"enabled": False}}))
    settings = load_settings(path)
    app, service = App(settings, SystemClock()), Service(path)

    def broken(*_: object) -> App:
        raise ZeroDivisionError("a defect")

    monkeypatch.setattr(serve_module, "App", broken)
    assert await service._replace(app, settings) == (app, settings)
    assert app.reloads.status()["refused"] == 1 and "a defect" in app.reloads.problem
    assert app.metrics.render(), "the scrape still reads what runs"
    assert last_words(caplog).msg == "reload refused"


def test_a_reload_that_is_asked_for_during_the_start_ends_nothing() -> None:
    """From the first import on, which is what takes longest."""
    code = (
        "import signal, sys; sys.argv = ['edge-agent', 'run']; import agent.cli;"
        " print(signal.getsignal(signal.SIGHUP) is signal.SIG_IGN)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE_S, check=True)
    assert done.stdout == "True\n"


def test_what_stays_is_passed_over_by_the_garbage_collector_and_what_went_is_not() -> None:
    """As after a start and after a reload: the former daemon's parts, which know each other, are gone by then."""

    class Part:
        other: Part

    def parts() -> tuple[Part, Part]:
        one, two = Part(), Part()
        one.other, two.other = two, one
        return one, two

    former, _ = parts()
    try:
        serve_module.settle()
        assert gc.get_freeze_count() > 1000
        assert not any(thing is former for thing in gc.get_objects())
        gone = weakref.ref(former)
        del former, _
        gc.collect()
        assert gone() is not None  # a circle that stays until the next reload
        serve_module.settle()
        assert gone() is None
    finally:
        gc.unfreeze()
