"""Signed updates end to end: keys and signatures from the command line, a board that verifies, a model in trial."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from agent import cli
from agent.config import McuSection
from agent.core.clock import SystemClock
from agent.link.push import ModelImage, push_model
from agent.link.serial import open_serial
from agent.link.session import Session
from agent.link.trial import TrialFailed
from agent.registry.catalog import load_catalog
from agent.registry.selftest import load_selftest
from agent.registry.signing import PrivateKey
from agent.targets.mcu import McuTarget
from agent.wire.codes import Rollback, SlotState
from hil.virtual.control import Control

pytestmark = pytest.mark.skipif(find_spec("tflite_micro") is None, reason="no TensorFlow Lite Micro wheel")

ROOT = Path(__file__).parents[2]
CLOCK = SystemClock()
CATALOG = load_catalog(ROOT / "models/catalog.yaml")


class VirtualBoard:
    def __init__(self, folder: Path, *options: str) -> None:
        self.port, self.socket = str(folder / "tty"), folder / "control"
        command = [sys.executable, "-m", "hil.virtual", "--link", self.port, "--flash", str(folder / "flash")]
        self._process = subprocess.Popen(
            [*command, "--control", str(self.socket), *options], cwd=ROOT, stdout=subprocess.PIPE, text=True
        )
        assert self._process.stdout is not None
        assert '"ready"' in self._process.stdout.readline()

    def control(self) -> Control:
        return Control(self.socket)

    def stop(self) -> None:
        self._process.terminate()
        self._process.communicate(timeout=10)


Start = Callable[..., VirtualBoard]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    if not (ROOT / "firmware/.pio/build/host/libedge_mcu.so").exists():
        built = subprocess.run([str(ROOT / "script/firmware"), "host"], capture_output=True, text=True, timeout=300)
        assert built.returncode == 0, built.stdout + built.stderr
    boards: list[VirtualBoard] = []

    def start(*options: str) -> VirtualBoard:
        boards.append(VirtualBoard(tmp_path, *options))
        return boards[-1]

    yield start
    for board in boards:
        board.stop()


@pytest.fixture
def key(tmp_path: Path) -> Path:
    PrivateKey.generate().save(tmp_path / "key.pem")
    return tmp_path / "key.pem"


async def opened(port: str) -> Session:
    session = Session(await open_serial(port, 921_600), CLOCK)
    await session.open(CLOCK.monotonic() + 10)
    return session


def image(family: str, counter: int = 1) -> ModelImage:
    variant = CATALOG.family(family).variant_for("edge_mcu")
    assert variant is not None and variant.selftest is not None
    samples = load_selftest(CATALOG.root / variant.selftest)
    model = CATALOG.path(variant).read_bytes()
    return ModelImage(model, counter, selftest=b"".join(samples[0]), samples=samples)


def slots(port: str, capsys: pytest.CaptureFixture[str]) -> dict[str, int]:
    """Counter of the slots in each state."""
    capsys.readouterr()
    assert cli.main(["mcu", "info", "--json", "--port", port]) == 0
    said = json.loads(capsys.readouterr().out)
    assert "ed25519" in said["capabilities"]
    return {slot["state"]: slot["counter"] for slot in said["slots"]}


def test_signed_off_the_gateway_and_pushed_without_a_key(
    start: Start, key: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    board = start("--public-key", f"{key}.pub")
    line = ["--port", board.port]
    config = tmp_path / "gateway.yaml"
    config.write_text(
        f"models: {{trusted_keys: [{key}.pub]}}\nedge_mcu: {{port: {board.port}, require_signed_updates: true}}\n"
    )
    sealed = tmp_path / "digits.json"
    assert cli.main(["mcu", "push", "digits", *line]) == 1
    assert "this board takes signed models only" in capsys.readouterr().err
    assert cli.main(["models", "sign", "digits", "--key", str(key), "--counter", "5", "--out", str(sealed)]) == 0
    capsys.readouterr()
    assert cli.main(["mcu", "push", "digits", "--signature", str(sealed), "--config", str(config), *line]) == 0
    said = capsys.readouterr().out
    assert "counter 5, signed with key" in said
    assert "in trial; there is no former model" in said
    assert "proved: 10 of 10 answers right" in said
    assert "slot 0 active, verified by the board, proved and confirmed" in said
    assert slots(board.port, capsys)["active"] == 5
    # Its counter is part of what was signed: neither option nor editor changes it.
    assert cli.main(["mcu", "push", "digits", "--signature", str(sealed), "--counter", "9", *line]) == 1
    assert "--counter: is part of what" in capsys.readouterr().err
    sealed.write_text(sealed.read_text().replace('"counter": 5', '"counter": 6'))
    assert cli.main(["mcu", "push", "digits", "--signature", str(sealed), "--config", str(config), *line]) == 1
    assert "the signature is wrong" in capsys.readouterr().err
    assert cli.main(["mcu", "push", "digits", "--signature", str(sealed), "--force", *line]) == 1
    assert "SIGNATURE" in capsys.readouterr().err, "without trusted keys here, the board itself refuses"
    assert slots(board.port, capsys)["active"] == 5


def test_signed_on_the_spot(start: Start, key: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    board = start("--public-key", str(key))
    assert cli.main(["mcu", "push", "digits", "--key", str(key), "--port", board.port]) == 0
    other = tmp_path / "other.pem"
    PrivateKey.generate().save(other)
    assert cli.main(["mcu", "push", "motion", "--key", str(other), "--port", board.port]) == 1
    assert "SIGNATURE: wrong signature: the board trusts another key" in capsys.readouterr().err
    config = tmp_path / "gateway.yaml"
    config.write_text(f"models: {{trusted_keys: [{other}.pub]}}\nedge_mcu: {{port: {board.port}}}\n")
    command = ["mcu", "push", "motion", "--key", str(key), "--config", str(config), "--port", board.port]
    assert cli.main(command) == 1
    assert "is not among models.trusted_keys" in capsys.readouterr().err


def test_a_signature_beside_the_model_is_found(
    start: Start, key: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    board = start("--public-key", f"{key}.pub")
    model = tmp_path / "mine.tflite"
    shutil.copy(ROOT / "models/digits/mcu-int8.tflite", model)
    assert cli.main(["models", "sign", str(model), "--key", str(key), "--board", "host"]) == 0
    assert cli.main(["mcu", "push", str(model), "--port", board.port]) == 0
    assert cli.main(["models", "sign", str(model), "--key", str(key), "--board", "pico", "--counter", "2"]) == 0
    assert cli.main(["mcu", "push", str(model), "--force", "--port", board.port]) == 1
    assert "not sent: signed for boards named pico, this one is host" in capsys.readouterr().err


def test_a_downgrade_is_signed_or_refused(
    start: Start, key: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    board = start("--public-key", f"{key}.pub")
    sealed = tmp_path / "old.json"
    push = ["mcu", "push", "motion", "--signature", str(sealed), "--port", board.port]
    sign = ["models", "sign", "motion", "--key", str(key), "--counter", "2", "--out", str(sealed)]
    assert cli.main(["mcu", "push", "digits", "--key", str(key), "--counter", "7", "--port", board.port]) == 0
    assert cli.main(sign) == 0
    assert cli.main(push) == 1
    assert "sign it with a higher --counter, or with --allow-downgrade" in capsys.readouterr().err
    sealed.write_text(sealed.read_text().replace('"allow_downgrade": false', '"allow_downgrade": true'))
    assert cli.main(push) == 1
    assert "SIGNATURE" in capsys.readouterr().err
    assert cli.main([*sign, "--allow-downgrade"]) == 0
    assert cli.main(push) == 0
    assert slots(board.port, capsys) == {"stored": 7, "active": 2}


def test_a_board_that_cannot_verify(
    start: Start, key: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    board = start()
    line = ["--port", board.port]
    assert cli.main(["mcu", "push", "digits", "--require-signed", *line]) == 1
    assert "does not verify signatures" in capsys.readouterr().err
    config = tmp_path / "gateway.yaml"
    config.write_text(f"edge_mcu: {{port: {board.port}, require_signed_updates: true}}\n")
    assert cli.main(["mcu", "push", "digits", "--key", str(key), "--config", str(config), *line]) == 1
    assert "it is not updated" in capsys.readouterr().err
    assert cli.main(["mcu", "push", "digits", "--key", str(key), *line]) == 0
    assert "takes the model unchecked" in capsys.readouterr().out


async def test_a_reset_in_trial_is_told_and_the_former_model_runs(start: Start) -> None:
    board = start()
    session = await opened(board.port)
    await push_model(session, image("digits"), CLOCK)

    def press(text: str) -> None:
        if "in trial" in text:
            with board.control() as control:
                control.reset(cause=4)

    with pytest.raises(TrialFailed, match=r"the board crashed or hung with the model .*the former model e71e57a83de0"):
        await push_model(session, image("motion", 2), CLOCK, tell=press)
    assert session.hello.rollback == Rollback.CRASH
    assert [slot.state for slot in session.hello.slots] == [SlotState.ACTIVE, SlotState.BAD]
    # The same again, undisturbed.
    status = await push_model(session, image("motion", 2), CLOCK)
    assert status.state == SlotState.ACTIVE
    session.close()


async def test_a_daemon_confirms_what_a_dead_push_left_behind(start: Start) -> None:
    board = start()
    session = await opened(board.port)

    def die(text: str) -> None:
        session.close()

    with pytest.raises(Exception, match="may be in trial still"):
        await push_model(session, image("digits"), CLOCK, tell=die)
    target = McuTarget(McuSection(ports=(board.port,)), CATALOG, CLOCK)
    await target.start()
    async with asyncio.timeout(20):
        while not target.availability().available:  # noqa: ASYNC110 the state of another process
            await asyncio.sleep(0.02)
    await target.stop()
    session = await opened(board.port)
    assert session.hello.trial is None and session.hello.active is not None
    session.close()


def test_a_model_that_the_board_would_refuse_is_not_sent(
    start: Start, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    board = start()
    broken = tmp_path / "cut.tflite"
    broken.write_bytes((ROOT / "models/digits/mcu-int8.tflite").read_bytes()[:2000])
    before = (tmp_path / "flash").read_bytes()
    assert cli.main(["mcu", "push", str(broken), "--port", board.port]) == 1
    assert "not sent, the board would refuse it: " in capsys.readouterr().err
    assert (tmp_path / "flash").read_bytes() == before
