"""Who asks, and what they may do."""

from __future__ import annotations

from typing import NamedTuple

from agent.config import Role
from agent.core.errors import Forbidden


class Identity(NamedTuple):
    """`name` begins with how it is known: `service:`, `user:`, `mqtt:` or `sensor:`, or is
    `loopback` or `mqtt`.

    `producer` is the only producer it may be. `default_producer` is who asks when a request does not say it: two
    callers with tokens of their own must not get each other's last known answers for want of a name.
    """

    name: str
    roles: frozenset[Role]
    producer: str | None = None
    default_producer: str | None = None

    def may(self, role: Role) -> bool:
        return role in self.roles or "admin" in self.roles

    def as_producer(self, named: object) -> str | None:
        """The producer of a request that names `named` (None: nobody); None: the one it names, whatever that is.

        Raises `Forbidden`.
        """
        if named is None:
            return self.default_producer
        if self.producer is None:
            return None
        if named != self.producer:
            raise Forbidden(f"producer: must be {self.producer!r}, or left out", field="producer")
        return self.producer
