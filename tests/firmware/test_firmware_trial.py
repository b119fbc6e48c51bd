"""The trial of a new model: confirmed, or back to the former one whatever happens."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
from board import (
    ACTIVE,
    BAD,
    BAD_LENGTH,
    IN_TRIAL,
    INVOKE,
    MISMATCH,
    NO_MODEL,
    NOT_BEGUN,
    RETRY,
    STORED,
    TRIAL,
    Board,
    Image,
    Message,
    Status,
    infer,
    line,
    model,
)

from hil.virtual.engine import EngineError

A = Image(model(), counter=1)
B = Image(model(1), counter=2)
C = Image(model(2), counter=3)
POWER_ON, PIN, SOFTWARE, WATCHDOG, FAULT = 1, 2, 3, 4, 5
NONE, RESET, CRASH, TIMEOUT, INVOKE_FAILED, REQUESTED = range(6)
TRIAL_LEFT_US = 19


def states(board: Board) -> dict[bytes, int]:
    return {slot.sha256: slot.state for slot in board.hello().slots}


def runs(board: Board, image: Image) -> bool:
    return board.ask("INFER", infer(image)).type == "RESULT"


def confirm(board: Board, image: Image) -> Message:
    return board.ask("MODEL_CONFIRM", image.sha256[:8])


def roll_back(board: Board, image: Image) -> Message:
    return board.ask("MODEL_ROLLBACK", image.sha256[:8])


def trial_left_us(board: Board) -> int:
    body = board.ask("STATS_REQ").body
    return dict(struct.iter_unpack("<BQ", body[1:]))[TRIAL_LEFT_US]


@pytest.fixture
def board() -> Iterator[Board]:
    """A is active, B in trial."""
    board = Board()
    assert board.push(A).code == 0
    status = Status.parse(board.push(B, trial=True).body)
    assert (status.state, status.length) == (TRIAL, len(B.data))
    yield board
    assert board.flash.breaches == []
    board.close()


def went_back(board: Board, why: int) -> None:
    assert states(board) == {A.sha256: ACTIVE, B.sha256: BAD}
    assert board.hello().rollback == why
    assert runs(board, A)
    assert board.ask("INFER", infer(B)).code == MISMATCH
    board.boot()
    assert states(board) == {A.sha256: ACTIVE, B.sha256: BAD}
    assert board.hello().rollback == why, "the reason outlives a reset"
    assert board.push(C, trial=True).code == 0
    assert board.hello().rollback == NONE


def test_a_new_model_runs_in_trial_and_the_former_one_is_kept(board: Board) -> None:
    assert states(board) == {A.sha256: STORED, B.sha256: TRIAL}
    assert runs(board, B)
    slot = next(slot for slot in board.hello().slots if slot.state == TRIAL)
    assert (slot.input_bytes, slot.output_bytes) == (64, 10)
    assert board.hello().trial_s == 300


def test_confirmed_for_good(board: Board) -> None:
    before = board.flash.operations
    assert Status.parse(confirm(board, B).body).state == ACTIVE
    assert board.flash.operations in (before + 1, before + 2), "a record, and an erase where the block was full"
    board.now_us += 3600 * 10**6
    board.poll()
    for cause in (POWER_ON, WATCHDOG):
        board.boot(cause)
        assert states(board) == {A.sha256: STORED, B.sha256: ACTIVE}
    assert board.hello().rollback == NONE


def test_confirming_is_done_once_however_often_it_is_asked(board: Board) -> None:
    board.feed(line("MODEL_CONFIRM", B.sha256[:8], 77))
    board.poll()
    operations = board.flash.operations
    board.take()
    board.feed(line("MODEL_CONFIRM", B.sha256[:8], 77, RETRY))  # the answer was lost, and is repeated
    assert [(m.type, m.id) for m in board.take()] == [("MODEL_STATUS", 77)]
    assert Status.parse(confirm(board, B).body).state == ACTIVE  # asked anew, under another id
    board.boot()
    assert Status.parse(confirm(board, B).body).state == ACTIVE
    assert board.flash.operations == 0
    assert operations


@pytest.mark.parametrize(
    ("cause", "why"), [(POWER_ON, RESET), (PIN, RESET), (SOFTWARE, RESET), (WATCHDOG, CRASH), (FAULT, CRASH)]
)
def test_any_reset_before_it_is_confirmed_goes_back(board: Board, cause: int, why: int) -> None:
    board.boot(cause)
    hello, log = board.take()
    assert (hello.type, log.type) == ("HELLO", "LOG")
    assert log.body[1:] == b"the model in trial was rolled back"
    went_back(board, why)
    assert confirm(board, B).code == MISMATCH  # too late, and it says so


def test_time_runs_out(board: Board) -> None:
    assert trial_left_us(board) == 300 * 10**6
    board.now_us += 299 * 10**6
    board.poll()
    assert states(board)[B.sha256] == TRIAL
    assert trial_left_us(board) == 10**6
    board.take()
    board.now_us += 10**6
    board.poll()
    assert [m.type for m in board.take()] == ["HELLO", "LOG"], "said unasked"
    assert trial_left_us(board) == 0
    went_back(board, TIMEOUT)


def test_a_failed_inference_goes_back(board: Board) -> None:
    board.engine.invoke_error = EngineError("kernel says no")
    answer = board.ask("INFER", infer(B))
    assert (answer.code, answer.body[2:]) == (INVOKE, b"kernel says no")
    board.engine.invoke_error = None
    went_back(board, INVOKE_FAILED)


def test_a_failed_inference_of_a_confirmed_model_does_not(board: Board) -> None:
    confirm(board, B)
    board.engine.invoke_error = EngineError("kernel says no")
    assert board.ask("INFER", infer(B)).code == INVOKE
    board.engine.invoke_error = None
    assert states(board) == {A.sha256: STORED, B.sha256: ACTIVE}
    assert board.push(C, trial=True).code == 0
    board.poll()
    assert states(board)[C.sha256] == TRIAL, "what an earlier model did is not held against this one"


def test_rolled_back_by_request_once_however_often_it_is_asked(board: Board) -> None:
    status = Status.parse(roll_back(board, B).body)
    assert (status.state, status.image_sha256) == (ACTIVE, A.sha256)
    operations = board.flash.operations
    assert Status.parse(roll_back(board, B).body).image_sha256 == A.sha256
    assert board.flash.operations == operations
    went_back(board, REQUESTED)


def test_a_late_word_about_another_model_decides_nothing(board: Board) -> None:
    for image in (A, C):
        assert roll_back(board, image).code == MISMATCH
        assert confirm(board, image).code == MISMATCH
    assert board.ask("MODEL_CONFIRM", B.sha256[:7]).code == BAD_LENGTH
    assert states(board)[B.sha256] == TRIAL
    confirm(board, B)
    assert roll_back(board, B).code == MISMATCH, "a confirmed model stays"


def test_nothing_else_is_taken_during_a_trial(board: Board) -> None:
    assert board.push(C).code == IN_TRIAL
    assert board.ask("MODEL_COMMIT", b"\1").code == NOT_BEGUN
    assert board.ask("MODEL_ABORT").code == 0
    assert states(board) == {A.sha256: STORED, B.sha256: TRIAL}
    roll_back(board, B)
    assert board.push(C, trial=True).code == 0
    confirm(board, C)
    assert states(board) == {A.sha256: STORED, C.sha256: ACTIVE}


def test_the_same_model_under_another_counter() -> None:
    board = Board()
    board.push(A)
    again = replace(A, counter=2)
    board.push(again, trial=True)
    assert sorted(slot.state for slot in board.hello().slots) == [STORED, TRIAL]
    board.boot()
    assert sorted((slot.state, slot.counter) for slot in board.hello().slots) == [(ACTIVE, 1), (BAD, 2)]
    board.push(again, trial=True)
    assert confirm(board, A).code == 0
    assert sorted((slot.state, slot.counter) for slot in board.hello().slots) == [(STORED, 1), (ACTIVE, 2)]
    board.close()


# -- a board that had no model before ----------------------------------------------------------------------------------


@pytest.fixture
def first() -> Iterator[Board]:
    board = Board()
    assert Status.parse(board.push(A, trial=True).body).state == TRIAL
    yield board
    board.close()


def a_reset(board: Board) -> None:
    board.boot(POWER_ON)


def an_hour(board: Board) -> None:
    board.now_us += 3600 * 10**6
    board.poll()


@pytest.mark.parametrize("event", [a_reset, an_hour])
def test_the_first_model_is_kept_where_nothing_speaks_against_it(first: Board, event: Callable[[Board], None]) -> None:
    event(first)
    assert states(first)[A.sha256] == TRIAL
    assert runs(first, A)
    assert confirm(first, A).code == 0
    assert states(first)[A.sha256] == ACTIVE


@pytest.mark.parametrize("cause", [WATCHDOG, FAULT])
def test_the_first_model_goes_when_it_crashed_the_board(first: Board, cause: int) -> None:
    first.boot(cause)
    assert states(first)[A.sha256] == BAD
    assert first.hello().rollback == CRASH
    assert first.ask("INFER", infer(A)).code == NO_MODEL
    assert first.push(B).code == 0


def test_the_first_model_goes_by_request_and_when_it_fails(first: Board) -> None:
    status = Status.parse(roll_back(first, A).body)
    assert status.slot == 0xFF
    assert first.ask("INFER", infer(A)).code == NO_MODEL
    assert first.push(B, trial=True).code == 0
    first.engine.invoke_error = EngineError("no")
    assert first.ask("INFER", infer(B)).code == INVOKE
    assert states(first)[B.sha256] == BAD
    assert first.hello().rollback == INVOKE_FAILED


def test_a_former_model_that_is_damaged_is_not_gone_back_to(board: Board) -> None:
    at = bytes(board.flash.memory).find(A.model)
    board.flash.memory[at + 500] ^= 1
    board.boot()
    assert states(board)[B.sha256] == TRIAL, "a model that works is worth more than none"
    assert runs(board, B)
    board.now_us += 301 * 10**6
    board.poll()
    assert runs(board, B)
    assert confirm(board, B).code == 0


# -- power cuts --------------------------------------------------------------------------------------------------------

TARGET = replace(B, counter=3)


def used_board() -> Board:
    """Journal and both slots have held something before; A is active."""
    board = Board()
    board.push(A)
    board.push(replace(A, counter=2))
    board.flash.power_on()
    return board


def update_and_confirm(board: Board) -> None:
    board.push(TARGET, trial=True)
    confirm(board, TARGET)


def update_and_roll_back(board: Board) -> None:
    board.push(TARGET, trial=True)
    roll_back(board, TARGET)


def update_and_reset(board: Board) -> None:
    board.push(TARGET, trial=True)
    reset_under_the_same_power(board)


def reset_under_the_same_power(board: Board) -> None:
    """A boot that itself may be cut."""
    flash = board.flash
    kept = flash.cut_at, flash.dead, flash.operations
    flash.power_on = lambda: None  # type: ignore[method-assign]
    flash.cut_at, flash.dead, flash.operations = kept
    board.boot(WATCHDOG)
    del flash.power_on


def operations_of(life: Callable[[Board], None], used: Callable[[], Board] = used_board) -> int:
    board = used()
    life(board)
    board.close()
    return board.flash.operations


def check_alive(board: Board, life: Callable[[Board], None]) -> bytes:
    """Exactly one model runs, and it is one of the two. Returns its digest."""
    found = [slot for slot in board.hello().slots if slot.state in (ACTIVE, TRIAL)]
    assert [slot.state for slot in found] == [ACTIVE], "no trial outlives a power cut where there is a former model"
    (slot,) = found
    assert slot.sha256 in (A.sha256, B.sha256)
    image = A if slot.sha256 == A.sha256 else B
    assert board.ask("INFER", infer(image)).body[16:] == board.engine.answer(bytes(range(64)), 10)
    assert board.engine.runs_on(image.model)
    return slot.sha256


@pytest.mark.parametrize("torn", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("life", [update_and_confirm, update_and_roll_back, update_and_reset])
def test_power_cut_at_every_flash_operation(life: Callable[[Board], None], torn: float) -> None:
    cut_everywhere(life, torn, used_board)


def cut_everywhere(life: Callable[[Board], None], torn: float, used: Callable[[], Board]) -> None:
    """`used` makes the board that each of the lives begins with."""
    cuts = operations_of(life, used)
    assert cuts > 30
    confirmed = []
    for cut in range(cuts):
        board = used()
        board.flash.cut_at, board.flash.torn = cut, torn
        life(board)
        assert board.flash.dead
        board.boot()
        running = check_alive(board, life)
        confirmed.append(running == B.sha256)
        if running == A.sha256:
            assert board.push(TARGET, trial=True).code == 0, f"not completed after a cut at {cut}"
            assert confirm(board, TARGET).code == 0
        board.boot()
        assert check_alive(board, life) == B.sha256
        assert board.flash.breaches == []
        board.close()
    # Only MODEL_CONFIRM's one write, when it is whole, keeps the new model.
    keeps = life is update_and_confirm and torn == 1.0
    assert confirmed == [False] * (cuts - 1) + [keeps]


@pytest.mark.parametrize("life", [update_and_confirm, update_and_reset])
def test_power_cut_while_recovering_from_a_power_cut(life: Callable[[Board], None]) -> None:
    """The boot after a cut writes too (the rollback), and so does the resumed transfer."""
    for first in range(operations_of(life)):
        for second in range(4):
            board = used_board()
            board.flash.cut_at, board.flash.torn = first, 0.5
            life(board)
            board.flash.power_on()
            board.flash.cut_at = second
            reset_under_the_same_power(board)
            update_and_confirm(board)
            board.boot()
            check_alive(board, life)
            assert board.flash.breaches == [], f"after cuts at {first} and {second}"
            board.close()
