"""Canonical tensors to and from a model file's: the affine formula, its rounding, and bytes there and back."""

import math
from typing import Any

import numpy as np
import pytest
from fakes import LABELS, family_document, make_catalog, variant_document
from hypothesis import given
from hypothesis import strategies as st

from agent.core.errors import TargetFailed
from agent.registry.catalog import Family, VariantTensor
from agent.registry.tensors import classify, dequantise, from_variant, pack, quantise, to_variant, unpack


def spec(dtype: str = "int8", scale: float | None = 0.5, zero_point: int | None = 3, **changes: Any) -> VariantTensor:
    fields = {"name": "t", "maps": "t", "dtype": dtype, "shape": (1,), "scale": scale, "zero_point": zero_point}
    return VariantTensor.model_validate(fields | changes)


def tflite_quantise(real: float, scale: float, zero_point: int, low: int, high: int) -> int:
    """`AffineQuantize` of TensorFlow Lite's reference kernels: single-precision quotient, `std::round`, clamp."""
    quotient = float(np.float32(real) / np.float32(scale))
    whole = math.floor(abs(quotient))
    rounded = math.copysign(whole + (abs(quotient) - whole >= 0.5), quotient)
    return int(min(high, max(low, rounded + zero_point)))


@pytest.mark.parametrize(
    ("real", "expected"),
    [
        (0.0, 3),
        (1.0, 5),
        (-1.0, 1),
        (0.25, 4),  # 0.5 away from zero: 1 + 3
        (-0.25, 2),  # -0.5 away from zero: -1 + 3
        (0.75, 5),
        (-0.75, 1),
        (float(np.nextafter(np.float32(0.25), np.float32(0))), 3),  # 0.49999997: the next float below a half
        (-float(np.nextafter(np.float32(0.25), np.float32(0))), 3),
        (62.0, 127),
        (62.3, 127),
        (1e30, 127),
        (-65.5, -128),
        (-1e30, -128),
        (3.4e38, 127),
    ],
)
def test_quantise_by_hand(real: float, expected: int) -> None:
    assert quantise(np.array([real], np.float32), spec()).tolist() == [expected]


@pytest.mark.filterwarnings("error")
def test_quantise_of_what_single_precision_cannot_hold() -> None:
    assert quantise(np.array([3e38], np.float32), spec(scale=1e-3)).tolist() == [127]


@given(
    real=st.floats(width=32, allow_nan=False, allow_infinity=False),
    scale=st.floats(min_value=2**-20, max_value=2**20, width=32),
    dtype=st.sampled_from(["int8", "uint8", "int16", "int32"]),
    data=st.data(),
)
def test_quantise_as_tensorflow_lite_does(real: float, scale: float, dtype: str, data: st.DataObject) -> None:
    limits = np.iinfo(dtype)
    zero_point = data.draw(st.integers(int(limits.min), int(limits.max)))
    found = quantise(np.array([real], np.float32), spec(dtype, scale, zero_point))
    with np.errstate(over="ignore"):
        if np.isinf(np.float32(real) / np.float32(scale)):
            assert found.tolist() == [limits.max if real > 0 else limits.min]
            return
    assert found.dtype == dtype
    assert found.tolist() == [tflite_quantise(real, scale, zero_point, int(limits.min), int(limits.max))]


@given(stored=st.integers(-128, 127), scale=st.floats(min_value=2**-20, max_value=2**20, width=32))
def test_dequantise_is_the_formula_and_undoes_quantise(stored: int, scale: float) -> None:
    tensor = spec(scale=scale, zero_point=-7)
    real = dequantise(np.array([stored], np.int8), tensor)
    assert real.dtype == np.float32
    assert real.tolist() == [float(np.float32(scale) * np.float32(stored + 7))]
    assert quantise(real, tensor).tolist() == [stored]


def test_the_range_of_int8_does_not_wrap() -> None:
    assert dequantise(np.array([-128, 127], np.int8), spec(zero_point=127)).tolist() == [-127.5, 0.0]


