"""The fault proxy between two pseudo-terminals, one of them the board's."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from hil.faultline import main
from hil.rig.damage import Damage, Faults
from hil.virtual.control import Control, ControlError
from hil.virtual.port import Port

LIMIT_S = 20.0


class Bench:
    """The board's port is `board`; the gateway opens `link`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.board = Port(folder / "board")
        self.link = folder / "line"
        self._process: subprocess.Popen[bytes] | None = None
        self.said: dict[str, Any] = {}

    def start(self, *options: str) -> Control:
        command = [sys.executable, "-m", "hil.faultline", str(self.board.link), "--link", str(self.link)]
        command += ["--control", str(self.folder / "control"), *options]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE)
        assert self._process.stdout is not None
        self.said = json.loads(self._process.stdout.readline())
        return Control(self.folder / "control")

    def gateway(self) -> int:
        return os.open(self.link, os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK)

    def stop(self) -> None:
        if self._process is not None:
            self._process.terminate()
            assert self._process.wait(LIMIT_S) == 0
            assert self._process.stdout is not None
            self._process.stdout.close()
        self.board.close()


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    bench = Bench(tmp_path)
    yield bench
    bench.stop()


def read(fd: int, count: int, limit_s: float = LIMIT_S) -> bytes:
    """`count` bytes, or what came within the limit."""
    data, end = b"", time.monotonic() + limit_s
    while len(data) < count and select.select([fd], [], [], max(0.0, end - time.monotonic()))[0]:
        data += os.read(fd, count - len(data))
    return data


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_a_clean_line_carries_both_ways(bench: Bench) -> None:
    bench.start().close()
    gateway = bench.gateway()
    os.write(gateway, b"to the board\0")
    assert read(bench.board.master, 13) == b"to the board\0"
    os.write(bench.board.master, b"back")
    assert read(gateway, 4) == b"back"
    os.close(gateway)


def test_bits_flip_where_the_seed_says(bench: Bench) -> None:
    bench.start("--bit-errors", "1e-2", "--seed", "7").close()
    assert bench.said["seed"] == 7 and bench.said["faults"] == "bit_errors=0.01"
    gateway = bench.gateway()
    os.write(gateway, bytes(1000))
    out = read(bench.board.master, 1000)
    os.write(bench.board.master, bytes(1000))
    back = read(gateway, 1000)
    faults = Faults(bit_errors=1e-2)
    assert out == Damage(faults, 7).apply(bytes(1000)) and back == Damage(faults, 8).apply(bytes(1000))
    assert out != back
    os.close(gateway)


def test_one_direction_alone(bench: Bench) -> None:
    control = bench.start("--direction", "in", "--drop", "0.5", "--seed", "1")
    gateway = bench.gateway()
    os.write(gateway, bytes(500))
    assert len(read(bench.board.master, 500)) == 500
    os.write(bench.board.master, bytes(500))
    until(lambda: control.call("stats")["in"]["dropped"] > 200)
    control.close()
    os.close(gateway)


def test_the_cable_is_pulled_at_a_byte_and_comes_back_as_another_device(bench: Bench, tmp_path: Path) -> None:
    control = bench.start("--cut-at", "100")
    gateway = bench.gateway()
    before = bench.link.readlink()
    os.write(gateway, bytes(range(200)))
    assert read(bench.board.master, 200, 0.3) == bytes(range(100))
    until(lambda: not bench.link.is_symlink())
    with pytest.raises(OSError):
        os.write(gateway, b"x")
    os.close(gateway)
    other = tmp_path / "other"
    assert control.call("plug", link=str(other))["plugged"]
    control.close()
    assert other.readlink() != before and not bench.link.is_symlink()
    bench.link = other
    gateway = bench.gateway()
    os.write(gateway, b"again")
    assert read(bench.board.master, 5) == b"again"
    os.close(gateway)


def test_garbage_stall_and_new_faults_while_it_runs(bench: Bench) -> None:
    with bench.start() as control:
        gateway = bench.gateway()
        control.call("garbage", direction="out", count=20_000, seed=3)
        assert len(read(bench.board.master, 20_000)) == 20_000
        control.call("stall", direction="out")
        os.write(gateway, b"held")
        assert read(bench.board.master, 4, 0.1) == b""
        control.call("resume")
        assert read(bench.board.master, 4) == b"held"
        control.call("set", drop_frames=0.99, seed=1)
        os.write(gateway, b"lost\0" * 50)
        until(lambda: control.call("stats")["out"]["frames"] > 40)
        with pytest.raises(ControlError, match="nonsense"):
            control.call("nonsense")
        with pytest.raises(ControlError, match="drop"):
            control.call("set", drop=2)
        os.close(gateway)


def test_pace(bench: Bench) -> None:
    bench.start("--baud", "115200").close()
    gateway = bench.gateway()
    began = time.monotonic()
    os.write(gateway, bytes(2304))
    assert len(read(bench.board.master, 2304)) == 2304
    assert 0.2 <= time.monotonic() - began < LIMIT_S
    os.close(gateway)


def test_the_link_goes_and_comes_with_the_boards_port(bench: Bench) -> None:
    bench.start().close()
    gateway = bench.gateway()
    bench.board.close()
    until(lambda: not bench.link.is_symlink())
    os.close(gateway)
    bench.board = Port(bench.folder / "board")
    until(bench.link.is_symlink)
    gateway = bench.gateway()
    os.write(gateway, b"hello")
    assert read(bench.board.master, 5) == b"hello"
    os.close(gateway)


def test_the_link_never_shows_the_device_that_it_must_not_be(tmp_path: Path) -> None:
    first = Port(tmp_path / "link")
    device = first.link.readlink()
    first.close()  # so that its number is the next one to be given out
    second = Port(tmp_path / "link", unlike=device)
    assert second.link.readlink() != device
    slave = os.open(second.link, os.O_RDWR | os.O_NOCTTY)
    os.write(slave, b"x")
    assert read(second.master, 1) == b"x"
    os.close(slave)
    second.close()


def test_a_port_that_is_not_there_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "none"), "--link", str(tmp_path / "line")]) == 1
    assert "none" in capsys.readouterr().err
