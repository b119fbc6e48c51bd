"""Keys, and signatures of models: what is refused, and with which reason."""

from __future__ import annotations

import builtins
import hashlib
import json
import stat
from pathlib import Path
from typing import Any

import pytest

from agent.link.push import ModelImage
from agent.registry.signing import PrivateKey, PublicKey, SignedManifest, SigningError, load_public
from agent.wire.codes import SignatureKind

MODEL, SELFTEST = b"a model" * 100, bytes(74)
IMAGE = ModelImage(MODEL, counter=3, arena=2048, selftest=SELFTEST, board="host", operators=(9, 22, 25))


@pytest.fixture(scope="module")
def key() -> PrivateKey:
    return PrivateKey.generate()


@pytest.fixture
def signed(key: PrivateKey, tmp_path: Path) -> Path:
    path = tmp_path / "model.tflite.sig.json"
    SignedManifest.make("toy/small", IMAGE.manifest(0), key).save(path)
    return path


def test_rfc_8032_vectors() -> None:
    """Section 7.1, tests 1 to 3."""
    for public, message, signature in (
        (
            "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a",
            "",
            "e5564300c360ac729086e2cc806e828a84877f1eb8e5d974d873e06522490155"
            "5fb8821590a33bacc61e39701cf9b46bd25bf5f0595bbe24655141438e7a100b",
        ),
        (
            "3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c",
            "72",
            "92a009a9f0d4cab8720e820b5f642540a2b27b5416503f8fb3762223ebdb69da"
            "085ac1e43e15996e458f3613d0f11d8c387b2eaeb4302aeeb00d291612bb0c00",
        ),
        (
            "fc51cd8e6218a1a38da47ed00230f0580816ed13ba3303ac5deb911548908025",
            "af82",
            "6291d657deec24024827e69c3abe01a30ce548a284743a445e3680d7db5ac3ac"
            "18ff9b538d16f290ae67f760984dc6594a7c15e9716ed28dc027beceea1ec40a",
        ),
    ):
        good = bytes.fromhex(signature)
        key = load_public(public)
        assert key.verify(bytes.fromhex(message), good)
        assert not key.verify(bytes.fromhex(message) + b"x", good)
        assert not key.verify(bytes.fromhex(message), good[:-1])
        assert not key.verify(bytes.fromhex(message), b"")


def test_a_pair_of_keys_in_files(tmp_path: Path) -> None:
    key, path = PrivateKey.generate(), tmp_path / "signing.pem"
    public = key.save(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert public.name == "signing.pem.pub" and b"PRIVATE" not in public.read_bytes()
    again = PrivateKey.load(path)
    assert again.public == key.public == load_public(str(public)) == load_public(str(path))
    assert load_public(key.public.raw.hex().upper()) == key.public
    assert key.public.verify(b"message", again.sign(b"message"))


@pytest.mark.parametrize("there", ["signing.pem", "signing.pem.pub"])
def test_keys_are_never_overwritten(tmp_path: Path, there: str) -> None:
    (tmp_path / there).write_text("precious")
    with pytest.raises(SigningError, match="exists already"):
        PrivateKey.generate().save(tmp_path / "signing.pem")
    assert (tmp_path / there).read_text() == "precious"
    assert [path.name for path in tmp_path.iterdir()] == [there]


def test_keys_that_cannot_be_used(tmp_path: Path) -> None:
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key

    path = tmp_path / "key.pem"
    key = PrivateKey.generate()
    key.save(path)
    path.chmod(0o640)
    with pytest.raises(SigningError, match=r"others may read this private key \(mode 0640\): chmod 600"):
        PrivateKey.load(path)
    path.chmod(0o600)
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(SigningError, match="no Ed25519 private key"):
        PrivateKey.load(path)
    with pytest.raises(SigningError, match="cannot be read: No such file"):
        PrivateKey.load(tmp_path / "none.pem")
    other = generate_private_key(SECP256R1())
    path.write_bytes(
        other.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    for load in (PrivateKey.load, lambda p: load_public(str(p))):
        with pytest.raises(SigningError, match="no Ed25519"):
            load(path)
    for text in ("", "ab" * 31, str(tmp_path)):
        with pytest.raises(SigningError):
            load_public(text)


def test_a_signature_travels_in_a_file(signed: Path, key: PrivateKey) -> None:
    loaded = SignedManifest.load(signed)
    assert (loaded.model, loaded.key_id, loaded.manifest.signature_kind) == (
        "toy/small",
        key.public.id,
        SignatureKind.ED25519,
    )
    assert loaded.check(MODEL, SELFTEST, [PublicKey(bytes(32)), key.public]) == key.public
    assert loaded.sign(IMAGE.manifest(1072).signed()) == loaded.manifest.signature, "whatever the chunk size"
    with pytest.raises(SigningError, match="does not cover the manifest"):
        loaded.sign(IMAGE.manifest(1072, 1).signed())


def test_another_key_another_model_another_self_test(signed: Path, key: PrivateKey) -> None:
    loaded = SignedManifest.load(signed)
    other = PrivateKey.generate()
    with pytest.raises(SigningError, match=f"signed with key {key.public.id}, which is not trusted"):
        loaded.check(MODEL, SELFTEST, [other.public])
    with pytest.raises(SigningError, match="not trusted; trusted: none"):
        loaded.check(MODEL, SELFTEST, [])
    for model in (MODEL[:-1], MODEL + b"\0", b"b" + MODEL[1:]):
        with pytest.raises(SigningError, match="the model is not the one that was signed"):
            loaded.check(model, SELFTEST, [key.public])
    for selftest in (b"", bytes(73) + b"\1", SELFTEST + b"\0"):
        with pytest.raises(SigningError, match="self-test"):
            loaded.check(MODEL, selftest, [key.public])


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("counter", 4),
        ("allow_downgrade", True),
        ("arena_bytes", 2049),
        ("selftest_tolerance", 2),
        ("board", ""),
        ("board", "mps2-an386"),
        ("operators", [9, 22]),
        ("operators", []),
    ],
)
def test_an_altered_manifest(signed: Path, key: PrivateKey, field: str, value: Any) -> None:
    document = json.loads(signed.read_text())
    assert document[field] != value
    signed.write_text(json.dumps(document | {field: value}))
    with pytest.raises(SigningError, match="the signature is wrong"):
        SignedManifest.load(signed).check(MODEL, SELFTEST, [key.public])