@pytest.mark.parametrize("dtype", ["float32", "float16", "int32"])
def test_tensors_without_a_scale_are_only_cast_and_shaped(dtype: str) -> None:
    tensor = spec(dtype, None, None, shape=(2, 1, 2))
    stored = quantise(np.array([[1.0, 2.0], [3.0, 4.0]], np.float32), tensor)
    assert (stored.dtype, stored.shape) == (np.dtype(dtype), (2, 1, 2))
    assert stored.flags.c_contiguous
    assert dequantise(stored, tensor).dtype == np.float32
    assert dequantise(stored, tensor).ravel().tolist() == [1, 2, 3, 4]


def test_inputs_go_by_the_names_and_in_the_order_of_the_file() -> None:
    tensors = [{"name": n, "maps": m, "dtype": "float32", "shape": [2]} for n, m in (("x:0", "b"), ("y:0", "a"))]
    canonical = [{"name": n, "dtype": "float32", "shape": [1, 2]} for n in "ab"]
    document = family_document(inputs=canonical, variants={"v": variant_document("edge_gpu", inputs=tensors)})
    variant = make_catalog(toy=document).family("toy").variants["v"]
    stored = to_variant({"a": np.array([[1.0, 2.0]]), "b": np.array([[3.0, 4.0]])}, variant)
    assert list(stored) == ["x:0", "y:0"]
    assert {name: value.tolist() for name, value in stored.items()} == {"x:0": [3, 4], "y:0": [1, 2]}


def test_outputs_come_back_canonical(family: Family) -> None:
    stored = {"out": np.array([[-3, 13, -19]], np.int8)}
    outputs = from_variant(stored, family.variants["small"], family)
    assert outputs["probabilities"].tolist() == [[0.0, 1.0, -1.0]]
    flat = from_variant({"out": np.array([0.1, 0.7, 0.2], np.float32)}, family.variants["large"], family)
    assert flat["probabilities"].shape == (1, 3)
    assert classify(flat, family) == (LABELS[1], pytest.approx(0.7))


@pytest.mark.parametrize(
    ("outputs", "expected"),
    [
        ({}, "toy/large returned no usable output 'out'"),
        ({"other": np.zeros((1, 3), np.float32)}, "returned no usable output 'out'"),
        ({"out": np.zeros((1, 4), np.float32)}, "returned no usable output 'out'"),
        ({"out": np.zeros(0, np.float32)}, "returned no usable output 'out'"),
        ({"out": np.zeros((1, 3), np.int8)}, "returned no usable output 'out'"),
        ({"out": np.array([[0.5, np.nan, 0.5]], np.float32)}, "returned NaN or infinity in 'out'"),
        ({"out": np.array([[0.5, np.inf, 0.5]], np.float32)}, "returned NaN or infinity in 'out'"),
    ],
)
def test_outputs_that_are_no_answer(family: Family, outputs: dict[str, Any], expected: str) -> None:
    with pytest.raises(TargetFailed, match=expected):
        from_variant(outputs, family.variants["large"], family)


SPECS = [spec("int8", shape=(1, 3)), spec("float32", None, None, name="u", shape=(2,))]


def test_packed_bytes_are_little_endian_and_in_order() -> None:
    packed = pack({"u": np.array([1.0, -2.0], "<f4"), "t": np.array([[1, -1, 2]], np.int8)}, SPECS)
    assert packed == bytes.fromhex("01ff02 0000803f 000000c0")


@given(
    first=st.lists(st.integers(-128, 127), min_size=3, max_size=3),
    second=st.lists(st.floats(width=32, allow_nan=False), min_size=2, max_size=2),
)
def test_packing_there_and_back(first: list[int], second: list[float]) -> None:
    tensors = {"t": np.array([first], np.int8), "u": np.array(second, np.float32)}
    found = unpack(pack(tensors, SPECS), SPECS)
    assert list(found) == ["t", "u"]
    for name, value in tensors.items():
        assert (found[name].dtype, found[name].shape) == (value.dtype, value.shape)
        assert np.array_equal(found[name], value)


@pytest.mark.parametrize("length", [n for n in range(24) if n != 11])
def test_bytes_of_a_wrong_length_are_an_error_of_the_target(length: int) -> None:
    with pytest.raises(TargetFailed, match=f"^{length} bytes of tensors do not fit the model's 2 outputs"):
        unpack(bytes(length), SPECS)
