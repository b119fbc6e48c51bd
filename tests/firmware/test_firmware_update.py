"""Model update: two slots that survive whatever happens in between."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator
from dataclasses import replace

import pytest
from board import (
    ACTIVE,
    ARENA,
    BAD,
    BAD_LENGTH,
    BAD_OFFSET,
    DIGEST,
    DOWNGRADE,
    EMPTY,
    INCOMPLETE,
    INVALID_MODEL,
    NOT_BEGUN,
    RECEIVING,
    SELFTEST,
    SIGNATURE,
    STORED,
    TOO_LARGE,
    Board,
    FakeEngine,
    Image,
    MemoryFlash,
    Status,
    infer,
    model,
)

from hil.virtual.engine import EngineError, LoadResult

A = Image(model(), counter=1)
B = Image(model(1), counter=2)
CHUNK = 256


@pytest.fixture
def board() -> Iterator[Board]:
    board = Board()
    assert board.push(A).code == 0
    yield board
    assert board.flash.breaches == []
    board.close()


def chunks(image: Image, size: int = CHUNK) -> list[bytes]:
    return [struct.pack("<I", at) + image.data[at : at + size] for at in range(0, len(image.data), size)]


def runs(board: Board, image: Image) -> bool:
    return board.ask("INFER", infer(image)).type == "RESULT"


def states(board: Board) -> dict[bytes, int]:
    return {slot.sha256: slot.state for slot in board.hello().slots}


def test_an_update_changes_the_model_and_keeps_the_old_one(board: Board) -> None:
    status = Status.parse(board.push(B).body)
    assert (status.state, status.length, status.next) == (ACTIVE, len(B.data), len(B.data))
    assert status.image_sha256 == B.sha256
    assert states(board) == {A.sha256: STORED, B.sha256: ACTIVE}
    assert runs(board, B)
    board.boot()
    assert states(board) == {A.sha256: STORED, B.sha256: ACTIVE}
    assert runs(board, B)
    slot = next(s for s in board.hello().slots if s.state == ACTIVE)
    assert (slot.length, slot.counter, slot.input_bytes, slot.output_bytes) == (len(B.model), 2, 64, 10)


def test_chunks_in_any_order_and_more_than_once(board: Board) -> None:
    all_chunks = chunks(B)
    board.ask("MODEL_BEGIN", B.begin(CHUNK))
    for chunk in (*reversed(all_chunks), all_chunks[3]):
        status = Status.parse(board.ask("MODEL_CHUNK", chunk).body)
    assert status.next == status.received == len(B.data)
    assert board.ask("MODEL_COMMIT").code == 0
    assert board.active() == B.sha256


def test_status_tells_what_is_missing(board: Board) -> None:
    board.ask("MODEL_BEGIN", B.begin(CHUNK))
    all_chunks = chunks(B)
    for index in (0, 2, 3):
        board.ask("MODEL_CHUNK", all_chunks[index])
    status = Status.parse(board.ask("MODEL_QUERY").body)
    assert (status.state, status.chunk, status.length) == (RECEIVING, CHUNK, len(B.data))
    assert (status.received, status.next) == (3 * CHUNK, CHUNK)
    assert status.bitmap == bytes([0b110]) + bytes(31)
    assert board.ask("MODEL_COMMIT").code == INCOMPLETE
    assert runs(board, A)


@pytest.mark.parametrize("cause", [1, 3])
def test_a_transfer_resumes_after_a_reset(board: Board, cause: int) -> None:
    board.ask("MODEL_BEGIN", B.begin(CHUNK))
    all_chunks = chunks(B)
    for chunk in all_chunks[:5]:
        board.ask("MODEL_CHUNK", chunk)
    board.boot(cause)
    assert runs(board, A)
    status = Status.parse(board.ask("MODEL_BEGIN", B.begin(CHUNK)).body)
    assert status.next == 5 * CHUNK
    for chunk in all_chunks[5:]:
        board.ask("MODEL_CHUNK", chunk)
    assert board.ask("MODEL_COMMIT").code == 0
    assert board.active() == B.sha256


def test_another_image_begins_anew(board: Board) -> None:
    board.ask("MODEL_BEGIN", B.begin(CHUNK))
    board.ask("MODEL_CHUNK", chunks(B)[0])
    other = Image(model(2), counter=3)
    assert Status.parse(board.ask("MODEL_BEGIN", other.begin(CHUNK)).body).received == 0
    board.boot()
    assert board.push(other).code == 0
    assert states(board) == {A.sha256: STORED, other.sha256: ACTIVE}


def test_abort_and_query_without_a_transfer(board: Board) -> None:
    assert Status.parse(board.ask("MODEL_QUERY").body).slot == 0xFF
    assert Status.parse(board.ask("MODEL_ABORT").body).slot == 0xFF
    assert board.ask("MODEL_CHUNK", chunks(B)[0]).code == NOT_BEGUN
    assert board.ask("MODEL_COMMIT").code == NOT_BEGUN
    board.ask("MODEL_BEGIN", B.begin(CHUNK))
    assert Status.parse(board.ask("MODEL_ABORT").body).slot == 0xFF
    assert states(board)[B.sha256] == EMPTY
    assert board.ask("MODEL_COMMIT").code == NOT_BEGUN


@pytest.mark.parametrize("offset", [1, CHUNK - 1, 1 << 20, 0xFFFFFF00])
def test_chunks_off_the_grid(board: Board, offset: int) -> None:
    board.ask("MODEL_BEGIN", B.begin(CHUNK))
    assert board.ask("MODEL_CHUNK", struct.pack("<I", offset) + bytes(CHUNK)).code == BAD_OFFSET


@pytest.mark.parametrize("size", [0, CHUNK - 1, CHUNK + 1])
def test_chunks_of_the_wrong_length(board: Board, size: int) -> None:
    board.ask("MODEL_BEGIN", B.begin(CHUNK))
    assert board.ask("MODEL_CHUNK", struct.pack("<I", 0) + bytes(size)).code == BAD_OFFSET


@pytest.mark.parametrize("chunk", [0, 100, 1088 - 15])
def test_chunk_sizes_that_cannot_be_stored(board: Board, chunk: int) -> None:
    assert board.ask("MODEL_BEGIN", B.begin(chunk)).code == BAD_LENGTH


def test_an_image_in_one_chunk_may_have_any_length() -> None:
    engine = FakeEngine()
    board = Board(engine=engine)
    odd = Image(b"not a model", counter=1)
    board.ask("MODEL_BEGIN", odd.begin(len(odd.data)))
    assert board.ask("MODEL_CHUNK", chunks(odd)[0]).code == 0
    assert board.ask("MODEL_COMMIT").code == INVALID_MODEL
    assert board.flash.breaches == []
    board.close()


def test_what_begin_refuses(board: Board) -> None:
    slot_size = board.hello().slot_size
    assert board.ask("MODEL_BEGIN", Image(bytes(slot_size + 1), counter=9).begin(CHUNK)).code == TOO_LARGE
    wraps = bytearray(B.begin(CHUNK))
    wraps[4:12] = struct.pack("<II", 0xFFFFFFFF, 2)
    assert board.ask("MODEL_BEGIN", bytes(wraps)).code == TOO_LARGE
    assert board.ask("MODEL_BEGIN", replace(B, arena=1 << 20).begin(CHUNK)).code == ARENA
    assert board.ask("MODEL_BEGIN", b"\3" + B.begin(CHUNK)[1:] + bytes(32)).code == INVALID_MODEL
    assert board.active() == A.sha256


def test_downgrade() -> None:
    board = Board()
    assert board.push(replace(A, counter=5)).code == 0
    for counter in (4, 5):
        assert board.push(replace(B, counter=counter)).code == DOWNGRADE
    assert board.push(replace(A, counter=5)).code == 0  # the same model again
    assert board.push(replace(B, counter=4, flags=1)).code == 0  # allowed by its flag
    assert board.active() == B.sha256
    board.close()


def failing(board: Board, image: Image, code: int) -> None:
    """The update fails with `code`; the old model goes on, also after a reset; a good update follows."""
    assert board.push(image).code == code
    assert runs(board, A)
    assert BAD in states(board).values()
    board.boot()
    assert board.active() == A.sha256
    assert runs(board, A)
    assert board.push(B).code == 0
    assert board.active() == B.sha256


def test_wrong_model_digest(board: Board) -> None:
    failing(board, replace(B, model_sha256=hashlib.sha256(b"another").digest()), DIGEST)


def test_wrong_image_digest(board: Board) -> None:
    begin = bytearray(B.begin(CHUNK))
    begin[53] ^= 1
    board.ask("MODEL_BEGIN", bytes(begin))
    for chunk in chunks(B):
        board.ask("MODEL_CHUNK", chunk)
    assert board.ask("MODEL_COMMIT").code == DIGEST
    assert runs(board, A)


@pytest.mark.parametrize("length", [1, 8, 100, len(B.model) // 2, len(B.model) - 1])
def test_truncated_model(board: Board, length: int) -> None:
    failing(board, Image(B.model[:length], counter=2), INVALID_MODEL)


def test_engine_that_refuses(board: Board) -> None:
    board.engine.load_error = EngineError("kernel says no", LoadResult.ARENA)
    answer = board.push(B)
    assert (answer.code, answer.body[2:]) == (ARENA, b"kernel says no")
    board.engine.load_error = None
    board.boot()
    assert board.active() == A.sha256


@pytest.mark.parametrize(
    ("difference", "tolerance", "code"), [(0, 0, 0), (1, 0, SELFTEST), (1, 1, 0), (3, 2, SELFTEST)]
)
def test_selftest(board: Board, difference: int, tolerance: int, code: int) -> None:
    inputs = bytes(range(64))
    expected = bytearray(FakeEngine.answer(inputs, 10))
    expected[7] = (expected[7] + difference) & 0xFF
    image = replace(B, selftest=inputs + bytes(expected), tolerance=tolerance)
    assert board.push(image).code == code
    assert board.active() == (A.sha256 if code else B.sha256)
    assert runs(board, A if code else B)


def test_a_first_model_that_failed_its_selftest_does_not_run() -> None:
    """Nor does another under whose slot flash is being erased for the next one."""
    board = Board()
    assert board.push(replace(A, selftest=bytes(74)), trial=True).code == SELFTEST
    assert not runs(board, A)
    assert board.ask("MODEL_BEGIN", B.begin(CHUNK)).code == 0
    assert not runs(board, A) and not runs(board, B)
    assert board.push(B).code == 0 and runs(board, B)
    board.close()


def test_a_transfer_whose_journal_is_full_begins_anew() -> None:
    """Power that goes each time the last chunk of a block is written uses the journal's 1,792 entries up."""
    board = Board(flash=MemoryFlash(size=256 * 1024, erase_size=4096))
    large = replace(B, model=B.model + bytes(40_000), counter=3)
    for _ in range(700):
        board.boot()
        status = Status.parse(board.ask("MODEL_BEGIN", large.begin(1072)).body)
        while status.next < 4000 and not board.flash.dead:
            board.flash.cut_at, board.flash.torn = (board.flash.operations if status.next > 2000 else None), 0.5
            part = large.data[status.next : status.next + status.chunk]
            answer = board.ask("MODEL_CHUNK", struct.pack("<I", status.next) + part)
            if answer.code:
                break
            status = Status.parse(answer.body)
    board.boot()
    assert board.push(large, 1072).code == 0
    board.close()


