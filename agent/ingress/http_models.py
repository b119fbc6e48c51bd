"""What `/openapi.json` says about requests and answers. Documentation only: `routing.admission` does the checking.

The models mirror `admission` and `InferenceResult.to_dict`; tests hold them to it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from pydantic.json_schema import models_json_schema

from agent.core.types import AccuracyMode, LatencyClass, Tier

DTYPES = ("float32", "float16", "int8", "uint8", "int16", "int32", "int64")
Milliseconds = Annotated[float, Field(gt=0, le=3_600_000)]
Name = Annotated[str, Field(min_length=1, max_length=128)]


# fmt: off
_THREE: list[Any] = [
    0, 0, 7, 15, 13, 1, 0, 0,
    0, 8, 13, 6, 15, 4, 0, 0,
    0, 2, 1, 13, 13, 0, 0, 0,
    0, 0, 2, 15, 11, 1, 0, 0,
    0, 0, 0, 1, 12, 12, 1, 0,
    0, 0, 0, 0, 1, 10, 8, 0,
    0, 0, 8, 4, 5, 14, 9, 0,
    0, 0, 7, 13, 13, 9, 0, 0,
]
# fmt: on
"""A handwritten digit: 8 x 8 pixels of 0 to 16, row by row."""


class _Documented(BaseModel):
    model_config = ConfigDict(extra="forbid", protected_namespaces=())


class InferDocument(_Documented):
    """One question. Only `model` and `inputs` are required."""

    model: Annotated[Name, Field(description="A family of the catalogue.")]
    inputs: Annotated[
        dict[str, list[Any]] | list[Any],
        Field(
            description="Tensor name to nested lists in the family's canonical units; for a model with one input, the "
            "nested list itself. Flat lists are taken as well."
        ),
    ]
    request_id: Annotated[Name | None, Field(description="Yours, given back; otherwise one is made.")] = None
    variant: Annotated[Name | None, Field(description="Only this variant of the model will do.")] = None
    latency_class: Annotated[
        LatencyClass | None, Field(description="Otherwise follows from `deadline_ms`; `interactive` without either.")
    ] = None
    deadline_ms: Annotated[
        Milliseconds | None, Field(description="Counted from receipt; otherwise the class's limit.")
    ] = None
    timeout_ms: Annotated[Milliseconds | None, Field(description="Bound on any single attempt.")] = None
    priority: Annotated[int, Field(ge=1, le=10, description="1 (least) to 10.")] = 5
    max_retries: Annotated[int, Field(ge=0, le=16, description="Further targets after the first one failed.")] = 5
    producer: Annotated[Name | None, Field(description="Who asks; keys the last known answer.")] = None
    idempotency_key: Annotated[Name | None, Field(description="The same key is answered once.")] = None
    allowed_regions: Annotated[
        list[str], Field(max_length=32, description="Cloud regions that may see the inputs. Empty: any.")
    ] = []
    use_cache: Annotated[bool, Field(description="Whether a fresh cached answer will do.")] = True
    accuracy: Annotated[
        AccuracyMode | None,
        Field(description="How right the answer has to be; otherwise the daemon's setting `accuracy.mode`."),
    ] = None
    explain: Annotated[bool, Field(description="Whether to say how the target was chosen.")] = False
    shadow: Annotated[
        bool, Field(description="Whether a cloud variant may be asked the same in the background, to watch the edge's.")
    ] = True
    delivery: Annotated[
        Literal["now", "durable"],
        Field(description="`durable`: kept on the disk until answered; the result is published by MQTT (202)."),
    ] = "now"
    metadata: Annotated[
        dict[str, str], Field(max_length=16, description="Yours: at most 16 texts, of which nothing depends.")
    ] = {}

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"model": "digits", "inputs": _THREE, "deadline_ms": 50, "priority": 7}]}
    )


class AttemptDocument(_Documented):
    """One try on one target."""

    target: Annotated[str, Field(description="Who was asked.")]
    tier: Annotated[Tier, Field(description="Where that is.")]
    variant: Annotated[str, Field(description="The model file it was asked for.")]
    outcome: Annotated[
        str,
        Field(
            description="`ok`, `unavailable`, `busy`, `timeout`, `failed`, or `cancelled`: another one answered first."
        ),
    ]
    elapsed_ms: Annotated[float, Field(description="Until it answered or was given up.")]
    error: Annotated[str | None, Field(description="What went wrong; left out after `ok`.")] = None
    hedge: Annotated[bool, Field(description="Begun while another was late; left out where it was not.")] = False


class TimingDocument(_Documented):
    """Milliseconds."""

    queue: Annotated[float, Field(description="Waiting for a turn at the target.")]
    link: Annotated[float, Field(description="On the way there and back.")]
    compute: Annotated[float, Field(description="In the model.")]
    total: Annotated[
        float,
        Field(description="From receipt to answer: the others, the daemon's own time and attempts that failed."),
    ]


class AnswerDocument(_Documented):
    """The answer, where it came from, how old it is and why that tier was chosen."""

    request_id: Annotated[str, Field(description="The request's, or the one that was made for it.")]
    model: Annotated[str, Field(description="The family that was asked for.")]
    label: Annotated[str | None, Field(description="The most probable class; null where the model has no labels.")]
    confidence: Annotated[
        float | None,
        Field(ge=0, le=1, description="The largest probability; null without labels and for an earlier input."),
    ]
    calibrated: Annotated[bool, Field(description="Whether `confidence` was fitted on held-out data.")]
    out_of_range: Annotated[
        bool, Field(description="Whether inputs are outside of what the model was trained on; `reasons` say which.")
    ]
    escalation: Annotated[
        Literal["", "escalated", "held"],
        Field(
            description="`escalated`: the small model was not sure, and a more accurate one answered; `held`: it could "
            "not, and this is the small model's answer."
        ),
    ]
    tier: Annotated[Tier, Field(description="Where it was computed; `fallback`: a stale cache entry.")]
    origin_tier: Annotated[Tier, Field(description="Where it was computed, also for a cache entry.")]
    target: Annotated[str, Field(description="Who answered: a target of `/status`, or `cache`.")]
    variant: Annotated[str, Field(description="The model file that computed it.")]
    model_sha256: Annotated[str, Field(description="The digest of that file.")]
    provider: Annotated[str, Field(description="The library and the processor that really ran it.")]
    latency_class: Annotated[LatencyClass, Field(description="The request's, as given or as its deadline made it.")]
    timing_ms: Annotated[TimingDocument, Field(description="Where the time went, in milliseconds.")]
    deadline_met: Annotated[bool, Field(description="Whether the answer was ready in time.")]
    cost_usd: Annotated[float, Field(description="What cloud lanes charged for it.")]
    cached: Annotated[bool, Field(description="Whether it was computed for an earlier request.")]
    stale: Annotated[
        bool,
        Field(description="Old, or to an earlier input; served because nothing could be asked."),
    ]
    same_input: Annotated[bool, Field(description="False: the producer's last known answer, to an earlier input.")]
    age_s: Annotated[float, Field(description="Seconds since it was computed; 0 unless `cached`.")]
    attempts: Annotated[
        list[AttemptDocument],
        Field(description="Every try on a target, in order; none for a fresh answer from the cache."),
    ]
    reasons: Annotated[list[str], Field(description="Why that tier was chosen, and others were not.")]
    explanation: Annotated[
        dict[str, Any] | None, Field(description="How the target was chosen; only with `explain`.")
    ] = None
    outputs: Annotated[dict[str, list[Any]], Field(description="Left out with `?outputs=false`.")] = {}

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "request_id": "4f9c0e7a",
                    "model": "digits",
                    "label": "3",
                    "confidence": 0.981445,
                    "calibrated": True,
                    "out_of_range": False,
                    "escalation": "",
                    "tier": "edge_gpu",
                    "origin_tier": "edge_gpu",
                    "target": "edge_gpu",
                    "variant": "float32",
                    "model_sha256": "9b74c9897bac770ffc029102a200c5de3a1c2d0b6f1f1e5e2c2f6b2a0d9f8c11",
                    "provider": "xnnpack",
                    "latency_class": "near",
                    "timing_ms": {"queue": 0.02, "link": 0.0, "compute": 0.31, "total": 0.62},
                    "deadline_met": True,
                    "cost_usd": 0.0,
                    "cached": False,
                    "stale": False,
                    "same_input": True,
                    "age_s": 0.0,
                    "attempts": [
                        {
                            "target": "edge_gpu",
                            "tier": "edge_gpu",
                            "variant": "float32",
                            "outcome": "ok",
                            "elapsed_ms": 0.4,
                        }
                    ],
                    "reasons": ["edge_gpu: within the deadline, free, most accurate variant"],
                    "outputs": {"scores": [[0.001, 0.002, 0.003, 0.981, 0.001, 0.002, 0.003, 0.002, 0.003, 0.002]]},
                }
            ]
        }
    )


class ExplanationDocument(_Documented):
    """How a request was decided. `docs/traces.md` names the keys below these."""

    request_id: Annotated[str, Field(description="The request's.")]
    at: Annotated[float, Field(description="Unix time of receipt.")]
    request: Annotated[dict[str, Any], Field(description="What was asked, defaults filled in, without its tensors.")]
    stages: Annotated[
        list[dict[str, Any]],
        Field(description="Each time routing was asked: `decision` with its candidates and weights, `attempts`."),
    ]
    outcome: Annotated[dict[str, Any], Field(description="What came of it: an answer or a refusal.")]
    reasons: Annotated[list[str], Field(description="The same for a person.")]


class FaultDocument(_Documented):
    code: Annotated[str, Field(description="For programs.")]
    message: Annotated[str, Field(description="For people: what was found, what is allowed.")]
    field: Annotated[str | None, Field(description="The part of the request that is wrong.")] = None
    retry_after_s: Annotated[float | None, Field(description="When asking again may help, where that is known.")] = None


class RefusalDocument(_Documented):
    """No answer, and why."""

    request_id: Annotated[str | None, Field(description="The request's; null where none could be made of it.")]
    error: Annotated[FaultDocument, Field(description="Why.")]
    attempts: Annotated[list[AttemptDocument], Field(description="Every try on a target, in order.")]
    cost_usd: Annotated[float, Field(description="What the attempts cost all the same.")]
    reasons: Annotated[list[str], Field(description="Which targets could not be asked, and why.")]
    explanation: Annotated[dict[str, Any] | None, Field(description="How it came to this; only with `explain`.")] = None

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "request_id": None,
                    "error": {
                        "code": "invalid_request",
                        "message": "priority: must be a whole number from 1 to 10, found 11",
                        "field": "priority",
                    },
                    "attempts": [],
                    "cost_usd": 0.0,
                    "reasons": [],
                }
            ]
        }
    )


class ReadyDocument(_Documented):
    ready: Annotated[bool, Field(description="Whether some target can be asked.")]
    reason: Annotated[str, Field(description="Why not; empty when ready.")]


class AliveDocument(_Documented):
    status: Annotated[Literal["alive"], Field(description="Always this: a daemon that is not does not answer.")]


class AcceptedDocument(_Documented):
    """A durable request is on the disk."""

    request_id: Annotated[str, Field(description="The request's.")]
    state: Annotated[Literal["accepted"], Field(description="It will be answered, or accounted for.")]
    id: Annotated[str, Field(description="The idempotency key of its result.")]
    duplicate: Annotated[bool, Field(description="It was accepted before, under the same `idempotency_key`.")]
    result_topic: Annotated[str, Field(description="Where the result is published on the gateway's broker.")]


_MODELS = (
    InferDocument,
    AnswerDocument,
    AcceptedDocument,
    ExplanationDocument,
    RefusalDocument,
    ReadyDocument,
    AliveDocument,
)

REFUSALS = {
    400: "The request is wrong (`invalid_request`), or its body is not JSON (`undecodable`).",
    401: "No token, or one that is not valid here (`unauthorized`); see `WWW-Authenticate`.",
    403: "The token lacks the role, or is another producer's (`forbidden`).",
    404: "The catalogue has no such model or variant (`unknown_model`).",
    408: "The body did not arrive in time (`body_timeout`).",
    413: "The body is larger than `http.max_body_bytes` (`too_large`).",
    415: "Neither application/json nor application/octet-stream (`unsupported_media_type`).",
    429: "A bounded queue (`overloaded`) or the outbox (`outbox_full`) is full, or this caller asks too often "
    "(`rate_limited`); see `Retry-After`.",
    503: "Every target failed or none could be asked, and nothing is cached (`unavailable`); the request cannot be "
    "put on record (`audit_unavailable`); or the disk did not take a durable request (`not_stored`).",
    504: "The deadline passed, and nothing is cached (`deadline_exceeded`).",
}


def with_components(openapi: Callable[[], dict[str, Any]]) -> Callable[[], dict[str, Any]]:
    """The application's OpenAPI document, with the schemas that the operations refer to."""

    def document() -> dict[str, Any]:
        whole = openapi()
        components = whole.setdefault("components", {})
        components["securitySchemes"] = {"bearer": {"type": "http", "scheme": "bearer", "bearerFormat": "JWT"}}
        whole["security"] = [{"bearer": []}, {}]
        schemas = components.setdefault("schemas", {})
        if InferDocument.__name__ not in schemas:
            _, made = models_json_schema(
                [(model, "validation") for model in _MODELS], ref_template="#/components/schemas/{model}"
            )
            schemas.update(made["$defs"])
        return whole

    return document


