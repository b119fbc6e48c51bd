"""Canonical tensors to and from what a variant's file takes: the affine quantisation of the TensorFlow Lite 8-bit
specification, `real = scale * (quantised - zero_point)`, rounded half away from zero as TensorFlow Lite does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from agent.core.errors import TargetFailed
from agent.core.types import Described, Tensor, Tensors
from agent.registry.catalog import Family, Variant, VariantTensor


def quantise(real: Tensor, spec: VariantTensor) -> Tensor:
    """float array -> array of `spec.dtype` and `spec.shape`; values out of range saturate."""
    if spec.scale is None or spec.zero_point is None:
        return np.ascontiguousarray(real, dtype=spec.dtype).reshape(spec.shape)
    limits = np.iinfo(spec.dtype)
    with np.errstate(over="ignore"):
        scaled = (real.astype(np.float32) / np.float32(spec.scale)).astype(np.float64)
    # In double precision, where adding a half to a single-precision number is exact.
    rounded = np.trunc(scaled + np.copysign(0.5, scaled)) + spec.zero_point
    stored: Tensor = np.clip(rounded, limits.min, limits.max).astype(spec.dtype).reshape(spec.shape)
    return stored


def dequantise(stored: Tensor, spec: VariantTensor) -> Tensor:
    """Array as the file gives it -> float32 array of the same shape."""
    if spec.scale is None or spec.zero_point is None:
        return stored.astype(np.float32, copy=False)
    return (stored.astype(np.float32) - np.float32(spec.zero_point)) * np.float32(spec.scale)


def misfit(variant: Variant, inputs: Described, outputs: Described) -> str:
    """In which tensor a file, run once, is not what the catalogue says of it; empty: it is.

    A dimension that an ONNX file leaves open was 1 in that run, so shapes of such inputs are not held against it.
    """
    if inputs.keys() != {spec.name for spec in variant.inputs}:
        return f"the file's inputs are {sorted(inputs)}, not as catalogued {sorted(s.name for s in variant.inputs)}"
    same = True
    for spec in variant.inputs:
        dtype, shape = inputs[spec.name]
        same = same and shape == spec.shape
        if dtype != spec.dtype or (variant.format == "tflite" and not same):
            return f"the file's input {spec.name!r} is {dtype} {list(shape)}, not {spec.dtype} {list(spec.shape)}"
    for spec in variant.outputs:
        if spec.name not in outputs:
            return f"the file has no output {spec.name!r}; it has {sorted(outputs)}"
        dtype, shape = outputs[spec.name]
        if dtype != spec.dtype or (same and math.prod(shape) != math.prod(spec.shape)):
            return f"the file's output {spec.name!r} is {dtype} {list(shape)}, not {spec.dtype} {list(spec.shape)}"
    return ""


def to_variant(inputs: Tensors, variant: Variant) -> dict[str, Tensor]:
    """Canonical inputs by canonical name -> the file's inputs by the file's names, in the file's order."""
    return {spec.name: quantise(inputs[spec.maps], spec) for spec in variant.inputs}


def from_variant(outputs: Tensors, variant: Variant, family: Family) -> dict[str, Tensor]:
    """The file's outputs by the file's names -> canonical outputs.

    Raises `TargetFailed` on an output that is missing, of another size or dtype, or holds NaN or infinity.
    """
    shapes = {tensor.name: tensor.shape for tensor in family.outputs}
    canonical = {}
    for spec in variant.outputs:
        value = outputs.get(spec.name)
        if value is None or value.size != math.prod(shapes[spec.maps]) or value.dtype != spec.dtype:
            raise TargetFailed(f"{variant.name} returned no usable output {spec.name!r}")
        real = dequantise(value, spec).reshape(shapes[spec.maps])
        if not np.isfinite(real).all():
            raise TargetFailed(f"{variant.name} returned NaN or infinity in {spec.name!r}")
        canonical[spec.maps] = real
    return canonical


def pack(tensors: Tensors, specs: Sequence[VariantTensor]) -> bytes:
    """All tensors in the order of `specs` as raw little-endian bytes, concatenated."""
    return b"".join(tensors[spec.name].tobytes() for spec in specs)


def unpack(data: bytes, specs: Sequence[VariantTensor]) -> dict[str, Tensor]:
    """Inverse of `pack`. Raises `TargetFailed` if the length is wrong."""
    tensors: dict[str, Tensor] = {}
    offset = 0
    for spec in specs:
        dtype = np.dtype(spec.dtype)
        count = math.prod(spec.shape)
        end = offset + count * dtype.itemsize
        if end > len(data):
            break
        tensors[spec.name] = np.frombuffer(data, dtype, count, offset).reshape(spec.shape)
        offset = end
    if len(tensors) != len(specs) or offset != len(data):
        raise TargetFailed(f"{len(data)} bytes of tensors do not fit the model's {len(specs)} outputs")
    return tensors


def classify(outputs: Tensors, family: Family) -> tuple[str, float]:
    """Label and confidence (its probability) from the family's first output."""
    probabilities = outputs[family.outputs[0].name].ravel()
    best = int(probabilities.argmax())
    return family.labels[best], float(probabilities[best])
