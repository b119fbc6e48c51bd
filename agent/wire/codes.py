"""The numbers of the serial protocol (docs/wire-protocol.md, section 3)."""

from __future__ import annotations

from enum import IntEnum, IntFlag
from typing import Final, TypeVar

PROTOCOL_MAJOR: Final = 1
PROTOCOL_MINOR: Final = 1
TRIAL_MINOR: Final = 1
"""From here on a new model is in trial until it is confirmed, and manifests have format 2."""

NO_SLOT: Final = 0xFF
"""`MODEL_STATUS.slot` when there is none."""

_E = TypeVar("_E", bound=IntEnum)


def known(enum: type[_E], value: int) -> _E | int:
    """The member, or the bare number where a later minor version has added one."""
    try:
        return enum(value)
    except ValueError:
        return value


def name_of(value: int) -> str:
    """`MODEL_MISMATCH` for a member, `99` for a number that this version does not know."""
    return value.name if isinstance(value, IntEnum) else str(value)


class MessageType(IntEnum):
    """First byte of a frame. Bit 7: from the MCU."""

    HELLO_REQ = 0x01
    PING = 0x02
    INFER = 0x03
    CANCEL = 0x04
    RESET = 0x05
    MODEL_BEGIN = 0x10
    MODEL_CHUNK = 0x11
    MODEL_COMMIT = 0x12
    MODEL_ABORT = 0x13
    MODEL_QUERY = 0x14
    MODEL_CONFIRM = 0x15
    MODEL_ROLLBACK = 0x16
    STATS_REQ = 0x20
    STREAM_START = 0x30
    STREAM_CREDIT = 0x31
    STREAM_STOP = 0x32
    HELLO = 0x81
    PONG = 0x82
    RESULT = 0x83
    MODEL_STATUS = 0x90
    STATS = 0xA0
    LOG = 0xA1
    STREAM_STATUS = 0xB0
    STREAM_RESULT = 0xB1
    ERROR = 0xFF


class ErrorCode(IntEnum):
    """What the MCU refuses a request with."""

    UNKNOWN_TYPE = 1
    BAD_LENGTH = 2
    BAD_FRAGMENT = 3
    TOO_LARGE = 4
    BUSY = 5
    VERSION = 6
    NO_ENGINE = 7
    NO_MODEL = 8
    MODEL_MISMATCH = 9
    DEADLINE = 10
    CANCELLED = 11
    INVOKE = 12
    NOT_BEGUN = 13
    BAD_OFFSET = 14
    INCOMPLETE = 15
    DIGEST = 16
    SIGNATURE = 17
    DOWNGRADE = 18
    INVALID_MODEL = 19
    OPERATOR = 20
    ARENA = 21
    SELFTEST = 22
    FLASH = 23
    INTERNAL = 24
    BOARD = 25
    IN_TRIAL = 26
    SENSOR = 27


class SlotState(IntEnum):
    """What a model slot holds."""

    EMPTY = 0
    RECEIVING = 1
    STORED = 2
    TRIAL = 3
    ACTIVE = 4
    BAD = 5


class Rollback(IntEnum):
    """Why the board took its last trial back."""

    NONE = 0
    RESET = 1
    CRASH = 2
    TIMEOUT = 3
    INVOKE = 4
    REQUESTED = 5

    @property
    def words(self) -> str:
        """The same for people: `it was reset before the model was confirmed`."""
        return _ROLLBACK_WORDS[self]


_ROLLBACK_WORDS: Final = {
    Rollback.NONE: "nothing was rolled back",
    Rollback.RESET: "the board was reset before the model was confirmed",
    Rollback.CRASH: "the board crashed or hung with the model",
    Rollback.TIMEOUT: "the model was not confirmed in time",
    Rollback.INVOKE: "an inference with the model failed",
    Rollback.REQUESTED: "the gateway asked for it",
}


class ResetCause(IntEnum):
    """Why the MCU booted last."""

    UNKNOWN = 0
    POWER_ON = 1
    RESET_PIN = 2
    SOFTWARE = 3
    WATCHDOG = 4
    FAULT = 5
    BROWN_OUT = 6


class Capability(IntFlag):
    """What the firmware can do."""

    ENGINE = 1
    ED25519 = 2
    STREAMS = 4
    KEEPS_MODELS = 8


class SignatureKind(IntEnum):
    NONE = 0
    ED25519 = 1


class SendInputs(IntEnum):
    """Which results of a stream carry the inputs they were computed from."""

    NEVER = 0
    BELOW = 1
    """The threshold: those that the board is not sure of."""
    ALWAYS = 2


class LogLevel(IntEnum):
    DEBUG = 0
    INFO = 1
    WARNING = 2
    ERROR = 3


class StatId(IntEnum):
    """What STATS counts, since the MCU's reset."""

    UPTIME_US = 1
    FRAMES_RECEIVED = 2
    FRAMES_SENT = 3
    FRAMES_BAD_CRC = 4
    FRAMES_UNDECODABLE = 5
    FRAMES_OVERSIZE = 6
    INFERENCES = 7
    INFERENCES_FAILED = 8
    REFUSED_BUSY = 9
    EXPIRED = 10
    COMPUTE_US = 11
    STACK_HIGH_WATER = 12
    ARENA_USED = 13
    UART_OVERRUNS = 14
    FRAMES_LOST = 15
    ANSWERS_REPEATED = 16
    FLASH_OPERATIONS = 17
    QUEUE_HIGH_WATER = 18
    TRIAL_LEFT_US = 19
    STREAM_RESULTS = 23
    STREAM_SKIPPED = 24
