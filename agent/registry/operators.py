"""Builtin operators of the TensorFlow Lite schema that firmware may have: names and codes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final

from agent.core.errors import ConfigError

OPERATOR_CODES: Final[Mapping[str, int]] = {
    "ADD": 0,
    "AVERAGE_POOL_2D": 1,
    "CONCATENATION": 2,
    "CONV_2D": 3,
    "DEPTHWISE_CONV_2D": 4,
    "DEQUANTIZE": 6,
    "FULLY_CONNECTED": 9,
    "LOGISTIC": 14,
    "MAX_POOL_2D": 17,
    "MUL": 18,
    "RELU": 19,
    "RELU6": 21,
    "RESHAPE": 22,
    "SOFTMAX": 25,
    "TANH": 28,
    "PAD": 34,
    "TRANSPOSE": 39,
    "MEAN": 40,
    "SUB": 41,
    "SQUEEZE": 43,
    "STRIDED_SLICE": 45,
    "SPLIT": 49,
    "MAXIMUM": 55,
    "ARG_MAX": 56,
    "MINIMUM": 57,
    "PADV2": 60,
    "TRANSPOSE_CONV": 67,
    "EXPAND_DIMS": 70,
    "SUM": 74,
    "SHAPE": 77,
    "PACK": 83,
    "RESIZE_NEAREST_NEIGHBOR": 97,
    "LEAKY_RELU": 98,
    "QUANTIZE": 114,
    "HARD_SWISH": 117,
}
"""Those that the firmware's validator knows (`kArity` in firmware/core/validator.cpp)."""


def operator_codes(names: Iterable[str]) -> tuple[int, ...]:
    """Sorted codes. Raises `ConfigError` for one that no board can have."""
    unknown = sorted(set(names) - set(OPERATOR_CODES))
    if unknown:
        raise ConfigError([f"operators: no firmware has {', '.join(unknown)}; known: {', '.join(OPERATOR_CODES)}"])
    return tuple(sorted({OPERATOR_CODES[name] for name in names}))
