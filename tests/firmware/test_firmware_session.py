"""The session's rules, on the real firmware with a clock and an engine that the test holds."""

from __future__ import annotations

import struct
from collections.abc import Iterator

import pytest
from board import (
    BAD_FRAGMENT,
    BAD_LENGTH,
    BUSY,
    CANCELLED,
    DEADLINE,
    INVOKE,
    MISMATCH,
    NO_MODEL,
    RETRY,
    TOO_LARGE,
    UNKNOWN_TYPE,
    VECTORS,
    VERSION,
    Board,
    FakeEngine,
    Hello,
    Image,
    infer,
    line,
    model,
    pieces,
)

from agent.wire.codes import MessageType
from agent.wire.frame import Frame, FrameDecoder
from hil.virtual.engine import EngineError

IMAGE = Image(model())
INPUTS = bytes(range(64))


@pytest.fixture
def bare() -> Iterator[Board]:
    board = Board()
    yield board
    board.close()


@pytest.fixture
def board(bare: Board) -> Board:
    """With an active model, and nothing on the line."""
    assert bare.push(IMAGE).code == 0
    bare.take()
    return bare


def stats(board: Board) -> dict[int, int]:
    body = board.ask("STATS_REQ").body
    return dict(struct.unpack_from("<BQ", body, 1 + 9 * i) for i in range(body[0]))


def codes(board: Board) -> list[tuple[int, str, int]]:
    return [(m.id, m.type, m.code) for m in board.take()]


def test_announces_itself_after_a_reset(bare: Board) -> None:
    (first,) = bare.take()
    hello = Hello.parse(first.body)
    assert (first.type, first.id) == ("HELLO", 0)
    assert (hello.board, hello.engine, hello.uid, hello.window) == ("host", "fake 1.0", 0x1234, 4)
    assert hello.capabilities == 0b1001  # an engine, keeps models; no verifier
    bare.boot(cause=4)
    (second,) = bare.take()
    assert Hello.parse(second.body).boot_id != hello.boot_id
    assert Hello.parse(second.body).reset_cause == 4


def test_frames_stay_small_until_the_gateway_says_what_it_takes(bare: Board) -> None:
    bare.feed(line("PING", bytes(244), 9))
    assert max(bare.line.frame_sizes) <= 256
    assert bare.take()[-1].body[16:] == bytes(244)
    bare.ask("HELLO_REQ", struct.pack("<BBH", 1, 0, 4096))
    bare.ask("PING", bytes(1000))
    assert bare.line.frame_sizes[-1] == 12 + 16 + 1000


def test_ping_tells_both_times_and_returns_the_bytes(bare: Board) -> None:
    bare.now_us = 5_000_000
    answer = bare.ask("PING", b"\0\1\2")
    assert answer.type == "PONG"
    assert struct.unpack_from("<QQ", answer.body) == (5_000_000, 5_000_000)
    assert answer.body[16:] == b"\0\1\2"
    assert bare.ask("PING", bytes(1088 - 28)).type == "PONG"
    assert bare.ask("PING", bytes(1088 - 27)).code == BAD_LENGTH


def test_infer_runs_the_active_model(board: Board) -> None:
    board.now_us = 100
    board.feed(line("INFER", infer(IMAGE, INPUTS), 5))
    board.now_us = 350
    board.poll()
    (result,) = board.take()
    assert (result.type, result.id) == ("RESULT", 5)
    assert result.body[:8] == IMAGE.sha256[:8]
    assert struct.unpack_from("<II", result.body, 8) == (250, 0)
    assert result.body[16:] == FakeEngine.answer(INPUTS, 10)


def test_infer_errors(board: Board) -> None:
    assert board.ask("INFER", infer(Image(model(1)), INPUTS)).code == MISMATCH
    assert board.ask("INFER", infer(IMAGE, INPUTS[:-1])).code == BAD_LENGTH
    board.engine.invoke_error = EngineError("kernel says no")
    answer = board.ask("INFER", infer(IMAGE, INPUTS))
    assert (answer.code, answer.body[2:]) == (INVOKE, b"kernel says no")


def test_no_model_and_no_engine(bare: Board) -> None:
    assert bare.ask("INFER", infer(IMAGE)).code == NO_MODEL
    none = Board(with_engine=False)
    assert (none.hello().engine, none.hello().capabilities & 1) == ("none", 0)
    assert none.ask("INFER", infer(IMAGE)).code == 7
    assert none.ask("MODEL_BEGIN", IMAGE.begin(256)).code == 7
    none.close()


@pytest.mark.parametrize("window", [1, 4, 8])
def test_the_window_is_what_hello_says_and_one_more_is_busy(window: int) -> None:
    board = Board(window=window)
    assert board.push(IMAGE).code == 0
    assert board.hello().window == window
    board.take()
    board.feed(*(line("INFER", infer(IMAGE), i) for i in range(100, 101 + window)))
    assert codes(board) == [(100 + window, "ERROR", BUSY)]
    board.feed(line("PING", b"", 7), line("HELLO_REQ", b"\1\0\0\4", 8))  # these do not count
    assert [m.type for m in board.take()] == ["PONG", "HELLO"]
    board.poll()
    assert [m.id for m in board.take()] == list(range(100, 100 + window))
    assert stats(board)[9] == 1
    assert stats(board)[18] == window
    board.close()


