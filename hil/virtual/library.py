"""The firmware's host library through ctypes (firmware/boards/host/edge_mcu.h)."""

from __future__ import annotations

import ctypes
import os
import secrets
import traceback
from collections.abc import Callable
from ctypes import (
    CFUNCTYPE,
    POINTER,
    byref,
    c_char_p,
    c_int,
    c_size_t,
    c_uint8,
    c_uint16,
    c_uint32,
    c_uint64,
    c_void_p,
)
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Protocol

from .engine import Engine, EngineError

ABI = 2
LIBRARY = Path("firmware/.pio/build/host/libedge_mcu.so")
ENVIRONMENT = "EDGE_AGENT_FIRMWARE"

UART_WRITE = CFUNCTYPE(None, c_void_p, c_void_p, c_size_t)
NUMBER = CFUNCTYPE(c_uint64, c_void_p)
REQUEST_RESET = CFUNCTYPE(None, c_void_p)
FLASH_WRITE = CFUNCTYPE(c_int, c_void_p, c_uint32, c_void_p, c_size_t)
FLASH_ERASE = CFUNCTYPE(c_int, c_void_p, c_uint32)
U32_OUT = POINTER(c_uint32)
ENGINE_LOAD = CFUNCTYPE(c_int, c_void_p, c_void_p, c_size_t, U32_OUT, U32_OUT, U32_OUT)
ENGINE_INVOKE = CFUNCTYPE(c_int, c_void_p, c_void_p, c_size_t, c_void_p, c_size_t)
# A pointer, not c_char_p: ctypes would free the converted string before the firmware reads it.
ENGINE_ERROR = CFUNCTYPE(c_void_p, c_void_p)
SAMPLE = CFUNCTYPE(c_int, c_void_p, c_uint8, c_void_p, c_size_t)
VERIFY = CFUNCTYPE(c_int, c_void_p, c_void_p, c_size_t, c_void_p)


FOR_EVER = 2**64 - 1


class LibraryMissing(Exception):
    """The host library is not built."""


class Config(ctypes.Structure):
    _fields_ = (
        ("abi", c_uint32),
        ("context", c_void_p),
        ("uart_write", UART_WRITE),
        ("clock_us", NUMBER),
        ("random64", NUMBER),
        ("request_reset", REQUEST_RESET),
        ("flash_base", c_void_p),
        ("flash_size", c_uint32),
        ("flash_erase_size", c_uint32),
        ("flash_write_size", c_uint32),
        ("flash_write", FLASH_WRITE),
        ("flash_erase", FLASH_ERASE),
        ("engine_name", c_char_p),
        ("operators", c_char_p),
        ("operator_count", c_uint32),
        ("arena_size", c_uint32),
        ("engine_load", ENGINE_LOAD),
        ("engine_invoke", ENGINE_INVOKE),
        ("engine_error", ENGINE_ERROR),
        ("verify", VERIFY),
        ("sample", SAMPLE),
        ("unique_id", c_uint64),
        ("sources", c_uint8),
        ("reset_cause", c_uint8),
        ("window", c_uint8),
    )


class Decoded(ctypes.Structure):
    _fields_ = (
        ("event", c_uint8),
        ("type", c_uint8),
        ("flags", c_uint8),
        ("seq", c_uint16),
        ("id", c_uint32),
        ("payload", c_void_p),
        ("size", c_size_t),
    )


class Flash(Protocol):
    """NOR flash that is also memory. `write` and `erase` say whether they worked."""

    size: int
    erase_size: int
    write_size: int
    address: int

    def write(self, offset: int, data: bytes) -> bool: ...
    def erase(self, offset: int) -> bool: ...


@dataclass(frozen=True, slots=True)
class Hardware:
    """What one board is made of. `clock_us` None is the machine's clock; `verify` None is a board that does not."""

    flash: Flash
    uart_write: Callable[[bytes], object]
    engine: Engine | None = None
    request_reset: Callable[[], object] = lambda: None
    clock_us: Callable[[], int] | None = None
    verify: Callable[[bytes, bytes], bool] | None = None
    sample: Callable[[int, int], bytes | None] | None = None
    """Number of the source and bytes wanted -> the next reading; None: it has none."""
    unique_id: int = 0
    window: int = 4


def find_library() -> Path:
    """The built library: $EDGE_AGENT_FIRMWARE, else in this tree. Raises LibraryMissing."""
    named = os.environ.get(ENVIRONMENT)
    path = Path(named) if named else Path(__file__).resolve().parents[2] / LIBRARY
    if not path.is_file():
        raise LibraryMissing(f"{path} is missing: build it with 'script/firmware host', or name it in ${ENVIRONMENT}")
    return path


