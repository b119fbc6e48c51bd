"""The one guard of all doors: who asks, whether they may, how often, and what is said of those who were turned away."""

from __future__ import annotations

import ipaddress
import logging
from collections import Counter
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from agent.config import ProducerSection, Role, SecuritySection
from agent.core.clock import Clock
from agent.core.errors import Forbidden, InferenceError, RateLimited, Unauthorized, UnknownKey
from agent.security.audit import Audit
from agent.security.identity import Identity
from agent.security.jwts import JwtVerifier, Rejected
from agent.security.limits import Buckets
from agent.security.repeats import Repeats
from agent.security.tokens import PREFIX, StaticTokens

log = logging.getLogger(__name__)

LOOPBACK = "loopback"
MAX_TOKEN = 8192
_INVALID = "a valid token is needed: Authorization: Bearer …"
"""The same for no token, an unknown, a wrong and an expired one: nobody learns how near they were."""


class Guard:
    """For the event loop only."""

    def __init__(
        self,
        section: SecuritySection,
        clock: Clock,
        producers: Mapping[str, ProducerSection] | None = None,
        audit: Audit | None = None,
        refusals: Counter[str] | None = None,
    ) -> None:
        """`refusals` goes on being counted in. Raises `ConfigError` for keys that cannot be used."""
        self._clock = clock
        self._audit = audit
        self._tokens = StaticTokens(section.tokens)
        self._jwt = JwtVerifier(section.jwt) if section.jwt else None
        self._local = Identity(LOOPBACK, section.loopback_roles)
        limits = section.limits
        own = {name: producer.rate for name, producer in (producers or {}).items() if producer.rate is not None}
        self._identities = Buckets(limits.identity, limits.tracked)
        self._producers = Buckets(limits.producer, limits.tracked, own)
        self._failures = Buckets(limits.failures, limits.tracked)
        self._repeats = Repeats()
        self.refusals: Counter[str] = Counter() if refusals is None else refusals

    # --- who ---

    def bearer(self, authorization: str | None, address: str, host: str) -> Identity:
        """Who sent an HTTP request from `address` with these headers.

        Without a token: whoever is on this machine, as far as the configuration lets them in. A browser that a foreign
        page made ask (DNS rebinding) is on this machine too; it is known by the foreign name in `host`.
        Raises `Unauthorized` and, after many bad signatures of one address, `RateLimited`.
        """
        if authorization is None:
            if self._local.roles and is_loopback(address) and not _foreign(host):
                return self._local
            raise _unknown("no token")
        scheme, _, token = authorization.partition(" ")
        try:
            if scheme.lower() != "bearer" or not 0 < len(token) <= MAX_TOKEN or not token.isascii():
                raise Rejected("not a bearer token")
            return self._holder(token, network(address))
        except Rejected as reason:
            raise _unknown(str(reason)) from None

    def _holder(self, token: str, source: str) -> Identity:
        now, now_wall = self._clock.monotonic(), self._clock.wall()
        if self._jwt is None or token.startswith(PREFIX):
            found = self._tokens.identify(token, now_wall)
            if found is None:
                raise Rejected("unknown or expired")
            return found
        known = self._jwt.known(token, now_wall)
        if known is not None:
            return known
        wait_s = self._failures.wait_s(source, now)
        if wait_s:  # what bounds the work that strangers can make is looking at signatures no more
            self._failures.refused += 1
            raise RateLimited("too many tokens that were not valid", retry_after_s=wait_s)
        try:
            return self._jwt.identify(token, now_wall)
        except Rejected:
            self._failures.take(source, now)
            raise

    # --- whether, and how often ---

    def require(self, identity: Identity, role: Role) -> None:
        """Raises `Forbidden`, and `RateLimited` beyond the identity's rate."""
        if not identity.may(role):
            raise Forbidden(f"this needs the role {role}")
        self.count(identity.name)

    def count(self, name: str) -> None:
        """One more request of an identity. Raises `RateLimited`."""
        wait_s = self._identities.take(name, self._clock.monotonic())
        if wait_s:
            raise RateLimited("more requests than security.limits.identity allows", retry_after_s=wait_s)

    def count_producer(self, producer: str) -> None:
        """One more request of a producer. Raises `RateLimited`."""
        wait_s = self._producers.take(producer, self._clock.monotonic())
        if wait_s:
            raise RateLimited("more requests than this producer is allowed", retry_after_s=wait_s)

    # --- what is said of it ---

    def refused(self, door: str, error: InferenceError, *, who: str = "unknown", address: str = "") -> None:
        """A door turned something away before it became a request: counted, and put on record once. Of a flood the
        first few are, then their number once a minute."""
        self.refusals[error.code] += 1
        why = next(iter(getattr(error, "__notes__", ())), None)
        field = "(unknown key)" if isinstance(error, UnknownKey) else error.field
        fields = {"door": door, "who": who, "from": address, "outcome": error.code, "field": field, "reason": why}
        fields = {name: value for name, value in fields.items() if value}
        kind = (door, who, network(address), error.code, why)  # not the field, which whoever asks may choose
        if self._repeats.admit(kind, fields, self._clock.monotonic()):
            self._tell(fields)
        self.flush()

    def flush(self) -> None:
        """Tell how many there were of what was held back for a minute."""
        for fields in self._repeats.ended(self._clock.monotonic()):
            self._tell(fields)

    def _tell(self, fields: Mapping[str, Any]) -> None:
        log.warning("turned away", extra=dict(fields))
        if self._audit is not None:
            self._audit.refusal(fields)

    def status(self) -> dict[str, Any]:
        """For `/status`."""
        return {
            "refused": dict(self.refusals),
            "limited": {
                "identity": self._identities.refused,
                "producer": self._producers.refused,
                "failures": self._failures.refused,
            },
            "tracked": {"identities": len(self._identities), "producers": len(self._producers)},
        }


def _unknown(why: str) -> Unauthorized:
    error = Unauthorized(_INVALID)
    error.add_note(why)  # for the log
    return error


def is_loopback(address: str) -> bool:
    """Whether it is this machine's own."""
    if address in ("127.0.0.1", "::1"):
        return True
    try:
        ip = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return False
    return (getattr(ip, "ipv4_mapped", None) or ip).is_loopback


def network(address: str) -> str:
    """What counts as one address: with IPv6 everybody has 2^64 of them."""
    if ":" not in address:
        return address
    try:
        return str(ipaddress.ip_network((address.partition("%")[0], 64), strict=False))
    except ValueError:
        return address


@lru_cache(maxsize=256)
def _foreign(host: str) -> bool:
    """Whether a Host header may be the name of a page somewhere else: a name with a dot that is no address. A browser
    reaches loopback under such a name only if that page's name server says so."""
    name = host.rpartition(":")[0] if host.count(":") == 1 else host
    name = name.strip("[]").rstrip(".").lower()
    if "." not in name or name.endswith(".localhost"):
        return False
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return True
    return False
