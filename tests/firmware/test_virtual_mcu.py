"""The virtual MCU as a process of its own on a real pseudo-terminal."""

from __future__ import annotations

import contextlib
import json
import os
import random
import select
import signal
import struct
import subprocess
import sys
import termios
import time
import tty
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from board import ACTIVE, ARENA, INVALID_MODEL, RETRY, ROOT, Hello, Image, Message, Receiver, Status, infer, line, model

from hil.virtual.control import Control, ControlError
from hil.virtual.flash import FLASH_SIZE, FileFlash

# A start loads numpy and TensorFlow Lite Micro and forks once; this machine may be busy.
START_LIMIT_S = 60.0
ANSWER_LIMIT_S = 20.0
STOP_LIMIT_S = 10.0

DIGITS = ROOT / "models/digits/mcu-int8.tflite"
MOTION = ROOT / "models/motion/mcu-int8.tflite"


class Line:
    """The gateway's end of the port."""

    def __init__(self, port: Path) -> None:
        self.fd = os.open(port, os.O_RDWR | os.O_NOCTTY)
        tty.setraw(self.fd)
        termios.tcflush(self.fd, termios.TCIFLUSH)
        os.set_blocking(self.fd, False)
        self.receiver = Receiver()
        self._id = 0

    def send(self, data: bytes) -> None:
        deadline = time.monotonic() + ANSWER_LIMIT_S
        while data:
            assert select.select([], [self.fd], [], deadline - time.monotonic())[1], "the board does not read"
            data = data[os.write(self.fd, data) :]

    def wait(self, id_: int) -> Message:
        """The next message with this id."""
        deadline = time.monotonic() + ANSWER_LIMIT_S
        while True:
            for message in self.receiver.messages:
                if message.id == id_:
                    self.receiver.messages.remove(message)
                    return message
            assert select.select([self.fd], [], [], max(0, deadline - time.monotonic()))[0], f"no answer to {id_}"
            self.receiver.push(os.read(self.fd, 65536))

    def ask(self, type_: str, body: bytes = b"", flags: int = 0) -> Message:
        self._id += 1
        self.send(line(type_, body, self._id, flags, self._id))
        return self.wait(self._id)

    def hello(self) -> Hello:
        return Hello.parse(self.ask("HELLO_REQ", struct.pack("<BBH", 1, 0, 4096)).body)

    def push(self, image: Image) -> Message:
        answer = self.ask("MODEL_BEGIN", image.begin(1072))
        if answer.code:
            return answer
        for offset in range(Status.parse(answer.body).next, len(image.data), 1072):
            self.ask("MODEL_CHUNK", struct.pack("<I", offset) + image.data[offset : offset + 1072])
        return self.ask("MODEL_COMMIT")

    def resynchronise(self) -> None:
        """Throws away what is under way, up to the answer to a PING with a mark in it."""
        mark = os.urandom(16).hex().encode()
        unsent, raw = b"\0" + line("PING", mark), b""
        deadline = time.monotonic() + ANSWER_LIMIT_S
        while mark not in raw or not raw.endswith(b"\0"):
            assert time.monotonic() < deadline, "the mark does not come back"
            readable, writable, _ = select.select([self.fd], [self.fd] if unsent else [], [], ANSWER_LIMIT_S)
            if writable:
                unsent = unsent[os.write(self.fd, unsent) :]
            if readable:
                raw = raw[-200:] + os.read(self.fd, 65536)
        self.receiver = Receiver()

    def close(self) -> None:
        os.close(self.fd)


