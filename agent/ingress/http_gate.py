"""In front of every HTTP handler: who asks, and whether they may.

| path | role |
|---|---|
| `/health`, `/` (the status page, which holds no state by itself) | none |
| `POST /infer` | `infer` |
| any other `GET` | `read` |
| anything else | `admin` |
"""

from __future__ import annotations

from typing import Literal

from starlette.types import Scope

from agent.config import Role
from agent.core.errors import Forbidden, InferenceError, Unauthorized
from agent.security.access import Guard
from agent.security.identity import Identity

OPEN = frozenset({"/health", "/"})
ASKING = frozenset({"/infer"})
LOOKING = frozenset({"/explain"})
"""Paths that only look, whatever the method."""
NOBODY = Identity("unknown", frozenset())

Needed = Role | Literal["nothing"]


def needed(method: str, path: str) -> Needed:
    """The role that a request needs. A path that does not exist needs one too: nobody learns what there is."""
    if method in ("GET", "HEAD"):
        return "nothing" if path in OPEN else "read"
    if path in ASKING:
        return "infer"
    return "read" if path.rstrip("/") in LOOKING else "admin"


class HttpGate:
    """Asks the guard for each request."""

    def __init__(self, guard: Guard) -> None:
        self._guard = guard

    def admit(self, scope: Scope) -> Identity:
        """Whose request it is. Raises `Unauthorized`, `Forbidden` and `RateLimited`."""
        role = needed(scope["method"], scope["path"])
        if role == "nothing":
            return NOBODY
        authorization: bytes | None = None
        host = b""
        for name, value in scope["headers"]:
            if name == b"authorization":
                authorization = value if authorization is None else b""  # two of them: neither
            elif name == b"host":
                host = value
        shown = None if authorization is None else authorization.decode("latin-1")
        identity = self._guard.bearer(shown, address_of(scope), host.decode("latin-1"))
        try:
            self._guard.require(identity, role)
        except InferenceError as error:
            scope["identity"] = identity
            raise error
        return identity


def address_of(scope: Scope) -> str:
    """The peer's, without its port."""
    client = scope.get("client")
    return client[0] if client else ""


def challenge(error: InferenceError, *, shown: bool) -> dict[str, str]:
    """`WWW-Authenticate` of RFC 6750, where there is one. `shown`: whether the request had a token."""
    if isinstance(error, Unauthorized):
        return {"WWW-Authenticate": 'Bearer realm="edge-agent"' + (', error="invalid_token"' if shown else "")}
    if isinstance(error, Forbidden) and error.field is None:
        return {"WWW-Authenticate": 'Bearer realm="edge-agent", error="insufficient_scope"'}
    return {}
