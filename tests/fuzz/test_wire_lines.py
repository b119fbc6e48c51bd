"""What comes over a serial line, in whatever portions: frames, damaged frames, noise, pieces that belong together and
pieces that do not. Nothing raises, what is kept is bounded, and the next sound frame is understood."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from agent.core.errors import ProtocolError
from agent.link.calls import Counters
from agent.link.inbox import MAX_FRAME, MAX_MESSAGE, Inbox
from agent.wire.fragments import Fragment, Reassembler
from agent.wire.frame import FRAGMENT, MIN_MAX_FRAME, Frame, FrameDecoder, line_bytes
from tests.fuzz.payloads import MANY, damaged

GOOD = Frame(0x82, 0, 1, 7, b"understood")
PIECES = st.builds(Fragment, st.integers(0, 40) | st.integers(0, 2**32 - 1), st.integers(0, 40), st.binary(max_size=20))
BODIES = st.binary(max_size=300) | PIECES.map(Fragment.to_bytes)
FRAMES = st.builds(
    Frame,
    type=st.sampled_from([0x01, 0x82, 0x83, 0xFF]),
    flags=st.sampled_from([0, FRAGMENT, FRAGMENT | 2, 0xFF]),
    seq=st.integers(0, 0xFFFF),
    id=st.integers(0, 3),
    payload=BODIES,
)
LINES = st.lists(
    FRAMES.map(Frame.encode) | FRAMES.map(Frame.encode).flatmap(damaged) | st.binary(max_size=700), max_size=8
).map(b"".join)
CUTS = st.lists(st.integers(0, 3000), max_size=8)


def portions(line: bytes, cuts: list[int]) -> list[bytes]:
    places = sorted({0, len(line), *(at % (len(line) + 1) for at in cuts)})
    return [line[begin:end] for begin, end in pairwise(places)]


@MANY
@given(LINES, CUTS)
def test_portions_make_no_difference(line: bytes, cuts: list[int]) -> None:
    whole, bit_by_bit = FrameDecoder(MIN_MAX_FRAME), FrameDecoder(MIN_MAX_FRAME)
    found = []
    for portion in portions(line, cuts):
        found += bit_by_bit.feed(portion)
        assert bit_by_bit.buffered <= line_bytes(MIN_MAX_FRAME)
    assert found == whole.feed(line)
    assert bit_by_bit.counters == whole.counters
    assert bit_by_bit.feed(b"\0" + GOOD.encode())[-1] == GOOD


@MANY
@given(LINES, CUTS)
def test_an_inbox_goes_on(line: bytes, cuts: list[int]) -> None:
    counters = Counters()
    inbox = Inbox(counters)
    for portion in portions(line, cuts):
        for message in inbox.feed(portion):
            assert len(message.body) <= MAX_MESSAGE
        assert inbox.buffered <= line_bytes(MAX_FRAME) + MAX_MESSAGE
    (last,) = inbox.feed(b"\0" + GOOD.encode())[-1:]
    assert (last.type, last.id, last.body) == (GOOD.type, GOOD.id, GOOD.payload)
    assert counters.bytes_received == len(line) + 1 + len(GOOD.encode())


@MANY
@given(st.lists(FRAMES, max_size=12))
def test_pieces_in_any_order(frames: list[Frame]) -> None:
    """Whatever is put together are pieces of one message, one behind the other, and all of it."""
    reassembler = Reassembler(max_message=64)
    run: list[Frame] = []
    for frame in frames:
        try:
            body = reassembler.add(frame)
        except ProtocolError:
            assert reassembler.buffered == 0
            run = []
            continue
        piece = Fragment.from_bytes(frame.payload)
        run = [frame] if piece.offset == 0 else [*run, frame]
        assert reassembler.buffered <= 64
        if body is not None:
            parts = [Fragment.from_bytes(one.payload) for one in run]
            assert len({(one.type, one.id) for one in run}) == 1
            assert b"".join(part.data for part in parts) == body
            assert {part.total for part in parts} == {len(body)}
