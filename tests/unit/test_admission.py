"""Admission: every request that gets in is whole, and every one that does not says which field is to blame."""

import json
import math
from typing import Any

import numpy as np
import pytest
from fakes import family_document, make_catalog
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from agent.config import LaneSection, LatencyThresholds, ProducerSection, RoutingSection
from agent.core.clock import ManualClock
from agent.core.errors import InvalidRequest, UnknownModel
from agent.core.types import AccuracyMode, InferenceRequest, LatencyClass
from agent.routing import admission as module
from agent.routing.admission import Admission, class_of

BATCH_S = 5.0
FLAT = [0.5, -1.0, 2.0, 0.0]


def typed(dtype: str, shape: tuple[int, ...] = (1, 4)) -> dict[str, Any]:
    return family_document(inputs=[{"name": "window", "dtype": dtype, "shape": list(shape)}])


CATALOG = make_catalog(
    toy=family_document(),
    half=typed("float16"),
    small=typed("int8"),
    pair=family_document(inputs=[{"name": n, "dtype": "float32", "shape": [1, 2]} for n in ("left", "right")]),
)
CLOCK = ManualClock()
ADMISSION = Admission(CATALOG, RoutingSection(), CLOCK, BATCH_S)


def admit(document: object = None, **fields: Any) -> InferenceRequest:
    return ADMISSION.from_document({"model": "toy", "inputs": FLAT, **fields} if document is None else document)


def refused(document: object = None, **fields: Any) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as caught:
        admit(document, **fields)
    error = caught.value
    assert str(error).startswith(f"{error.field}: ")
    assert len(str(error)) < 400
    str(error).encode()
    return error


# --- classes and deadlines -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("deadline_ms", "expected"),
    [
        (0.001, LatencyClass.REALTIME),
        (10, LatencyClass.REALTIME),
        (10.001, LatencyClass.NEAR),
        (100, LatencyClass.NEAR),
        (100.001, LatencyClass.INTERACTIVE),
        (500, LatencyClass.INTERACTIVE),
        (1000, LatencyClass.INTERACTIVE),
        (1000.001, LatencyClass.BATCH),
        (3_600_000, LatencyClass.BATCH),
    ],
)
def test_a_deadline_sets_the_class(deadline_ms: float, expected: LatencyClass) -> None:
    assert class_of(deadline_ms, LatencyThresholds()) is expected
    request = admit(deadline_ms=deadline_ms)
    assert request.latency_class is expected
    assert request.deadline - request.received == pytest.approx(deadline_ms / 1e3)


@pytest.mark.parametrize(
    ("named", "seconds"), [("realtime", 0.01), ("near", 0.1), ("interactive", 0.5), ("batch", BATCH_S), (None, 0.5)]
)
def test_a_class_sets_the_deadline(named: str | None, seconds: float) -> None:
    request = admit(latency_class=named)
    assert request.latency_class == (named or "interactive")
    assert request.deadline == CLOCK.monotonic() + seconds


def test_the_class_and_the_deadline_that_are_given_both_hold() -> None:
    request = admit(latency_class="realtime", deadline_ms=700)
    assert request.latency_class is LatencyClass.REALTIME
    assert request.deadline - request.received == pytest.approx(0.7)


def test_a_batch_deadline_is_never_below_its_threshold() -> None:
    request = Admission(CATALOG, RoutingSection(), CLOCK, 0.2).from_document(
        {"model": "toy", "inputs": FLAT, "latency_class": "batch"}
    )
    assert request.deadline - request.received == 1.0


def test_limits_are_settings() -> None:
    limits = LatencyThresholds(realtime=1, near_realtime=2, interactive=3, batch=4)
    request = Admission(CATALOG, RoutingSection(latency_thresholds=limits), CLOCK, BATCH_S).from_document(
        {"model": "toy", "inputs": FLAT, "deadline_ms": 5}
    )
    assert request.latency_class is LatencyClass.BATCH


def test_time_counts_from_receipt() -> None:
    request = ADMISSION.from_document({"model": "toy", "inputs": FLAT, "deadline_ms": 50}, received=12.0)
    assert (request.received, request.deadline) == (12.0, 12.05)


