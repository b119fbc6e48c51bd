"""What is sent to the doors: bytes of every kind, documents that are nearly right, numbers that are none."""

from __future__ import annotations

import json
import os
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

LONG = "FUZZ_TIMES" in os.environ
"""So many times the examples, others each time; without it the same few."""
TIMES = int(os.environ.get("FUZZ_TIMES", "1"))


def _examples(count: int) -> settings:
    return settings(
        max_examples=count * TIMES,
        deadline=None,
        derandomize=not LONG,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


MANY, HUNDRED, SOME, FEW = _examples(300), _examples(100), _examples(40), _examples(6)
"""Of what takes a millisecond, ten, a hundred, and of what takes a broker and a batch of payloads."""
BATCH = 40
"""Payloads of one example that goes through a broker."""

FIELDS = (
    "inputs",
    "deadline_ms",
    "latency_class",
    "priority",
    "accuracy",
    "variant",
    "request_id",
    "producer",
    "idempotency_key",
    "allowed_regions",
    "timeout_ms",
    "max_retries",
    "use_cache",
    "explain",
    "shadow",
    "delivery",
    "value",
)
CANARY = "what-a-patient-measured"
"""A value that stands for what no log may hold."""
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(max_size=40)
    | st.sampled_from(["", "NaN", "1e999", "../..", "\x00", "digits", "realtime", "x" * 5000, CANARY])
)
VALUES = st.recursive(
    SCALARS,
    lambda below: st.lists(below, max_size=6) | st.dictionaries(st.text(max_size=12), below, max_size=4),
    max_leaves=12,
)
SAMPLE = [[[float(row + column) % 17] for column in range(8)] for row in range(8)]
"""Fits `digits`."""


def _nearly(inputs: Any) -> st.SearchStrategy[bytes]:
    changes = st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=4)
    return changes.map(lambda change: json.dumps({"inputs": inputs, **change}).encode())


def around(inputs: Any) -> st.SearchStrategy[bytes]:
    """Payloads around a document that fits a model which takes `inputs`."""
    nearly = _nearly(inputs)
    cut = st.tuples(nearly, st.integers(0, 200)).map(lambda made: made[0][: made[1]])
    anything = VALUES.map(lambda value: json.dumps(value).encode())
    return st.binary(max_size=300) | nearly | cut | DEEP | anything


DEEP = st.integers(1, 5000).map(lambda depth: b"[" * depth)
PAYLOADS = around([SAMPLE])
"""Bytes of every kind, documents that nearly fit `digits`, parts of them, depth without end, any JSON."""


def damaged(sound: bytes) -> st.SearchStrategy[bytes]:
    """A sound message with some bytes changed, with more bytes behind it, or cut."""
    change = st.tuples(st.integers(0, len(sound) - 1), st.integers(0, 255))
    return st.tuples(st.lists(change, max_size=4), st.integers(0, len(sound)), st.binary(max_size=8)).map(
        lambda made: _changed(sound, *made)
    )


def _changed(sound: bytes, changes: list[tuple[int, int]], cut: int, tail: bytes) -> bytes:
    made = bytearray(sound)
    for at, value in changes:
        made[at] = value
    return bytes(made) + tail if cut % 2 else bytes(made[: len(made) - cut // 2])
