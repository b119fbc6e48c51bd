"""What every door needs of the daemon, and nothing else of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from agent.core.errors import InvalidRequest
from agent.core.types import InferenceRequest, InferenceResult
from agent.routing.admission import Admission


class NotRemembered(InvalidRequest):
    """Nothing is known of a request: too long ago, repeated under an idempotency key, or never admitted."""

    code = "not_remembered"
    http_status = 404

    def __init__(self, request_id: str) -> None:
        super().__init__(
            f"request_id: {request_id[:128]!r} is not among the last requests (routing.explain_last)",
            field="request_id",
        )


class Core(Protocol):
    """The one core that all doors call."""

    @property
    def admission(self) -> Admission:
        """Makes requests out of what callers sent."""
        ...

    async def infer(self, request: InferenceRequest) -> InferenceResult:
        """Answer by the request's deadline. Raises `InferenceError` and nothing else."""
        ...

    async def accept(self, request: InferenceRequest) -> Mapping[str, Any]:
        """Return when a durable request is on the disk, with what its caller is told. Raises `InferenceError`."""
        ...

    def ready(self) -> tuple[bool, str]:
        """Whether some target can be asked now; if not, why."""
        ...

    def status(self) -> Mapping[str, Any]:
        """The whole state, plain JSON types, no secrets."""
        ...

    def explain(self, request_id: str) -> Mapping[str, Any] | None:
        """How one of the last requests was decided, plain JSON types; None if it is not remembered."""
        ...
