"""Ed25519 keys (RFC 8032), and the signature of a model that travels beside it.

A signature covers the manifest that a board checks (MODEL_BEGIN, docs/wire-protocol.md 3.6). It is made where the
private key is; a gateway needs the file that `SignedManifest` writes and no key. The algorithm is the `cryptography`
package's, which is imported only when a key is used.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from agent.core.errors import EdgeAgentError
from agent.wire.codes import SignatureKind
from agent.wire.update import ALLOW_LOWER_COUNTER, BOARD_BYTES, MANIFEST_FORMAT, OPERATOR_BYTES, ModelBegin

KEY_BYTES: Final = 32
KEY_ID_DIGITS: Final = 16
SUFFIX: Final = ".sig.json"
"""Of a signature, behind the whole name of its model."""
MAX_FILE_BYTES: Final = 64 * 1024
PRIVATE_MODE: Final = 0o600


class SigningError(EdgeAgentError):
    """A key or signature that cannot be used, or that does not fit; the message says why."""


@dataclass(frozen=True, slots=True)
class PublicKey:
    """`raw`: the 32 bytes of RFC 8032."""

    raw: bytes

    @property
    def id(self) -> str:
        """16 hex digits: the start of the SHA-256 of `raw`."""
        return hashlib.sha256(self.raw).hexdigest()[:KEY_ID_DIGITS]

    def verify(self, message: bytes, signature: bytes) -> bool:
        """Raises `SigningError` only where the package is missing."""
        crypto = _crypto()
        try:
            crypto.Ed25519PublicKey.from_public_bytes(self.raw).verify(signature, message)
        except (crypto.InvalidSignature, ValueError):
            return False
        return True


class PrivateKey:
    """Signs. The key stays in the object that the package made of it."""

    def __init__(self, key: Any) -> None:
        self._key = key
        raw = _crypto().serialization
        self.public = PublicKey(key.public_key().public_bytes(raw.Encoding.Raw, raw.PublicFormat.Raw))

    @classmethod
    def generate(cls) -> Self:
        return cls(_crypto().Ed25519PrivateKey.generate())

    @classmethod
    def load(cls, path: Path) -> Self:
        """From a PEM file that nobody else may read."""
        key = _parse_private(_read(path))
        if key is None:
            raise SigningError(f"{path}: is no Ed25519 private key in PEM without a passphrase")
        mode = stat.S_IMODE(path.stat().st_mode)
        if mode & 0o077:
            raise SigningError(f"{path}: others may read this private key (mode {mode:04o}): chmod 600 {path}")
        return cls(key)

    def save(self, path: Path) -> Path:
        """Write the pair: `path` (PKCS 8, mode 0600) and `path`.pub, whose name is returned. Overwrites nothing."""
        raw = _crypto().serialization
        private = self._key.private_bytes(raw.Encoding.PEM, raw.PrivateFormat.PKCS8, raw.NoEncryption())
        public = self._key.public_key().public_bytes(raw.Encoding.PEM, raw.PublicFormat.SubjectPublicKeyInfo)
        beside = path.with_name(f"{path.name}.pub")
        if beside.exists():
            raise SigningError(f"{beside}: exists already, and is not overwritten")
        _create(path, private, PRIVATE_MODE)
        _create(beside, public, 0o644)
        return beside

    def sign(self, message: bytes) -> bytes:
        signature: bytes = self._key.sign(message)
        return signature


def load_public(text: str) -> PublicKey:
    """From 64 hex digits, or the name of a PEM file that holds a public or a private key."""
    if re.fullmatch(r"[0-9A-Fa-f]{64}", text):
        return PublicKey(bytes.fromhex(text))
    path, crypto = Path(text), _crypto()
    data = _read(path)
    raw = crypto.serialization
    try:
        key = raw.load_pem_public_key(data)
    except (ValueError, crypto.UnsupportedAlgorithm):
        private = _parse_private(data)
        key = private.public_key() if private is not None else None
    if not isinstance(key, crypto.Ed25519PublicKey):
        raise SigningError(f"{path}: is no Ed25519 key in PEM, nor 64 hex digits")
    return PublicKey(key.public_bytes(raw.Encoding.Raw, raw.PublicFormat.Raw))


class _File(BaseModel):
    """The signature file, field by field."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, protected_namespaces=())

    edge_agent_signature: Literal[1]
    model: str = Field(max_length=200)
    model_sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    image_sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    model_bytes: int = Field(ge=1, lt=1 << 32)
    selftest_bytes: int = Field(ge=0, lt=1 << 32)
    selftest_tolerance: int = Field(ge=0, le=255)
    counter: int = Field(ge=0, lt=1 << 32)
    allow_downgrade: bool
    arena_bytes: int = Field(ge=0, lt=1 << 32)
    board: str = Field(pattern=rf"^[\x21-\x7e]{{0,{BOARD_BYTES}}}$")
    operators: list[int] = Field(max_length=8 * OPERATOR_BYTES)
    key_id: str = Field(pattern=rf"^[0-9a-f]{{{KEY_ID_DIGITS}}}$")
    signature: str = Field(pattern=r"^[0-9a-f]{128}$")


