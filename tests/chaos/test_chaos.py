"""The short schedule: real processes, most kinds of fault, one seed. `script/chaos` has the long ones."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SEED, MINUTES = "11", "0.6"
LIMIT_S = 400


def test_the_ledger_balances(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "hil.chaos.main", "--seed", SEED, "--minutes", MINUTES]
    command += ["--json", str(tmp_path / "summary.json"), "--keep", str(tmp_path / "run")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=LIMIT_S)
    assert done.returncode == 0, done.stdout + done.stderr
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["balances"] and not summary["trouble"]
    assert sum(summary["requests"].values()) > 300 and summary["requests"]["answered"] > 100
    assert summary["items"]["delivered"] > 50
    assert "the ledger balances" in done.stdout
    if os.environ.get("CI"):
        assert set(summary["left_out"]) <= {"disk full"}, "a tool is missing; only mounting may be forbidden"


@pytest.mark.parametrize("words", [["--minutes", "0"], ["--only", "a comet"]])
def test_words_that_make_no_sense(words: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "hil.chaos.main", *words], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2
    assert words[0] in done.stderr
