"""Classify, check and bound what callers send: the only place where an `InferenceRequest` is made."""

from __future__ import annotations

import math
import uuid
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any, NoReturn, get_args

import numpy as np

from agent.config import LatencyThresholds, ProducerSection, RoutingSection
from agent.core.clock import Clock
from agent.core.errors import InvalidRequest, UnknownKey, UnknownModel
from agent.core.types import AccuracyMode, InferenceRequest, LatencyClass, Tensor
from agent.registry.catalog import Catalog, DType, Family, FamilyTensor

MAX_DEADLINE_MS = 3_600_000.0
MAX_NAME = 128
MAX_METADATA = 16
MAX_DIMENSIONS = 8
DTYPES: tuple[str, ...] = get_args(DType)

NO_REGION = frozenset({"(none)"})
"""No lane can have a region of this name: the inputs stay on the gateway."""

_KEYS = frozenset(
    {
        "request_id",
        "model",
        "variant",
        "inputs",
        "latency_class",
        "deadline_ms",
        "timeout_ms",
        "priority",
        "max_retries",
        "producer",
        "idempotency_key",
        "allowed_regions",
        "use_cache",
        "accuracy",
        "explain",
        "shadow",
        "metadata",
        "delivery",
    }
)


class Admission:
    """Makes requests. `batch_deadline_s` is what a batch request without a deadline gets, `accuracy` what a request
    gets that names no mode; `producers` are the rules that hold whatever a request says."""

    def __init__(
        self,
        catalog: Catalog,
        routing: RoutingSection,
        clock: Clock,
        batch_deadline_s: float,
        accuracy: AccuracyMode = AccuracyMode.ADAPTIVE,
        *,
        producers: Mapping[str, ProducerSection] | None = None,
    ) -> None:
        self.catalog = catalog
        self._producers = producers or {}
        self._clock = clock
        self._accuracy = accuracy
        limits = routing.latency_thresholds
        self._limits = limits
        self._deadlines_s = {
            LatencyClass.REALTIME: limits.realtime / 1e3,
            LatencyClass.NEAR: limits.near_realtime / 1e3,
            LatencyClass.INTERACTIVE: limits.interactive / 1e3,
            LatencyClass.BATCH: max(batch_deadline_s, limits.batch / 1e3),
        }

    def from_document(
        self,
        document: object,
        *,
        model: str | None = None,
        producer: str | None = None,
        received: float | None = None,
        asked_by: str = "",
    ) -> InferenceRequest:
        """A request from decoded JSON. `model` and `producer`, where given, win over the document's.

        `inputs` is a mapping of tensor name to nested lists, or, for a model with one input, the nested list itself.
        Raises `InvalidRequest` (names the field) and `UnknownModel`.
        """
        if not isinstance(document, Mapping):
            _refuse("(body)", f"must be a JSON object, found {_kind(document)}")
        unknown = sorted(str(key)[:64] for key in document if key not in _KEYS)
        if unknown:
            _refuse(unknown[0], f"unknown key; known: {', '.join(sorted(_KEYS))}", UnknownKey)
        family = self.catalog.family(_text(document, "model", model) or _refuse("model", "is missing"))
        if "inputs" not in document:
            _refuse("inputs", f"is missing; {family.name} takes {_describe(family)}")
        return self._build(family, _tensors(document["inputs"], family), document, producer, received, asked_by)

    def from_bytes(
        self,
        data: bytes,
        *,
        model: str,
        options: Mapping[str, Any] | None = None,
        dtype: str | None = None,
        scale: float = 1.0,
        producer: str | None = None,
        received: float | None = None,
        asked_by: str = "",
    ) -> InferenceRequest:
        """A request from the raw little-endian bytes of a model's single input tensor.

        `dtype` None: the model's own. Values are multiplied by `scale`. `options` are the other keys of a document.
        """
        options = options or {}
        unknown = sorted(str(key)[:64] for key in options if key not in _KEYS)
        if unknown:
            _refuse(unknown[0], f"unknown key; known: {', '.join(sorted(_KEYS))}", UnknownKey)
        family = self.catalog.family(model)
        if len(family.inputs) != 1:
            _refuse("inputs", f"{family.name} has {len(family.inputs)} inputs: raw bytes are for models with one")
        if "inputs" in options:
            _refuse("inputs", "are given as raw bytes already")
        spec = family.inputs[0]
        if dtype is not None and dtype not in DTYPES:
            _refuse("dtype", f"must be one of {', '.join(DTYPES)}, found {_shown(dtype)}")
        kind = np.dtype(dtype or spec.dtype).newbyteorder("<")
        expected = math.prod(spec.shape) * kind.itemsize
        if len(data) != expected:
            found = f"{len(data)} bytes"
            _refuse(f"inputs.{spec.name}", f"must be {expected} bytes ({kind.name} {list(spec.shape)}), found {found}")
        inputs = self.scaled({spec.name: np.frombuffer(data, kind)}, family, scale)
        return self._build(family, inputs, options, producer, received, asked_by)

    @staticmethod
    def scaled(inputs: Mapping[str, Tensor], family: Family, scale: float) -> dict[str, Tensor]:
        """Values times `scale`, in the family's own dtypes and shapes, checked."""
        tensors = {}
        for spec in family.inputs:
            value = inputs[spec.name]
            if scale != 1.0:
                with np.errstate(over="ignore", invalid="ignore"):
                    value = value.astype(np.float32) * np.float32(scale)
            tensors[spec.name] = _checked(value, spec)
        return tensors

    def _build(
        self,
        family: Family,
        inputs: Mapping[str, Tensor],
        options: Mapping[str, Any],
        producer: str | None,
        received: float | None,
        asked_by: str,
    ) -> InferenceRequest:
        received = self._clock.monotonic() if received is None else received
        durable = _durable(options)
        latency_class, budget_s = self._deadline(options, durable=durable)
        variant = _text(options, "variant")
        if variant is not None and variant not in family.variants:
            known = ", ".join(sorted(family.variants))
            raise UnknownModel(f"{family.name} has no variant {variant[:64]!r}; it has: {known}", field="variant")
        producer = producer or _text(options, "producer") or "anonymous"
        notes = _notes(inputs, family)
        return InferenceRequest(
            id=_text(options, "request_id") or uuid.uuid4().hex,
            model=family.name,
            inputs=inputs,
            latency_class=latency_class,
            received=received,
            deadline=received + budget_s,
            priority=_integer(options, "priority", 5, 1, 10),
            max_retries=_integer(options, "max_retries", 5, 0, 16),
            timeout_ms=_milliseconds(options, "timeout_ms"),
            variant=variant,
            producer=producer,
            idempotency_key=_text(options, "idempotency_key"),
            allowed_regions=self.allowed_regions(producer, _regions(options)),
            use_cache=_boolean(options, "use_cache", True),
            accuracy=_accuracy(options, self._accuracy),
            explain=_boolean(options, "explain", False),
            shadow=_boolean(options, "shadow", True),
            metadata=_metadata(options),
            durable=durable,
            notes=notes,
            out_of_range=bool(notes),
            asked_by=asked_by,
        )

    def deadline_s(self, latency_class: LatencyClass) -> float:
        """How long a request of this class has that names no deadline of its own."""
        return self._deadlines_s[latency_class]

    def allowed_regions(self, producer: str, asked: frozenset[str]) -> frozenset[str]:
        """What both the request and the producer's rule allow. Nothing is not the same as no rule: `NO_REGION`."""
        rule = self._producers.get(producer)
        if rule is None or not rule.allowed_regions:
            return asked
        allowed = frozenset(rule.allowed_regions)
        return (asked & allowed if asked else allowed) or NO_REGION

    def _deadline(self, options: Mapping[str, Any], *, durable: bool) -> tuple[LatencyClass, float]:
        """Class and seconds: an explicit deadline sets the class, unless both are given. Durable requests are batch,
        and their deadline is that of one try."""
        deadline_ms = _milliseconds(options, "deadline_ms")
        named = _text(options, "latency_class")
        if named is not None:
            try:
                latency_class = LatencyClass(named)
            except ValueError:
                _refuse("latency_class", f"must be one of {[c.value for c in LatencyClass]}, found {named[:32]!r}")
        elif durable:
            latency_class = LatencyClass.BATCH
        elif deadline_ms is not None:
            latency_class = class_of(deadline_ms, self._limits)
        else:
            latency_class = LatencyClass.INTERACTIVE
        if durable and latency_class is not LatencyClass.BATCH:
            _refuse("latency_class", f"must be batch for a durable request, found {latency_class.value}")
        return latency_class, self._deadlines_s[latency_class] if deadline_ms is None else deadline_ms / 1e3


