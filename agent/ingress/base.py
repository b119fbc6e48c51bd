"""What every door needs of the daemon, and nothing else of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from agent.core.types import InferenceRequest, InferenceResult
from agent.routing.admission import Admission


class Core(Protocol):
    """The one core that all doors call."""

    @property
    def admission(self) -> Admission:
        """Makes requests out of what callers sent."""
        ...

    async def infer(self, request: InferenceRequest) -> InferenceResult:
        """Answer by the request's deadline. Raises `InferenceError` and nothing else."""
        ...

    def ready(self) -> tuple[bool, str]:
        """Whether some target can be asked now; if not, why."""
        ...

    def status(self) -> Mapping[str, Any]:
        """The whole state, plain JSON types, no secrets."""
        ...