def test_selftest_of_the_wrong_length(board: Board) -> None:
    failing(board, replace(B, selftest=bytes(73)), SELFTEST)


def test_a_board_that_verifies_takes_signed_models_only() -> None:
    seen: list[bytes] = []

    def verify(message: bytes, signature: bytes) -> bool:
        seen.append(message)
        return signature == b"s" * 64

    board = Board(verify=verify)
    assert board.hello().capabilities & 2
    assert board.push(A).code == SIGNATURE
    assert board.push(replace(A, signature=b"x" * 64)).code == SIGNATURE
    assert board.push(replace(A, signature=b"s" * 64)).code == 0
    # At the beginning, so that nothing is erased for a forgery, and at the end, of what was read back from flash.
    assert seen == [A.covered(0)] * 3
    board.close()


def test_a_damaged_active_model_gives_way_to_the_stored_one(board: Board) -> None:
    assert board.push(B).code == 0
    at = bytes(board.flash.memory).find(B.model)
    board.flash.memory[at + 500] ^= 1
    board.boot()
    assert [m.type for m in board.take()] == ["HELLO", "LOG"]
    assert states(board) == {A.sha256: ACTIVE, B.sha256: BAD}
    assert runs(board, A)
    board.boot()
    assert states(board) == {A.sha256: ACTIVE, B.sha256: BAD}