def test_a_retry_is_answered_from_the_store_and_runs_once(board: Board) -> None:
    runs = board.engine.runs
    board.feed(line("INFER", infer(IMAGE), 50))
    board.feed(line("INFER", infer(IMAGE), 50, RETRY))  # still queued: its answer is coming
    board.poll()
    (first,) = board.take()
    board.feed(line("INFER", infer(IMAGE), 50, RETRY))
    assert board.take() == [first]
    assert board.engine.runs == runs + 1
    assert stats(board)[16] == 1


def test_a_retry_that_is_no_longer_remembered_runs_as_if_new(board: Board) -> None:
    board.feed(line("INFER", infer(IMAGE), 50))
    board.poll()
    for id_ in range(60, 63):
        board.feed(line("INFER", infer(IMAGE), id_))
        board.poll()
    runs = board.engine.runs
    board.feed(line("INFER", infer(IMAGE), 50, RETRY))
    assert board.engine.runs == runs  # three later: remembered
    board.feed(line("INFER", infer(IMAGE), 63))
    board.poll()
    board.feed(line("INFER", infer(IMAGE), 50, RETRY))
    board.poll()
    assert board.engine.runs == runs + 2  # the fourth pushed it out


def test_busy_is_not_remembered(board: Board) -> None:
    board.feed(*(line("INFER", infer(IMAGE), i) for i in range(1, 6)))
    board.poll()
    board.take()
    board.feed(line("INFER", infer(IMAGE), 5, RETRY))
    board.poll()
    assert [m.type for m in board.take()] == ["RESULT"]


def test_cancel(board: Board) -> None:
    runs = board.engine.runs
    board.feed(line("INFER", infer(IMAGE), 1), line("INFER", infer(IMAGE), 2), line("CANCEL", b"", 1))
    assert codes(board) == [(1, "ERROR", CANCELLED)]
    board.poll()
    assert [m.id for m in board.take()] == [2]
    assert board.engine.runs == runs + 1
    board.feed(line("CANCEL", b"", 2), line("CANCEL", b"", 99))  # done, and never heard of
    assert board.take() == []


def test_cancel_of_a_half_received_message(board: Board) -> None:
    board.feed(*pieces("INFER", infer(IMAGE), 3, 40)[:1], line("CANCEL", b"", 3))
    assert codes(board) == [(3, "ERROR", CANCELLED)]


@pytest.mark.parametrize(("waited_ms", "expired"), [(7.999, False), (8, True), (500, True)])
def test_an_expired_budget_is_not_computed(board: Board, waited_ms: float, expired: bool) -> None:
    runs = board.engine.runs
    board.feed(line("INFER", infer(IMAGE, budget_ms=8), 1))
    board.now_us += int(waited_ms * 1000)
    board.poll()
    (answer,) = board.take()
    assert answer.code == (DEADLINE if expired else 0)
    assert board.engine.runs == runs + (not expired)
    assert stats(board)[10] == expired


def test_fragments(board: Board) -> None:
    parts = pieces("INFER", infer(IMAGE, INPUTS), 4, 17)
    assert len(parts) > 3
    board.feed(*parts)
    board.poll()
    (result,) = board.take()
    assert result.body[16:] == FakeEngine.answer(INPUTS, 10)


def test_a_lost_fragment_is_told_once_and_the_retry_succeeds(board: Board) -> None:
    parts = pieces("INFER", infer(IMAGE), 4, 17)
    board.feed(parts[0], *parts[2:])
    assert codes(board) == [(4, "ERROR", BAD_FRAGMENT)]
    board.feed(*pieces("INFER", infer(IMAGE), 4, 17, RETRY))
    board.poll()
    assert codes(board) == [(4, "RESULT", 0)]


def test_a_retry_after_a_lost_last_fragment_begins_anew(board: Board) -> None:
    board.feed(*pieces("INFER", infer(IMAGE), 4, 17)[:-1])
    board.feed(*pieces("INFER", infer(IMAGE), 4, 17, RETRY))
    board.poll()
    assert codes(board) == [(4, "RESULT", 0)]


def test_a_fragment_of_another_message_replaces(board: Board) -> None:
    board.feed(*pieces("INFER", infer(IMAGE), 4, 17)[:2], *pieces("INFER", infer(IMAGE), 5, 40))
    board.poll()
    assert codes(board) == [(4, "ERROR", BAD_FRAGMENT), (5, "RESULT", 0)]


