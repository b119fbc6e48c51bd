"""The board's own sensor: samples, credits, and requests in between, with a clock that the test holds."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from board import BAD_LENGTH, MISMATCH, NO_MODEL, ROOT, Board, FakeEngine, Image, Message, infer, line, model

from hil.virtual.engine import EngineError

IMAGE = Image(model())
NEVER, BELOW, ALWAYS = 0, 1, 2
SENSOR, INVOKE = 27, 12
INTERVAL_US = 10_000


@dataclass(frozen=True)
class Result:
    id: int
    seq: int
    skipped: int
    time_us: int
    compute_us: int
    outputs: bytes
    inputs: bytes

    @classmethod
    def parse(cls, message: Message) -> Result:
        assert message.type == "STREAM_RESULT", message
        *head, length = struct.unpack_from("<IIQIH", message.body)
        return cls(message.id, *head, message.body[22 : 22 + length], message.body[22 + length :])


class Sensor:
    """Counts up; `dry` has nothing to read."""

    def __init__(self) -> None:
        self.count = 0
        self.dry = False

    def read(self, source: int, size: int) -> bytes | None:
        assert source == 0
        self.count += 1
        return None if self.dry else self.at(self.count - 1, size)

    @staticmethod
    def at(count: int, size: int = 64) -> bytes:
        return bytes([count & 0x7F]) * size


@pytest.fixture
def sensor() -> Sensor:
    return Sensor()


@pytest.fixture
def board(sensor: Sensor) -> Iterator[Board]:
    board = Board(sample=sensor.read)
    assert board.push(IMAGE).code == 0
    board.take()
    yield board
    board.close()


def start(
    *, credits: int = 8, send: int = NEVER, threshold: int = 0, interval_ms: int = 10, source: int = 0, tag: bytes = b""
) -> bytes:
    return struct.pack("<BBbII", source, send, threshold, interval_ms, credits) + (tag or IMAGE.sha256[:8])


def begin(board: Board, **options: int) -> list[Result]:
    """STREAM_START and the sample that is due at once."""
    board.feed(line("STREAM_START", start(**options), 40))  # type: ignore[arg-type]
    board.poll()
    status, *results = board.take()
    assert (status.type, status.id) == ("STREAM_STATUS", 40)
    assert struct.unpack("<BIII", status.body)[0] == 1
    return [Result.parse(m) for m in results]


def passed(board: Board, intervals: float = 1) -> list[Result]:
    board.now_us += int(intervals * INTERVAL_US)
    board.poll()
    return [Result.parse(m) for m in board.take()]


def status(board: Board, type_: str = "STREAM_CREDIT", body: bytes = bytes(4)) -> tuple[int, int, int, int]:
    board.feed(line(type_, body, 99))
    (answer,) = [m for m in board.take() if m.type == "STREAM_STATUS"]
    state, seq, skipped, upto = struct.unpack("<BIII", answer.body)
    return state, seq, skipped, upto


def test_hello_says_whether_the_board_streams(board: Board) -> None:
    assert board.hello().capabilities & 4
    bare = Board()
    assert not bare.hello().capabilities & 4
    bare.close()


def test_a_sample_each_interval_with_its_time_and_answer(board: Board) -> None:
    board.now_us = 5_000
    (first,) = begin(board)
    assert (first.id, first.seq, first.skipped, first.time_us) == (40, 0, 0, 5_000)
    assert first.outputs == FakeEngine.answer(Sensor.at(0), 10)
    assert first.inputs == b""
    assert passed(board, 0.5) == []
    (second,) = passed(board, 0.5)
    assert (second.seq, second.time_us, second.outputs) == (1, 15_000, FakeEngine.answer(Sensor.at(1), 10))


def test_no_more_than_granted_and_the_newest_is_kept(board: Board) -> None:
    results = begin(board, credits=2) + [r for _ in range(5) for r in passed(board)]
    assert [r.seq for r in results] == [0, 1]
    assert status(board)[1:] == (2, 3, 2)  # four more samples, of which the last still waits
    board.feed(line("STREAM_CREDIT", struct.pack("<I", 3), 0))
    (newest,) = [Result.parse(m) for m in board.take()]
    assert (newest.seq, newest.skipped, newest.time_us) == (2, 3, 50_000)
    assert newest.outputs == FakeEngine.answer(Sensor.at(5), 10)


def test_a_late_grant_takes_nothing_back(board: Board) -> None:
    begin(board, credits=8)
    board.feed(line("STREAM_CREDIT", struct.pack("<I", 5), 0))
    assert status(board)[3] == 8


def test_numbers_go_on_from_stream_to_stream(board: Board) -> None:
    begin(board)
    passed(board)
    (again,) = begin(board, credits=1)
    assert again.seq == 2
    assert status(board)[3] == 3


@pytest.mark.parametrize(
    ("send", "threshold", "with_inputs"), [(NEVER, 127, False), (BELOW, 127, True), (ALWAYS, -128, True)]
)
def test_inputs_travel_as_asked(board: Board, send: int, threshold: int, with_inputs: bool) -> None:
    (result,) = begin(board, send=send, threshold=threshold)
    assert result.inputs == (Sensor.at(0) if with_inputs else b"")


def test_the_threshold_is_on_the_highest_output_as_a_signed_byte(board: Board) -> None:
    # The first sample's outputs are all 0x5A.
    (result,) = begin(board, send=BELOW, threshold=0x5A)
    assert result.inputs == b""
    (result,) = begin(board, send=BELOW, threshold=0x5C)
    assert result.outputs[0] == 0x5B
    assert result.inputs == Sensor.at(1)


def test_instants_that_passed_while_the_board_was_busy_are_skipped(board: Board, sensor: Sensor) -> None:
    begin(board)
    (late,) = passed(board, 4.5)
    assert (late.skipped, sensor.count) == (3, 2)
    (on_time,) = passed(board, 0.5)
    assert on_time.time_us == 5 * INTERVAL_US


def test_hours_without_a_turn_are_survived(board: Board) -> None:
    begin(board)
    assert len(passed(board, 3 * 3600 * 1e6 / INTERVAL_US)) == 1
    assert len(passed(board)) == 1


def test_requests_and_samples_take_turns(board: Board) -> None:
    """The sensor is due at every turn, and the window is full: each gets every second turn."""

    def busy() -> None:
        board.now_us += INTERVAL_US

    board.engine.on_invoke = busy
    board.feed(*(line("INFER", infer(IMAGE), i) for i in range(1, 5)), line("STREAM_START", start(credits=100), 40))
    board.poll()
    kinds = [m.type for m in board.take() if m.type in ("RESULT", "STREAM_RESULT")]
    assert kinds[:7] == [
        "STREAM_RESULT",
        "RESULT",
        "STREAM_RESULT",
        "RESULT",
        "STREAM_RESULT",
        "RESULT",
        "STREAM_RESULT",
    ]


def test_another_model_ends_the_stream(board: Board) -> None:
    begin(board)
    assert board.push(Image(model(1), counter=2)).code == 0
    board.take()
    board.now_us += INTERVAL_US
    board.poll()
    assert [(m.id, m.code) for m in board.take()] == [(40, MISMATCH)]
    assert status(board)[0] == 0


@pytest.mark.parametrize("fault", ["sensor", "engine"])
def test_what_it_cannot_go_on_from_ends_it(board: Board, sensor: Sensor, fault: str) -> None:
    begin(board)
    if fault == "sensor":
        sensor.dry = True
    else:
        board.engine.invoke_error = EngineError("no")
    board.now_us += INTERVAL_US
    board.poll()
    assert [(m.id, m.code) for m in board.take()] == [(40, SENSOR if fault == "sensor" else INVOKE)]
    assert passed(board, 5) == []


def test_stop_ends_it(board: Board) -> None:
    begin(board)
    assert status(board, "STREAM_STOP", b"")[0] == 0
    assert passed(board, 5) == []


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (start()[:-1], BAD_LENGTH),
        (start(interval_ms=0), BAD_LENGTH),
        (start(interval_ms=3_600_001), BAD_LENGTH),
        (start(send=3), BAD_LENGTH),
        (start(source=1), SENSOR),
        (start(tag=b"another!"), MISMATCH),
    ],
)
def test_a_start_that_makes_no_sense_is_refused(board: Board, body: bytes, code: int) -> None:
    assert board.ask("STREAM_START", body).code == code
    assert status(board)[0] == 0


def test_without_a_model_there_is_no_stream(sensor: Sensor) -> None:
    board = Board(sample=sensor.read)
    assert board.ask("STREAM_START", start()).code == NO_MODEL
    board.close()


def test_large_inputs_travel_in_fragments(board: Board) -> None:
    board.feed(line("HELLO_REQ", struct.pack("<BBH", 1, 0, 256), 7))
    board.take()
    motion = Image((ROOT / "models/motion/mcu-int8.tflite").read_bytes(), counter=2)
    assert board.push(motion, chunk=128).code == 0
    board.take()
    board.feed(line("STREAM_START", start(send=ALWAYS, tag=motion.sha256[:8]), 40))
    board.poll()
    (result,) = [Result.parse(m) for m in board.take() if m.type == "STREAM_RESULT"]
    assert result.inputs == Sensor.at(0, 600)
    assert max(board.line.frame_sizes) <= 256


def test_stats_count_what_was_sent_and_skipped(board: Board) -> None:
    begin(board, credits=1)
    passed(board)
    passed(board)
    body = board.ask("STATS_REQ").body
    found = dict(struct.unpack_from("<BQ", body, 1 + 9 * i) for i in range(body[0]))
    assert (found[23], found[24]) == (1, 1)
