"""Admission of tensors: nested lists, arrays and raw bytes, and what none of them may do."""

import json
import math
import resource
from typing import Any

import numpy as np
import pytest
from fakes import INPUT, family_document, make_catalog
from hypothesis import given
from hypothesis import strategies as st

from agent.config import RoutingSection, SensorSection
from agent.core.clock import ManualClock
from agent.core.errors import InvalidRequest
from agent.core.types import InferenceRequest, LatencyClass
from agent.ingress import sensors
from agent.routing import admission as module
from agent.routing.admission import Admission

HUGE = int("9" * 5000, 16)
FLAT = [0.5, -1.0, 2.0, 0.0]


def typed(dtype: str, shape: tuple[int, ...] = (1, 4)) -> dict[str, Any]:
    return family_document(inputs=[{"name": "window", "dtype": dtype, "shape": list(shape)}])


CATALOG = make_catalog(
    toy=family_document(),
    half=typed("float16"),
    small=typed("int8"),
    large=typed("int64"),
    line=typed("float32", (4,)),
    cube=typed("float32", (2, 1, 2)),
    pair=family_document(inputs=[{"name": n, "dtype": "float32", "shape": [1, 2]} for n in ("left", "right")]),
)
ADMISSION = Admission(CATALOG, RoutingSection(), ManualClock(), batch_deadline_s=5.0)


def admit(**fields: Any) -> InferenceRequest:
    return ADMISSION.from_document({"model": "toy", "inputs": FLAT, **fields})


def refused(**fields: Any) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as caught:
        admit(**fields)
    error = caught.value
    assert str(error).startswith(f"{error.field}: ")
    assert len(str(error)) < 400
    str(error).encode()
    return error


# --- tensors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "inputs",
    [
        FLAT,
        [FLAT],
        {"window": FLAT},
        {"window": [FLAT]},
        INPUT,
        INPUT[0],
        (0.5, -1, 2, 0),
        INPUT.astype(np.float64),
        [[FLAT]],
    ],
    ids=str,
)
def test_shapes_that_are_taken(inputs: Any) -> None:
    tensor = admit(inputs=inputs).inputs["window"]
    assert (tensor.dtype, tensor.shape) == (np.float32, (1, 4))
    assert np.array_equal(tensor, INPUT)


def test_two_inputs() -> None:
    request = admit(model="pair", inputs={"right": [3, 4], "left": [[1, 2]]})
    assert {name: value.tolist() for name, value in request.inputs.items()} == {"left": [[1, 2]], "right": [[3, 4]]}


BAD_INPUTS = [
    ("toy", [1, 2, 3], "must have shape [1, 4] (or [4]), found [3]"),
    ("toy", [[1, 2], [3, 4]], "found [2, 2]"),
    ("toy", [], "found [0]"),
    ("toy", [[]], "found [1, 0]"),
    ("toy", 5, "found []"),
    ("line", 5, "found []"),
    ("cube", [[1, 2]], "found [1, 2]"),
    ("toy", [[1, 2], [3]], "rows differ in length"),
    ("toy", [1, [2, 3, 4]], "rows differ in length"),
    ("toy", [1, 2, "3", 4], "must be numbers of shape [1, 4], found a string"),
    ("toy", "1234", "found a string"),
    ("toy", [1, 2, None, 4], "found null"),
    ("toy", None, "found null"),
    ("toy", [1, 2, True, 4], "found a boolean"),
    ("toy", [True] * 4, "found a boolean"),
    ("toy", True, "found a boolean"),
    ("toy", [1, 2, 3, {}], "found an object"),
    ("toy", [{"window": FLAT}], "found an object"),
    ("toy", [1, 2, 3, math.nan], "holds NaN, infinity or a value too large for float32"),
    ("toy", [1, 2, 3, -math.inf], "holds NaN, infinity or a value too large for float32"),
    ("toy", [1, 2, 3, 1e39], "holds NaN, infinity or a value too large for float32"),
    ("toy", [1, 2, 3, 2**200], "holds a value too large for float32"),
    ("toy", [1, 2, 3, HUGE], "holds a value too large for float32"),
    ("half", [1, 2, 3, 65_520], "holds NaN, infinity or a value too large for float16"),
    ("small", [1, 2, 3, 128], "holds a value that int8 cannot"),
    ("small", [1, 2, 3, 0.5], "holds a value that int8 cannot"),
    ("small", [1, 2, 3, math.nan], "holds a value that int8 cannot"),
    ("large", [1, 2, 3, 2**63], "holds a value that int64 cannot"),
    ("large", [1.0, 2.0, 3.0, 2.0**63], "holds a value that int64 cannot"),
    ("toy", np.array(["a"] * 4), "must be numbers of shape [1, 4]"),
    ("toy", np.array([True] * 4), "must be numbers of shape [1, 4]"),
    ("toy", np.array([1j] * 4), "must be numbers of shape [1, 4]"),
]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("model", "inputs", "expected"), BAD_INPUTS, ids=[f"{i}-{e}" for i, (*_, e) in enumerate(BAD_INPUTS)]
)
def test_bad_inputs_are_named(model: str, inputs: Any, expected: str) -> None:
    error = refused(model=model, inputs=inputs)
    assert error.field == "inputs.window"
    assert expected in str(error)


def test_inputs_by_name() -> None:
    assert refused(inputs={"window": FLAT, "x" * 100: 1}).field == "inputs." + "x" * 64
    assert refused(inputs={}).field == "inputs.window"
    assert refused(model="pair", inputs={"left": [1, 2]}).field == "inputs.right"
    assert str(refused(model="pair", inputs=[1, 2])).startswith(
        "inputs: must be an object with left: float32 [1, 2], r"
    )