def _notes(inputs: Mapping[str, Tensor], family: Family) -> tuple[str, ...]:
    """Inputs outside of what the model was trained on are answered, and the answer says so."""
    notes = []
    for spec in family.inputs:
        if spec.minimum is None or spec.maximum is None:
            continue
        low, high = float(inputs[spec.name].min()), float(inputs[spec.name].max())
        if low < spec.minimum or high > spec.maximum:
            unit = f" {spec.unit}" if spec.unit else ""
            trained = f"{spec.minimum:g} to {spec.maximum:g}{unit}"
            notes.append(f"inputs.{spec.name}: {low:g} to {high:g}; the model was trained on {trained}")
    return tuple(notes)


def class_of(deadline_ms: float, limits: LatencyThresholds) -> LatencyClass:
    """The strictest class that a deadline falls into."""
    if deadline_ms <= limits.realtime:
        return LatencyClass.REALTIME
    if deadline_ms <= limits.near_realtime:
        return LatencyClass.NEAR
    return LatencyClass.INTERACTIVE if deadline_ms <= limits.batch else LatencyClass.BATCH


def _refuse(field: str, message: str, kind: type[InvalidRequest] = InvalidRequest) -> NoReturn:
    field = _printable(field)
    raise kind(f"{field}: {_printable(message)}", field=field)


