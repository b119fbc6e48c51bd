"""Gateway and firmware over a real serial line: the virtual microcontroller's, or a board's.

`EDGE_AGENT_TEST_PORT=/dev/ttyACM0` runs the same tests on a board with our firmware; those that need to unplug it or to
disturb its line are skipped. Models are pushed to it.
"""

from __future__ import annotations

import asyncio
import hashlib
import importlib.util
import json
import os
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agent import cli
from agent.config import McuSection
from agent.core.clock import SystemClock
from agent.core.errors import LinkError, TargetError
from agent.core.types import InferenceRequest, LatencyClass
from agent.link.calls import RemoteError
from agent.link.push import ModelImage, push_model
from agent.link.serial import open_serial
from agent.link.session import Session
from agent.registry.catalog import Catalog, Variant, load_catalog
from agent.targets.mcu import McuTarget
from agent.wire.codes import ErrorCode, ResetCause, SlotState

ROOT = Path(__file__).parents[2]
REAL_PORT = os.environ.get("EDGE_AGENT_TEST_PORT")
BAUD = int(os.environ.get("EDGE_AGENT_TEST_BAUD", "921600"))
CLOCK = SystemClock()
FAMILIES = ("digits", "motion")


class VirtualMcu:
    """A virtual microcontroller's process."""

    def __init__(self, folder: Path) -> None:
        self.port = str(folder / "ttyMCU")
        self.control = folder / "control"
        self._arguments = ["--link", self.port, "--flash", str(folder / "flash"), "--control", str(self.control)]
        self._process: subprocess.Popen[str] | None = None

    def start(self) -> None:
        """Returns when the port is there."""
        self._process = subprocess.Popen(
            [sys.executable, "-m", "hil.virtual", *self._arguments], cwd=ROOT, stdout=subprocess.PIPE, text=True
        )
        assert self._process.stdout is not None
        assert '"ready"' in self._process.stdout.readline(), "the virtual MCU did not start"

    def kill(self) -> None:
        """As a power cut: no goodbye."""
        assert self._process is not None
        self._process.kill()
        self._process.communicate()
        self._process = None

    def stop(self) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.communicate(timeout=10)
            self._process = None

    def command(self, **request: Any) -> None:
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(10)
            client.connect(str(self.control))
            client.sendall(json.dumps(request).encode() + b"\n")
            answer = json.loads(client.makefile().readline())
        assert "error" not in answer, answer


@pytest.fixture(scope="module")
def firmware() -> None:
    """Skips where there is no virtual MCU; builds its firmware where that was not done yet."""
    for module in ("hil.virtual", "tflite_micro"):
        try:
            found = importlib.util.find_spec(module)
        except ModuleNotFoundError:
            found = None
        if found is None:
            pytest.skip(f"{module} is not installed here")
    if not (ROOT / "firmware/.pio/build/host/libedge_mcu.so").exists():
        built = subprocess.run([str(ROOT / "script/firmware"), "host"], capture_output=True, text=True, timeout=300)
        assert built.returncode == 0, built.stdout + built.stderr