class Virtual:
    def __init__(self, folder: Path, *options: str | Path) -> None:
        self.port, self.flash, self.socket = folder / "port", folder / "flash", folder / "control"
        arguments = ["--link", self.port, "--flash", self.flash, "--control", self.socket, *options]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "hil.virtual", *map(str, arguments)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        assert self.process.stdout
        ready = select.select([self.process.stdout], [], [], START_LIMIT_S)[0]
        assert ready, "not ready in time"
        self.ready: dict[str, Any] = json.loads(self.process.stdout.readline() or b"{}")

    @contextlib.contextmanager
    def line(self) -> Iterator[Line]:
        opened = Line(self.port)
        try:
            yield opened
        finally:
            opened.close()

    def stop(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        self.said = self.process.communicate(timeout=STOP_LIMIT_S)
        return self.process.returncode


@pytest.fixture
def mcu(tmp_path: Path) -> Iterator[Virtual]:
    virtual = Virtual(tmp_path, "--model", DIGITS)
    yield virtual
    if virtual.process.poll() is None:
        virtual.stop(signal.SIGKILL)


def tflm_outputs(path: Path, inputs: list[bytes]) -> list[bytes]:
    import numpy as np
    import tflite_micro

    interpreter = tflite_micro.runtime.Interpreter.from_bytes(path.read_bytes(), arena_size=128 * 1024)
    shape = interpreter.get_input_details(0)["shape"]
    outputs = []
    for raw in inputs:
        interpreter.set_input(np.frombuffer(raw, np.int8).reshape(shape), 0)
        interpreter.invoke()
        outputs.append(interpreter.get_output(0).tobytes())
    return outputs


def test_ready_hello_ping(mcu: Virtual) -> None:
    assert (mcu.ready["event"], mcu.ready["port"]) == ("ready", str(mcu.port))
    with mcu.line() as gateway:
        hello = gateway.hello()
        assert (hello.board, hello.engine) == ("host", mcu.ready["engine"])
        (slot,) = [s for s in hello.slots if s.state == ACTIVE]
        assert (slot.sha256, slot.counter) == (Image(model()).sha256, 1)
        assert (slot.input_bytes, slot.output_bytes) == (64, 10)
        data = bytes(i % 256 for i in range(1024))
        assert gateway.ask("PING", data).body[16:] == data


@pytest.mark.parametrize("path", [DIGITS, MOTION], ids=["digits", "motion"])
def test_outputs_equal_tflite_micro_bit_for_bit(tmp_path: Path, path: Path) -> None:
    pytest.importorskip("tflite_micro", reason="no TensorFlow Lite Micro wheel on this machine")
    virtual = Virtual(tmp_path, "--model", path)
    image, rng = Image(path.read_bytes()), random.Random(7)
    with virtual.line() as gateway:
        (slot,) = [s for s in gateway.hello().slots if s.state == ACTIVE]
        inputs = [rng.randbytes(slot.input_bytes) for _ in range(50)]
        got = [gateway.ask("INFER", infer(image, raw)).body[16:] for raw in inputs]
        assert slot.arena_used > 0
    assert got == tflm_outputs(path, inputs)
    assert len(set(got)) > 10  # the model does look at its input
    assert virtual.stop() == 0


def test_requests_in_the_window_are_all_answered(mcu: Virtual) -> None:
    with mcu.line() as gateway:
        for id_ in range(100, 104):
            gateway.send(line("INFER", infer(Image(model())), id_))
        assert {gateway.wait(id_).type for id_ in range(100, 104)} == {"RESULT"}
        gateway.send(line("INFER", infer(Image(model())), 103, RETRY))
        assert gateway.wait(103).type == "RESULT"


def test_update_over_the_line_outlives_a_restart(mcu: Virtual, tmp_path: Path) -> None:
    motion = Image(MOTION.read_bytes(), counter=2)
    with mcu.line() as gateway:
        gateway.hello()
        assert gateway.push(motion).code == 0
    assert mcu.stop() == 0
    assert mcu.said == (b"", b"")  # nothing of the engine's while it loads models
    again = Virtual(tmp_path)
    with again.line() as gateway:
        states = {slot.sha256: slot.state for slot in gateway.hello().slots}
        assert states[motion.sha256] == ACTIVE
        assert gateway.ask("INFER", infer(motion, bytes(600))).type == "RESULT"
    assert again.stop() == 0


def test_a_provisioned_flash_is_left_alone(mcu: Virtual, tmp_path: Path) -> None:
    assert mcu.stop() == 0
    before = mcu.flash.read_bytes()
    again = Virtual(tmp_path, "--model", DIGITS)
    again.port.unlink()
    again.port.symlink_to("/dev/pts/of-another")  # which it must not remove
    assert again.stop() == 0
    assert (again.port.is_symlink(), mcu.flash.read_bytes()) == (True, before)


def test_models_that_would_crash_the_engine(mcu: Virtual) -> None:
    with mcu.line() as gateway:
        gateway.hello()
        for length in (100, 1500, len(model()) - 1):
            assert gateway.push(Image(model()[:length], counter=2)).code == INVALID_MODEL
        assert gateway.ask("INFER", infer(Image(model()))).type == "RESULT"


def test_a_model_that_needs_more_arena_than_there_is(tmp_path: Path) -> None:
    """TensorFlow Lite Micro crashes on it: the board says ARENA and lives."""
    virtual = Virtual(tmp_path, "--arena", "600")
    with virtual.line() as gateway:
        gateway.hello()
        assert gateway.push(Image(model())).code == ARENA
        assert gateway.ask("PING", b"alive").body[16:] == b"alive"
    assert virtual.stop() == 0


def test_reset_by_the_button_and_by_the_gateway(mcu: Virtual) -> None:
    with mcu.line() as gateway, Control(mcu.socket) as control:
        first = gateway.hello()
        gateway.receiver.messages.clear()  # the HELLO of the start
        control.reset()
        button = Hello.parse(gateway.wait(0).body)
        gateway.send(line("RESET"))
        software = Hello.parse(gateway.wait(0).body)
        assert (first.reset_cause, button.reset_cause, software.reset_cause) == (1, 2, 3)
        assert len({first.boot_id, button.boot_id, software.boot_id}) == 3
        assert gateway.ask("INFER", infer(Image(model()))).type == "RESULT"


def test_unplug_and_plug(mcu: Virtual) -> None:
    with Control(mcu.socket) as control:
        with mcu.line() as gateway:
            first = gateway.hello()
            control.unplug()
            assert not mcu.port.is_symlink()
            # What a pulled cable looks like from the other side: readable, and then end of file or an error.
            assert select.select([gateway.fd], [], [], ANSWER_LIMIT_S)[0]
            with contextlib.suppress(OSError):
                assert os.read(gateway.fd, 100) == b""
        control.plug()
        with mcu.line() as gateway:
            assert gateway.hello().boot_id != first.boot_id
        assert control.stats()["boots"] == 2


def test_a_gateway_that_comes_and_goes(mcu: Virtual) -> None:
    boot_ids = set()
    for _ in range(3):
        with mcu.line() as gateway:
            boot_ids.add(gateway.hello().boot_id)
    assert len(boot_ids) == 1


def test_a_gateway_that_does_not_read_is_held_back(mcu: Virtual) -> None:
    ping = line("PING", bytes(1000), 5)
    with mcu.line() as gateway, Control(mcu.socket) as control:
        gateway.hello()
        deadline = time.monotonic() + ANSWER_LIMIT_S
        while control.stats()["waiting"] < 64 * 1024:
            assert time.monotonic() < deadline
            if select.select([], [gateway.fd], [], 0.05)[1]:
                os.write(gateway.fd, ping)
        more = 0
        while select.select([], [gateway.fd], [], 0)[1]:
            more += os.write(gateway.fd, ping)
            assert more < 64 * 1024, "the board reads on"
        assert control.stats()["waiting"] < 128 * 1024
        gateway.resynchronise()
        assert gateway.ask("PING", b"again").body[16:] == b"again"


def test_stall_and_resume(mcu: Virtual) -> None:
    with mcu.line() as gateway, Control(mcu.socket) as control:
        gateway.hello()
        control.stall()
        gateway.send(line("PING", b"x", 77))
        for _ in range(3):  # rounds of its loop, in each of which it could have read
            assert control.stats()["stalled"]
        assert not select.select([gateway.fd], [], [], 0)[0]
        control.resume()
        assert gateway.wait(77).type == "PONG"


def test_noise_is_noticed_and_ends(mcu: Virtual) -> None:
    with mcu.line() as gateway, Control(mcu.socket) as control:
        gateway.hello()
        control.noise(rate=2e-3, seed=3)
        for id_ in range(1000, 1200):
            gateway.send(line("PING", bytes(50), id_))
        deadline = time.monotonic() + ANSWER_LIMIT_S
        while control.stats()["bytes_in"] < 200 * 60:  # all of it goes through the noise
            assert time.monotonic() < deadline
        control.noise(rate=0)
        gateway.resynchronise()
        body = gateway.ask("STATS_REQ").body
        counts = dict(struct.unpack_from("<BQ", body, 1 + 9 * i) for i in range(body[0]))
        assert counts[4] + counts[5] > 10


def test_baud_rate_paces_both_directions(tmp_path: Path) -> None:
    virtual = Virtual(tmp_path, "--baud", "115200")
    with virtual.line() as gateway:
        gateway.resynchronise()  # the first HELLO may be on its way still
        gateway.hello()
        started = time.monotonic()
        gateway.ask("PING", bytes(1000))
        took = time.monotonic() - started
    # 1,018 bytes there and 1,034 back at 11,520 bytes a second.
    assert took >= 2052 / 11520 * 0.98
    assert virtual.stop() == 0


def test_sigterm_leaves_nothing_and_sigkill_nothing_that_matters(tmp_path: Path) -> None:
    first = Virtual(tmp_path, "--model", DIGITS)
    first.stop(signal.SIGKILL)
    assert first.port.is_symlink()
    assert first.socket.is_socket()
    second = Virtual(tmp_path)
    with second.line() as gateway, Control(second.socket):
        assert gateway.ask("INFER", infer(Image(model()))).type == "RESULT"
    assert second.stop() == 0
    assert (second.port.is_symlink(), second.socket.exists()) == (False, False)


def test_control_refuses_what_it_does_not_know(mcu: Virtual) -> None:
    with Control(mcu.socket) as control:
        for command, parameters in (("dance", {}), ("noise", {"rate": 2}), ("noise", {"rate": "x"})):
            with pytest.raises(ControlError):
                control.call(command, **parameters)
        assert control.stats()["plugged"]


def refused(*options: str | Path, **environ: str) -> str:
    """What it says of a start that fails."""
    done = subprocess.run(
        [sys.executable, "-m", "hil.virtual", *map(str, options)],
        cwd=ROOT,
        env={**os.environ, **environ},
        capture_output=True,
        text=True,
        timeout=START_LIMIT_S,
    )
    assert done.returncode == 1
    return done.stderr


def test_errors_at_the_start(tmp_path: Path) -> None:
    link = ("--link", tmp_path / "port", "--flash", tmp_path / "flash")
    assert "script/firmware host" in refused(*link, EDGE_AGENT_FIRMWARE=str(tmp_path / "none.so"))
    bad = tmp_path / "bad.tflite"
    bad.write_bytes(model()[:1000])
    assert f"{bad}: refused with error {INVALID_MODEL}" in refused(*link, "--model", bad)
    occupied = tmp_path / "file"
    occupied.write_text("mine")
    assert "no such folder" in refused("--link", tmp_path / "none" / "port", "--flash", tmp_path / "flash")
    assert not (tmp_path / "none").exists()
    none = tmp_path / "nosuch.table"
    assert f"{none}: no such file" in refused(*link, "--samples", none)
    assert "is no .tflite model" in refused(*link, "--model", __file__)
    (tmp_path / "flash").unlink(missing_ok=True)
    assert "not a symlink" in refused("--link", occupied, "--flash", tmp_path / "flash")
    assert occupied.read_text() == "mine"
    occupied.unlink()
    occupied.symlink_to("ttyACM0")
    assert "no pseudo-terminal" in refused("--link", occupied, "--flash", tmp_path / "untouched")
    assert (str(occupied.readlink()), (tmp_path / "untouched").exists()) == ("ttyACM0", False)


def test_a_file_that_is_no_flash_is_not_touched(tmp_path: Path) -> None:
    diary, padded, port = tmp_path / "diary", tmp_path / "padded", tmp_path / "port"
    diary.write_text("dear diary")
    padded.write_bytes(b"x" * FLASH_SIZE)
    for path in (diary, padded):
        before = path.read_bytes()
        assert "no flash of a virtual microcontroller" in refused("--link", port, "--flash", path, "--model", DIGITS)
        assert (path.read_bytes(), port.is_symlink()) == (before, False)
    assert "is not a file" in refused("--link", port, "--flash", "/dev/null")
    # Cut off while it was made, or made by hand.
    for size in (0, 5000):
        padded.write_bytes(b"\xff" * size)
        FileFlash(padded).close()
        assert padded.read_bytes() == b"\xff" * FLASH_SIZE


def test_a_second_board_is_refused_and_takes_nothing(mcu: Virtual, tmp_path: Path) -> None:
    pointed, held = mcu.port.readlink(), mcu.flash.read_bytes()
    other = tmp_path / "other"
    assert f"{mcu.port} is in use by another" in refused("--link", mcu.port, "--flash", other)
    assert not other.exists()
    assert f"{mcu.flash} is in use by another" in refused("--link", other, "--flash", mcu.flash, "--model", MOTION)
    free = ("--link", other, "--flash", tmp_path / "free", "--control", mcu.socket)
    assert f"{mcu.socket} is in use" in refused(*free)
    assert (mcu.port.readlink(), mcu.flash.read_bytes()) == (pointed, held)
    with mcu.line() as gateway, Control(mcu.socket):
        assert gateway.ask("INFER", infer(Image(model()))).type == "RESULT"
