"""Static tokens of services: 32 random bytes, of which the configuration holds the SHA-256 only.

A slow hash is for passwords, which can be guessed; 256 random bits cannot.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Iterable
from datetime import UTC, datetime

from agent.config import TokenSection
from agent.security.identity import Identity

PREFIX = "ea_"
"""By which scanners for leaked secrets, and people, know one."""


def new_token() -> str:
    """`ea_` and 43 characters."""
    return PREFIX + secrets.token_urlsafe(32)


def hashed(token: str) -> str:
    """What the configuration holds of it."""
    return hashlib.sha256(token.encode()).hexdigest()


class StaticTokens:
    """The tokens of the configuration."""

    def __init__(self, sections: Iterable[TokenSection]) -> None:
        self._known = [(section.sha256, section) for section in sections]

    def identify(self, token: str, now_wall: float) -> Identity | None:
        """Whose token it is, or None. Takes as long for a token that is nearly right as for any other: hashes are
        compared, each in constant time, and always all of them."""
        digest = hashed(token)
        found: TokenSection | None = None
        for sha256, section in self._known:
            if hmac.compare_digest(sha256, digest):
                found = section
        if found is None:
            return None
        if found.expires is not None and datetime.fromtimestamp(now_wall, UTC).date() > found.expires:
            return None
        return Identity(f"service:{found.name}", frozenset(found.roles), found.producer, found.producer or found.name)