def test_fragments_that_lie(board: Board) -> None:
    too_large = struct.pack("<II", board.hello().max_message + 1, 0) + b"x"
    board.take()
    board.feed(line("INFER", too_large, 1, 1))
    assert codes(board) == [(1, "ERROR", TOO_LARGE)]
    board.feed(line("INFER", struct.pack("<II", 4, 0) + b"longer", 2, 1))
    assert codes(board) == [(2, "ERROR", BAD_FRAGMENT)]
    board.feed(line("INFER", struct.pack("<II", 9, 0) + b"abc", 3, 1))
    board.feed(line("INFER", struct.pack("<II", 8, 3) + b"abc", 3, 1))  # another total
    assert codes(board) == [(3, "ERROR", BAD_FRAGMENT)]
    board.feed(line("INFER", struct.pack("<II", 0xFFFFFFFF, 0xFFFFFFF0) + b"abc", 4, 1))
    assert codes(board) == [(4, "ERROR", BAD_FRAGMENT)]


def test_a_full_window_still_reassembles(board: Board) -> None:
    board.feed(*(line("INFER", infer(IMAGE), i) for i in range(1, 5)))
    board.feed(*pieces("INFER", infer(IMAGE), 5, 17))
    assert codes(board) == [(5, "ERROR", BUSY)]
    board.poll()
    assert len(board.take()) == 4


def test_version_mismatch_serves_only_the_way_back(board: Board) -> None:
    answer = board.ask("HELLO_REQ", struct.pack("<BBH", 2, 0, 1024))
    assert (answer.code, answer.body[2:]) == (VERSION, b"1.1")
    assert board.ask("INFER", infer(IMAGE)).code == VERSION
    assert board.ask("STATS_REQ").code == VERSION
    assert board.ask("PING", b"x").type == "PONG"
    assert board.ask("HELLO_REQ", struct.pack("<BBH", 1, 9, 1024)).type == "HELLO"
    assert board.ask("INFER", infer(IMAGE)).type == "RESULT"


def test_hello_req_does_not_disturb_open_requests(board: Board) -> None:
    board.feed(line("INFER", infer(IMAGE), 5), line("HELLO_REQ", b"\1\0\0\4", 6))
    board.poll()
    assert [m.type for m in board.take()] == ["HELLO", "RESULT"]


def test_reset_is_asked_of_the_board_and_silences_the_session(board: Board) -> None:
    board.feed(line("INFER", infer(IMAGE), 5), line("RESET", b"", 6), line("PING", b"", 7))
    board.poll()
    assert board.resets == 1
    assert board.take() == []


@pytest.mark.parametrize("type_", [0x00, 0x06, 0x33, 0x7E, 0x83, 0xFF])
def test_unknown_types(board: Board, type_: int) -> None:
    board.feed(line(type_, b"what", 77))
    assert codes(board) == [(77, "ERROR", UNKNOWN_TYPE)]


FROM_GATEWAY = {"HELLO_REQ", "INFER", "MODEL_BEGIN", "MODEL_CHUNK"}


@pytest.mark.parametrize("short", [s for s in VECTORS["short"] if s["type"] in FROM_GATEWAY], ids=lambda s: s["name"])
def test_bodies_that_are_too_short(board: Board, short: dict) -> None:
    assert board.ask(short["type"], bytes.fromhex(short["body_hex"])).code == BAD_LENGTH


def test_bodies_of_a_later_minor_version(board: Board) -> None:
    grown = {g["name"]: bytes.fromhex(g["body_hex"]) for g in VECTORS["grown"]}
    assert board.ask("HELLO_REQ", grown["hello_req_grown"]).type == "HELLO"
    board.feed(line("INFER", infer(IMAGE), 5), line("CANCEL", grown["cancel_grown"], 5))
    assert codes(board) == [(5, "ERROR", CANCELLED)]


def test_stats_count_what_the_line_did(board: Board) -> None:
    before = stats(board)
    bad = bytearray(line("PING", b"abc", 1))
    bad[-3] ^= 1
    board.feed(bytes(bad), b"\5\0", b"\7" * 3000 + b"\0", line("PING", seq=7), line("PING", seq=12))
    after = stats(board)
    assert [after[i] - before[i] for i in (4, 5, 6)] == [1, 1, 1]
    # From sequence 1 (behind the 0 of the request before) to 7, then from 8 to 12.
    assert after[15] - before[15] == 6 + 4
    assert after[2] - before[2] == 3


def test_a_frame_that_a_reset_cut_short_does_not_take_hello_with_it(board: Board) -> None:
    before = len(board.line.raw)
    board.ask("STATS_REQ")
    answer = board.line.raw[before:]
    board.boot()
    for sent in (1, 20, len(answer) - 1, len(answer)):
        found = FrameDecoder(4096).feed(answer[:sent] + board.line.raw)
        assert isinstance(found[-1], Frame) and found[-1].type == MessageType.HELLO


def test_a_defect_of_the_virtual_engine_is_no_answer(board: Board) -> None:
    def break_down() -> None:
        raise MemoryError("a defect")

    board.engine.on_invoke = break_down
    assert board.ask("INFER", infer(IMAGE, INPUTS)).code == INVOKE
