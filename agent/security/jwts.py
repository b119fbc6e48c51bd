"""JSON Web Tokens of users (RFC 7519, and RFC 8725 on what goes wrong with them).

The key decides the algorithm, never the token: a header with another one, with `none`, or with anything beyond `alg`,
`kid` and `typ` is refused before a signature is looked at.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

from agent.config import JwtKeySection, JwtSection, Role
from agent.core.errors import ConfigError
from agent.security.identity import Identity

MAX_TOKEN = 4096
MAX_SUBJECT = 128
MIN_SECRET_BYTES = 32
MIN_RSA_BITS = 2048
MAX_KEY_FILE = 16_384
REMEMBERED = 256
"""Tokens whose signature was found good, so that it need not be computed for each of their requests."""
_HEADER = frozenset({"alg", "kid", "typ"})


class Rejected(Exception):
    """Why a token is not taken: for the log, not for whoever showed it."""


class JwtVerifier:
    """Checks tokens against the keys of the configuration. Raises `ConfigError` for a key that cannot be used."""

    def __init__(self, section: JwtSection) -> None:
        self._section = section
        self._keys = {key.kid: (key.algorithm, _load(key)) for key in section.keys}
        self._good: OrderedDict[str, tuple[Identity, float]] = OrderedDict()

    def known(self, token: str, now_wall: float) -> Identity | None:
        """Whose token it is, if it was found good before and has not expired since. `now_wall` is Unix time."""
        known = self._good.get(token)
        if known is None:
            return None
        identity, expires = known
        if now_wall >= expires + self._section.leeway_s:
            del self._good[token]
            return None
        self._good.move_to_end(token)
        return identity

    def identify(self, token: str, now_wall: float) -> Identity:
        """Whose token it is, by its signature and its claims. Raises `Rejected`."""
        good = self._verified(token, now_wall)
        if len(self._good) >= REMEMBERED:
            self._good.popitem(last=False)
        self._good[token] = good
        return good[0]

    def _verified(self, token: str, now_wall: float) -> tuple[Identity, float]:
        import jwt

        if len(token) > MAX_TOKEN:
            raise Rejected("longer than 4096 characters")
        try:
            header = jwt.get_unverified_header(token)
        except (jwt.PyJWTError, ValueError, RecursionError):
            raise Rejected("is no JSON Web Token") from None
        if not header.keys() <= _HEADER:
            raise Rejected("its header holds more than alg, kid and typ")
        kid = header.get("kid")
        algorithm, key = self._keys.get(kid, ("", None)) if isinstance(kid, str) else ("", None)
        if key is None or header.get("alg") != algorithm:
            raise Rejected("no key of the configuration has this kid and algorithm")
        try:
            claims = jwt.decode(
                token,
                key,
                algorithms=[algorithm],
                audience=self._section.audience,
                issuer=self._section.issuer,
                options={
                    "require": ["exp", "iat", "iss", "aud", "sub"],
                    "verify_exp": False,  # by our own clock, below
                    "verify_iat": False,
                    "verify_nbf": False,
                },
            )
        except (jwt.PyJWTError, ValueError, TypeError, RecursionError) as error:
            raise Rejected(f"{type(error).__name__}") from None
        return self._identity(claims), self._checked_times(claims, now_wall)

    def _checked_times(self, claims: Mapping[str, Any], now: float) -> float:
        """`exp`, after a look at all three times."""
        leeway_s = self._section.leeway_s
        issued, expires, begins = claims["iat"], claims["exp"], claims.get("nbf", claims["iat"])
        if not all(type(at) in (int, float) and 0 <= at < 1e12 for at in (issued, expires, begins)):
            raise Rejected("its times are no numbers")
        if max(issued, begins) > now + leeway_s:
            raise Rejected("from the future: is the clock of this gateway right?")
        if expires - issued > self._section.max_lifetime_s:
            raise Rejected(f"lives longer than {self._section.max_lifetime_s} s")
        if now >= expires + leeway_s:
            raise Rejected("expired")
        return float(expires)

    def _identity(self, claims: Mapping[str, Any]) -> Identity:
        subject = claims["sub"]
        if not isinstance(subject, str) or not 0 < len(subject) <= MAX_SUBJECT or not subject.isprintable():
            raise Rejected("its subject is empty, too long or not printable")
        claimed = claims.get(self._section.roles_claim, ())
        words = claimed.split() if isinstance(claimed, str) else claimed if isinstance(claimed, list) else ()
        roles: frozenset[Role] = frozenset(role for role in get_args(Role) if role in words)
        return Identity(f"user:{subject}", roles, None, f"user:{subject}"[:MAX_SUBJECT])


def _load(section: JwtKeySection) -> Any:
    """The key, as PyJWT takes it. Raises `ConfigError`."""
    where = f"security.jwt.keys: {section.kid}"
    data = read_key_file(section.key_file, where)
    if section.algorithm == "HS256":
        return require_secret(data, where)
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    try:
        key = load_pem_public_key(data)
    except (ValueError, UnsupportedAlgorithm):
        raise ConfigError([f"{where}: key_file holds no public key in PEM"]) from None
    right = {
        "EdDSA": isinstance(key, ed25519.Ed25519PublicKey),
        "ES256": isinstance(key, ec.EllipticCurvePublicKey) and key.curve.name == "secp256r1",
        "RS256": isinstance(key, rsa.RSAPublicKey) and key.key_size >= MIN_RSA_BITS,
    }
    if not right[section.algorithm]:
        wanted = {"EdDSA": "Ed25519", "ES256": "P-256", "RS256": f"RSA of {MIN_RSA_BITS} bits or more"}
        raise ConfigError([f"{where}: {section.algorithm} needs a key of the kind {wanted[section.algorithm]}"])
    return key


def read_key_file(path: Path, where: str) -> bytes:
    """A small file, without the line's end that an editor adds. Raises `ConfigError`."""
    try:
        with path.open("rb") as file:
            return file.read(MAX_KEY_FILE).rstrip(b"\r\n")
    except OSError as error:
        raise ConfigError([f"{where}: {path} cannot be read: {error.strerror or error}"]) from None


def require_secret(data: bytes, where: str) -> bytes:
    """Raises `ConfigError` unless it is long enough to be no password."""
    if len(data) < MIN_SECRET_BYTES:
        raise ConfigError([f"{where}: the secret must have at least {MIN_SECRET_BYTES} bytes, found {len(data)}"])
    return data