@cache
def load(path: Path | None = None) -> ctypes.CDLL:
    lib = ctypes.CDLL(str(path or find_library()))
    lib.edge_mcu_create.restype = c_void_p
    lib.edge_mcu_create.argtypes = (POINTER(Config),)
    lib.edge_mcu_destroy.argtypes = (c_void_p,)
    lib.edge_mcu_destroy.restype = None
    lib.edge_mcu_feed.argtypes = (c_void_p, c_char_p, c_size_t)
    lib.edge_mcu_poll.argtypes = (c_void_p,)
    lib.edge_mcu_idle_us.argtypes = (c_void_p,)
    lib.edge_mcu_idle_us.restype = c_uint64
    lib.edge_crc32.argtypes = (c_char_p, c_size_t)
    lib.edge_crc32.restype = c_uint32
    lib.edge_sha256.argtypes = (c_char_p, c_size_t, c_char_p)
    lib.edge_sha256.restype = None
    encode = (c_uint8, c_uint8, c_uint16, c_uint32, c_char_p, c_size_t, c_char_p, c_size_t)
    lib.edge_frame_encode.argtypes = encode
    lib.edge_frame_encode.restype = c_size_t
    lib.edge_decoder_create.argtypes = (c_size_t,)
    lib.edge_decoder_create.restype = c_void_p
    lib.edge_decoder_destroy.argtypes = (c_void_p,)
    lib.edge_decoder_destroy.restype = None
    lib.edge_decoder_push.argtypes = (c_void_p, c_void_p, c_size_t, POINTER(Decoded))
    lib.edge_decoder_push.restype = c_size_t
    lib.edge_known_operators.argtypes = (c_char_p, c_size_t)
    lib.edge_known_operators.restype = c_size_t
    validate = (c_char_p, c_size_t, c_char_p, c_size_t, U32_OUT, U32_OUT, POINTER(c_char_p))
    lib.edge_validate_model.argtypes = validate
    return lib


class Mcu:
    """One running board. Its callbacks run inside `boot`, `feed` and `poll`, in the caller's thread."""

    def __init__(self, hardware: Hardware, reset_cause: int = 1) -> None:
        self._lib = load()
        self._hardware = hardware
        self._engine_error = ctypes.create_string_buffer(b"")
        self._config = self._make_config(reset_cause)
        self._mcu: int | None = self._lib.edge_mcu_create(byref(self._config))
        if self._mcu is None:
            raise RuntimeError("the host library refused its configuration: it is of another version")
        # Bound once: attribute look-ups on a CDLL cost as much as the call.
        self._feed = self._lib.edge_mcu_feed
        self._poll = self._lib.edge_mcu_poll

    def feed(self, data: bytes) -> bool:
        """Takes received bytes; True if requests are queued."""
        return bool(self._feed(self._mcu, data, len(data)))

    def poll(self) -> bool:
        """Runs one queued request at most, or takes a sample; True if requests are queued still."""
        return bool(self._poll(self._mcu))

    def idle_s(self) -> float | None:
        """For how long `poll` has nothing to do if no bytes come; None: for ever."""
        idle_us = int(self._lib.edge_mcu_idle_us(self._mcu))
        return None if idle_us == FOR_EVER else idle_us / 1e6

    def close(self) -> None:
        if self._mcu is not None:
            self._lib.edge_mcu_destroy(self._mcu)
            self._mcu = None

    def _make_config(self, reset_cause: int) -> Config:
        hardware, flash = self._hardware, self._hardware.flash

        def uart_write(_: int, data: int, size: int) -> None:
            hardware.uart_write(ctypes.string_at(data, size))

        def flash_write(_: int, offset: int, data: int, size: int) -> int:
            return _as_status(lambda: flash.write(offset, ctypes.string_at(data, size)))

        def flash_erase(_: int, offset: int) -> int:
            return _as_status(lambda: flash.erase(offset))

        config = Config(
            abi=ABI,
            uart_write=UART_WRITE(uart_write),
            random64=NUMBER(lambda _: secrets.randbits(64)),
            request_reset=REQUEST_RESET(lambda _: hardware.request_reset()),
            flash_base=flash.address,
            flash_size=flash.size,
            flash_erase_size=flash.erase_size,
            flash_write_size=flash.write_size,
            flash_write=FLASH_WRITE(flash_write),
            flash_erase=FLASH_ERASE(flash_erase),
            unique_id=hardware.unique_id,
            reset_cause=reset_cause,
            window=hardware.window,
        )
        if (source := hardware.sample) is not None:
            reading = source

            def sample(_: int, number: int, out: int, size: int) -> int:
                return _as_status(lambda: _copied(reading(number, size), out, size))

            config.sample = SAMPLE(sample)
            config.sources = 1
        if (clock := hardware.clock_us) is not None:
            config.clock_us = NUMBER(lambda _: clock())
        if (verify := hardware.verify) is not None:
            check = verify
            config.verify = VERIFY(
                lambda _, message, size, signature: _as_status(
                    lambda: check(ctypes.string_at(message, size), ctypes.string_at(signature, 64))
                )
            )
        if hardware.engine is not None:
            self._add_engine(config, hardware.engine)
        return config

    def _add_engine(self, config: Config, engine: Engine) -> None:
        def load_model(_: int, data: int, size: int, *out: ctypes._Pointer[c_uint32]) -> int:
            try:
                info = engine.load(ctypes.string_at(data, size))
            except EngineError as err:
                self._set_error(str(err))
                return int(err.result)
            out[0][0], out[1][0], out[2][0] = info.input_bytes, info.output_bytes, info.arena_used
            return 0

        def invoke(_: int, inputs: int, input_size: int, outputs: int, output_size: int) -> int:
            into = memoryview((c_uint8 * output_size).from_address(outputs)).cast("B")
            try:
                engine.invoke(ctypes.string_at(inputs, input_size), into)
            except EngineError as err:
                self._set_error(str(err))
                return 1
            except Exception as err:
                self._set_error(_defect(err))
                return 1
            return 0

        config.engine_name = engine.name.encode()
        config.operators = engine.operators
        config.operator_count = len(engine.operators)
        config.arena_size = engine.arena_size
        config.engine_load = ENGINE_LOAD(load_model)
        config.engine_invoke = ENGINE_INVOKE(invoke)
        config.engine_error = ENGINE_ERROR(lambda _: ctypes.addressof(self._engine_error))

    def _set_error(self, text: str) -> None:
        self._engine_error = ctypes.create_string_buffer(text.encode(errors="replace"))