@dataclass(frozen=True, slots=True)
class SignedManifest:
    """A manifest with its signature. `model`: the catalogue's entry (`family/variant`), or empty; `key_id` of the key.

    Neither of the two is covered by the signature: `check` compares them with what they speak of.
    """

    model: str
    key_id: str
    manifest: ModelBegin

    @classmethod
    def make(cls, model: str, manifest: ModelBegin, key: PrivateKey) -> Self:
        signature = key.sign(manifest.signed())
        return cls(model, key.public.id, manifest.with_signature(SignatureKind.ED25519, signature))

    @classmethod
    def load(cls, path: Path) -> Self:
        """Raises `SigningError`."""
        try:
            file = _File.model_validate_json(_read(path))
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            at = ".".join(map(str, first["loc"])) or "file"
            raise SigningError(f"{path}: is no signature of a model: {at}: {first['msg']}") from None
        if any(not 0 <= code < 8 * OPERATOR_BYTES for code in file.operators):
            raise SigningError(f"{path}: operators: must be 0 to {8 * OPERATOR_BYTES - 1}")
        manifest = ModelBegin(
            format=MANIFEST_FORMAT,
            flags=ALLOW_LOWER_COUNTER if file.allow_downgrade else 0,
            chunk=0,
            model_length=file.model_bytes,
            selftest_length=file.selftest_bytes,
            counter=file.counter,
            arena=file.arena_bytes,
            selftest_tolerance=file.selftest_tolerance,
            model_sha256=bytes.fromhex(file.model_sha256),
            image_sha256=bytes.fromhex(file.image_sha256),
            signature_kind=SignatureKind.ED25519,
            signature=bytes.fromhex(file.signature),
            board=file.board,
            operators=tuple(sorted(set(file.operators))),
        )
        return cls(file.model, file.key_id, manifest)

    def save(self, path: Path) -> None:
        """Write it for people and machines. Replaces an earlier one. Raises `SigningError`."""
        manifest = self.manifest
        file = _File(
            edge_agent_signature=1,
            model=self.model,
            model_sha256=manifest.model_sha256.hex(),
            image_sha256=manifest.image_sha256.hex(),
            model_bytes=manifest.model_length,
            selftest_bytes=manifest.selftest_length,
            selftest_tolerance=manifest.selftest_tolerance,
            counter=manifest.counter,
            allow_downgrade=bool(manifest.flags & ALLOW_LOWER_COUNTER),
            arena_bytes=manifest.arena,
            board=manifest.board,
            operators=list(manifest.operators),
            key_id=self.key_id,
            signature=manifest.signature.hex(),
        )
        fresh = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            fresh.write_text(json.dumps(file.model_dump(), indent=2) + "\n")
            fresh.replace(path)
        except OSError as error:
            raise SigningError(f"{path}: cannot be written: {error.strerror}") from None

    def check(self, model: bytes, selftest: bytes, keys: Sequence[PublicKey]) -> PublicKey:
        """The key among `keys` that signed this very image. Raises `SigningError` with the reason."""
        self.check_image(model, selftest)
        key = next((key for key in keys if key.id == self.key_id), None)
        if key is None:
            known = ", ".join(key.id for key in keys) or "none"
            raise SigningError(f"it was signed with key {self.key_id}, which is not trusted; trusted: {known}")
        if not key.verify(self.manifest.signed(), self.manifest.signature):
            raise SigningError(f"the signature is wrong: it was altered, or was not made with key {key.id}")
        return key

    def check_image(self, model: bytes, selftest: bytes) -> None:
        """Raises `SigningError` unless it speaks of these bytes."""
        manifest = self.manifest
        if (len(model), hashlib.sha256(model).digest()) != (manifest.model_length, manifest.model_sha256):
            raise SigningError("the model is not the one that was signed: its SHA-256 or length differs")
        image = hashlib.sha256(model + selftest).digest()
        if (len(selftest), image) != (manifest.selftest_length, manifest.image_sha256):
            raise SigningError("the self-test vectors are not those that were signed with the model")

    def sign(self, message: bytes) -> bytes:
        """The signature, if it is one of `message`: of the manifest that is about to be sent. Raises `SigningError`."""
        if message != self.manifest.signed():
            raise SigningError(
                "the signature does not cover the manifest that this board takes: it is of an earlier firmware, or "
                "another option was given than when it was signed"
            )
        return self.manifest.signature


@dataclass(frozen=True, slots=True)
class _Crypto:
    """What is used of the package."""

    Ed25519PrivateKey: Any
    Ed25519PublicKey: Any
    InvalidSignature: type[Exception]
    UnsupportedAlgorithm: type[Exception]
    serialization: Any


def _crypto() -> _Crypto:
    try:
        from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
    except ImportError as error:
        raise SigningError(f"signatures need the package cryptography: pip install cryptography ({error})") from None
    return _Crypto(Ed25519PrivateKey, Ed25519PublicKey, InvalidSignature, UnsupportedAlgorithm, serialization)


def _parse_private(data: bytes) -> Any | None:
    crypto = _crypto()
    try:
        key = crypto.serialization.load_pem_private_key(data, password=None)
    except (ValueError, TypeError, crypto.UnsupportedAlgorithm):
        return None
    return key if isinstance(key, crypto.Ed25519PrivateKey) else None


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise SigningError(f"{path}: cannot be read: {error.strerror}") from None
    if len(data) > MAX_FILE_BYTES:
        raise SigningError(f"{path}: is over {MAX_FILE_BYTES} bytes")
    return data


def _create(path: Path, data: bytes, mode: int) -> None:
    try:
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
            file.write(data)
    except FileExistsError:
        raise SigningError(f"{path}: exists already, and is not overwritten") from None
    except OSError as error:
        raise SigningError(f"{path}: cannot be written: {error.strerror}") from None
