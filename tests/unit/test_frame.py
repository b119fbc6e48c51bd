"""The frame codec against the golden vectors, round trips, and hostile input."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from cobs import cobs
from hypothesis import given
from hypothesis import strategies as st

from agent.core.errors import ProtocolError
from agent.wire.fragments import FRAGMENT_OVERHEAD, Fragment, Reassembler, split
from agent.wire.frame import FRAGMENT, MIN_MAX_FRAME, OVERHEAD, Fault, Frame, FrameDecoder

VECTORS = json.loads((Path(__file__).parents[1] / "vectors" / "frames.json").read_text(encoding="utf-8"))
FRAMES = {
    entry["name"]: Frame(entry["type"], entry["flags"], entry["seq"], entry["id"], bytes.fromhex(entry["payload_hex"]))
    for entry in VECTORS["frames"]
}
GOOD = Frame(2, 0, 1, 7, b"understood")

frames = st.builds(
    Frame,
    type=st.integers(0, 0xFF),
    flags=st.integers(0, 0xFF),
    seq=st.integers(0, 0xFFFF),
    id=st.integers(0, 0xFFFFFFFF),
    payload=st.binary(max_size=1100),
)


@pytest.mark.parametrize("entry", VECTORS["frames"], ids=lambda entry: entry["name"])
def test_golden_frame(entry: dict[str, str]) -> None:
    frame = FRAMES[entry["name"]]
    line = bytes.fromhex(entry["line_hex"])
    assert frame.encode() == line
    assert FrameDecoder(4096).feed(line) == [frame]


@pytest.mark.parametrize("whole", [True, False], ids=["whole", "byte by byte"])
@pytest.mark.parametrize("stream", VECTORS["streams"], ids=lambda stream: stream["name"])
def test_golden_stream(stream: dict[str, object], whole: bool) -> None:
    line = bytes.fromhex(str(stream["line_hex"]))
    decoder = FrameDecoder(int(str(stream["max_frame"])))
    portions = [line] if whole else [line[i : i + 1] for i in range(len(line))]
    found = [item for portion in portions for item in decoder.feed(portion)]
    expected: list[Frame | Fault] = [
        FRAMES[item["frame"]] if "frame" in item else Fault(item["error"])
        for item in stream["expect"]  # type: ignore[attr-defined]
    ]
    assert found == expected
    assert decoder.counters.good == sum(isinstance(item, Frame) for item in expected)
    assert decoder.counters.bad == sum(isinstance(item, Fault) for item in expected)


@given(st.lists(frames, max_size=5), st.data())
def test_round_trip_in_any_portions(sent: list[Frame], data: st.DataObject) -> None:
    line = b"".join(frame.encode() for frame in sent)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(line)), max_size=6)))
    decoder = FrameDecoder(4096)
    found = []
    for begin, end in zip([0, *cuts], [*cuts, len(line)], strict=True):
        found += decoder.feed(line[begin:end])
    assert found == sent
    assert decoder.buffered == 0


def test_overhead_on_the_line_is_what_the_page_says() -> None:
    assert len(Frame(2, 0, 0, 1, bytes(range(1, 255)) * 4 + b"12345678").encode()) == 1042


def test_ten_thousand_random_and_mutated_frames() -> None:
    rng = random.Random(20240917)
    decoder = FrameDecoder(MIN_MAX_FRAME)
    for number in range(10_000):
        line = bytearray(Frame(2, 0, number & 0xFFFF, number, rng.randbytes(rng.randrange(245))).encode())
        for _ in range(rng.randrange(1, 4)):
            kind = rng.randrange(4)
            at = rng.randrange(len(line) + 1)
            if kind == 0 and at < len(line):
                line[at] = rng.randrange(256)
            elif kind == 1:
                del line[at:]
            elif kind == 2:
                line[at:at] = rng.randbytes(rng.randrange(1, 600))
            else:
                line = bytearray(rng.randbytes(rng.randrange(1, 700)))
        decoder.feed(bytes(line))
        assert decoder.buffered <= MIN_MAX_FRAME + 2
        # A delimiter ends whatever the noise left behind; the frame behind it must be understood.
        assert decoder.feed(b"\0" + GOOD.encode())[-1] == GOOD


def test_buffer_is_capped() -> None:
    decoder = FrameDecoder(MIN_MAX_FRAME)
    found = []
    for _ in range(1000):
        found += decoder.feed(b"\x55" * 100)
        assert decoder.buffered <= MIN_MAX_FRAME + 2
    assert found == [Fault.OVERSIZE]
    assert decoder.feed(b"\0" + GOOD.encode()) == [GOOD]
    assert decoder.counters.oversize == 1


def test_largest_frame_fits_and_one_more_byte_does_not() -> None:
    full = Frame(2, 0, 0, 1, bytes(1 + i % 255 for i in range(MIN_MAX_FRAME - OVERHEAD)))
    over = Frame(2, 0, 0, 1, full.payload + b"x")
    for portion in (1, 64, 10_000):
        decoder = FrameDecoder(MIN_MAX_FRAME)
        line = full.encode() + over.encode() + full.encode()
        found = [item for i in range(0, len(line), portion) for item in decoder.feed(line[i : i + portion])]
        assert found == [full, Fault.OVERSIZE, full]


def test_max_frame_has_a_least() -> None:
    with pytest.raises(ValueError, match="256"):
        FrameDecoder(255)


def test_crc_covers_header_and_payload() -> None:
    raw = cobs.decode(GOOD.encode()[:-1])
    for at in range(len(raw)):
        for bit in range(8):
            changed = bytearray(raw)
            changed[at] ^= 1 << bit
            assert FrameDecoder(256).feed(cobs.encode(bytes(changed)) + b"\0") == [Fault.CRC]


@given(st.binary(max_size=3000), st.integers(MIN_MAX_FRAME, 1088))
def test_split_and_reassemble(body: bytes, max_frame: int) -> None:
    reassembler = Reassembler(max_message=3000)
    pieces = list(split(body, max_frame))
    assert all(len(payload) + OVERHEAD <= max_frame for _, payload in pieces)
    if len(body) <= max_frame - OVERHEAD:
        assert pieces == [(0, body)]
        return
    assert all(flags == FRAGMENT for flags, _ in pieces)
    results = [reassembler.add(Frame(3, flags, 0, 9, payload)) for flags, payload in pieces]
    assert results[:-1] == [None] * (len(pieces) - 1)
    assert results[-1] == body
    assert reassembler.buffered == 0


def _piece(total: int, offset: int, data: bytes, id_: int = 9) -> Frame:
    return Frame(3, FRAGMENT, 0, id_, Fragment(total, offset, data).to_bytes())


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (_piece(20, 0, b"0123456789"), _piece(20, 11, b"x")),
        (_piece(20, 0, b"0123456789"), _piece(21, 10, b"x")),
        (_piece(20, 0, b"0123456789"), _piece(20, 10, b"x", id_=10)),
        (_piece(20, 0, b"0123456789"), _piece(20, 15, b"0123456789")),
        (_piece(20, 0, b"0123456789"), _piece(5000, 0, b"x")),
        (_piece(20, 0, b"0123456789"), Frame(3, FRAGMENT, 0, 9, b"short")),
    ],
    ids=["gap", "other total", "other id", "beyond the whole", "too large", "cut"],
)
def test_wrong_piece_drops_the_partial_message(first: Frame, second: Frame) -> None:
    reassembler = Reassembler(max_message=4096)
    assert reassembler.add(first) is None
    with pytest.raises(ProtocolError):
        reassembler.add(second)
    assert reassembler.buffered == 0
    with pytest.raises(ProtocolError):
        reassembler.add(_piece(20, 10, b"0123456789"))


def test_a_new_first_piece_replaces_a_partial_message() -> None:
    reassembler = Reassembler(max_message=4096)
    assert reassembler.add(_piece(20, 0, b"0123456789")) is None
    assert reassembler.add(_piece(12, 0, b"abcdef", id_=10)) is None
    assert reassembler.add(_piece(12, 6, b"ghijkl", id_=10)) == b"abcdefghijkl"


def test_fragment_overhead_is_what_a_fragment_adds() -> None:
    assert len(Fragment(1, 0, b"x").to_bytes()) == FRAGMENT_OVERHEAD + 1
