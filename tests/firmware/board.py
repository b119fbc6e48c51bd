"""A board in this process: the real firmware on a flash, an engine and a clock that the test holds."""

from __future__ import annotations

import ctypes
import hashlib
import json
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Protocol

from cobs import cobs

from hil.virtual.engine import EngineError, LoadResult, ModelInfo
from hil.virtual.library import Hardware, Mcu, known_operators, validate_model

ROOT = Path(__file__).resolve().parents[2]
VECTORS = json.loads((ROOT / "tests/vectors/frames.json").read_text())
TYPES: dict[str, int] = VECTORS["types"]
NAMES = {number: name for name, number in TYPES.items()}

FRAGMENT, RETRY = 1, 2
BUSY, VERSION, NO_MODEL, MISMATCH, DEADLINE, CANCELLED = 5, 6, 8, 9, 10, 11
UNKNOWN_TYPE, BAD_LENGTH, BAD_FRAGMENT, TOO_LARGE, INVOKE = 1, 2, 3, 4, 12
NOT_BEGUN, BAD_OFFSET, INCOMPLETE, DIGEST, SIGNATURE, DOWNGRADE = 13, 14, 15, 16, 17, 18
INVALID_MODEL, OPERATOR, ARENA, SELFTEST, WRONG_BOARD, IN_TRIAL = 19, 20, 21, 22, 25, 26
EMPTY, RECEIVING, STORED, TRIAL, ACTIVE, BAD = 0, 1, 2, 3, 4, 5
OVERHEAD = 12


def line(type_: int | str, body: bytes = b"", id_: int = 1, flags: int = 0, seq: int = 0) -> bytes:
    """One frame as it travels."""
    number = TYPES[type_] if isinstance(type_, str) else type_
    head = struct.pack("<BBHI", number, flags, seq & 0xFFFF, id_) + body
    return cobs.encode(head + struct.pack("<I", zlib.crc32(head))) + b"\0"


def pieces(type_: str, body: bytes, id_: int, size: int, flags: int = 0) -> list[bytes]:
    """`body` in fragments of `size` data bytes."""
    return [
        line(type_, struct.pack("<II", len(body), at) + body[at : at + size], id_, flags | FRAGMENT)
        for at in range(0, len(body), size)
    ]


@dataclass(frozen=True)
class Message:
    type: str
    id: int
    body: bytes

    @property
    def code(self) -> int:
        """The error code, 0 if this is no error."""
        return struct.unpack_from("<H", self.body)[0] if self.type == "ERROR" else 0


class Receiver:
    """The gateway's end: bytes to messages, fragments put together."""

    def __init__(self) -> None:
        self._pending = b""
        self._partial = b""
        self.raw = b""
        self.messages: list[Message] = []
        self.frame_sizes: list[int] = []

    def push(self, data: bytes) -> None:
        self.raw += data
        *lines, self._pending = (self._pending + data).split(b"\0")
        for encoded in filter(None, lines):
            frame = cobs.decode(encoded)
            assert zlib.crc32(frame[:-4]) == int.from_bytes(frame[-4:], "little")
            self.frame_sizes.append(len(frame))
            number, flags, _, id_ = struct.unpack_from("<BBHI", frame)
            body = frame[8:-4]
            if flags & FRAGMENT:
                total, offset = struct.unpack_from("<II", body)
                assert offset == len(self._partial)
                self._partial += body[8:]
                if len(self._partial) < total:
                    continue
                body, self._partial = self._partial, b""
            self.messages.append(Message(NAMES[number], id_, body))


class MemoryFlash:
    """NOR flash that notes every breach of its rules, and whose power can be cut.

    `cut_at`: that operation (counted from 0) is done by the fraction `torn`, and nothing after it.
    """

    def __init__(self, size: int = 96 * 1024, erase_size: int = 1024, write_size: int = 16) -> None:
        self.size, self.erase_size, self.write_size = size, erase_size, write_size
        self.memory = (ctypes.c_ubyte * size)(*b"\xff" * size)
        self.address = ctypes.addressof(self.memory)
        self.breaches: list[str] = []
        self.operations = 0
        self.cut_at: int | None = None
        self.torn = 0.0
        self.dead = False

    def power_on(self) -> None:
        self.cut_at, self.dead, self.operations = None, False, 0

    def write(self, offset: int, data: bytes) -> bool:
        unit = self.write_size
        if offset % unit or len(data) % unit:
            self.breaches.append(f"write of {len(data)} at {offset} is not aligned")
        for at in range(0, len(data), unit):
            old = bytes(self.memory[offset + at : offset + at + unit])
            if old not in (b"\xff" * unit, data[at : at + unit]):
                self.breaches.append(f"unit at {offset + at} is written twice")
        return self._operate(offset, data)

    def erase(self, offset: int) -> bool:
        if offset % self.erase_size:
            self.breaches.append(f"erase at {offset} is not aligned")
        return self._operate(offset, b"\xff" * self.erase_size)

    def _operate(self, offset: int, data: bytes) -> bool:
        if self.dead:
            return False
        done = len(data)
        if self.operations == self.cut_at:
            self.dead = True
            done = int(done * self.torn)
        self.operations += 1
        self.memory[offset : offset + done] = list(data[:done])
        return not self.dead


