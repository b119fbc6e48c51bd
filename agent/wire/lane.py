"""What a gateway and the workers of a cloud lane say to each other over MQTT 5: topics, properties, presence.

Sans-I/O. The tables are in docs/mqtt.md. Tensors travel as `wire.oip` writes them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic_core import from_json, to_json

from agent.core.errors import ProtocolError

BUDGET_MS = "budget-ms"
IDEMPOTENCY_KEY = "idempotency-key"
STATUS = "status"

OK = "ok"
BUSY = "busy"
EXPIRED = "expired"
INVALID = "invalid"
FAILED = "failed"

MAX_PRESENCE_BYTES = 64 << 10
MAX_MODELS = 256
MAX_TEXT = 200
MAX_BUDGET_S = 3600.0


def request_topic(lane: str, model: str, sha256: str) -> str:
    """Where requests for one model file go: only workers that have that very file subscribe to it."""
    return f"{lane}/requests/{model}/{sha256}"


def reply_topic(lane: str, gateway: str, instance: str) -> str:
    """Where answers to one daemon go. The gateway has a level of its own, for the broker's access list."""
    return f"{lane}/replies/{gateway}/{instance}"


def presence_topic(lane: str, worker: str) -> str:
    return f"{lane}/workers/{worker}"


@dataclass(frozen=True, slots=True)
class ServedModel:
    """One model file that a worker has loaded. `provider` is what really runs it."""

    model: str
    variant: str
    sha256: str
    provider: str


@dataclass(frozen=True, slots=True)
class Presence:
    """What a worker keeps retained on its topic while it is there."""

    worker: str
    max_concurrent: int
    models: tuple[ServedModel, ...]

    def to_bytes(self) -> bytes:
        return to_json(self)

    @classmethod
    def from_bytes(cls, data: bytes) -> Presence:
        """Raises `ProtocolError`."""
        document = _document(data, MAX_PRESENCE_BYTES)
        models = document.get("models")
        if not isinstance(models, list) or len(models) > MAX_MODELS:
            raise ProtocolError(f"models must be a list of at most {MAX_MODELS}")
        concurrent = document.get("max_concurrent")
        if type(concurrent) is not int or not 0 < concurrent <= 100_000:
            raise ProtocolError("max_concurrent must be a whole number from 1 to 100000")
        served = tuple(
            ServedModel(*(_text(entry, key) for key in ServedModel.__slots__))
            for entry in models
            if isinstance(entry, dict)
        )
        return cls(_text(document, "worker"), concurrent, served)


@dataclass(frozen=True, slots=True)
class Execution:
    """How a worker came to an answer: the `parameters` of an OIP response."""

    model_sha256: str
    provider: str
    worker: str
    queue_s: float
    compute_s: float

    def to_parameters(self) -> dict[str, Any]:
        return {
            "model_sha256": self.model_sha256,
            "provider": self.provider,
            "worker": self.worker,
            "queue_ms": round(self.queue_s * 1e3, 4),
            "compute_ms": round(self.compute_s * 1e3, 4),
        }

    @classmethod
    def from_parameters(cls, parameters: Mapping[str, Any]) -> Execution:
        """Raises `ProtocolError`."""
        return cls(
            _text(parameters, "model_sha256"),
            _text(parameters, "provider"),
            _text(parameters, "worker"),
            _seconds(parameters, "queue_ms"),
            _seconds(parameters, "compute_ms"),
        )


def encode_error(message: str) -> bytes:
    """The payload of a reply whose status is not `ok`, as the Open Inference Protocol has it."""
    return to_json({"error": message[:MAX_TEXT]})


def decode_error(data: bytes) -> str:
    """What a worker said was wrong; never raises."""
    try:
        return _text(_document(data, 4096), "error")
    except ProtocolError:
        return "(no usable message)"


def budget_s(text: str | None) -> float | None:
    """Seconds out of `budget-ms`; None if it is not there. Raises `ProtocolError`."""
    if text is None:
        return None
    try:
        seconds = float(text) / 1e3
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds <= MAX_BUDGET_S:
        raise ProtocolError(f"{BUDGET_MS} must be 0 to {MAX_BUDGET_S * 1e3:.0f}, found {text[:32]!r}")
    return seconds


def _document(data: bytes, limit: int) -> dict[str, Any]:
    if len(data) > limit:
        raise ProtocolError(f"must be at most {limit} bytes, found {len(data)}")
    try:
        document = from_json(data, allow_inf_nan=False)
    except ValueError as error:
        raise ProtocolError(f"is not JSON: {error}") from None
    if not isinstance(document, dict):
        raise ProtocolError("must be a JSON object")
    return document


def _text(document: Mapping[str, Any], key: str) -> str:
    value = document.get(key)
    if not isinstance(value, str) or not 0 < len(value) <= MAX_TEXT or not value.isprintable():
        raise ProtocolError(f"{key} must be 1 to {MAX_TEXT} printable characters")
    return value


def _seconds(document: Mapping[str, Any], key: str) -> float:
    value = document.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 3.6e6:
        raise ProtocolError(f"{key} must be milliseconds from 0 to 3600000")
    return value / 1e3
