"""The properties of an MQTT 5 PUBLISH packet that this product uses (MQTT 5.0, sections 2.2.2 and 3.3.2.3).

Sans-I/O. paho-mqtt has its own, which costs more than everything else a message goes through (docs/mqtt.md).
"""

from __future__ import annotations

from dataclasses import dataclass

from agent.core.errors import ProtocolError

_PAYLOAD_FORMAT = 0x01
_MESSAGE_EXPIRY = 0x02
_CONTENT_TYPE = 0x03
_RESPONSE_TOPIC = 0x08
_CORRELATION_DATA = 0x09
_SUBSCRIPTION_ID = 0x0B
_TOPIC_ALIAS = 0x23
_USER_PROPERTY = 0x26

MAX_STRING = 65_535
MAX_EXPIRY_S = 0xFFFF_FFFF
MAX_USER = 256
"""User properties that are read; what comes behind them is passed over, for a packet holds 400,000."""


@dataclass(frozen=True, slots=True)
class MessageProperties:
    """What travels beside a payload. `user` keeps order and duplicates, as the protocol does."""

    content_type: str | None = None
    response_topic: str | None = None
    correlation_data: bytes | None = None
    message_expiry_s: int | None = None
    user: tuple[tuple[str, str], ...] = ()

    def get(self, name: str) -> str | None:
        """The first user property of that name."""
        for key, value in self.user:
            if key == name:
                return value
        return None

    def to_bytes(self) -> bytes:
        """The property block with its length in front. Raises `ValueError` if a string is too long."""
        parts = []
        if self.message_expiry_s is not None:
            parts.append(b"\x02" + min(self.message_expiry_s, MAX_EXPIRY_S).to_bytes(4, "big"))
        if self.content_type is not None:
            parts.append(b"\x03" + _field(self.content_type.encode()))
        if self.response_topic is not None:
            parts.append(b"\x08" + _field(self.response_topic.encode()))
        if self.correlation_data is not None:
            parts.append(b"\x09" + _field(self.correlation_data))
        parts += [b"\x26" + _field(key.encode()) + _field(value.encode()) for key, value in self.user]
        body = b"".join(parts)
        return _variable(len(body)) + body

    @classmethod
    def from_bytes(cls, data: bytes | bytearray | memoryview, offset: int = 0) -> tuple[MessageProperties, int]:
        """The properties that start at `offset`, and the offset after them. Raises `ProtocolError`."""
        length, offset = _read_variable(data, offset)
        end = offset + length
        if end > len(data):
            raise ProtocolError("the MQTT properties are longer than their packet")
        if not length:
            return _NONE, end
        found: dict[int, bytes] = {}
        user: list[tuple[str, str]] = []
        while offset < end and len(user) < MAX_USER:
            identifier = data[offset]
            offset += 1
            if identifier == _USER_PROPERTY:
                key, offset = _read_field(data, offset, end)
                value, offset = _read_field(data, offset, end)
                user.append((_text(key), _text(value)))
                continue
            if identifier == _SUBSCRIPTION_ID:
                _, offset = _read_variable(data, offset)
                continue
            if identifier in found:
                raise ProtocolError(f"the MQTT property {identifier:#04x} is there twice")
            if identifier in (_CONTENT_TYPE, _RESPONSE_TOPIC, _CORRELATION_DATA):
                found[identifier], offset = _read_field(data, offset, end)
                continue
            size = {_PAYLOAD_FORMAT: 1, _MESSAGE_EXPIRY: 4, _TOPIC_ALIAS: 2}.get(identifier)
            if size is None:
                raise ProtocolError(f"the MQTT property {identifier:#04x} does not belong in a PUBLISH packet")
            found[identifier] = bytes(data[offset : offset + size])
            offset += size
        if offset != end and len(user) < MAX_USER:
            raise ProtocolError("an MQTT property runs over the end of the properties")
        expiry = found.get(_MESSAGE_EXPIRY)
        content_type, response_topic = found.get(_CONTENT_TYPE), found.get(_RESPONSE_TOPIC)
        return cls(
            content_type=None if content_type is None else _text(content_type),
            response_topic=None if response_topic is None else _text(response_topic),
            correlation_data=found.get(_CORRELATION_DATA),
            message_expiry_s=None if expiry is None else int.from_bytes(expiry, "big"),
            user=tuple(user),
        ), end


_NONE = MessageProperties()


def usable_topic(topic: str) -> bool:
    """Whether a message may be published there: brokers close the connection on a topic that they dislike."""
    return 0 < len(topic) <= 1024 and topic.isprintable() and not any(char in topic for char in "+#")


def _field(value: bytes) -> bytes:
    if len(value) > MAX_STRING:
        raise ValueError(f"an MQTT property holds at most {MAX_STRING} bytes, found {len(value)}")
    return len(value).to_bytes(2, "big") + value


def _variable(number: int) -> bytes:
    if number < 128:
        return bytes((number,))
    encoded = bytearray()
    while number:
        number, low = number >> 7, number & 0x7F
        encoded.append(low | (0x80 if number else 0))
    return bytes(encoded)


def _read_variable(data: bytes | bytearray | memoryview, offset: int) -> tuple[int, int]:
    number = 0
    for shift in (0, 7, 14, 21):
        if offset >= len(data):
            break
        byte = data[offset]
        offset += 1
        number |= (byte & 0x7F) << shift
        if not byte & 0x80:
            return number, offset
    raise ProtocolError("an MQTT variable byte integer does not end")


def _read_field(data: bytes | bytearray | memoryview, offset: int, end: int) -> tuple[bytes, int]:
    start = offset + 2
    stop = start + int.from_bytes(data[offset:start], "big")
    if start > end or stop > end:
        raise ProtocolError("an MQTT property runs over the end of the properties")
    return bytes(data[start:stop]), stop


def _text(value: bytes) -> str:
    try:
        return value.decode()
    except UnicodeDecodeError:
        raise ProtocolError("an MQTT property is not UTF-8") from None
