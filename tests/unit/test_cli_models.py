"""`edge-agent models`: keys, signatures and their exit codes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from agent import cli
from agent.registry.catalog import load_catalog
from agent.registry.operators import OPERATOR_CODES, operator_codes
from agent.registry.selftest import load_selftest

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "models/digits/mcu-int8.tflite"


def run(*words: str) -> int:
    return cli.main(["models", *words])


@pytest.fixture
def key(tmp_path: Path) -> Path:
    assert run("keygen", str(tmp_path / "k.pem")) == 0
    return tmp_path / "k.pem"


def test_the_list_needs_no_action(capsys: pytest.CaptureFixture[str]) -> None:
    assert run() == 0
    assert "digits/mcu-int8" in capsys.readouterr().out


def test_sign_and_verify(key: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "digits.sig.json"
    assert run("sign", "digits", "--key", str(key), "--board", "host", "--out", str(out)) == 0
    assert "digits/mcu-int8: counter 1, for boards named host, signed with key" in capsys.readouterr().out
    document = json.loads(out.read_text())
    assert (document["model"], document["board"], document["operators"]) == ("digits/mcu-int8", "host", [9, 22, 25])
    assert run("verify", "digits", "--signature", str(out), "--key", f"{key}.pub") == 0
    assert "digits/mcu-int8: yes: signed with key" in capsys.readouterr().out
    assert run("verify", "motion", "--signature", str(out), "--key", f"{key}.pub") == 1
    assert "no: the model is not the one that was signed" in capsys.readouterr().out


def test_the_signature_lies_beside_its_model(key: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tmp_path / "copy.tflite"
    model.write_bytes(MODEL.read_bytes())
    assert run("verify", str(model), "--key", f"{key}.pub") == 1
    assert "no:" in capsys.readouterr().out
    assert run("sign", str(model), "--key", str(key), "--counter", "7") == 0
    assert (tmp_path / "copy.tflite.sig.json").is_file()
    config = tmp_path / "config.yaml"
    config.write_text(f"models: {{trusted_keys: [{key}.pub]}}\n")
    assert run("verify", str(model), "--config", str(config)) == 0
    assert "counter 7" in capsys.readouterr().out
    model.write_bytes(MODEL.read_bytes() + b"\0")
    assert run("verify", str(model), "--config", str(config)) == 1


def test_an_entry_of_the_catalogue_that_it_is_not(
    key: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "s.json"
    assert run("sign", "digits", "--key", str(key), "--out", str(out)) == 0
    out.write_text(out.read_text().replace("digits/mcu-int8", "motion/mcu-int8"))
    assert run("verify", "digits", "--signature", str(out), "--key", f"{key}.pub") == 1
    assert "it says to be of motion/mcu-int8, this is digits/mcu-int8" in capsys.readouterr().out


def test_what_is_missing_is_told(key: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stranger = tmp_path / "stranger.tflite"
    stranger.write_bytes(b"unknown to the catalogue")
    assert run("sign", str(stranger), "--key", str(key)) == 2
    assert "--counter: is needed" in capsys.readouterr().err
    assert run("sign", "nothing", "--key", str(key)) == 2
    assert run("sign", "digits", "--key", str(key), "--board", "a name that is too long") == 2
    assert run("verify", "digits") == 2
    assert "name the keys that are trusted" in capsys.readouterr().err
    assert run("keygen", str(key)) == 1
    assert "exists already" in capsys.readouterr().err
    assert run("sign", "digits", "--key", f"{key}.pub") == 1
    assert "no Ed25519 private key" in capsys.readouterr().err


def test_operators_of_shipped_models_have_codes() -> None:
    catalog = load_catalog(ROOT / "models/catalog.yaml")
    for family in catalog.families.values():
        variant = family.variant_for("edge_mcu")
        assert variant is not None and variant.selftest is not None
        codes = operator_codes(variant.operators)
        assert len(codes) == len(set(variant.operators)) and list(codes) == sorted(codes)
        samples = load_selftest(catalog.root / variant.selftest)
        assert len(samples) > 1
    assert len(set(OPERATOR_CODES.values())) == len(OPERATOR_CODES)
    with pytest.raises(Exception, match="no firmware has WHILE"):
        operator_codes(["ADD", "WHILE"])