def _ref(model: type[BaseModel]) -> dict[str, Any]:
    return {"schema": {"$ref": f"#/components/schemas/{model.__name__}"}}


def _json(model: type[BaseModel], description: str) -> dict[str, Any]:
    return {"description": description, "content": {"application/json": _ref(model)}}


def infer_operation() -> dict[str, Any]:
    """The operation object of `POST /infer`. Query parameters carry the options of a raw body."""
    options = InferDocument.model_json_schema()["properties"]
    query: list[tuple[str, Any, str]] = [
        (name, options[name], options[name].get("description", ""))
        for name in options
        if name not in ("inputs", "metadata")
    ]
    query += [
        (
            "dtype",
            {"type": "string", "enum": list(DTYPES)},
            "How the bytes are to be read (little-endian); otherwise the model's own type.",
        ),
        ("scale", {"type": "number", "default": 1}, "Values are multiplied by this."),
    ]
    parameters = [
        {"name": name, "in": "query", "description": f"For octet-stream. {text}".strip(), "schema": _inline(schema)}
        for name, schema, text in query
    ]
    outputs = {"name": "outputs", "in": "query", "description": "false: leave the output tensors out of the answer."}
    parameters.append({**outputs, "schema": {"type": "boolean", "default": True}})
    return {
        "parameters": parameters,
        "requestBody": {
            "required": True,
            "content": {
                "application/json": _ref(InferDocument),
                "application/octet-stream": {
                    "schema": {"type": "string", "format": "binary"},
                    "example": "(the tensor's little-endian bytes; `model` and the other options are query parameters)",
                },
            },
        },
        "responses": {
            "200": _json(AnswerDocument, "The best answer that could be had in time."),
            "202": _json(AcceptedDocument, "With `delivery: durable`: it is on the disk."),
            **{str(status): _json(RefusalDocument, text) for status, text in REFUSALS.items()},
        },
    }