def test_flash_too_small_for_a_store() -> None:
    board = Board(MemoryFlash(size=8 * 1024))
    assert board.hello().slot_size == 0
    assert board.push(A).code == 23
    board.close()


def test_the_directory_outlives_many_updates() -> None:
    board = Board()
    for counter in range(1, 30):
        image = replace(A if counter % 2 else B, counter=counter)
        assert board.push(image, 1072).code == 0
        board.boot()
        assert board.active() == image.sha256
    assert board.flash.breaches == []
    board.close()


def power_cuts() -> list[int]:
    """As many as an update has flash operations."""
    board = Board()
    board.push(A)
    board.push(replace(A, counter=2))  # so that journal and both slots were used before
    board.flash.power_on()
    board.push(replace(B, counter=3))
    board.close()
    return list(range(board.flash.operations))


@pytest.mark.parametrize("torn", [0.0, 0.5, 1.0])
def test_power_cut_at_every_flash_operation(torn: float) -> None:
    """After each cut the board boots with one valid model, and the update can be completed."""
    target = replace(B, counter=3)
    cuts = power_cuts()
    assert len(cuts) > 30
    changed = []
    for cut in cuts:
        board = Board()
        board.push(A)
        board.push(replace(A, counter=2))
        board.flash.power_on()
        board.flash.cut_at, board.flash.torn = cut, torn
        board.push(target)
        assert board.flash.dead
        board.boot()
        active = board.active()
        assert active in (A.sha256, B.sha256), f"no model after a cut at operation {cut}"
        assert runs(board, A if active == A.sha256 else B)
        changed.append(active == B.sha256)
        answer = board.push(replace(target, flags=1) if active == B.sha256 else target)
        assert answer.code == 0, f"not completed after a cut at operation {cut}: {answer}"
        assert board.active() == B.sha256
        board.boot()
        assert runs(board, B)
        assert board.flash.breaches == []
        board.close()
    # Only the very last operation, the directory record, makes the change, and only when it is whole.
    assert changed == [False] * (len(cuts) - 1) + [torn == 1.0]


