"""The streaming messages of make.py: types, encoders, messages, and which of them are tried grown and cut."""

from __future__ import annotations

import struct
from typing import Any

MODEL = bytes(range(8))
TYPES = {
    "STREAM_START": 0x30,
    "STREAM_CREDIT": 0x31,
    "STREAM_STOP": 0x32,
    "STREAM_STATUS": 0xB0,
    "STREAM_RESULT": 0xB1,
}


def start(f: dict[str, Any]) -> bytes:
    names = ("source", "send_inputs", "threshold", "interval_ms", "credits")
    return struct.pack("<BBbII", *(f[k] for k in names)) + bytes(f["model"])


def result(f: dict[str, Any]) -> bytes:
    head = struct.pack("<IIQIH", *(f[k] for k in ("seq", "skipped", "time_us", "compute_us")), len(f["outputs"]))
    return head + bytes(f["outputs"]) + bytes(f["inputs"])


ENCODE: dict[str, Any] = {
    "STREAM_START": start,
    "STREAM_CREDIT": lambda f: struct.pack("<I", f["upto"]),
    "STREAM_STOP": lambda f: b"",
    "STREAM_STATUS": lambda f: struct.pack("<BIII", *(f[k] for k in ("state", "seq", "skipped", "upto"))),
    "STREAM_RESULT": result,
}

RESULT = {
    "seq": 16,
    "skipped": 3,
    "time_us": 123_456_789_012,
    "compute_us": 4800,
    "outputs": bytes(range(246, 256)),
    "inputs": b"",
}
MESSAGES: list[tuple[str, str, dict[str, Any]]] = [
    (
        "stream_start",
        "STREAM_START",
        {"source": 0, "send_inputs": 1, "threshold": -5, "interval_ms": 50, "credits": 8, "model": MODEL},
    ),
    ("stream_credit", "STREAM_CREDIT", {"upto": 0xFFFFFFFF}),
    ("stream_stop", "STREAM_STOP", {}),
    ("stream_status", "STREAM_STATUS", {"state": 1, "seq": 17, "skipped": 3, "upto": 25}),
    ("stream_result", "STREAM_RESULT", RESULT),
    ("stream_result_inputs", "STREAM_RESULT", RESULT | {"inputs": bytes(range(64))}),
]
GROWN = ("stream_start", "stream_credit", "stream_status")
SHORT = ("stream_start", "stream_credit", "stream_status", "stream_result")