def test_deep_nests_are_refused() -> None:
    nest: Any = 1.0
    for _ in range(500):
        nest = [nest]
    assert "nested too deeply" in str(refused(inputs=nest))


def test_strings_among_inputs_do_not_become_an_array() -> None:
    """A numpy array of strings takes the longest one's room for each: 100,000 x 100,000 x 4 bytes here."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for inputs in ([["x" * 100_000] + [""] * 100_000], [1, ["x" * 100_000] + [""] * 100_000]):
        assert refused(inputs=inputs).field == "inputs.window"
    nest: Any = ["x" * 100_000] + [""] * 100_000
    for _ in range(module.MAX_DIMENSIONS + 2):
        nest = [nest]
    assert refused(inputs=nest).field == "inputs.window"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KiB


# --- raw bytes -------------------------------------------------------------------------------------------------------


def from_bytes(data: bytes, **options: Any) -> InferenceRequest:
    return ADMISSION.from_bytes(data, **{"model": "toy", **options})


def test_raw_bytes_in_the_models_own_type() -> None:
    request = from_bytes(INPUT.astype("<f4").tobytes(), producer="p", received=7.0, options={"deadline_ms": 10})
    assert np.array_equal(request.inputs["window"], INPUT)
    assert (request.producer, request.received, request.latency_class) == ("p", 7.0, LatencyClass.REALTIME)


def test_raw_bytes_of_another_type_and_scale() -> None:
    data = np.array([100, -200, 300, 0], "<i2").tobytes()
    assert from_bytes(data, dtype="int16").inputs["window"].tolist() == [[100, -200, 300, 0]]
    scaled = from_bytes(data, dtype="int16", scale=0.01).inputs["window"]
    assert scaled.dtype == np.float32
    assert scaled.ravel().tolist() == pytest.approx([1, -2, 3, 0])


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("data", "options", "field", "expected"),
    [
        (bytes(15), {}, "inputs.window", "must be 16 bytes (float32 [1, 4]), found 15 bytes"),
        (b"", {}, "inputs.window", "must be 16 bytes"),
        (bytes(16), {"dtype": "int16"}, "inputs.window", "must be 8 bytes (int16 [1, 4]), found 16 bytes"),
        (bytes(16), {"dtype": "nonsense"}, "dtype", "must be one of float32, float16"),
        (bytes(32), {"dtype": "object"}, "dtype", "must be one of"),
        (bytes(32), {"dtype": "O"}, "dtype", "must be one of"),
        (bytes(16), {"dtype": ">f4"}, "dtype", "must be one of"),
        (bytes(16), {"model": "pair"}, "inputs", "pair has 2 inputs: raw bytes are for models with one"),
        (np.array([1, 2, 3, np.nan], "<f4").tobytes(), {}, "inputs.window", "holds NaN"),
        (np.array([1, 2, 3, 3e38], "<f4").tobytes(), {"scale": 10.0}, "inputs.window", "holds NaN, infinity"),
        (bytes(16), {"scale": math.nan}, "inputs.window", "holds NaN"),
        (bytes(16), {"scale": math.inf}, "inputs.window", "holds NaN"),
        (bytes(range(4)), {"model": "small", "scale": 0.5}, "inputs.window", "holds a value that int8 cannot"),
        (bytes(16), {"options": {"surprise": 1}}, "surprise", "unknown key"),
        (bytes(16), {"options": {"inputs": FLAT}}, "inputs", "are given as raw bytes already"),
        (bytes(16), {"options": {"priority": 99}}, "priority", "from 1 to 10"),
    ],
)
def test_bad_raw_bytes_are_named(data: bytes, options: Any, field: str, expected: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        from_bytes(data, **options)
    assert caught.value.field == field
    assert expected in str(caught.value)


@given(data=st.binary(max_size=40), dtype=st.one_of(st.none(), st.text(max_size=5), st.sampled_from(module.DTYPES)))
def test_any_bytes_are_refused_or_a_whole_request(data: bytes, dtype: str | None) -> None:
    try:
        request = from_bytes(data, dtype=dtype)
    except InvalidRequest as error:
        assert error.field
    else:
        assert request.inputs["window"].shape == (1, 4)
        assert np.isfinite(request.inputs["window"]).all()


def test_inputs_outside_of_the_training_range_are_answered_and_named() -> None:
    ranged = family_document(
        inputs=[{"name": "window", "dtype": "float32", "shape": [1, 4], "minimum": 0, "maximum": 16, "unit": "grey"}]
    )
    admission = Admission(make_catalog(ranged=ranged), RoutingSection(), ManualClock(), batch_deadline_s=5.0)
    inside = admission.from_document({"model": "ranged", "inputs": [0, 1, 2, 16]})
    outside = admission.from_document({"model": "ranged", "inputs": [-1, 0, 0, 255]})
    assert (inside.notes, inside.out_of_range, outside.out_of_range) == ((), False, True)
    assert outside.notes == ("inputs.window: -1 to 255; the model was trained on 0 to 16 grey",)


@pytest.mark.parametrize("values", [["x" * 20_000, "", "", ""], [True, 0.5, 1, 2], [[1, 2], [True, 3]]])
def test_a_scaled_reading_is_looked_at_before_an_array_is_made_of_it(
    values: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sensors.np, "asarray", lambda *_: pytest.fail("made"))
    sensor = sensors.Sensor("a", SensorSection(model="toy", scale=2.0))
    admission = Admission(make_catalog(), RoutingSection(), ManualClock(), 5.0)
    with pytest.raises(InvalidRequest) as caught:
        sensor.request(admission, json.dumps(values).encode(), "a", 0.0)
    assert caught.value.field == "inputs.window"