def _copied(reading: bytes | None, out: int, size: int) -> bool:
    if reading is None or len(reading) != size:
        return False
    ctypes.memmove(out, reading, size)
    return True


def _as_status(call: Callable[[], bool]) -> int:
    """0 for True. An exception must not cross into C, where it would read as success."""
    try:
        return 0 if call() else 1
    except OSError:
        return 1
    except Exception as err:
        _defect(err)
        return 1


def _defect(err: Exception) -> str:
    """Told with its trace, as ctypes would; in words for the firmware's answer."""
    traceback.print_exception(err)
    return f"{type(err).__name__}: {err}"


def known_operators() -> bytes:
    """The operator codes that the firmware's validator has rules for."""
    out = ctypes.create_string_buffer(128)
    count = load().edge_known_operators(out, len(out))
    return out.raw[:count]


def validate_model(model: bytes, operators: bytes) -> tuple[int, str, int, int]:
    """(error code or 0, why, input bytes, output bytes)."""
    inputs, outputs, text = c_uint32(), c_uint32(), c_char_p()
    code = load().edge_validate_model(
        model, len(model), operators, len(operators), byref(inputs), byref(outputs), byref(text)
    )
    return code, (text.value or b"").decode(), inputs.value, outputs.value


def sha256(data: bytes) -> bytes:
    out = ctypes.create_string_buffer(32)
    load().edge_sha256(data, len(data), out)
    return out.raw


def crc32(data: bytes) -> int:
    return int(load().edge_crc32(data, len(data)))


def encode_frame(type_: int, flags: int, seq: int, id_: int, payload: bytes) -> bytes:
    """The frame as it travels, delimiter included."""
    out = ctypes.create_string_buffer(len(payload) + len(payload) // 254 + 32)
    size = load().edge_frame_encode(type_, flags, seq, id_, payload, len(payload), out, len(out))
    return out.raw[:size]


@dataclass(frozen=True, slots=True)
class DecodedFrame:
    type: int
    flags: int
    seq: int
    id: int
    payload: bytes


class FrameDecoder:
    """The firmware's decoder: frames and the names of errors, in order."""

    EVENTS = ("none", "frame", "decode", "short", "crc", "oversize")

    def __init__(self, max_frame: int) -> None:
        self._lib = load()
        self._decoder = self._lib.edge_decoder_create(max_frame)

    def push(self, data: bytes) -> list[DecodedFrame | str]:
        found: list[DecodedFrame | str] = []
        buffer = ctypes.create_string_buffer(data, len(data))
        at, event = 0, Decoded()
        while at < len(data):
            at += self._lib.edge_decoder_push(
                self._decoder, ctypes.addressof(buffer) + at, len(data) - at, byref(event)
            )
            if self.EVENTS[event.event] == "frame":
                payload = ctypes.string_at(event.payload, event.size)
                found.append(DecodedFrame(event.type, event.flags, event.seq, event.id, payload))
            elif event.event:
                found.append(self.EVENTS[event.event])
        return found

    def close(self) -> None:
        self._lib.edge_decoder_destroy(self._decoder)