def _printable(text: str) -> str:
    """Without lone surrogates, which JSON can hold and no door can encode."""
    return text.encode("utf-8", "backslashreplace").decode()


def _shown(value: object) -> str:
    return "a very large number" if isinstance(value, int) and value.bit_length() > 128 else str(value)[:32]


def _kind(value: object) -> str:
    if value is None:
        return "null"
    return {dict: "an object", list: "an array", str: "a string", bool: "a boolean"}.get(type(value), "a number")


def _text(options: Mapping[str, Any], key: str, given: str | None = None) -> str | None:
    value = options.get(key) if given is None else given
    if value is None:
        return None
    if not isinstance(value, str) or not 0 < len(value) <= MAX_NAME or not value.isprintable():
        _refuse(key, f"must be 1 to {MAX_NAME} printable characters")
    return value


def _integer(options: Mapping[str, Any], key: str, default: int, low: int, high: int) -> int:
    value = options.get(key)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int):
        _refuse(key, f"must be a whole number, found {_kind(value)}")
    if not low <= value <= high:
        _refuse(key, f"must be a whole number from {low} to {high}, found {_shown(value)}")
    return value


def _milliseconds(options: Mapping[str, Any], key: str) -> float | None:
    value = options.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        _refuse(key, f"must be a number of milliseconds, found {_kind(value)}")
    if not 0 < value <= MAX_DEADLINE_MS:
        _refuse(key, f"must be above 0 and at most {MAX_DEADLINE_MS:.0f} milliseconds, found {_shown(value)}")
    return float(value)


def _boolean(options: Mapping[str, Any], key: str, default: bool) -> bool:
    value = options.get(key)
    if value is None:
        return default
    if not isinstance(value, bool):
        _refuse(key, f"must be true or false, found {_kind(value)}")
    return value


def _accuracy(options: Mapping[str, Any], default: AccuracyMode) -> AccuracyMode:
    value = options.get("accuracy")
    if value is None:
        return default
    try:
        return AccuracyMode(value)
    except ValueError:
        _refuse("accuracy", f"must be one of {[mode.value for mode in AccuracyMode]}, found {_shown(value)}")


def _durable(options: Mapping[str, Any]) -> bool:
    value = options.get("delivery")
    if value not in (None, "now", "durable"):
        _refuse("delivery", f"must be now or durable, found {_shown(value)}")
    return value == "durable"


def _regions(options: Mapping[str, Any]) -> frozenset[str]:
    value = options.get("allowed_regions")
    if value is None:
        return frozenset()
    if isinstance(value, str) or not isinstance(value, Sequence) or len(value) > 32:
        _refuse("allowed_regions", "must be a list of at most 32 region names")
    if not all(isinstance(region, str) and 0 < len(region) <= 64 and region.isprintable() for region in value):
        _refuse("allowed_regions", "must be a list of region names")
    return frozenset(value)


