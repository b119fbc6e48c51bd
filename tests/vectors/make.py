"""Writes frames.json, the golden vectors of docs/wire-protocol.md that every codec in this repository answers to.

Independent of both codecs on purpose: only `cobs`, `zlib.crc32` and `struct`. Run `python tests/vectors/make.py`
after a change of the protocol; `--check` compares instead of writing.
"""

from __future__ import annotations

import json
import struct
import sys
import zlib
from pathlib import Path
from typing import Any

import streaming
from cobs import cobs
from updates import SHA_A, SHA_B, UPDATE_ENCODE, UPDATE_MESSAGES, pattern

TARGET = Path(__file__).with_name("frames.json")

TYPES = {
    "HELLO_REQ": 0x01,
    "PING": 0x02,
    "INFER": 0x03,
    "CANCEL": 0x04,
    "RESET": 0x05,
    "MODEL_BEGIN": 0x10,
    "MODEL_CHUNK": 0x11,
    "MODEL_COMMIT": 0x12,
    "MODEL_ABORT": 0x13,
    "MODEL_QUERY": 0x14,
    "MODEL_CONFIRM": 0x15,
    "MODEL_ROLLBACK": 0x16,
    "STATS_REQ": 0x20,
    "HELLO": 0x81,
    "PONG": 0x82,
    "RESULT": 0x83,
    "MODEL_STATUS": 0x90,
    "STATS": 0xA0,
    "LOG": 0xA1,
    "ERROR": 0xFF,
} | streaming.TYPES
FRAGMENT, RETRY = 1, 2

ABOUT = [
    "Golden vectors of docs/wire-protocol.md. Written by make.py beside this file; do not edit.",
    "types: message name -> type byte.",
    "frames: one good frame each. line_hex is what travels, with COBS and the final delimiter.",
    "messages: a body and its fields, both ways. Field names are those of the protocol page. Byte fields (hashes,",
    "  tensors, data, bitmap, signature) are hex strings; text is text; operators is a list of numbers; slots is a",
    "  list of objects; STATS has one field 'values', a list of [id, value]. 'FRAGMENT' is the payload of a frame with",
    "  the FRAGMENT flag. MODEL_BEGIN has a 'signature' (hex) only if signature_kind is 1, and 'board'",
    "  (text) and 'operators' (a list of codes) only in format 2. HELLO has 'rollback' and 'trial_s' from minor 1 on.",
    "grown: bodies of a later minor version. They parse to the fields; the bytes behind are ignored. Not for encoding.",
    "short: bodies that are too short for their type: a parser refuses them (BAD_LENGTH).",
    "streams: bytes on the line and what a decoder with max_frame yields, in order: a frame's name, or an error.",
    "  decode: COBS is broken. short: under 12 decoded bytes. crc: wrong CRC. oversize: over max_frame decoded bytes,",
    "  one error however long it is. An unfinished frame at the end yields nothing.",
]


def decoded(type_: int, flags: int, seq: int, id_: int, payload: bytes) -> bytes:
    head = struct.pack("<BBHI", type_, flags, seq, id_) + payload
    return head + struct.pack("<I", zlib.crc32(head))


def on_line(frame: bytes) -> bytes:
    return cobs.encode(frame) + b"\0"


def str8(text: str) -> bytes:
    raw = text.encode()
    return bytes([len(raw)]) + raw


