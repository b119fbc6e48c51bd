"""Puts a model into a board the way a gateway does: over its protocol, without the line."""

from __future__ import annotations

import hashlib
import struct
from pathlib import Path

from .library import DecodedFrame, FrameDecoder, Hardware, Mcu, encode_frame

MODEL_BEGIN, MODEL_CHUNK, MODEL_COMMIT, MODEL_ROLLBACK, HELLO_REQ = 0x10, 0x11, 0x12, 0x16, 0x01
MODEL_STATUS, HELLO, ERROR = 0x90, 0x81, 0xFF
ALLOW_DOWNGRADE = 1
TRIAL, ACTIVE = 3, 4
HELLO_FIXED, SLOT_SIZE = 38, 54
# Larger than the firmware's own, which is what limits.
MAX_FRAME = 65535
FIRST_COUNTER = 1


class ProvisionError(Exception):
    """The firmware refused a model; the message is its own."""


class Provisioner:
    """A board off the line. `hardware.uart_write` must be `provisioner.receive`."""

    def __init__(self) -> None:
        self._decoder = FrameDecoder(MAX_FRAME)
        self._frames: list[DecodedFrame] = []
        self._id = 0

    def receive(self, data: bytes) -> None:
        self._frames += [f for f in self._decoder.push(data) if isinstance(f, DecodedFrame)]

    def provision(self, hardware: Hardware, models: list[Path]) -> None:
        """Makes the last of `models` active, unless it is. Raises ProvisionError."""
        mcu = Mcu(hardware)
        try:
            hello = self._ask(mcu, HELLO_REQ, struct.pack("<BBH", 1, 0, MAX_FRAME))
            wanted = hashlib.sha256(models[-1].read_bytes()).digest()
            for state, sha256 in _slots(hello):
                if state == ACTIVE and sha256 == wanted:
                    return
                if state == TRIAL:  # the first model of a board, which nobody confirmed
                    self._ask(mcu, MODEL_ROLLBACK, sha256[:8])
            chunk = (struct.unpack_from("<H", hello, 2)[0] - 16) // 16 * 16
            for path in models:
                self._install(mcu, path, chunk)
        finally:
            mcu.close()
            self._decoder.close()

    def _install(self, mcu: Mcu, path: Path, chunk: int) -> None:
        model = path.read_bytes()
        digest = hashlib.sha256(model).digest()
        begin = struct.pack("<BBHIIIIB", 1, ALLOW_DOWNGRADE, chunk, len(model), 0, FIRST_COUNTER, 0, 0)
        try:
            self._ask(mcu, MODEL_BEGIN, begin + digest + digest + b"\0")
            for offset in range(0, len(model), chunk):
                self._ask(mcu, MODEL_CHUNK, struct.pack("<I", offset) + model[offset : offset + chunk])
            self._ask(mcu, MODEL_COMMIT, b"")
        except ProvisionError as err:
            raise ProvisionError(f"{path}: {err}") from err

    def _ask(self, mcu: Mcu, type_: int, body: bytes) -> bytes:
        self._id += 1
        mcu.feed(encode_frame(type_, 0, self._id & 0xFFFF, self._id, body))
        while mcu.poll():
            pass
        answer = next(f for f in reversed(self._frames) if f.id == self._id)
        self._frames.clear()
        if answer.type == ERROR:
            code = struct.unpack_from("<H", answer.payload)[0]
            raise ProvisionError(f"error {code}: {answer.payload[2:].decode(errors='replace')}")
        return answer.payload


def _slots(hello: bytes) -> list[tuple[int, bytes]]:
    """(state, SHA-256 of the model) of each slot: behind three texts and the list of operators."""
    at = HELLO_FIXED
    for _ in range(4):
        at += 1 + hello[at]
    starts = range(at + 1, at + 1 + hello[at] * SLOT_SIZE, SLOT_SIZE)
    return [(hello[start + 1], hello[start + 6 : start + 38]) for start in starts]
