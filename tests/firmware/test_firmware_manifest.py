"""What a manifest asks of the board, which flags need a signature, and directories of an earlier firmware."""

from __future__ import annotations

import hashlib
import struct
import zlib
from dataclasses import replace

import pytest
from board import (
    ACTIVE,
    BAD_LENGTH,
    DOWNGRADE,
    OPERATOR,
    SIGNATURE,
    STORED,
    WRONG_BOARD,
    Board,
    Image,
    infer,
    model,
)

from agent.registry.operators import OPERATOR_CODES
from hil.virtual.library import known_operators

A = Image(model(), counter=1)
B = Image(model(1), counter=2)


def test_the_gateway_knows_the_operators_of_the_firmware() -> None:
    assert sorted(OPERATOR_CODES.values()) == sorted(known_operators())


def bits(*codes: int) -> bytes:
    return sum(1 << code for code in codes).to_bytes(16, "little")


def test_a_manifest_names_its_board_and_operators() -> None:
    board = Board()
    fits = replace(A, board=b"host", operators=bits(9, 22, 25))
    answer = board.ask("MODEL_BEGIN", replace(fits, board=b"mps2-an386").begin(256))
    assert (answer.code, answer.body[2:]) == (WRONG_BOARD, b"host")
    assert board.ask("MODEL_BEGIN", replace(fits, board=b"hos").begin(256)).code == WRONG_BOARD
    assert board.ask("MODEL_BEGIN", replace(fits, board=b"host2").begin(256)).code == WRONG_BOARD
    missing = next(code for code in range(128) if code not in known_operators())
    for codes in ((9, missing), (127,)):
        assert board.ask("MODEL_BEGIN", replace(fits, operators=bits(*codes)).begin(256)).code == OPERATOR
    assert board.flash.operations == 0, "nothing was erased for it"
    assert board.push(fits).code == 0
    assert board.push(replace(B, board=b"")).code == 0
    board.boot()
    assert board.ask("INFER", infer(B)).type == "RESULT"
    board.close()


def test_a_directory_of_an_earlier_firmware_is_read() -> None:
    """Records with the magic EEM1 have manifests of format 1 and no reason of a rollback."""
    board = Board()
    board.push(A)
    at = bytes(board.flash.memory).rfind(b"EEM2", 0, 2048)
    record = bytes(board.flash.memory[at : at + 512])
    slots = [record[8 + 183 * i : 8 + 183 * i + 151] for i in range(2)]
    old = (b"EEM1" + record[4:8] + b"".join(slots)).ljust(508, b"\xff")
    old += struct.pack("<I", zlib.crc32(old))
    board.flash.memory[at : at + 512] = list(old)
    board.boot()
    assert board.active() == A.sha256
    assert board.hello().rollback == 0
    assert board.push(B).code == 0
    board.boot()
    assert {slot.sha256: slot.state for slot in board.hello().slots} == {A.sha256: STORED, B.sha256: ACTIVE}
    assert board.flash.breaches == []
    board.close()


# -- downgrade and its flag --------------------------------------------------------------------------------------------

ALLOW_LOWER = 1


def signed(image: Image) -> Image:
    """As if the key were a digest: what counts here is what the signature covers."""
    return replace(image, signature=hashlib.sha512(image.covered(0)).digest())


def verify(message: bytes, signature: bytes) -> bool:
    return signature == hashlib.sha512(message).digest()


@pytest.mark.parametrize("board_name", [None, b"host"])
def test_a_downgrade_is_forced_by_a_signed_flag_only(board_name: bytes | None) -> None:
    board = Board(verify=verify)
    new, old = replace(A, counter=9, board=board_name), replace(B, counter=3, board=board_name)
    assert board.push(signed(new)).code == 0
    assert board.push(signed(old)).code == DOWNGRADE
    operations = board.flash.operations
    forged = replace(signed(old), flags=ALLOW_LOWER)
    assert board.push(forged).code == SIGNATURE
    assert board.push(replace(old, flags=ALLOW_LOWER)).code == SIGNATURE
    assert board.flash.operations == operations, "a forged manifest erases nothing"
    cleared = replace(signed(replace(old, flags=ALLOW_LOWER)), flags=0)
    assert board.push(cleared).code == SIGNATURE
    assert board.push(signed(replace(old, flags=ALLOW_LOWER))).code == 0
    assert board.active() == B.sha256
    board.close()


def test_every_field_of_a_signed_manifest_is_covered() -> None:
    board = Board(verify=verify)
    good = signed(replace(A, counter=4, board=b"host", operators=bits(9))).begin(256)
    for at in range(len(good) - 64):
        if at in (2, 3):  # the chunk size is the line's
            continue
        forged = bytearray(good)
        forged[at] ^= 1
        assert board.ask("MODEL_BEGIN", bytes(forged)).code, f"byte {at} is not covered"
    assert board.ask("MODEL_BEGIN", good[:-1]).code == BAD_LENGTH
    assert board.ask("MODEL_BEGIN", good).code == 0
    board.close()
