"""Seeds for the fuzz targets, from the golden vectors and the shipped models: seeds.py FOLDER"""

import json
import struct
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
VECTORS = json.loads((ROOT / "tests/vectors/frames.json").read_text())
TYPES = VECTORS["types"]


def step(type_, body=b"", id_=1, how=0):
    return struct.pack("<BBBH", how, type_, id_, len(body)) + body


def update(image, chunk, last=None):
    """A whole update of an image, and an inference, as steps of fuzz_session. `last` ends a trial."""
    import hashlib

    digest = hashlib.sha256(image).digest()
    begin = struct.pack("<BBHIIIIB", 1, 0, chunk, len(image), 0, 1, 0, 0) + digest + digest + b"\0"
    run = bytes([230])
    steps = step(TYPES["HELLO_REQ"], b"\1\0\0\4") + step(TYPES["MODEL_BEGIN"], begin, 2) + run
    for at in range(0, len(image), chunk):
        steps += step(TYPES["MODEL_CHUNK"], struct.pack("<I", at) + image[at : at + chunk], 3) + run
    steps += step(TYPES["MODEL_COMMIT"], b"\1" if last else b"", 4) + run
    stream = struct.pack("<BBbII", 0, 1, 20, 2, 3) + digest[:8]
    steps += step(TYPES["STREAM_START"], stream, 8) + 30 * run + step(TYPES["STREAM_CREDIT"], struct.pack("<I", 9), 9)
    steps += step(TYPES["INFER"], digest[:8] + bytes(4) + bytes(64), 5) + 30 * run
    return steps + (step(TYPES[last], digest[:8], 6) + run if last else b"") + bytes([255])


def seeds():
    frames = [bytes.fromhex(frame["line_hex"]) for frame in VECTORS["frames"]]
    streams = [bytes.fromhex(stream["line_hex"]) for stream in VECTORS["streams"]]
    models = [path.read_bytes() for path in sorted(ROOT.glob("models/*/mcu-int8.tflite"))]
    yield "frame", [b"\2\7" + line for line in frames + streams]
    yield "message", [bytes.fromhex(frame["payload_hex"]) for frame in VECTORS["frames"]]
    yield "validator", models
    session = [step(frame["type"], bytes.fromhex(frame["payload_hex"])[:1076]) for frame in VECTORS["frames"]]
    yield (
        "session",
        session + [update(model, 1024, last) for model in models for last in (None, "MODEL_CONFIRM", "MODEL_ROLLBACK")],
    )


def main():
    for target, items in seeds():
        folder = Path(sys.argv[1]) / target
        folder.mkdir(parents=True, exist_ok=True)
        for number, item in enumerate(items):
            (folder / f"seed-{number}").write_bytes(item)


main()
