"""sd_notify against a socket that plays the service manager."""

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent.sdnotify import Notifier


@pytest.fixture(params=["path", "abstract"])
def manager(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[socket.socket, str]]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.settimeout(5)
        name = str(tmp_path / "notify") if request.param == "path" else f"@edge-agent-test-{os.getpid()}"
        sock.bind(name if request.param == "path" else "\0" + name[1:])
        yield sock, name


def test_what_the_manager_is_told(manager: tuple[socket.socket, str]) -> None:
    sock, name = manager
    notifier = Notifier({"NOTIFY_SOCKET": name})
    assert notifier.ready("serving\non 8080")
    assert sock.recv(4096) == b"READY=1\nSTATUS=serving on 8080", "a status is one line: it must not smuggle in a state"
    assert notifier.watchdog()
    assert sock.recv(4096) == b"WATCHDOG=1"
    assert notifier.status("edge_mcu-0: unplugged")
    assert sock.recv(4096) == b"STATUS=edge_mcu-0: unplugged"
    assert notifier.reloading()
    state, stamp = sock.recv(4096).split(b"\n")
    assert state == b"RELOADING=1"
    assert stamp.startswith(b"MONOTONIC_USEC=")
    assert notifier.stopping()
    assert sock.recv(4096) == b"STOPPING=1"


def test_a_long_status_is_cut(manager: tuple[socket.socket, str]) -> None:
    sock, name = manager
    assert Notifier({"NOTIFY_SOCKET": name}).status("x" * 10_000)
    assert len(sock.recv(20_000)) < 250


@pytest.mark.parametrize("name", ["", "relative", "/nowhere/notify", "@nobody-listens-here", "/" + "x" * 500])
def test_without_a_manager_nothing_happens(name: str) -> None:
    assert Notifier({"NOTIFY_SOCKET": name}).ready() is False
    assert Notifier({}).watchdog() is False


def test_a_manager_that_does_not_read_blocks_nobody(manager: tuple[socket.socket, str]) -> None:
    _, name = manager
    notifier = Notifier({"NOTIFY_SOCKET": name})
    sent = [notifier.watchdog() for _ in range(2000)]
    assert sent[0] is True
    assert sent[-1] is False


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({"WATCHDOG_USEC": "30000000"}, 30.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": str(os.getpid())}, 30.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "1"}, None),
        ({"WATCHDOG_USEC": "0"}, None),
        ({"WATCHDOG_USEC": "soon"}, None),
        ({}, None),
    ],
)
def test_watchdog_interval(environ: dict[str, str], expected: float | None) -> None:
    assert Notifier(environ).watchdog_s == expected
