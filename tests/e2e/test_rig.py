"""The rig's whole suite on the virtual board, and its short form on the emulated one, as script/hil runs it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest

from hil.processes import Stage, StartError
from hil.rig.main import EXIT_MISSING
from hil.rig.suite import SUITE

ROOT = Path(__file__).resolve().parents[2]
SEED = "7"
LIMIT_S = 600
EMULATED = (
    "handshake",
    "timing/error bound",
    "faults/bit errors",
    "faults/missing delimiters",
    "faults/reset mid-call",
    "faults/replug",
)
"""What takes seconds on an emulated board; the suite as a whole takes minutes there."""


def hil(folder: Path, board: str, *options: str) -> tuple[int, str, dict[str, Any], ET.Element]:
    """Exit code, report, JSON and JUnit of one run."""
    files = folder / "report.json", folder / "report.xml"
    command = [sys.executable, "-m", "hil.rig.main", "--board", board, "--seed", SEED, "--minutes", "0.05", *options]
    command += ["--json", str(files[0]), "--junit", str(files[1])]
    done = subprocess.run(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=LIMIT_S
    )
    assert files[0].exists(), done.stdout
    return done.returncode, done.stdout, json.loads(files[0].read_text()), ET.parse(files[1]).getroot()


def test_the_virtual_board_holds_up(tmp_path: Path) -> None:
    code, text, document, junit = hil(tmp_path, "virtual")
    if code == EXIT_MISSING:
        assert not os.environ.get("CI"), text
        pytest.skip(document["checks"][0]["reason"])
    assert code == 0 and document["ok"], text
    assert {check["check"] for check in document["checks"]} == {check.key for check in SUITE}
    # Nothing is left out on this board.
    assert document["counts"]["passed"] == len(SUITE) == len(junit.findall("testsuite/testcase")), text
    assert not junit.findall(".//failure") and not junit.findall(".//error")
    assert f"Seed {SEED}." in text and "The board, its line and the gateway hold up." in text
    damaged = next(check for check in document["checks"] if check["check"] == "faults/bit errors")
    assert any(f"seed={SEED}" in line for line in damaged["lines"])


def test_the_emulated_board_holds_up(tmp_path: Path) -> None:
    if shutil.which("arm-none-eabi-g++"):  # the image that hil/rig.yaml names; a fresh checkout has none
        subprocess.run([ROOT / "script" / "firmware", "qemu"], check=True, capture_output=True, timeout=300)
    code, text, document, _ = hil(tmp_path, "qemu", *(f"--only={name}" for name in EMULATED))
    if code == EXIT_MISSING:
        assert not os.environ.get("CI"), text
        pytest.skip(document["checks"][0]["reason"])
    assert code == 0 and document["ok"], text
    assert document["counts"]["passed"] >= len(EMULATED), text


def test_a_board_that_is_not_there_is_skipped_with_the_reason(tmp_path: Path) -> None:
    code, text, document, junit = hil(tmp_path, str(tmp_path / "ttyNone"))
    assert code == EXIT_MISSING and "no such port" in text
    assert document["counts"]["skipped"] == len(SUITE) == len(junit.findall(".//skipped"))


def test_a_board_on_a_serial_port_by_its_path(tmp_path: Path) -> None:
    with Stage(tmp_path / "board") as stage:
        port = stage.folder / "ttyDesk"
        try:
            stage.virtual_mcu(port)
        except StartError as error:
            assert not os.environ.get("CI"), str(error)
            pytest.skip(str(error).splitlines()[-1])
        code, text, document, _ = hil(tmp_path, str(port), "--only=handshake", "--only=faults/reset mid-call")
    assert code == 0 and document["counts"]["passed"] == 6, text
    assert "nothing here can press the button" in document["checks"][-1]["notes"][0]
