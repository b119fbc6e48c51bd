"""A catalogue that nobody vouches for is refused; whoever may vouch says so with a key."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from agent.cli import main
from agent.config import Config
from agent.core.errors import ConfigError
from agent.registry.locate import catalog_path
from agent.registry.signing import PrivateKey
from agent.registry.trust import CatalogSignature, keep_counter, signature_path, trust_of
from agent.settings import load_settings

KEY, OTHER = PrivateKey.generate(), PrivateKey.generate()
TRUSTED = (KEY.public.raw.hex(),)


@pytest.fixture
def catalog(tmp_path: Path) -> Path:
    """A copy of what ships, as a fleet's own."""
    shutil.copytree(
        catalog_path(None).parent, tmp_path / "models", ignore=shutil.ignore_patterns("*.py", "__pycache__")
    )
    return tmp_path / "models" / "catalog.yaml"


def sign(catalog: Path, counter: int = 1, key: PrivateKey = KEY, **how: bool) -> None:
    CatalogSignature.make(catalog, counter, key, **how).save(signature_path(catalog))


def why(catalog: Path, keys: tuple[str, ...] = TRUSTED, state: Path | None = None) -> str:
    trust = trust_of(catalog, keys, state)
    assert not trust.trusted
    return trust.why


def test_what_ships_is_trusted_without_a_signature() -> None:
    assert trust_of(None, ()).trusted
    assert trust_of(catalog_path(None), ()).trusted


def test_a_signed_one_is_trusted(catalog: Path) -> None:
    sign(catalog, 7)
    trust = trust_of(catalog, TRUSTED)
    assert (trust.trusted, trust.counter) == (True, 7)


def test_an_unsigned_one_is_not(catalog: Path) -> None:
    assert "No such file" in why(catalog)


def test_nor_one_that_was_changed_since(catalog: Path) -> None:
    sign(catalog)
    text = catalog.read_text()
    catalog.write_text(text.replace("schema: 1", "schema: 1 "))
    assert why(catalog) == "it was changed since it was signed"


def test_nor_one_of_another_key(catalog: Path) -> None:
    sign(catalog, key=OTHER)
    assert "is not trusted" in why(catalog)
    assert "trusted: none" in why(catalog, ())


@pytest.mark.parametrize("field", ["counter", "allow_downgrade", "signature", "key_id"])
def test_nor_one_whose_signature_was_altered(catalog: Path, field: str) -> None:
    sign(catalog)
    path = signature_path(catalog)
    document = json.loads(path.read_text())
    document |= {
        "counter": {"counter": 2},
        "allow_downgrade": {"allow_downgrade": True},
        "signature": {"signature": "00" * 64},
        "key_id": {"key_id": OTHER.public.id},
    }[field]
    path.write_text(json.dumps(document))
    assert ("is not trusted" if field == "key_id" else "the signature is wrong") in why(catalog)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"edge_agent_catalogue_signature": 2}', "\x00" * 100_000])
def test_nor_one_with_a_file_that_is_no_signature(catalog: Path, text: str) -> None:
    signature_path(catalog).write_text(text)
    assert "is no signature of a catalogue" in why(catalog)


def test_an_earlier_one_is_refused_once_a_later_one_was_in_force(catalog: Path, tmp_path: Path) -> None:
    state = tmp_path / "state"
    sign(catalog, 5)
    keep_counter(trust_of(catalog, TRUSTED, state), state)
    sign(catalog, 4)
    assert why(catalog, TRUSTED, state) == "its counter 4 is below 5, which was in force already"
    sign(catalog, 4, allow_downgrade=True)
    assert trust_of(catalog, TRUSTED, state).trusted
    sign(catalog, 5)
    assert trust_of(catalog, TRUSTED, state).trusted


def test_a_model_signature_is_none_of_a_catalogue(catalog: Path) -> None:
    """What is signed says what it is of."""
    unsigned = CatalogSignature(CatalogSignature.make(catalog, 1, KEY).sha256, 1, False, KEY.public.id, b"")
    forged = KEY.sign(unsigned.message().split(b"\0", 1)[1])
    CatalogSignature(unsigned.sha256, 1, False, KEY.public.id, forged).save(signature_path(catalog))
    assert "the signature is wrong" in why(catalog)


def configuration(tmp_path: Path, catalog: Path, **models: object) -> Path:
    path = tmp_path / "edge-agent.yaml"
    section = {"catalog": str(catalog), **models}
    path.write_text(json.dumps({"models": section, "gateway": {"state_dir": str(tmp_path / "state")}}))
    return path


def test_a_start_refuses_it_by_default_and_says_what_to_do(tmp_path: Path, catalog: Path) -> None:
    with pytest.raises(ConfigError, match=r"is not trusted: .*sign-catalog.*require_signed"):
        load_settings(configuration(tmp_path, catalog))
    assert Config().models.require_signed
    load_settings(configuration(tmp_path, catalog, require_signed=False))
    sign(catalog)
    load_settings(configuration(tmp_path, catalog, trusted_keys=TRUSTED))


def test_the_commands(tmp_path: Path, catalog: Path, capsys: pytest.CaptureFixture[str]) -> None:
    KEY.save(tmp_path / "key")
    words = ["models", "sign-catalog", "--catalog", str(catalog), "--key", str(tmp_path / "key")]
    assert main(words) == 0
    assert "counter 1" in capsys.readouterr().out
    assert main(words) == 0
    assert "counter 2" in capsys.readouterr().out
    verify = ["models", "verify-catalog", "--catalog", str(catalog), "--key"]
    assert main([*verify, str(tmp_path / "key.pub")]) == 0
    assert "yes: signed with key" in capsys.readouterr().out
    assert main([*verify, OTHER.public.raw.hex()]) == 1
    assert "no: it was signed with key" in capsys.readouterr().out


def test_a_catalogue_whose_files_are_not_there_is_not_signed(tmp_path: Path, catalog: Path) -> None:
    KEY.save(tmp_path / "key")
    next(catalog.parent.glob("*/*.onnx")).unlink()
    assert main(["models", "sign-catalog", "--catalog", str(catalog), "--key", str(tmp_path / "key")]) == 2
    assert not signature_path(catalog).exists()


def test_a_worker_refuses_an_earlier_one_as_well(
    tmp_path: Path, catalog: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = tmp_path / "state"
    sign(catalog, 5)
    keep_counter(trust_of(catalog, TRUSTED, state), state)
    sign(catalog, 4)
    words = ["worker", "--broker", "mqtt://127.0.0.1:1", "--catalog", str(catalog), "--trusted-key", TRUSTED[0]]
    assert main([*words, "--state-dir", str(state)]) == 2
    said = capsys.readouterr().err
    assert "its counter 4 is below 5" in said and "sign-catalog" in said and "--allow-unsigned" in said