def test_an_altered_digest_or_length_names_another_model(signed: Path, key: PrivateKey) -> None:
    document = json.loads(signed.read_text())
    other = hashlib.sha256(b"another").hexdigest()
    changes = {"model_sha256": other, "image_sha256": other, "model_bytes": 1, "selftest_bytes": 0}
    for field, value in changes.items():
        signed.write_text(json.dumps(document | {field: value}))
        with pytest.raises(SigningError):
            SignedManifest.load(signed).check(MODEL, SELFTEST, [key.public])
    # Someone who swaps the model and writes its digest into the file has no signature for it.
    model = b"another"
    swapped = {"model_sha256": other, "model_bytes": len(model)}
    swapped["image_sha256"] = hashlib.sha256(model + SELFTEST).hexdigest()
    signed.write_text(json.dumps(document | swapped))
    with pytest.raises(SigningError, match="the signature is wrong"):
        SignedManifest.load(signed).check(model, SELFTEST, [key.public])


def test_an_altered_key_id_or_signature(signed: Path, key: PrivateKey) -> None:
    document = json.loads(signed.read_text())
    other = PrivateKey.generate()
    signed.write_text(json.dumps(document | {"key_id": other.public.id}))
    with pytest.raises(SigningError, match="the signature is wrong"):
        SignedManifest.load(signed).check(MODEL, SELFTEST, [key.public, other.public])
    flipped = f"{int(document['signature'], 16) ^ 1:0128x}"
    signed.write_text(json.dumps(document | {"signature": flipped}))
    with pytest.raises(SigningError, match="the signature is wrong"):
        SignedManifest.load(signed).check(MODEL, SELFTEST, [key.public])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"signature": "ab" * 63}, "signature: String should match"),
        ({"signature": "ab" * 65}, "signature: String should match"),
        ({"counter": -1}, "counter: Input should be greater"),
        ({"counter": "3"}, "counter: Input should be a valid integer"),
        ({"board": "a name that is too long"}, "board: String should match"),
        ({"operators": [128]}, "operators: must be 0 to 127"),
        ({"edge_agent_signature": 2}, "edge_agent_signature: Input should be 1"),
        ({"surprise": 1}, "surprise: Extra inputs"),
    ],
)
def test_files_that_are_no_signature(signed: Path, change: dict[str, Any], says: str) -> None:
    signed.write_text(json.dumps(json.loads(signed.read_text()) | change))
    with pytest.raises(SigningError, match=says):
        SignedManifest.load(signed)


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b"\xff\xfe", b'{"edge_agent_signature": 1}', b" " * 70_000])
def test_files_that_are_something_else(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(SigningError):
        SignedManifest.load(path)


def test_a_missing_package_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def no_cryptography(name: str, *rest: Any, **more: Any) -> Any:
        if name.partition(".")[0] == "cryptography":
            raise ModuleNotFoundError(f"No module named {name!r}")
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", no_cryptography)
    for use in (PrivateKey.generate, lambda: PublicKey(bytes(32)).verify(b"", b"")):
        with pytest.raises(SigningError, match=r"pip install cryptography"):
            use()
