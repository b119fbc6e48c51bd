"""Whether a catalogue, and with it every model file whose SHA-256 it holds, comes from somebody who is trusted.

The catalogue that ships is trusted as the program is. Any other one is trusted if the file beside it, `NAME.sig.json`,
is an Ed25519 signature (RFC 8032) of its SHA-256 and version counter by a trusted key. As the catalogue records of each
model its SHA-256, what it runs on, its accuracy and its calibration, none of that can be changed without the signature.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from agent.core.errors import ConfigError
from agent.registry.locate import catalog_path
from agent.registry.signing import KEY_ID_DIGITS, SUFFIX, PrivateKey, PublicKey, SigningError, load_public

DOMAIN: Final = b"edge-agent catalogue 1\0"
"""In front of what is signed: a signature of something else never passes for one of a catalogue."""
MAX_BYTES: Final = 64 * 1024
SEEN: Final = "catalogue.json"
"""In `gateway.state_dir`: the highest counter that was in force."""


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    edge_agent_catalogue_signature: Literal[1]
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    counter: int = Field(ge=0, lt=1 << 32)
    allow_downgrade: bool
    key_id: str = Field(pattern=rf"^[0-9a-f]{{{KEY_ID_DIGITS}}}$")
    signature: str = Field(pattern=r"^[0-9a-f]{128}$")


@dataclass(frozen=True, slots=True)
class CatalogSignature:
    """`counter` rises with every catalogue that is signed; a lower one is refused unless `allow_downgrade`."""

    sha256: str
    counter: int
    allow_downgrade: bool
    key_id: str
    signature: bytes

    @classmethod
    def make(cls, catalog: Path, counter: int, key: PrivateKey, *, allow_downgrade: bool = False) -> Self:
        """Raises `SigningError`."""
        digest = _digest(catalog)
        unsigned = cls(digest, counter, allow_downgrade, key.public.id, b"")
        return cls(digest, counter, allow_downgrade, key.public.id, key.sign(unsigned.message()))

    @classmethod
    def load(cls, path: Path) -> Self:
        """Raises `SigningError`."""
        try:
            with path.open("rb") as file:
                found = _File.model_validate_json(file.read(MAX_BYTES))
        except OSError as error:
            raise SigningError(f"{path}: cannot be read: {error.strerror}") from None
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            at = ".".join(map(str, first["loc"])) or "file"
            raise SigningError(f"{path}: is no signature of a catalogue: {at}: {first['msg']}") from None
        return cls(found.sha256, found.counter, found.allow_downgrade, found.key_id, bytes.fromhex(found.signature))

    def save(self, path: Path) -> None:
        """Replaces an earlier one. Raises `SigningError`."""
        document = {
            "edge_agent_catalogue_signature": 1,
            "sha256": self.sha256,
            "counter": self.counter,
            "allow_downgrade": self.allow_downgrade,
            "key_id": self.key_id,
            "signature": self.signature.hex(),
        }
        _replace(path, json.dumps(document, indent=2) + "\n")

    def message(self) -> bytes:
        """What is signed."""
        fields = {"sha256": self.sha256, "counter": self.counter, "allow_downgrade": self.allow_downgrade}
        return DOMAIN + json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()

    def check(self, sha256: str, keys: Sequence[PublicKey]) -> None:
        """Raises `SigningError` unless a key among `keys` signed the catalogue with this digest."""
        if sha256 != self.sha256:
            raise SigningError("it was changed since it was signed")
        key = next((key for key in keys if key.id == self.key_id), None)
        if key is None:
            known = ", ".join(key.id for key in keys) or "none"
            raise SigningError(f"it was signed with key {self.key_id}, which is not trusted; trusted: {known}")
        if not key.verify(self.message(), self.signature):
            raise SigningError(f"the signature is wrong: it was altered, or was not made with key {key.id}")


@dataclass(frozen=True, slots=True)
class Trust:
    """What is held of a catalogue. `counter`: of its signature, if it has one that counts."""

    trusted: bool
    why: str
    counter: int | None = None


SHIPPED: Final = Trust(True, "it ships with the program")


def signature_path(catalog: Path) -> Path:
    return catalog.with_name(catalog.name + SUFFIX)


def trust_of(
    configured: Path | None, keys: Sequence[str], state_dir: Path | None = None, sha256: str | None = None
) -> Trust:
    """Of the catalogue that a configuration names; None is the one that ships. Never raises for what is not trusted.

    `state_dir`: where the highest counter that was in force is kept. `sha256`: of the bytes that were read as the
    catalogue (`Catalog.sha256`), so that what is trusted is what was read; None: the file is read here.
    """
    path = catalog_path(configured)
    if _same(path, catalog_path(None)):
        return SHIPPED
    try:
        signature = CatalogSignature.load(signature_path(path))
        signature.check(sha256 or _digest(path), [load_public(text) for text in keys])
        highest = 0 if state_dir is None else _highest(state_dir)
        if signature.counter < highest and not signature.allow_downgrade:
            raise SigningError(f"its counter {signature.counter} is below {highest}, which was in force already")
    except SigningError as error:
        return Trust(False, str(error))
    return Trust(True, f"signed with key {signature.key_id}, counter {signature.counter}", signature.counter)


def require(trust: Trust, configured: Path | None) -> None:
    """Raises `ConfigError` for a catalogue that is not trusted, with what to do."""
    if not trust.trusted:
        sign = "sign it with a key of models.trusted_keys (`edge-agent models sign-catalog`)"
        todo = f"{sign}, or set models.require_signed to false"
        raise ConfigError([f"models.catalog: {configured}: is not trusted: {trust.why}; {todo}"])


def keep_counter(trust: Trust, state_dir: Path) -> None:
    """It is in force: from now on a lower counter is refused. Raises `SigningError` if that cannot be kept."""
    if trust.counter is not None and trust.counter != _highest(state_dir):
        _replace(state_dir / SEEN, json.dumps({"counter": trust.counter}) + "\n")


def _highest(state_dir: Path) -> int:
    try:
        kept = json.loads((state_dir / SEEN).read_text())["counter"]
    except (OSError, ValueError, KeyError, TypeError):
        return 0
    return kept if isinstance(kept, int) else 0


def _same(one: Path, other: Path) -> bool:
    try:
        return one.samefile(other)
    except OSError:
        return False


def _digest(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise SigningError(f"{path}: cannot be read: {error.strerror}") from None


def _replace(path: Path, text: str) -> None:
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh.write_text(text)
        fresh.replace(path)
    except OSError as error:
        raise SigningError(f"{path}: cannot be written: {error.strerror}") from None