# --- the other fields ------------------------------------------------------------------------------------------------


def test_defaults() -> None:
    request = admit()
    assert len(request.id) == 32
    assert (request.priority, request.max_retries, request.timeout_ms, request.variant) == (5, 5, None, None)
    assert (request.producer, request.idempotency_key, request.use_cache) == ("anonymous", None, True)
    assert (request.allowed_regions, request.metadata) == (frozenset(), {})
    assert admit().id != request.id


def test_the_mode_is_the_setting_where_the_request_names_none() -> None:
    document = {"model": "toy", "inputs": FLAT}
    assert ADMISSION.from_document(document).accuracy is AccuracyMode.ADAPTIVE
    strict = Admission(CATALOG, RoutingSection(), CLOCK, BATCH_S, AccuracyMode.HIGH)
    assert strict.from_document(document).accuracy is AccuracyMode.HIGH
    assert strict.from_document(document | {"accuracy": None}).accuracy is AccuracyMode.HIGH
    assert strict.from_document(document | {"accuracy": "acceptable"}).accuracy is AccuracyMode.ACCEPTABLE


def test_every_field_is_taken_over() -> None:
    request = admit(
        request_id="r",
        variant="small",
        priority=10,
        max_retries=0,
        timeout_ms=5,
        producer="press-7",
        idempotency_key="k",
        allowed_regions=["eu", "us"],
        use_cache=False,
        accuracy="high",
        explain=True,
        shadow=False,
        metadata={"line": "3"},
    )
    assert (request.id, request.variant, request.priority, request.max_retries) == ("r", "small", 10, 0)
    assert (request.timeout_ms, request.producer, request.idempotency_key) == (5.0, "press-7", "k")
    assert (request.allowed_regions, request.use_cache) == ({"eu", "us"}, False)
    assert (request.accuracy, request.explain, request.shadow) == (AccuracyMode.HIGH, True, False)
    assert request.metadata == {"line": "3"}


def test_what_the_door_knows_wins() -> None:
    document = {"model": "half", "producer": "liar", "inputs": FLAT}
    request = ADMISSION.from_document(document, model="toy", producer="press-7")
    assert (request.model, request.producer) == ("toy", "press-7")


HUGE = int("9" * 5000, 16)
WORDS = ["request_id", "model", "variant", "latency_class", "producer", "idempotency_key"]
BAD_WORDS = [1, True, [], {}, "", "x" * 129, "a\nb", "\x00", "\ud800"]
BAD = [
    *((word, bad) for word in WORDS for bad in BAD_WORDS),
    ("latency_class", "REALTIME"),
    *(("deadline_ms", bad) for bad in (0, -1, 3_600_001, math.nan, math.inf, True, "5", [], HUGE, -HUGE)),
    *(("timeout_ms", bad) for bad in (0, -1, math.nan, True, "5", HUGE)),
    *(("priority", bad) for bad in (0, 11, 5.0, True, "5", HUGE, math.nan)),
    *(("max_retries", bad) for bad in (-1, 17, 1.0, False, "1")),
    *((flag, bad) for flag in ("use_cache", "explain", "shadow") for bad in (0, 1, "true", [])),
    *(("accuracy", bad) for bad in ("best", "HIGH", "", 1, True, [], {}, HUGE, "\ud800")),
    *(("allowed_regions", bad) for bad in ("eu", 1, {}, [1], [""], ["x" * 65], ["eu"] * 33, ["\ud800"], [None])),
    *(("metadata", bad) for bad in ("x", [], {"k": 1}, {"k": "v" * 1025}, {"k" * 129: "v"}, {"k": "\ud800"})),
    ("metadata", {str(i): "v" for i in range(17)}),
]


@pytest.mark.parametrize(("field", "bad"), BAD, ids=[f"{f}-{type(b).__name__}-{i}" for i, (f, b) in enumerate(BAD)])
def test_a_bad_field_is_named(field: str, bad: Any) -> None:
    assert refused(**{field: bad}).field == field


