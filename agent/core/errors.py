"""Every exception that crosses a module border.

    EdgeAgentError
    ├── ConfigError            the configuration or the catalogue cannot be used
    ├── InferenceError         what a caller is told when there is no answer (has a code and an HTTP status)
    │   ├── InvalidRequest     400  names the field, what was found, what is allowed
    │   ├── Unauthorized       401  no token, or one that is not valid here
    │   ├── Forbidden          403  the token is valid and does not allow this
    │   ├── UnknownModel       404
    │   ├── Overloaded         429  a bounded queue is full
    │   │   └── OutboxFull     429  the outbox is, and its policy is to refuse
    │   ├── NotStored          503  a durable request could not be put on the disk
    │   ├── RateLimited        429  this caller or producer asks more often than it may
    │   ├── AuditUnavailable   503  the audit trail cannot be written, and `audit.on_full` says refuse
    │   ├── Unavailable        503  every target failed or none could be asked, and nothing is cached
    │   └── DeadlineExceeded   504  time ran out, and nothing is cached
    ├── TargetError            why one attempt on one target failed; routing goes on to the next target
    │   ├── TargetUnavailable  cannot be asked now (unplugged, disconnected, no such model there)
    │   ├── TargetBusy         its queue or window is full
    │   ├── TargetTimeout      no answer in the time it was given
    │   └── TargetFailed       it answered with an error, or its runtime raised
    ├── LinkError              a connection was lost or could not be opened (`LinkFull`: it cannot take more now)
    ├── RemoteError            `link.calls`: a microcontroller answered a request with ERROR
    └── ProtocolError          the peer sent something the protocol does not allow

Errors are translated once, at the seam: routing never sees a `SerialException`, a caller never sees a `TargetError`.
"""

from __future__ import annotations

import errno
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from agent.core.types import Attempt


class EdgeAgentError(Exception):
    """Base of all errors of this package."""


class ConfigError(EdgeAgentError):
    """A configuration or catalogue that cannot be used.

    `problems` holds one line for each fault: file, path of the key, what was found, what is allowed.
    """

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = tuple(problems)


_PLAIN = {
    errno.ENOENT: "no such file",
    errno.EISDIR: "is a folder",
    errno.ENOTDIR: "a part of this path is no folder",
    errno.EACCES: "this user may not use it",
    errno.EPERM: "this user may not use it",
    errno.ENOSPC: "no space left on its disk",
}


def plain_words(error: OSError) -> str:
    """What the system said, for a person: without its number and without the name of the file."""
    words = error.strerror or str(error)
    return _PLAIN.get(error.errno or 0) or words[:1].lower() + words[1:]


def is_misuse(error: OSError) -> bool:
    """Whether it comes from naming what is not there or cannot be used, and not from this machine's state."""
    return error.filename is not None and error.errno in _PLAIN and error.errno != errno.ENOSPC


class InferenceError(EdgeAgentError):
    """A described refusal. `attempts` and `reasons` are filled in by the pipeline."""

    code = "internal"
    http_status = 500

    def __init__(self, message: str, *, field: str | None = None, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.field = field
        self.retry_after_s = retry_after_s
        self.request_id: str | None = None
        self.attempts: tuple[Attempt, ...] = ()
        self.reasons: tuple[str, ...] = ()
        self.cost_usd = 0.0
        self.explanation: Mapping[str, Any] | None = None
        """How it came to this, for a request with `explain`."""

    def to_dict(self) -> dict[str, Any]:
        """The error as every door shows it: plain JSON types."""
        error: dict[str, Any] = {"code": self.code, "message": self.message}
        if self.field is not None:
            error["field"] = self.field
        if self.retry_after_s is not None:
            error["retry_after_s"] = self.retry_after_s
        document = {
            "request_id": self.request_id,
            "error": error,
            "attempts": [attempt.to_dict() for attempt in self.attempts],
            "cost_usd": self.cost_usd,
            "reasons": list(self.reasons),
        }
        if self.explanation is not None:
            document["explanation"] = dict(self.explanation)
        return document


class InvalidRequest(InferenceError):
    """The request itself is wrong; asking again will not help."""

    code = "invalid_request"
    http_status = 400


class UnknownKey(InvalidRequest):
    """`field` is a word of whoever asks. It stands in the answer, and on no record: it may be anything."""


class Unauthorized(InferenceError):
    """Nobody knows who asks. The message is the same whatever is wrong with the token."""

    code = "unauthorized"
    http_status = 401


class Forbidden(InferenceError):
    """It is known who asks, and that they may not."""

    code = "forbidden"
    http_status = 403


class UnknownModel(InferenceError):
    """The catalogue has no such model or variant."""

    code = "unknown_model"
    http_status = 404


class Overloaded(InferenceError):
    """A bounded queue is full. Ask again later."""

    code = "overloaded"
    http_status = 429


class OutboxFull(Overloaded):
    """The outbox has reached one of its bounds, and its policy is to refuse."""

    code = "outbox_full"


class NotStored(InferenceError):
    """A durable request could not be put on the disk, so it was not accepted."""

    code = "not_stored"
    http_status = 503


class RateLimited(InferenceError):
    """Asked more often than is allowed; `retry_after_s` says when one more request will be taken."""

    code = "rate_limited"
    http_status = 429


class AuditUnavailable(InferenceError):
    """Nothing may be answered that cannot be put on record."""

    code = "audit_unavailable"
    http_status = 503


class Unavailable(InferenceError):
    """No target could answer and nothing is cached."""

    code = "unavailable"
    http_status = 503


class DeadlineExceeded(InferenceError):
    """The deadline passed and nothing is cached."""

    code = "deadline_exceeded"
    http_status = 504


class TargetError(EdgeAgentError):
    """Why one attempt failed.

    `permanent` says that the same attempt would fail again until somebody acts (bad credentials, wrong protocol
    version): the breaker goes to its longest back-off at once. `counts` says whether it is held against the target:
    a full queue or a deadline that was too short to begin with is not.
    """

    code = "failed"
    counts = True

    def __init__(self, message: str, *, permanent: bool = False) -> None:
        super().__init__(message)
        self.permanent = permanent


class TargetUnavailable(TargetError):
    """The target cannot be asked now."""

    code = "unavailable"


class TargetBusy(TargetError):
    """The target's queue or window is full."""

    code = "busy"
    counts = False


class TargetTimeout(TargetError):
    """No answer within the time the attempt was given."""

    code = "timeout"


class TargetFailed(TargetError):
    """The target answered with an error."""

    code = "failed"


class LinkError(EdgeAgentError):
    """A connection was lost or could not be opened."""

    def __init__(self, message: str, *, permanent: bool = False) -> None:
        super().__init__(message)
        self.permanent = permanent


class ProtocolError(EdgeAgentError):
    """The peer sent something that the protocol does not allow."""