class FakeEngine:
    """Takes what the validator takes; an output byte is an input byte, changed. Counts its runs."""

    name = "fake 1.0"
    arena_size = 64 * 1024

    def __init__(self) -> None:
        self.operators = known_operators()
        self.runs = 0
        self.loaded = b""
        self.load_error: EngineError | None = None
        self.invoke_error: EngineError | None = None
        self.on_invoke: Callable[[], None] = lambda: None

    def load(self, model: bytes) -> ModelInfo:
        if self.load_error:
            raise self.load_error
        code, text, inputs, outputs = validate_model(model, self.operators)
        if code:
            raise EngineError(text, LoadResult.INVALID)
        self.loaded = model
        return ModelInfo(inputs, outputs, 4096)

    def runs_on(self, model: bytes) -> bool:
        """Whether it was this model that was loaded last."""
        return self.loaded == model

    def invoke(self, inputs: bytes, outputs: memoryview) -> None:
        self.runs += 1
        self.on_invoke()
        if self.invoke_error:
            raise self.invoke_error
        outputs[:] = self.answer(inputs, len(outputs))

    @staticmethod
    def answer(inputs: bytes, size: int) -> bytes:
        return bytes(inputs[i % len(inputs)] ^ 0x5A for i in range(size))


class Core(Protocol):
    """Where the firmware of a `Board` runs: in this process, or on the emulated Cortex-M (emulated.py)."""

    def flash(self) -> MemoryFlash: ...
    def engine(self) -> FakeEngine: ...
    def mcu(self, hardware: Hardware, reset_cause: int) -> Mcu: ...


class HostCore:
    flash = MemoryFlash
    engine = FakeEngine
    mcu = Mcu


class Chosen:
    """What boards are made on now; a module of tests may change it."""

    core: Core = HostCore()


class Board:
    """The firmware, booted. `ask` is one exchange; `boot` is a reset with the same flash."""

    def __init__(
        self,
        flash: MemoryFlash | None = None,
        engine: FakeEngine | None = None,
        window: int = 4,
        verify: Callable[[bytes, bytes], bool] | None = None,
        with_engine: bool = True,
        sample: Callable[[int, int], bytes | None] | None = None,
    ) -> None:
        self.flash = flash or Chosen.core.flash()
        self.engine = engine or Chosen.core.engine()
        self.now_us = 0
        self.resets = 0
        self.line = Receiver()
        self._id = 0
        self._hardware = Hardware(
            flash=self.flash,
            engine=self.engine if with_engine else None,
            uart_write=lambda data: self.line.push(data),
            request_reset=self._count_reset,
            clock_us=lambda: self.now_us,
            verify=verify,
            sample=sample,
            unique_id=0x1234,
            window=window,
        )
        self._mcu: Mcu | None = None
        self.boot()

    def _count_reset(self) -> None:
        self.resets += 1

    def boot(self, cause: int = 1) -> None:
        self.close()
        self.flash.power_on()
        self.line = Receiver()
        self._mcu = Chosen.core.mcu(self._hardware, cause)

    def close(self) -> None:
        if self._mcu:
            self._mcu.close()
            self._mcu = None

    def feed(self, *lines: bytes) -> None:
        assert self._mcu
        for data in lines:
            self._mcu.feed(data)

    def poll(self) -> None:
        """Runs all that is queued."""
        assert self._mcu
        while self._mcu.poll():
            pass

    def take(self) -> list[Message]:
        messages, self.line.messages = self.line.messages, []
        return messages

    def ask(self, type_: str, body: bytes = b"", flags: int = 0) -> Message:
        self._id += 1
        self.take()
        self.feed(line(type_, body, self._id, flags))
        self.poll()
        (answer,) = [m for m in self.take() if m.id == self._id]
        return answer

    def hello(self) -> Hello:
        return Hello.parse(self.ask("HELLO_REQ", struct.pack("<BBH", 1, 0, 4096)).body)

    def active(self) -> bytes | None:
        """SHA-256 of the active model; asserts that there is at most one."""
        found = [slot.sha256 for slot in self.hello().slots if slot.state == ACTIVE]
        assert len(found) <= 1
        return found[0] if found else None

    # -- model update --------------------------------------------------------------------------------------------------

    def push(self, image: Image, chunk: int = 256, trial: bool = False) -> Message:
        """A whole update. The last answer: of the commit, or the first error."""
        answer = self.ask("MODEL_BEGIN", image.begin(chunk))
        if answer.code:
            return answer
        status = Status.parse(answer.body)
        sent = 0
        # `next` may go back: a block that a power cut left half written is erased, with the chunks in it.
        while status.next < status.length:
            assert sent < 3 * status.length, "the transfer does not end"
            part = image.data[status.next : status.next + status.chunk]
            sent += len(part)
            answer = self.ask("MODEL_CHUNK", struct.pack("<I", status.next) + part)
            if answer.code:
                return answer
            status = Status.parse(answer.body)
        return self.ask("MODEL_COMMIT", b"\1" if trial else b"")