@pytest.fixture
def board(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[VirtualMcu]:
    """A virtual MCU with an empty flash."""
    if REAL_PORT is not None:
        pytest.skip("needs a virtual MCU: EDGE_AGENT_TEST_PORT names a real port")
    request.getfixturevalue("firmware")
    mcu = VirtualMcu(tmp_path)
    mcu.start()
    yield mcu
    mcu.stop()


@pytest.fixture
def port(request: pytest.FixtureRequest) -> str:
    """The real port, or that of a virtual MCU."""
    return REAL_PORT or request.getfixturevalue("board").port


@pytest.fixture
async def session(port: str) -> AsyncIterator[Session]:
    session = await opened(port)
    yield session
    session.close()


@pytest.fixture(scope="module")
def shipped() -> Catalog:
    return load_catalog(ROOT / "models/catalog.yaml")


def soon(seconds: float = 10.0) -> float:
    return CLOCK.monotonic() + seconds


async def opened(port: str) -> Session:
    session = Session(await open_serial(port, BAUD), CLOCK)
    await session.open(soon())
    return session


def variant_of(catalog: Catalog, family: str) -> Variant:
    variant = catalog.family(family).variant_for("edge_mcu")
    assert variant is not None
    return variant


async def push(session: Session, catalog: Catalog, family: str) -> Variant:
    variant = variant_of(catalog, family)
    model = catalog.path(variant).read_bytes()
    await push_model(session, ModelImage(model, variant.version, allow_lower_counter=True), CLOCK)
    return variant


def samples(variant: Variant, count: int) -> list[np.ndarray[Any, Any]]:
    """Every kind of int8 input, the extremes among them."""
    rng = np.random.default_rng(5)
    shape = variant.inputs[0].shape
    random = [rng.integers(-128, 128, shape, dtype=np.int8) for _ in range(count)]
    return [np.full(shape, -128, np.int8), np.full(shape, 127, np.int8), *random]


async def until(condition: Callable[[], bool], seconds: float, what: str) -> None:
    try:
        async with asyncio.timeout(seconds):
            while not condition():  # noqa: ASYNC110 - what it waits for is in another process
                await asyncio.sleep(0.01)
    except TimeoutError:
        pytest.fail(f"not within {seconds} s: {what}")


async def test_hello_tells_what_the_board_is(session: Session) -> None:
    hello = session.hello
    assert (hello.major, len(hello.slots)) == (1, 2)
    assert hello.board
    assert hello.engine != "none"
    pinged = await session.ping(bytes(range(200)), soon())
    assert 0 < pinged.round_trip_s < 10
    assert (await session.stats(soon())).by_name()["frames_received"] >= 2
    assert session.counters.lost_frames == 0


@pytest.mark.parametrize("family", FAMILIES)
async def test_outputs_equal_the_interpreter_called_directly(session: Session, shipped: Catalog, family: str) -> None:
    runtime = pytest.importorskip("tflite_micro").runtime
    variant = await push(session, shipped, family)
    interpreter = runtime.Interpreter.from_bytes(shipped.path(variant).read_bytes())
    for sample in samples(variant, 40):
        interpreter.set_input(sample, 0)
        interpreter.invoke()
        expected = interpreter.get_output(0).tobytes()
        reply = await session.infer(bytes.fromhex(variant.sha256)[:8], sample.tobytes(), soon())
        assert reply.message.outputs == expected


async def test_requests_in_flight_are_answered_each_with_its_own(session: Session, shipped: Catalog) -> None:
    variant = await push(session, shipped, "digits")
    key = bytes.fromhex(variant.sha256)[:8]
    inputs = [sample.tobytes() for sample in samples(variant, 30)]
    alone = [(await session.infer(key, data, soon())).message.outputs for data in inputs]
    together = await asyncio.gather(*(session.infer(key, data, soon()) for data in inputs))
    assert [reply.message.outputs for reply in together] == alone
    assert (await session.stats(soon())).by_name()["refused_busy"] == 0


async def test_refusals(session: Session, shipped: Catalog) -> None:
    variant = await push(session, shipped, "digits")
    key = bytes.fromhex(variant.sha256)[:8]
    with pytest.raises(RemoteError) as caught:
        await session.infer(bytes(8), bytes(64), soon())
    assert caught.value.code == ErrorCode.MODEL_MISMATCH
    # Three frames at least: this body was put together again before it was refused.
    with pytest.raises(RemoteError) as caught:
        await session.infer(key, bytes(2 * session.hello.max_frame), soon())
    assert caught.value.code == ErrorCode.BAD_LENGTH
    model = bytearray(shipped.path(variant).read_bytes())
    model[-len(model) // 2 :] = bytes(len(model) // 2)
    with pytest.raises(RemoteError):
        await push_model(session, ModelImage(bytes(model), 99), CLOCK)
    with pytest.raises(RemoteError) as caught:
        await push_model(session, ModelImage(bytes(shipped.path(variant).read_bytes()) + bytes(16), 0), CLOCK)
    assert caught.value.code == ErrorCode.DOWNGRADE
    # Whatever was refused, the model that was active goes on.
    await session.infer(key, bytes(64), soon())


async def test_reset_is_adopted_and_the_model_is_kept(session: Session, shipped: Catalog) -> None:
    variant = await push(session, shipped, "motion")
    before = session.hello.boot_id
    hello = await session.reset(soon(20))
    assert hello.boot_id != before
    assert hello.reset_cause == ResetCause.SOFTWARE
    assert hello.active is not None
    assert (hello.active.state, hello.active.sha256.hex()) == (SlotState.ACTIVE, variant.sha256)


async def test_a_push_that_was_cut_is_resumed(board: VirtualMcu, shipped: Catalog) -> None:
    session = await opened(board.port)
    image = ModelImage(shipped.path(variant_of(shipped, "motion")).read_bytes(), 1)
    cut = LinkError("cut by the test")

    def cut_after_the_first(received: int, total: int) -> None:
        if 0 < received < total:
            raise cut

    with pytest.raises(LinkError, match="cut by the test"):
        await push_model(session, image, CLOCK, cut_after_the_first)
    session.close()
    session = await opened(board.port)
    steps: list[int] = []
    await push_model(session, image, CLOCK, lambda received, total: steps.append(received))
    assert steps[0] > 0
    assert session.hello.active is not None
    assert session.hello.active.sha256 == hashlib.sha256(image.model).digest()
    session.close()


async def test_a_noisy_line_loses_requests_but_never_lies(board: VirtualMcu, shipped: Catalog) -> None:
    session = await opened(board.port)
    variant = await push(session, shipped, "digits")
    key, data = bytes.fromhex(variant.sha256)[:8], samples(variant, 1)[-1].tobytes()
    expected = (await session.infer(key, data, soon())).message.outputs
    board.command(command="noise", rate=3e-4, seed=3)
    answered = 0
    for _ in range(120):
        began = CLOCK.monotonic()
        try:
            reply = await session.infer(key, data, soon(0.2))
            assert reply.message.outputs == expected
            answered += 1
        except TimeoutError:
            assert CLOCK.monotonic() - began < 2
    assert answered > 90
    assert session.counters.lost_frames + sum(session.status()[kind] for kind in ("bad_crc", "undecodable")) > 0
    board.command(command="noise", rate=0)
    await session.infer(key, data, soon())
    session.close()


async def test_a_power_cut_in_traffic_ends_every_call_and_the_board_comes_back(
    board: VirtualMcu, shipped: Catalog
) -> None:
    session = await opened(board.port)
    variant = await push(session, shipped, "digits")
    session.close()
    section = McuSection(ports=(board.port,), timeout_ms=500, max_concurrent=8, health_check_interval=1)
    target = McuTarget(section, shipped, CLOCK)
    family = shipped.family("digits")
    request = InferenceRequest(
        "r", "digits", {"image": np.zeros((1, 8, 8, 1), np.float32)}, LatencyClass.NEAR, CLOCK.monotonic(), soon()
    )
    outcomes: list[str] = []
    overrun: list[float] = []
    stop = asyncio.Event()

    async def caller() -> None:
        while not stop.is_set():
            deadline = soon(0.5)
            try:
                await target.infer(request, family, variant, deadline)
                outcomes.append("ok")
            except TargetError as error:
                outcomes.append(error.code)
                await asyncio.sleep(0.005)  # traffic's own pace; without it the loop would spin
            overrun.append(CLOCK.monotonic() - deadline)

    def answered() -> int:
        return outcomes.count("ok")

    def answered_more_than(count: int) -> bool:
        return answered() > count

    await target.start()
    await until(lambda: target.availability().available, 10, "available")
    callers = [asyncio.create_task(caller()) for _ in range(8)]
    try:
        for _ in range(2):
            before = answered()
            await until(partial(answered_more_than, before + 50), 10, "traffic")
            await asyncio.to_thread(board.kill)
            await until(lambda: not target.availability().available, 30, "noticed")
            assert "unplugged" in target.availability().reason
            await asyncio.to_thread(board.start)
            await until(lambda: target.availability().available, 15, "available again")
    finally:
        stop.set()
        await asyncio.gather(*callers)
        await target.stop()
    # A busy machine may be late to run a callback; a call that hung would be seconds late.
    assert max(overrun) < 0.5
    assert set(outcomes) <= {"ok", "unavailable", "timeout"}
    assert target.status()["ports"][0]["connects"] == 3


def test_the_command_line(port: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["--port", port, "--baud", str(BAUD)]
    assert cli.main(["mcu", "push", "digits", *line]) == 0
    assert "digits/mcu-int8" in capsys.readouterr().out
    assert cli.main(["mcu", "info", "--json", *line]) == 0
    slots = json.loads(capsys.readouterr().out)["slots"]
    assert [slot["state"] for slot in slots].count("active") == 1
    assert cli.main(["mcu", "push", "digits", *line]) == 0
    assert "already active" in capsys.readouterr().out
    assert cli.main(["mcu", "info", "--json", *line]) == 0
    assert json.loads(capsys.readouterr().out)["slots"] == slots
    assert cli.main(["mcu", "push", "digits", "--force", *line]) == 0
    assert "active, verified by the board" in capsys.readouterr().out
    assert cli.main(["mcu", "info", *line]) == 0
    said = capsys.readouterr().out
    assert "active, digits/mcu-int8, 2824 bytes" in said and "not: verifies signatures" in said
    assert cli.main(["mcu", "ping", "--count", "3", "--size", "100", *line]) == 0
    assert "the board's clock is" in capsys.readouterr().out
    assert cli.main(["mcu", "bench", "--rounds", "20", "--json", str(tmp_path / "bench.json"), *line]) == 0
    names = [row["name"] for row in json.loads((tmp_path / "bench.json").read_text())["measurements"]]
    assert "infer" in names
    assert cli.main(["mcu", "stream", "--seconds", "1", "--interval-ms", "50", *line]) == 0
    said = capsys.readouterr().out
    assert "results in 1." in said and "0 lost on the line" in said
    assert cli.main(["mcu", "reset", *line]) == 0


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["info", "--port", "/nonexistent/tty"], 3, "unplugged"),
        (["info", "--port", os.devnull], 3, "not a serial port"),
        (["push", "nothing", "--port", "/nonexistent/tty"], 2, "no model 'nothing'"),
        (["push", "digits/cloud-fp32", "--port", "/nonexistent/tty"], 2, "not a variant for microcontrollers"),
        (["push", "/nonexistent.tflite", "--port", "/nonexistent/tty"], 2, "cannot be read"),
    ],
)
def test_what_goes_wrong_is_said_without_a_traceback(
    arguments: list[str], code: int, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["mcu", *arguments]) == code
    error = capsys.readouterr().err
    assert text in error
    assert "Traceback" not in error
