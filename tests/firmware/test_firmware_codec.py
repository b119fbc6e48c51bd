"""The firmware's frame codec and digests against the golden vectors, the `cobs` package and NIST's examples."""

from __future__ import annotations

import hashlib
import random
import subprocess
import sys
import zlib

import pytest
from board import ROOT, VECTORS, line
from hypothesis import given, settings
from hypothesis import strategies as st

from hil.virtual import library

FRAMES = {f["name"]: f for f in VECTORS["frames"]}
MAX_FRAME = 1088


def decode(data: bytes, max_frame: int = MAX_FRAME, step: int | None = None) -> list[library.DecodedFrame | str]:
    decoder = library.FrameDecoder(max_frame)
    try:
        size = step or len(data) or 1
        return [found for at in range(0, len(data), size) for found in decoder.push(data[at : at + size])]
    finally:
        decoder.close()


def as_frame(vector: dict) -> library.DecodedFrame:
    return library.DecodedFrame(
        vector["type"], vector["flags"], vector["seq"], vector["id"], bytes.fromhex(vector["payload_hex"])
    )


@pytest.mark.parametrize("name", FRAMES)
def test_frame_vectors_both_ways(name: str) -> None:
    vector, frame = FRAMES[name], as_frame(FRAMES[name])
    encoded = bytes.fromhex(vector["line_hex"])
    assert library.encode_frame(frame.type, frame.flags, frame.seq, frame.id, frame.payload) == encoded
    assert decode(encoded, 2048) == [frame]


@pytest.mark.parametrize("step", [None, 1, 7])
@pytest.mark.parametrize("stream", VECTORS["streams"], ids=lambda s: s["name"])
def test_stream_vectors(stream: dict, step: int | None) -> None:
    expected = [as_frame(FRAMES[e["frame"]]) if "frame" in e else e["error"] for e in stream["expect"]]
    assert decode(bytes.fromhex(stream["line_hex"]), stream["max_frame"], step) == expected


@given(
    st.integers(0, 255),
    st.integers(0, 255),
    st.integers(0, 0xFFFF),
    st.integers(0, 0xFFFFFFFF),
    # Long runs without a zero and runs of zeros are where COBS groups end.
    st.lists(st.sampled_from([b"\0", b"\1" * 253, b"\2" * 254, b"\3" * 255, b"ab", b"\xff"]), max_size=4).map(b"".join),
)
def test_round_trip(type_: int, flags: int, seq: int, id_: int, payload: bytes) -> None:
    encoded = library.encode_frame(type_, flags, seq, id_, payload)
    assert encoded == line(type_, payload, id_, flags, seq)
    assert decode(encoded) == [library.DecodedFrame(type_, flags, seq, id_, payload)]


@given(st.lists(st.binary(max_size=40), max_size=10), st.randoms(use_true_random=False))
@settings(max_examples=50)
def test_a_good_frame_behind_any_bytes_is_found(garbage: list[bytes], rng: random.Random) -> None:
    good = line("PING", bytes(rng.randrange(256) for _ in range(8)), 5)
    found = decode(b"".join(garbage) + b"\0" + good)
    assert found[-1] == library.DecodedFrame(2, 0, 0, 5, found[-1].payload)


@given(st.binary(max_size=3000))
def test_crc32_is_zlibs(data: bytes) -> None:
    assert library.crc32(data) == zlib.crc32(data)


@pytest.mark.parametrize(
    ("message", "digest"),
    [
        (b"", "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"),
        (b"abc", "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"),
        (
            b"abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq",
            "248d6a61d20638b8e5c026930c3e6039a33ce45964ff2167f6ecedd419db06c1",
        ),
        (b"a" * 1_000_000, "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0"),
    ],
    ids=["empty", "abc", "two blocks", "a million a"],
)
def test_sha256_of_nist(message: bytes, digest: str) -> None:
    assert library.sha256(message).hex() == digest


@given(st.binary(max_size=300))
def test_sha256_is_hashlibs(data: bytes) -> None:
    assert library.sha256(data) == hashlib.sha256(data).digest()


def test_vectors_are_what_their_script_writes() -> None:
    subprocess.run([sys.executable, ROOT / "tests/vectors/make.py", "--check"], check=True)