def used_board() -> Board:
    """Journal and both slots have held something before."""
    board = Board()
    board.push(A)
    board.push(replace(A, counter=2))
    return board


def cut_push(board: Board, image: Image, cut: int) -> bool:
    """Pushes with the power cut at that operation and boots again. False if the push was over before it."""
    board.flash.power_on()
    board.flash.cut_at, board.flash.torn = cut, 0.5
    board.push(image)
    was_cut = board.flash.dead
    board.boot()
    return was_cut


def test_power_cut_while_resuming_from_a_power_cut() -> None:
    target = replace(B, counter=3)
    for first in power_cuts():
        # A resumed transfer first repairs what was torn: these are the operations that differ from the first time.
        for second in range(6):
            board = used_board()
            assert cut_push(board, target, first)
            if cut_push(board, target, second):
                assert board.active() == A.sha256
                answer = board.push(target)
                assert answer.code == 0, f"not completed after cuts at {first} and {second}: {answer}"
            assert board.active() == B.sha256
            assert board.flash.breaches == []
            board.close()


def test_another_update_after_a_power_cut() -> None:
    """What was torn is not taken for blank when something else is to be written there."""
    other = Image(model(2), counter=4)
    for cut in power_cuts():
        board = used_board()
        assert cut_push(board, replace(B, counter=3), cut)
        assert board.push(other).code == 0
        assert board.active() == other.sha256
        assert board.flash.breaches == [], f"after a cut at {cut}"
        board.close()