@pytest.mark.parametrize("body", [None, [], "x", 5, True, 1.5])
def test_a_body_that_is_no_object(body: Any) -> None:
    with pytest.raises(InvalidRequest, match=r"^\(body\): must be a JSON object, found"):
        ADMISSION.from_document(body)


@pytest.mark.parametrize("key", ["deadline", "", "x" * 10_000, "\ud800", 5])
def test_an_unknown_key_is_named(key: Any) -> None:
    error = refused({"model": "toy", "inputs": FLAT, key: 1})
    assert "unknown key; known: accuracy, allowed_regions, deadline_ms" in str(error)
    assert error.field is not None
    assert len(error.field) <= 64
    error.field.encode()


def test_what_is_missing_is_named() -> None:
    assert refused({"inputs": FLAT}).field == "model"
    error = refused({"model": "toy"})
    assert str(error) == "inputs: is missing; toy takes window: float32 [1, 4]"


def test_models_and_variants_that_are_not_there() -> None:
    with pytest.raises(UnknownModel, match="no model 'cats'; the catalogue has: half, pair, small, toy"):
        admit(model="cats")
    with pytest.raises(UnknownModel, match="toy has no variant 'tiny'; it has: large, medium, small") as caught:
        admit(variant="tiny")
    assert caught.value.field == "variant"


# --- whatever it is given --------------------------------------------------------------------------------------------

VALUES = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.just(10**400),
        st.floats(),
        st.text(max_size=8),
        st.sampled_from(["toy", "pair", "small", "near", "medium", "\ud800"]),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=5), st.dictionaries(st.sampled_from(["window", "left", "x"]), inner, max_size=2)
    ),
    max_leaves=10,
)
DOCUMENTS = st.one_of(
    VALUES,
    st.fixed_dictionaries(
        {
            "model": st.sampled_from(["toy", "pair", "small", "half", "none"]),
            "inputs": st.one_of(st.just(FLAT), VALUES),
        },
        optional=dict.fromkeys(sorted(module._KEYS - {"model", "inputs"}), VALUES),
    ),
)


@settings(max_examples=600)
@given(document=DOCUMENTS)
def test_any_document_is_refused_or_a_whole_request(document: Any) -> None:
    try:
        request = ADMISSION.from_document(document)
    except (InvalidRequest, UnknownModel) as error:
        assert error.field
        json.dumps(error.to_dict(), ensure_ascii=False).encode()
        return
    family = CATALOG.family(request.model)
    assert {name: (value.dtype.name, value.shape) for name, value in request.inputs.items()} == {
        spec.name: (spec.dtype, spec.shape) for spec in family.inputs
    }
    assert all(np.isfinite(value).all() for value in request.inputs.values())
    assert request.received < request.deadline <= request.received + 3600
    assert 1 <= request.priority <= 10
    assert 0 <= request.max_retries <= 16


# --- rules of producers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "asked", "allowed"),
    [
        ((), [], set()),
        ((), ["us"], {"us"}),
        (("eu", "uk"), [], {"eu", "uk"}),
        (("eu", "uk"), ["eu", "us"], {"eu"}),
        (("eu",), ["us"], module.NO_REGION),
    ],
)
def test_a_request_narrows_the_regions_of_its_producer_and_never_widens_them(
    rule: tuple[str, ...], asked: list[str], allowed: set[str]
) -> None:
    rules = {"ward": ProducerSection(allowed_regions=rule)}
    admission = Admission(CATALOG, RoutingSection(), CLOCK, BATCH_S, producers=rules)
    document = {"model": "toy", "inputs": FLAT, "allowed_regions": asked}
    assert admission.from_document(document, producer="ward").allowed_regions == allowed
    assert admission.from_document({**document, "producer": "ward"}).allowed_regions == allowed
    assert admission.from_document(document).allowed_regions == set(asked)


def test_no_lane_can_have_the_name_that_stands_for_none() -> None:
    (name,) = module.NO_REGION
    with pytest.raises(ValidationError):
        LaneSection(name="a", broker="mqtt://h", region=name)
