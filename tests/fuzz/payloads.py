"""What is sent to the doors: bytes of every kind, documents that are nearly right, numbers that are none."""

from __future__ import annotations

import json
import os
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

LONG = "FUZZ_EXAMPLES" in os.environ
"""More examples, others each time; without it the same few."""

FEW = settings(
    max_examples=int(os.environ.get("FUZZ_EXAMPLES", "6")),
    deadline=None,
    derandomize=not LONG,
    database=None,
    suppress_health_check=list(HealthCheck),
)
MANY = settings(FEW, max_examples=int(os.environ.get("FUZZ_EXAMPLES", "300")))
SOME = settings(FEW, max_examples=int(os.environ.get("FUZZ_EXAMPLES", "40")))
"""Of what takes a tenth of a second."""
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
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(max_size=40)
    | st.sampled_from(["", "NaN", "1e999", "../..", "\x00", "digits", "realtime", "x" * 5000])
)
VALUES = st.recursive(
    SCALARS,
    lambda below: st.lists(below, max_size=6) | st.dictionaries(st.text(max_size=12), below, max_size=4),
    max_leaves=12,
)
SAMPLE = [[[float(row + column) % 17] for column in range(8)] for row in range(8)]
"""Fits `digits`."""


def _document(changes: dict[str, Any]) -> bytes:
    return json.dumps({"inputs": [SAMPLE], **changes}).encode()


NEARLY = st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=4).map(_document)
CUT = st.tuples(NEARLY, st.integers(0, 200)).map(lambda cut: cut[0][: cut[1]])
DEEP = st.integers(1, 5000).map(lambda depth: b"[" * depth)
PAYLOADS = st.binary(max_size=300) | NEARLY | CUT | DEEP | VALUES.map(lambda value: json.dumps(value).encode())
