"""Who may ask, how often, where their inputs may go, and what is put on record."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import date
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, Self

from pydantic import Field, SerializerFunctionWrapHandler, field_serializer, field_validator, model_validator

from agent.config.base import Name, Section

Role = Literal["read", "infer", "admin"]
"""`read`: state, metrics, answers of others; `infer`: ask; `admin`: everything."""
AuditField = Literal["who", "from", "producer", "request_id", "model", "reason"]
Masking = Literal["keep", "mask", "pseudonym"]


class TokenSection(Section):
    """A token of a service. The token itself is nowhere: `edge-agent token new` shows it once."""

    name: Name
    roles: tuple[Role, ...] = Field(min_length=1, max_length=3)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    """SHA-256 of the token."""
    producer: Name | None = None
    """Whoever holds it asks as this producer and as no other; None: as whom the request names."""
    expires: date | None = None
    """The last day, in UTC, on which it is taken."""


class JwtKeySection(Section):
    kid: Name
    """What the token's header calls this key."""
    algorithm: Literal["EdDSA", "ES256", "RS256", "HS256"]
    """The only algorithm that this key is used with."""
    key_file: Path
    """EdDSA, ES256, RS256: the public key in PEM. HS256: the secret, at least 32 bytes."""


class JwtSection(Section):
    """Tokens of users, which an identity provider signs."""

    issuer: str = Field(min_length=1, max_length=256)
    audience: str = Field(min_length=1, max_length=256)
    keys: tuple[JwtKeySection, ...] = Field(min_length=1, max_length=8)
    roles_claim: str = Field(default="roles", min_length=1, max_length=128)
    """The claim that holds the roles, as a list or as text with spaces between them."""
    max_lifetime_s: int = Field(default=900, ge=10, le=900)
    """From `iat` to `exp`, at most."""
    leeway_s: int = Field(default=30, ge=0, le=120)
    """By how much the issuer's clock may differ."""

    @model_validator(mode="after")
    def _distinct(self) -> Self:
        if len({key.kid for key in self.keys}) != len(self.keys):
            raise ValueError("two keys have the same kid")
        return self


class RateSection(Section):
    """A token bucket: `burst` requests at once, and `per_s` in the long run."""

    per_s: float = Field(gt=0, le=1_000_000)
    burst: int = Field(ge=1, le=1_000_000)


class LimitsSection(Section):
    identity: RateSection = RateSection(per_s=2000, burst=4000)
    """Of everybody with the same token, the same subject, or none at all."""
    producer: RateSection = RateSection(per_s=1000, burst=2000)
    failures: RateSection = RateSection(per_s=0.5, burst=20)
    """Signatures of one address that were looked at and found bad; beyond it only tokens that are known to be good are
    taken from there."""
    tracked: int = Field(default=4096, ge=16, le=1_000_000)
    """Buckets of each kind; the least recently used is forgotten first."""


class AuditSection(Section):
    """The record of who asked what, and what came of it. Never the payload."""

    enabled: bool = False
    dir: Path | None = None
    """None: `audit` in `gateway.state_dir`."""
    max_file_bytes: int = Field(default=16 << 20, ge=4096, le=1 << 32)
    """A file that has grown to this is closed, and the chain goes on in the next."""
    keep_files: int = Field(default=16, ge=1, le=10_000)
    """Files that are kept; the oldest is deleted."""
    queue: int = Field(default=4096, ge=16, le=1_000_000)
    """Lines that wait for the disk."""
    on_full: Literal["drop", "refuse"] = "drop"
    """When the queue is full or the disk fails. `drop`: answer all the same, count what is missing, and say so in the
    chain. `refuse`: answer nothing that cannot be put on record."""
    fsync_s: float = Field(default=5, ge=0, le=3600)
    """Lines written longer ago than this survive a power cut. 0: every batch is forced to the disk."""
    rules: Mapping[AuditField, Masking] = Field(default_factory=dict)
    """What is done to a field: `mask` replaces it, `pseudonym` makes an HMAC-SHA-256 of it, by `key_file`."""
    key_file: Path | None = None
    """The key of pseudonyms, at least 32 bytes. With one, `producer` is a pseudonym unless a rule says otherwise."""

    @field_validator("rules", mode="after")
    @classmethod
    def _frozen(cls, rules: Mapping[AuditField, Masking]) -> Mapping[AuditField, Masking]:
        return MappingProxyType(dict(rules))

    @field_serializer("rules", mode="wrap")
    def _plain(self, rules: Mapping[str, str], dump: SerializerFunctionWrapHandler) -> Any:
        return dump(dict(rules))

    @model_validator(mode="after")
    def _key(self) -> Self:
        if "pseudonym" in self.rules.values() and self.key_file is None:
            raise ValueError("a rule says pseudonym: key_file is required")
        if self.dir is not None and not self.dir.is_absolute():
            raise ValueError("dir must be absolute")
        return self

    def rule(self, field: AuditField) -> Masking:
        """What is done to a field."""
        implied: Masking = "pseudonym" if field == "producer" and self.key_file is not None else "keep"
        return self.rules.get(field, implied)


class SecuritySection(Section):
    tokens: tuple[TokenSection, ...] = Field(default=(), max_length=64)
    jwt: JwtSection | None = None
    open_on_loopback: tuple[Role, ...] | None = None
    """What somebody on this machine may do without a token. None: `[read, infer]` while there are neither tokens nor
    jwt, and nothing once there are. Behind a proxy on this machine everybody is on this machine: []."""
    limits: LimitsSection = LimitsSection()
    audit: AuditSection = AuditSection()
    certificate_warn_days: int = Field(default=30, ge=1, le=365)
    """How long before its end a certificate is an alarm."""

    @property
    def has_tokens(self) -> bool:
        return bool(self.tokens) or self.jwt is not None

    @property
    def loopback_roles(self) -> frozenset[Role]:
        if self.open_on_loopback is not None:
            return frozenset(self.open_on_loopback)
        return frozenset() if self.has_tokens else frozenset(("read", "infer"))

    @model_validator(mode="after")
    def _distinct(self) -> Self:
        for what, values in (
            ("name", [token.name for token in self.tokens]),
            ("sha256", [token.sha256 for token in self.tokens]),
        ):
            if len(set(values)) != len(values):
                raise ValueError(f"two tokens have the same {what}")
        return self


class ProducerSection(Section):
    """What holds for one producer, whatever its requests say."""

    allowed_regions: tuple[Name, ...] = Field(default=(), max_length=32)
    """Cloud regions that may see its inputs; a request may narrow this and not widen it. Empty: any."""
    rate: RateSection | None = None
    """In place of `security.limits.producer`."""
