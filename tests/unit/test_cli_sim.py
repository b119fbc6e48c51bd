"""The simulator's commands: what they print and write, and what they refuse."""

import json
from pathlib import Path

import pytest

from agent import cli


def test_simulate_prints_and_writes_what_came_of_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "out.json"
    policy = tmp_path / "policy.yaml"
    policy.write_text("routing: {policy: scorecard}\n")
    command = ["simulate", "--sensors", "20", "--seconds", "5", "--faults", "cloud-slow", "--policy", str(policy)]
    assert cli.main([*command, "--json", str(path)]) == 0
    first = json.loads(path.read_text())
    shown = capsys.readouterr().out
    assert "realtime" in shown
    assert "answered by" in shown
    assert first["all"]["requests"] == sum(found["requests"] for found in first["classes"].values()) > 20
    assert cli.main([*command, "--json", str(path)]) == 0
    assert json.loads(path.read_text()) == first


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (["--sensors", "0"], "--sensors must be 1 to 10000, found 0"),
        (["--sensors", "10001"], "--sensors must be 1 to 10000"),
        (["--seconds", "0.5"], "--seconds must be 1 to 86400"),
        (["--rate", "0"], "--rate must be"),
        (["--sensors", "10000", "--rate", "100", "--seconds", "80000"], "--sensors x --rate x --seconds"),
        (["--faults", "rain"], "--faults: must be cloud-slow"),
        (["--strategy", "best"], "--strategy must be one of ours"),
        (["--json", "/nowhere/at/all.json"], "--json: no such folder"),
    ],
)
def test_what_makes_no_sense_is_refused(options: list[str], why: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["simulate", *options]) == 2
    assert why in capsys.readouterr().err


def test_times_that_are_not_there_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    missing = tmp_path / "tiers.json"
    assert cli.main(["simulate", "--times", str(missing)]) == 2
    assert f"{missing}: no such file" in capsys.readouterr().err


def test_the_other_benchmarks_are_still_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "--only", "nothing"]) == 2
    assert "--only must be one of" in capsys.readouterr().err