def jsonable(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, dict):
        return {k: jsonable(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(v) for v in value]
    return value


SLOT_FIELDS = ("index", "state", "length", "sha256", "counter", "input_bytes", "output_bytes", "arena_used")


def hello(fields: dict[str, Any]) -> bytes:
    f = fields
    body = struct.pack(
        "<BBHIBBQIIIQ",
        *(f[k] for k in ("major", "minor", "max_frame", "max_message", "window", "reset_cause", "boot_id")),
        *(f[k] for k in ("capabilities", "arena", "slot_size", "uid")),
    )
    body += str8(f["board"]) + str8(f["build"]) + str8(f["engine"])
    body += bytes([len(f["operators"])]) + bytes(f["operators"]) + bytes([len(f["slots"])])
    for slot in f["slots"]:
        body += struct.pack("<BBI32sIIII", *(slot[k] for k in SLOT_FIELDS))
    if f["minor"] >= 1:
        body += struct.pack("<BH", f["rollback"], f["trial_s"])
    return body


def stats(fields: dict[str, Any]) -> bytes:
    values = fields["values"]
    return bytes([len(values)]) + b"".join(struct.pack("<BQ", i, v) for i, v in values)


ENCODE: dict[str, Any] = (
    UPDATE_ENCODE
    | {
        "HELLO_REQ": lambda f: struct.pack("<BBH", f["major"], f["minor"], f["max_frame"]),
        "HELLO": hello,
        "PING": lambda f: f["data"],
        "PONG": lambda f: struct.pack("<QQ", f["t_rx"], f["t_tx"]) + f["data"],
        "INFER": lambda f: f["model"] + struct.pack("<I", f["budget_ms"]) + f["inputs"],
        "RESULT": lambda f: f["model"] + struct.pack("<II", f["queue_us"], f["compute_us"]) + f["outputs"],
        "CANCEL": lambda f: b"",
        "RESET": lambda f: b"",
        "STATS_REQ": lambda f: b"",
        "STATS": stats,
        "LOG": lambda f: bytes([f["level"]]) + f["text"].encode(),
        "ERROR": lambda f: struct.pack("<H", f["code"]) + f["text"].encode(),
        "FRAGMENT": lambda f: struct.pack("<II", f["total"], f["offset"]) + f["data"],
    }
    | streaming.ENCODE
)

EMPTY_SLOT = dict.fromkeys(SLOT_FIELDS, 0) | {"index": 1, "sha256": bytes(32)}
ACTIVE_SLOT = {
    "index": 0,
    "state": 4,
    "length": 20480,
    "sha256": SHA_A,
    "counter": 7,
    "input_bytes": 64,
    "output_bytes": 10,
    "arena_used": 9216,
}
HELLO_FULL = {
    "major": 1,
    "minor": 0,
    "max_frame": 1088,
    "max_message": 32768,
    "window": 4,
    "reset_cause": 1,
    "boot_id": 0x0123456789ABCDEF,
    "capabilities": 0b1001,
    "arena": 131072,
    "slot_size": 262144,
    "uid": 0xFFFFFFFFFFFFFFFF,
    "board": "host",
    "build": "0.1.0",
    "engine": "tflite-micro 1.0",
    "operators": [0, 3, 4, 9, 25, 114],
    "slots": [ACTIVE_SLOT, EMPTY_SLOT],
}
MESSAGES: list[tuple[str, str, dict[str, Any]]] = [
    ("hello_req", "HELLO_REQ", {"major": 1, "minor": 0, "max_frame": 4096}),
    ("hello_full", "HELLO", HELLO_FULL),
    (
        "hello_bare",
        "HELLO",
        HELLO_FULL
        | {"board": "", "build": "", "engine": "none", "operators": [], "slots": [], "capabilities": 0, "uid": 0},
    ),
    (
        "hello_trial",
        "HELLO",
        HELLO_FULL
        | {"minor": 1, "rollback": 0, "trial_s": 300}
        | {"slots": [ACTIVE_SLOT | {"state": 3}, EMPTY_SLOT | {"state": 2, "length": 9, "sha256": SHA_B}]},
    ),
    (
        "hello_rolled_back",
        "HELLO",
        HELLO_FULL
        | {"minor": 1, "rollback": 2, "trial_s": 300}
        | {"slots": [ACTIVE_SLOT, EMPTY_SLOT | {"state": 5, "length": 9, "sha256": SHA_B}]},
    ),
    ("hello_utf8", "HELLO", HELLO_FULL | {"board": "prüfstand-β"}),
    ("ping_empty", "PING", {"data": b""}),
    ("ping_zeros", "PING", {"data": bytes(8)}),
    ("ping_long", "PING", {"data": pattern(1024)}),
    ("pong_empty", "PONG", {"t_rx": 1, "t_tx": 0xFFFFFFFFFFFFFFFF, "data": b""}),
    ("pong_data", "PONG", {"t_rx": 1_000_000, "t_tx": 1_000_250, "data": b"\x00\x01\xff"}),
    ("infer_no_deadline", "INFER", {"model": SHA_A[:8], "budget_ms": 0, "inputs": pattern(64)}),
    ("infer_no_inputs", "INFER", {"model": SHA_A[:8], "budget_ms": 0xFFFFFFFF, "inputs": b""}),
    ("result", "RESULT", {"model": SHA_A[:8], "queue_us": 120, "compute_us": 4800, "outputs": bytes(range(246, 256))}),
    ("cancel", "CANCEL", {}),
    ("reset", "RESET", {}),
    *UPDATE_MESSAGES,
    ("stats_req", "STATS_REQ", {}),
    ("stats", "STATS", {"values": [[1, 123_456_789_012], [2, 10], [200, 0xFFFFFFFFFFFFFFFF]]}),
    ("stats_empty", "STATS", {"values": []}),
    ("log", "LOG", {"level": 2, "text": "slot 1 is bad"}),
    ("log_empty", "LOG", {"level": 0, "text": ""}),
    ("error_text", "ERROR", {"code": 19, "text": "tensor 3: größer als der Puffer"}),
    ("error_bare", "ERROR", {"code": 5, "text": ""}),
    ("fragment", "FRAGMENT", {"total": 2000, "offset": 236, "data": pattern(236, 1)}),
    *streaming.MESSAGES,
]


def without_zeros() -> tuple[int, bytes]:
    """A payload for a 254-byte frame without a zero byte anywhere: exactly one full COBS group."""
    payload = bytes(i % 255 + 1 for i in range(242))
    id_ = next(
        i
        for i in range(0x01010101, 0x02000000)
        if 0 not in decoded(2, 3, 0x0101, i, payload) and 0 not in i.to_bytes(4, "little")
    )
    return id_, payload


def build() -> dict[str, Any]:
    messages, bodies, frames, raw = [], {}, [], {}
    for name, type_name, fields in MESSAGES:
        bodies[name] = (type_name, ENCODE[type_name](fields))
        messages.append(
            {"name": name, "type": type_name, "body_hex": bodies[name][1].hex(), "fields": jsonable(fields)}
        )

    def add_frame(name: str, type_: int, flags: int, seq: int, id_: int, payload: bytes) -> None:
        raw[name] = decoded(type_, flags, seq, id_, payload)
        frames.append(
            {
                "name": name,
                "type": type_,
                "flags": flags,
                "seq": seq,
                "id": id_,
                "payload_hex": payload.hex(),
                "line_hex": on_line(raw[name]).hex(),
            }
        )

    for seq, (name, (type_name, body)) in enumerate(bodies.items()):
        if type_name == "FRAGMENT":
            add_frame(name, TYPES["INFER"], FRAGMENT, seq, 0xFFFFFFFF, body)
        else:
            add_frame(name, TYPES[type_name], 0, seq, seq + 1, body)
    add_frame("infer_retry", TYPES["INFER"], RETRY, 0xFFFF, 77, bodies["infer_no_deadline"][1])
    add_frame("unknown_type", 0x7E, 0, 256, 0x01020304, b"what is this")
    add_frame("reserved_flags", TYPES["PING"], 0xF0, 5, 5, b"")
    add_frame("exactly_256", TYPES["PING"], 0, 6, 6, pattern(244))
    add_frame("one_over_256", TYPES["PING"], 0, 7, 7, pattern(245))
    full_id, full_payload = without_zeros()
    add_frame("one_full_cobs_group", TYPES["PING"], 3, 0x0101, full_id, full_payload)

    grown = []
    for name in (
        "hello_req",
        "hello_trial",
        "model_begin_signed",
        "model_begin_format_2",
        "model_confirm",
        "model_status",
        "stats",
        "cancel",
        *streaming.GROWN,
    ):
        fields = next(f for n, _, f in MESSAGES if n == name)
        type_name, body = bodies[name]
        grown.append(
            {
                "name": f"{name}_grown",
                "type": type_name,
                "body_hex": (body + b"\x2a\x00\x07").hex(),
                "fields": jsonable(fields),
            }
        )

    short = []
    for name in (
        "hello_req",
        "hello_full",
        "pong_empty",
        "infer_no_inputs",
        "model_begin_unsigned",
        "model_begin_signed",
        "model_begin_format_2",
        "model_confirm",
        "model_status",
        "stats",
        "error_bare",
        *streaming.SHORT,
    ):
        type_name, body = bodies[name]
        cuts = sorted({0, 1, len(body) // 2, len(body) - 1})
        short += [{"name": f"{name}_cut_to_{n}", "type": type_name, "body_hex": body[:n].hex()} for n in cuts]
    short += [
        {"name": "result_cut", "type": "RESULT", "body_hex": bodies["result"][1][:15].hex()},
        {"name": "model_chunk_cut", "type": "MODEL_CHUNK", "body_hex": "010203"},
        {"name": "log_cut", "type": "LOG", "body_hex": ""},
        {"name": "fragment_cut", "type": "FRAGMENT", "body_hex": "01020304050607"},
    ]

    line = {name: on_line(frame) for name, frame in raw.items()}
    good, other = line["hello_req"], line["ping_zeros"]

    def flip(data: bytes, at: int, bit: int = 1) -> bytes:
        return data[:at] + bytes([data[at] ^ bit]) + data[at + 1 :]

    wrong_crc = on_line(flip(raw["infer_no_deadline"], len(raw["infer_no_deadline"]) - 1))
    wrong_payload = on_line(flip(raw["infer_no_deadline"], 20))
    streams: list[tuple[str, int, bytes, list[Any]]] = [
        ("one frame", 256, good, ["hello_req"]),
        ("two frames", 256, good + other, ["hello_req", "ping_zeros"]),
        ("nothing", 256, b"", []),
        ("delimiters only", 256, b"\0\0\0\0", []),
        ("flush before a frame", 256, b"\0" + good, ["hello_req"]),
        ("empty frames between", 256, good + b"\0\0\0" + other + b"\0", ["hello_req", "ping_zeros"]),
        ("unfinished frame at the end", 256, good + other[:-1], ["hello_req"]),
        ("wrong CRC, then good", 256, wrong_crc + good, [("crc",), "hello_req"]),
        ("changed payload, then good", 256, wrong_payload + good, [("crc",), "hello_req"]),
        ("truncated inside a group", 256, line["infer_no_deadline"][:30] + b"\0" + good, [("decode",), "hello_req"]),
        (
            "truncated at a group's end",
            256,
            cobs.encode(raw["infer_no_deadline"][:40]) + b"\0" + good,
            [("crc",), "hello_req"],
        ),
        ("a lone code byte", 256, b"\x05\0" + good, [("decode",), "hello_req"]),
        ("zero decoded bytes", 256, b"\x01\0" + good, [("short",), "hello_req"]),
        ("eleven decoded bytes", 256, on_line(bytes(range(11))) + good, [("short",), "hello_req"]),
        ("twelve decoded bytes, wrong CRC", 256, on_line(bytes(range(12))) + good, [("crc",), "hello_req"]),
        ("missing delimiter between two", 256, good[:-1] + other + good, [("crc",), "hello_req"]),
        ("garbage glued to a frame", 256, b"\x03\x11\x22" + good + other, [("crc",), "ping_zeros"]),
        ("garbage, delimiter, frame", 256, b"\x7fgarbage\0" + good, [("decode",), "hello_req"]),
        ("exactly max_frame", 256, line["exactly_256"] + good, ["exactly_256", "hello_req"]),
        ("one byte over max_frame", 256, line["one_over_256"] + good, [("oversize",), "hello_req"]),
        ("the same with a larger max_frame", 257, line["one_over_256"] + good, ["one_over_256", "hello_req"]),
        ("long frame, small max_frame", 256, line["ping_long"] + good, [("oversize",), "hello_req"]),
        ("long frame, large max_frame", 1088, line["ping_long"] + good, ["ping_long", "hello_req"]),
        ("10,000 bytes without a delimiter", 256, b"\x55" * 10_000 + b"\0" + good, [("oversize",), "hello_req"]),
        (
            "two oversize frames",
            256,
            line["ping_long"] + line["ping_long"] + good,
            [("oversize",), ("oversize",), "hello_req"],
        ),
        ("one full group", 256, line["one_full_cobs_group"], ["one_full_cobs_group"]),
        (
            "one full group, final 01 written",
            256,
            line["one_full_cobs_group"][:-1] + b"\x01\0",
            ["one_full_cobs_group"],
        ),
        ("unknown type is a good frame", 256, line["unknown_type"], ["unknown_type"]),
        (
            "all kinds of error",
            256,
            wrong_crc + b"\x05\0" + b"\x01\0" + line["ping_long"] + good,
            [("crc",), ("decode",), ("short",), ("oversize",), "hello_req"],
        ),
    ]
    return {
        "about": ABOUT,
        "types": TYPES,
        "frames": frames,
        "messages": messages,
        "grown": grown,
        "short": short,
        "streams": [
            {
                "name": name,
                "max_frame": max_frame,
                "line_hex": data.hex(),
                "expect": [{"frame": e} if isinstance(e, str) else {"error": e[0]} for e in expect],
            }
            for name, max_frame, data, expect in streams
        ],
    }


def reference_decode(data: bytes, max_frame: int, names: dict[bytes, str]) -> list[dict[str, str]]:
    """What the vectors claim, computed the slow way: guards against a wrong expectation in the list above."""
    out: list[dict[str, str]] = []
    for piece in data.split(b"\0")[:-1]:
        if not piece:
            continue
        if len(piece) > max_frame + max_frame // 254 + 1:
            out.append({"error": "oversize"})
            continue
        try:
            frame = cobs.decode(piece)
        except cobs.DecodeError:
            out.append({"error": "decode"})
            continue
        if len(frame) > max_frame:
            out.append({"error": "oversize"})
        elif len(frame) < 12:
            out.append({"error": "short"})
        elif zlib.crc32(frame[:-4]) != int.from_bytes(frame[-4:], "little"):
            out.append({"error": "crc"})
        else:
            out.append({"frame": names[frame]})
    return out


def main() -> int:
    vectors = build()
    names = {cobs.decode(bytes.fromhex(f["line_hex"])[:-1]): f["name"] for f in vectors["frames"]}
    for stream in vectors["streams"]:
        got = reference_decode(bytes.fromhex(stream["line_hex"]), stream["max_frame"], names)
        if got != stream["expect"]:
            raise SystemExit(f"stream {stream['name']!r}: expected {stream['expect']}, reference decodes {got}")
    text = json.dumps(vectors, indent=1, ensure_ascii=False) + "\n"
    if "--check" in sys.argv[1:]:
        if TARGET.read_text() != text:
            raise SystemExit(f"{TARGET.name} is not what make.py writes")
    else:
        TARGET.write_text(text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