def _inline(schema: Any) -> dict[str, Any]:
    """The schema of a parameter: what a key of the document takes when it is not null."""
    options = [option for option in schema.get("anyOf", (schema,)) if option.get("type") != "null"]
    if "$ref" in options[0]:
        return {"type": "string", "enum": [member.value for member in LatencyClass]}
    return {key: value for key, value in options[0].items() if key not in ("description", "title")}


def explain_operation() -> dict[str, Any]:
    """The operation object of `GET /explain/{request_id}`."""
    return {
        "parameters": [
            {
                "name": "request_id",
                "in": "path",
                "required": True,
                "description": "Of an answer or a refusal.",
                "schema": {"type": "string"},
            }
        ],
        "responses": {
            "200": _json(ExplanationDocument, "How it was decided."),
            "404": _json(RefusalDocument, "Not among the last `routing.explain_last` requests (`not_remembered`)."),
        },
    }


def ready_operation() -> dict[str, Any]:
    return {
        "responses": {
            "200": _json(ReadyDocument, "Some target can be asked now."),
            "503": _json(ReadyDocument, "None can; `reason` says why."),
        }
    }


def alive_operation() -> dict[str, Any]:
    return {"responses": {"200": _json(AliveDocument, "The event loop turns.")}}


def plain_operation(media_type: str, description: str, *, many: bool = False) -> dict[str, Any]:
    """An operation that answers with a document of `media_type`; `many`: with a list of them."""
    schema: dict[str, Any] = {"type": "object"} if media_type == "application/json" else {"type": "string"}
    schema = {"type": "array", "items": schema} if many else schema
    return {"responses": {"200": {"description": description, "content": {media_type: {"schema": schema}}}}}
