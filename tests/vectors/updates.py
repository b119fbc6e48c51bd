"""Vectors of a model update (docs/wire-protocol.md, section 3.6), for make.py."""

from __future__ import annotations

import hashlib
import struct
from typing import Any

SHA_A = hashlib.sha256(b"model a").digest()
SHA_B = hashlib.sha256(b"model b").digest()
SHA_IMAGE = hashlib.sha256(b"image a").digest()


def pattern(length: int, seed: int = 0) -> bytes:
    """Bytes with zeros and long runs without any, so that every kind of COBS group occurs."""
    return bytes((i * 7 + seed) % 251 for i in range(length))


def model_begin(fields: dict[str, Any]) -> bytes:
    names = ("format", "flags", "chunk", "model_length", "selftest_length", "counter", "arena", "selftest_tolerance")
    body = struct.pack("<BBHIIIIB", *(fields[k] for k in names))
    body += fields["model_sha256"] + fields["image_sha256"]
    if fields["format"] >= 2:
        bits = sum(1 << code for code in fields["operators"])
        body += fields["board"].encode().ljust(16, b"\0") + bits.to_bytes(16, "little")
    body += bytes([fields["signature_kind"]])
    return body + fields.get("signature", b"")


def model_status(fields: dict[str, Any]) -> bytes:
    names = ("slot", "state", "chunk", "length", "received", "next", "bitmap", "image_sha256")
    return struct.pack("<BBHIII32s32s", *(fields[k] for k in names))


UPDATE_ENCODE: dict[str, Any] = {
    "MODEL_BEGIN": model_begin,
    "MODEL_CHUNK": lambda f: struct.pack("<I", f["offset"]) + f["data"],
    "MODEL_COMMIT": lambda f: bytes([f["flags"]]) if f["flags"] else b"",
    "MODEL_CONFIRM": lambda f: f["model"],
    "MODEL_ROLLBACK": lambda f: f["model"],
    "MODEL_ABORT": lambda f: b"",
    "MODEL_QUERY": lambda f: b"",
    "MODEL_STATUS": model_status,
}

BEGIN = {
    "format": 1,
    "flags": 0,
    "chunk": 1072,
    "model_length": 20480,
    "selftest_length": 74,
    "counter": 8,
    "arena": 9216,
    "selftest_tolerance": 1,
    "model_sha256": SHA_B,
    "image_sha256": SHA_IMAGE,
    "signature_kind": 0,
}
STATUS = {
    "slot": 1,
    "state": 1,
    "chunk": 1072,
    "length": 20554,
    "received": 3216,
    "next": 2144,
    "bitmap": bytes([0b10]) + bytes(31),
    "image_sha256": SHA_IMAGE,
}

UPDATE_MESSAGES: list[tuple[str, str, dict[str, Any]]] = [
    ("model_begin_unsigned", "MODEL_BEGIN", BEGIN),
    ("model_begin_signed", "MODEL_BEGIN", BEGIN | {"flags": 1, "signature_kind": 1, "signature": pattern(64, 3)}),
    ("model_chunk", "MODEL_CHUNK", {"offset": 2144, "data": pattern(1072, 9)}),
    (
        "model_begin_format_2",
        "MODEL_BEGIN",
        BEGIN
        | {"format": 2, "board": "mps2-an386", "operators": [9, 22, 25, 127], "signature_kind": 1}
        | {"signature": pattern(64, 5)},
    ),
    (
        "model_begin_for_any_board",
        "MODEL_BEGIN",
        BEGIN | {"format": 2, "board": "", "operators": []},
    ),
    ("model_commit", "MODEL_COMMIT", {"flags": 0}),
    ("model_commit_trial", "MODEL_COMMIT", {"flags": 1}),
    ("model_confirm", "MODEL_CONFIRM", {"model": SHA_B[:8]}),
    ("model_rollback", "MODEL_ROLLBACK", {"model": SHA_B[:8]}),
    ("model_abort", "MODEL_ABORT", {}),
    ("model_query", "MODEL_QUERY", {}),
    ("model_status", "MODEL_STATUS", STATUS),
    (
        "model_status_none",
        "MODEL_STATUS",
        dict.fromkeys(STATUS, 0) | {"slot": 0xFF, "bitmap": bytes(32), "image_sha256": bytes(32)},
    ),
]
