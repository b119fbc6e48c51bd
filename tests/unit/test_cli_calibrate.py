"""`edge-agent models calibrate`: what it writes, what it leaves alone, and what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from agent.cli import main
from agent.registry.catalog import load_catalog

MODELS = Path(__file__).parents[2] / "models"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The shipped motion family (40 windows: quick) beside digits, in a catalogue that may be written."""
    shutil.copytree(MODELS / "motion", tmp_path / "motion")
    shutil.copytree(MODELS / "digits", tmp_path / "digits")
    shutil.copy(MODELS / "catalog.yaml", tmp_path / "catalog.yaml")
    return tmp_path


def calibrate(folder: Path, *options: str, family: str = "motion") -> int:
    return main(["models", "calibrate", family, "--catalog", str(folder / "catalog.yaml"), *options])


def variants(folder: Path, family: str = "motion") -> dict[str, Any]:
    document = yaml.safe_load((folder / "catalog.yaml").read_text())
    found: dict[str, Any] = document["families"][family]["variants"]
    return found


def without_calibration(text: str) -> str:
    return "".join(line for line in text.splitlines(keepends=True) if not line.strip().startswith("calibration:"))


@pytest.mark.parametrize("family", ["digits", "motion"])
def test_the_shipped_catalogue_is_what_the_command_finds(family: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "calibrate", family, "--check"]) == 0, capsys.readouterr().err


def test_the_shipped_cascade_of_digits_holds_what_is_asked_of_it() -> None:
    family = load_catalog(MODELS / "catalog.yaml").family("digits")
    cloud = family.variants["cloud-fp32"]
    for id_ in ("mcu-int8", "gateway-fp16"):
        calibration = family.variants[id_].calibration
        assert calibration is not None
        assert calibration.cascade is not None
        assert calibration.cascade.accuracy >= cloud.accuracy.value - 0.005
        assert calibration.cascade.offload <= 0.25


def test_it_writes_one_line_for_each_variant_and_touches_no_other(folder: Path) -> None:
    path = folder / "catalog.yaml"
    text = without_calibration(path.read_text()).replace("    variants:\n", "    variants:  # a comment\n")
    path.write_text(text)
    assert calibrate(folder) == 0
    assert without_calibration(path.read_text()) == text
    once = path.read_text()
    assert once.count("calibration:") == 3
    assert calibrate(folder) == 0
    assert path.read_text() == once
    load_catalog(path)


def test_line_ends_and_mode_stay_as_they_are(folder: Path) -> None:
    path = folder / "catalog.yaml"
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    path.chmod(0o640)
    before = path.read_bytes()
    assert calibrate(folder) == 0
    assert path.read_bytes() == before
    assert path.stat().st_mode & 0o777 == 0o640


def test_a_catalogue_in_another_style_is_refused_and_left_alone(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = folder / "catalog.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()), default_flow_style=True))
    before = path.read_bytes()
    assert calibrate(folder) == 2
    assert "must have a line for each key" in capsys.readouterr().err
    assert path.read_bytes() == before


def test_check_writes_nothing_and_says_what_differs(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = folder / "catalog.yaml"
    assert calibrate(folder, "--check") == 0
    changed = path.read_text().replace("threshold: 0.8745", "threshold: 0.7745")
    path.write_text(changed)
    assert calibrate(folder, "--check") == 1
    assert "motion/mcu-int8: the catalogue has another calibration" in capsys.readouterr().err
    assert path.read_text() == changed


def test_figures_and_curve(folder: Path) -> None:
    pytest.importorskip("matplotlib")
    figures, plot = folder / "figures.json", folder / "curve.png"
    assert calibrate(folder, "--check", "--json", str(figures), "--plot", str(plot)) == 0
    found = json.loads(figures.read_text())
    curve = found["variants"]["mcu-int8"]["curve"]
    assert (curve["offload"][0], curve["offload"][-1]) == (0, 1)
    assert len(curve["offload"]) == len(curve["accuracy"]) == len(curve["random"])
    assert found["variants"]["cloud-fp32"]["curve"] is None
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_other_held_out_data_are_calibrated_anew_and_not_before_they_are_recorded(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    heldout = folder / "motion" / "heldout.npz"
    with np.load(heldout) as file:
        np.savez(heldout, inputs=file["inputs"][:30], labels=file["labels"][:30])
    assert calibrate(folder) == 2
    told = capsys.readouterr().err
    assert "heldout_sha256: motion/heldout.npz is not the file recorded; its is " in told
    digest = told.strip().rsplit(" ", 1)[1]
    path = folder / "catalog.yaml"
    family = load_catalog(MODELS / "catalog.yaml").family("motion")
    head, tail = path.read_text().split("  motion:\n")
    tail = tail.replace(f"heldout_sha256: {family.data.heldout_sha256}", f"heldout_sha256: {digest}")
    path.write_text(f"{head}  motion:\n{tail}")
    assert main(["models", "--catalog", str(path)]) == 2
    assert (
        "was fitted to other held-out data; run `edge-agent models calibrate motion` again" in capsys.readouterr().err
    )
    assert calibrate(folder) == 0
    assert main(["models", "--catalog", str(path)]) == 0
    assert variants(folder)["mcu-int8"]["calibration"]["samples"] == 30


@pytest.mark.parametrize(
    ("arrays", "told"),
    [
        ({"inputs": np.zeros((3, 100, 6)), "labels": np.zeros(2)}, "needs one label from 0 to 3 for each input"),
        ({"inputs": np.zeros((1, 100, 6)), "labels": np.array([4])}, "needs one label from 0 to 3 for each input"),
        ({"inputs": np.zeros((0, 100, 6)), "labels": np.zeros(0)}, "needs one label from 0 to 3 for each input"),
        ({"inputs": np.zeros((1, 100, 6))}, "must be an .npz with inputs and labels"),
        ({"inputs": np.zeros((2, 7)), "labels": np.zeros(2)}, "does not run"),
    ],
)
def test_data_that_cannot_be_used(
    folder: Path, capsys: pytest.CaptureFixture[str], arrays: dict[str, Any], told: str
) -> None:
    heldout = folder / "motion" / "heldout.npz"
    np.savez(heldout, **arrays)
    import hashlib

    path = folder / "catalog.yaml"
    old = load_catalog(MODELS / "catalog.yaml").family("motion").data.heldout_sha256
    path.write_text(path.read_text().replace(old, hashlib.sha256(heldout.read_bytes()).hexdigest()))
    assert calibrate(folder) == 2
    assert told in capsys.readouterr().err


@pytest.mark.parametrize("loss", ["-0.1", "1", "nan"])
def test_a_loss_that_is_no_share(folder: Path, capsys: pytest.CaptureFixture[str], loss: str) -> None:
    assert calibrate(folder, f"--max-loss={loss}") == 2
    assert "--max-loss: must be at least 0 and below 1" in capsys.readouterr().err


def test_a_family_that_is_not_there(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert calibrate(folder, family="none") != 0
    assert "no model 'none'" in capsys.readouterr().err