@dataclass(frozen=True)
class Slot:
    index: int
    state: int
    length: int
    sha256: bytes
    counter: int
    input_bytes: int
    output_bytes: int
    arena_used: int


@dataclass(frozen=True)
class Hello:
    max_frame: int
    max_message: int
    window: int
    reset_cause: int
    boot_id: int
    capabilities: int
    arena: int
    slot_size: int
    uid: int
    board: str
    build: str
    engine: str
    operators: bytes
    slots: tuple[Slot, ...]
    rollback: int
    trial_s: int

    @classmethod
    def parse(cls, body: bytes) -> Hello:
        major, minor, *fixed = struct.unpack_from("<BBHIBBQIIIQ", body)
        assert (major, minor) == (1, 1)
        at, texts = struct.calcsize("<BBHIBBQIIIQ"), []
        for _ in range(4):  # three texts and the operator list have the same shape
            texts.append(body[at + 1 : at + 1 + body[at]])
            at += 1 + body[at]
        count, at = body[at], at + 1
        slots = tuple(Slot(*struct.unpack_from("<BBI32sIIII", body, at + 54 * i)) for i in range(count))
        rollback, trial_s = struct.unpack_from("<BH", body, at + 54 * count)
        return cls(*fixed, *(text.decode() for text in texts[:3]), texts[3], slots, rollback, trial_s)


@dataclass(frozen=True)
class Status:
    slot: int
    state: int
    chunk: int
    length: int
    received: int
    next: int
    bitmap: bytes
    image_sha256: bytes

    @classmethod
    def parse(cls, body: bytes) -> Status:
        return cls(*struct.unpack("<BBHIII32s32s", body))


@dataclass(frozen=True)
class Image:
    model: bytes
    selftest: bytes = b""
    counter: int = 1
    flags: int = 0
    arena: int = 0
    tolerance: int = 0
    signature: bytes = b""
    model_sha256: bytes = b""
    board: bytes | None = None
    """With it the manifest has format 2."""
    operators: bytes = bytes(16)

    @property
    def data(self) -> bytes:
        return self.model + self.selftest

    @property
    def sha256(self) -> bytes:
        return self.model_sha256 or hashlib.sha256(self.model).digest()

    def covered(self, chunk: int) -> bytes:
        """MODEL_BEGIN up to signature_kind: what a signature covers, with chunk 0."""
        sizes = (len(self.model), len(self.selftest), self.counter, self.arena)
        head = struct.pack("<BBHIIIIB", 1 if self.board is None else 2, self.flags, chunk, *sizes, self.tolerance)
        needs = b"" if self.board is None else self.board.ljust(16, b"\0") + self.operators
        return head + self.sha256 + hashlib.sha256(self.data).digest() + needs

    def begin(self, chunk: int) -> bytes:
        return self.covered(chunk) + bytes([bool(self.signature)]) + self.signature


@cache
def model(variant: int = 0) -> bytes:
    """The digits model (64 bytes in, 10 out); a variant differs in one weight."""
    data = (ROOT / "models/digits/mcu-int8.tflite").read_bytes()
    if variant == 0:
        return data
    good = validate_model(data, known_operators())
    for at in range(len(data) // 2, len(data)):
        changed = data[:at] + bytes([data[at] ^ variant]) + data[at + 1 :]
        if validate_model(changed, known_operators()) == good:
            return changed
    raise AssertionError("no byte of the model can be changed")


def infer(image: Image, inputs: bytes = bytes(range(64)), budget_ms: int = 0) -> bytes:
    return image.sha256[:8] + struct.pack("<I", budget_ms) + inputs