def _metadata(options: Mapping[str, Any]) -> dict[str, str]:
    value = options.get("metadata")
    if value is None:
        return {}
    if not isinstance(value, Mapping) or len(value) > MAX_METADATA:
        _refuse("metadata", f"must be an object of at most {MAX_METADATA} strings")
    for key, text in value.items():
        if not isinstance(key, str) or not isinstance(text, str) or len(key) > MAX_NAME or len(text) > 1024:
            _refuse("metadata", f"keys and values must be strings of at most {MAX_NAME} and 1024 characters")
        if _printable(key + text) != key + text:
            _refuse("metadata", "must be text that UTF-8 can hold")
    return dict(value)


def _describe(family: Family) -> str:
    return ", ".join(f"{spec.name}: {spec.dtype} {list(spec.shape)}" for spec in family.inputs)


def _tensors(inputs: object, family: Family) -> dict[str, Tensor]:
    if not isinstance(inputs, Mapping):
        if len(family.inputs) != 1:
            _refuse("inputs", f"must be an object with {_describe(family)}")
        inputs = {family.inputs[0].name: inputs}
    names = {spec.name for spec in family.inputs}
    for key in inputs:
        if key not in names:
            _refuse(f"inputs.{str(key)[:64]}", f"no such input; {family.name} takes {_describe(family)}", UnknownKey)
    tensors = {}
    for spec in family.inputs:
        if spec.name not in inputs:
            _refuse(f"inputs.{spec.name}", f"is missing; must be {spec.dtype} {list(spec.shape)}")
        value = inputs[spec.name]
        tensors[spec.name] = _checked(value if isinstance(value, np.ndarray) else _array(value, spec), spec)
    return tensors


_NESTS = frozenset({list, tuple})


def _array(value: object, spec: FamilyTensor) -> Tensor:
    """Nested lists of numbers as an array.

    Looks at every element before numpy does: numpy would take true for 1, and make one long string among many short
    ones an array of gigabytes.
    """
    field, wanted = f"inputs.{spec.name}", f"must be numbers of shape {list(spec.shape)}"
    shape: list[int] = []
    level: Sequence[Any] = (value,)
    for _ in range(MAX_DIMENSIONS):
        kinds = set(map(type, level))
        if not kinds <= _NESTS:
            break
        lengths = set(map(len, level))
        if len(lengths) > 1:
            _refuse(field, f"{wanted}: rows differ in length")
        shape += lengths
        level = level[0] if len(level) == 1 else list(chain.from_iterable(level))
    nested = kinds & _NESTS
    for kind in kinds - nested:
        if kind is bool or not issubclass(kind, int | float | np.number):
            _refuse(field, f"{wanted}, found {_kind(next(item for item in level if type(item) is kind))}")
    if nested:
        _refuse(field, f"{wanted}: " + ("rows differ in length" if kinds != nested else "nested too deeply"))
    array = np.array(level)
    if array.dtype.kind == "O":
        _refuse(field, f"holds a value too large for {spec.dtype}")
    return array.reshape(shape)


def _squeezed(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(size for size in shape if size != 1)


def _checked(value: Tensor, spec: FamilyTensor) -> Tensor:
    """The tensor in the canonical dtype and shape. A flat one, or one that lacks dimensions of 1, is taken as well."""
    field = f"inputs.{spec.name}"
    if value.dtype.kind not in "fiu":
        _refuse(field, f"must be numbers of shape {list(spec.shape)}")
    shape = spec.shape
    flat = math.prod(shape)
    if value.shape != shape and value.shape != (flat,) and _squeezed(value.shape) != _squeezed(shape):
        others = " or ".join(dict.fromkeys((str(list(_squeezed(shape))), str([flat]))))
        _refuse(field, f"must have shape {list(shape)} (or {others}), found {list(value.shape)}")
    with np.errstate(over="ignore", invalid="ignore"):
        tensor = np.ascontiguousarray(value, dtype=spec.dtype).reshape(shape)
    if tensor.dtype.kind == "f" and not np.isfinite(tensor).all():
        _refuse(field, f"holds NaN, infinity or a value too large for {spec.dtype}")
    if tensor.dtype.kind in "iu" and not np.array_equal(tensor.ravel(), value.ravel()):
        _refuse(field, f"holds a value that {spec.dtype} cannot")
    return tensor
