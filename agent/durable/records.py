"""What of a durable request and of a message is kept in the outbox, as bytes. Sans-I/O."""

from __future__ import annotations

import math
import uuid
import zlib
from dataclasses import dataclass, replace
from typing import Any

from pydantic_core import from_json, to_json

from agent.core.errors import InferenceError, InvalidRequest
from agent.core.types import AccuracyMode, InferenceRequest, InferenceResult, LatencyClass
from agent.registry.catalog import Catalog
from agent.store.cache import cache_key, pack_tensors, unpack_tensors
from agent.store.outbox import BY_PRODUCER, Item, Stored
from agent.wire.mqtt_properties import MessageProperties

ASK, LOCAL, UPLINK = BY_PRODUCER, "local", "uplink"
"""The routes: to be answered; to the gateway's own broker; to the uplink's."""

IDEMPOTENCY_KEY = "idempotency-key"
"""User property of every message out of the outbox: whoever has seen it has seen the message."""

_KEPT = (
    "model",
    "variant",
    "priority",
    "max_retries",
    "timeout_ms",
    "producer",
    "use_cache",
    "explain",
    "shadow",
    "asked_by",
)
_SCHEMA = 1


class Expired(InferenceError):
    """A durable request could not be answered within `outbox.max_age_s`."""

    code = "expired"
    http_status = 504


@dataclass(frozen=True, slots=True)
class Return:
    """Where the answer of a durable request goes. `sensor` is added to it."""

    topic: str
    correlation: bytes | None = None
    sensor: str | None = None


def request_item(request: InferenceRequest, back: Return, key: str | None, *, repeat: bool) -> Item:
    """`key`, `repeat`: as in `Item`."""
    model, variant, digest = cache_key(request.model, request.variant, request.inputs)
    head = {
        "schema": _SCHEMA,
        "request_id": request.id,
        "budget_s": request.deadline - request.received,
        **{name: getattr(request, name) for name in _KEPT},
        "allowed_regions": sorted(request.allowed_regions),
        "accuracy": request.accuracy.value,
        "metadata": dict(request.metadata),
        "notes": list(request.notes),
        "out_of_range": request.out_of_range,
        "uplink": request.uplink,
        "back": [back.topic, None if back.correlation is None else back.correlation.hex(), back.sensor],
    }
    question = f"{model} {variant} {request.accuracy.value} ".encode() + digest
    body = pack_tensors(request.inputs)
    return Item(ASK, request.producer, uuid.uuid4().hex, to_json(head), body, key, repeat, question)


def stored_request(stored: Stored, catalog: Catalog, now: float) -> tuple[InferenceRequest, Return]:
    """The request, with a deadline for one more try. Raises `InvalidRequest` and `UnknownModel` if it is none, or none
    that today's catalogue can answer."""
    try:
        head = from_json(stored.head)
        inputs = unpack_tensors(stored.body)
        back = _return(head["back"])
        request = InferenceRequest(
            id=head["request_id"],
            inputs=inputs,
            latency_class=LatencyClass.BATCH,
            received=now,
            deadline=now + head["budget_s"],
            allowed_regions=frozenset(head["allowed_regions"]),
            accuracy=AccuracyMode(head["accuracy"]),
            metadata=head["metadata"],
            notes=tuple(head["notes"]),
            out_of_range=head["out_of_range"],
            durable=True,
            uplink=head["uplink"],
            **{name: head[name] for name in _KEPT},
        )
    except (ValueError, KeyError, TypeError) as error:
        raise InvalidRequest(f"(stored request): cannot be read: {error!r}") from None
    family = catalog.family(request.model)
    if request.variant is not None and request.variant not in family.variants:
        raise InvalidRequest(f"variant: {request.variant[:64]!r} is in the catalogue no more", field="variant")
    wanted = {spec.name: (spec.shape, spec.dtype) for spec in family.inputs}
    if wanted != {name: (value.shape, value.dtype.name) for name, value in inputs.items()}:
        raise InvalidRequest("inputs: are not those that the model takes now", field="inputs")
    return request, back


def return_of(stored: Stored) -> Return | None:
    """Where the answer goes, of a request that is otherwise unusable; None if that cannot be read either."""
    try:
        return _return(from_json(stored.head)["back"])
    except (ValueError, KeyError, TypeError):
        return None


def answer_item(stored: Stored, back: Return, outcome: InferenceResult | InferenceError) -> Item:
    """What takes the place of the request: its answer, under the same id."""
    document = outcome.to_dict()
    if back.sensor is not None:
        document = {"sensor": back.sensor, **document}
    return _message(LOCAL, stored.producer, stored.id, back.topic, document, _status(outcome), back.correlation)


def uplink_item(
    request: InferenceRequest,
    outcome: InferenceResult | InferenceError,
    topic: str,
    wall: float,
    id_: str | None = None,
) -> Item:
    """For the cloud. `topic` is the uplink's; `wall` says when it was answered."""
    document = {"producer": request.producer, "answered_at": round(wall, 3), **outcome.to_dict()}
    level = "".join(char if char.isalnum() or char in "_.-" else "-" for char in request.producer)[:64] or "-"
    return _message(
        UPLINK, request.producer, id_ or uuid.uuid4().hex, f"{topic}/{level}", document, _status(outcome), None
    )


def message_of(stored: Stored, expiry_s: float) -> tuple[str, MessageProperties]:
    """Topic and properties of a stored message. Raises `ValueError`, `KeyError` or `TypeError` if it is none."""
    head = from_json(stored.head)
    correlation = head["correlation"]
    properties = MessageProperties(
        "application/json",
        correlation_data=None if correlation is None else bytes.fromhex(correlation),
        message_expiry_s=max(1, math.ceil(expiry_s)),
        user=(("status", head["status"]), (IDEMPOTENCY_KEY, stored.id)),
    )
    return head["topic"], properties


def arrival_key(topic: str, payload: bytes, correlation: bytes | None, mid: int) -> str:
    """By which a message without a key of its own is known when the broker sends it again: the same packet identifier
    and the same content."""
    content = zlib.crc32(payload, zlib.crc32(correlation or b"", zlib.crc32(topic.encode())))
    return f"mqtt:{mid}:{len(payload)}:{content:08x}"


def renamed(outcome: InferenceResult, request: InferenceRequest) -> InferenceResult:
    """An answer is the caller's own, whichever request it was computed for."""
    return outcome if outcome.request_id == request.id else outcome._replace(request_id=request.id)


def tried(request: InferenceRequest) -> InferenceRequest:
    """As the pipeline is to see it: the outbox itself knows repeats, and a failed try must not be remembered."""
    return replace(request, idempotency_key=None)


def _return(back: Any) -> Return:
    topic, correlation, sensor = back
    return Return(topic, None if correlation is None else bytes.fromhex(correlation), sensor)


def _status(outcome: InferenceResult | InferenceError) -> str:
    return outcome.code if isinstance(outcome, InferenceError) else "ok"


def _message(
    route: str,
    producer: str,
    id_: str,
    topic: str,
    document: dict[str, Any],
    status: str,
    correlation: bytes | None,
) -> Item:
    head = {"topic": topic, "status": status, "correlation": None if correlation is None else correlation.hex()}
    return Item(route, producer, id_, to_json(head), to_json(document, inf_nan_mode="null"))
