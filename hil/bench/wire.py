"""Encoding and decoding one frame of the serial protocol, beside COBS and CRC-32 alone."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from zlib import crc32

from cobs import cobs

from agent.wire.frame import Frame, FrameDecoder
from hil.bench.report import Aim, Line
from hil.bench.stats import Sampler, alternate

PAYLOAD_BYTES = 1024
MAX_FRAME = 4096
BATCH = 20
"""Calls between two looks at the clock: a look costs a fiftieth of a call."""
AIM_US = 6.0


def measure(seconds: float) -> list[Line]:
    payload = os.urandom(PAYLOAD_BYTES)
    decoder = FrameDecoder(MAX_FRAME)
    frame = Frame(1, 0, 7, 42, payload)
    encoded = frame.encode()
    body = bytes(8) + payload

    def both() -> None:
        decoder.feed(frame.encode())

    def bare() -> None:
        line = cobs.encode(body + crc32(body).to_bytes(4, "little"))
        crc32(cobs.decode(line))

    sides: dict[str, Sampler] = {
        "both": batches(both),
        "encode": batches(frame.encode),
        "decode": batches(lambda: decoder.feed(encoded)),
        "bare": batches(bare),
    }
    if decoder.feed(frame.encode()) != [frame]:
        raise AssertionError("the codec does not return what was put in")
    found = {name: side.scaled(1e6) for name, side in alternate(sides, seconds).items()}
    floor = "cobs + crc32 alone, both ways"
    return [
        Line(
            "wire", "frame of 1 KB: encode + decode", "us", found["both"], floor, found["bare"], Aim(AIM_US, "figure")
        ),
        Line("wire", "frame of 1 KB: encode", "us", found["encode"]),
        Line("wire", "frame of 1 KB: decode", "us", found["decode"]),
    ]


def batches(call: Callable[[], object]) -> Sampler:
    """Seconds for each call, as means over batches."""

    def sample(seconds: float) -> Sequence[float]:
        now = time.perf_counter()
        end = now + seconds
        samples: list[float] = []
        while not samples or now < end:
            for _ in range(BATCH):
                call()
            then, now = now, time.perf_counter()
            samples.append((now - then) / BATCH)
        return samples

    return sample
