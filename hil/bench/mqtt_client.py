"""The least MQTT 5 client for requests and responses: a blocking socket, so that the other end is measured."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from agent.wire.mqtt_properties import MessageProperties

READ_BYTES = 262_144
TIMEOUT_S = 10.0
CONNECT, CONNACK, PUBLISH, PUBACK, SUBSCRIBE, SUBACK = 1, 2, 3, 4, 8, 9


class MqttFault(OSError):
    """The broker refused something, or the answer did not come."""


def packet(kind: int, flags: int, body: bytes) -> bytes:
    """A control packet with its fixed header (MQTT 5.0, section 2.1)."""
    length, size = bytearray(), len(body)
    while True:
        size, low = size >> 7, size & 0x7F
        length.append(low | (0x80 if size else 0))
        if not size:
            return bytes([kind << 4 | flags]) + bytes(length) + body


def text(value: str) -> bytes:
    """A string with its length in front."""
    return len(value.encode()).to_bytes(2, "big") + value.encode()


def publish(topic: str, payload: bytes, qos: int, properties: MessageProperties) -> bytes:
    """A whole PUBLISH, ready to be sent again and again: only one is ever open, so all have packet identifier 1."""
    identifier = b"\0\1" if qos else b""
    return packet(PUBLISH, qos << 1, text(topic) + identifier + properties.to_bytes() + payload)


class Connection:
    """Connected and subscribed to one topic, where the answers come."""

    def __init__(self, port: int, client_id: str, answers: str) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), TIMEOUT_S)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._received = bytearray()
        clean_start, no_keepalive = b"\2", b"\0\0"
        connect = text("MQTT") + b"\5" + clean_start + no_keepalive + b"\0" + text(client_id)
        self.socket.sendall(packet(CONNECT, 0, connect))
        self._expect(CONNACK)
        self.socket.sendall(packet(SUBSCRIBE, 2, b"\0\1\0" + text(answers) + b"\1"))
        self._expect(SUBACK)

    def exchange(self, request: bytes) -> tuple[bytes, float]:
        """The answer's payload, and the seconds until it was here."""
        began = time.perf_counter()
        self.socket.sendall(request)
        while True:
            kind, flags, body = self._next()
            if kind == PUBLISH:
                took = time.perf_counter() - began
                break
        start = 2 + int.from_bytes(body[:2], "big")
        if flags >> 1 & 3:
            self.socket.sendall(packet(PUBACK, 0, body[start : start + 2]))
            start += 2
        _, start = MessageProperties.from_bytes(body, start)
        return body[start:], took

    def close(self) -> None:
        self.socket.close()

    def _expect(self, kind: int) -> None:
        found, _, body = self._next()
        reason = body[1] if kind == CONNACK else body[-1]
        if found != kind or reason >= 0x80:
            raise MqttFault(f"the broker answered packet type {found}, reason {reason:#04x}")

    def _next(self) -> tuple[int, int, bytes]:
        while (found := self._whole()) is None:
            piece = self.socket.recv(READ_BYTES)
            if not piece:
                raise MqttFault("the broker closed the connection")
            self._received += piece
        return found

    def _whole(self) -> tuple[int, int, bytes] | None:
        data, size = self._received, 0
        for at in range(1, min(5, len(data))):
            size |= (data[at] & 0x7F) << 7 * (at - 1)
            if data[at] < 0x80:
                end = at + 1 + size
                if len(data) < end:
                    return None
                head, body = data[0], bytes(data[at + 1 : end])
                del data[:end]
                return head >> 4, head & 15, body
        return None


@dataclass(slots=True)
class OneByOne:
    """One client that asks again as soon as it was answered. Keeps the answers."""

    port: int
    client_id: str
    answers: str
    requests: Iterator[bytes]
    bodies: list[bytes] = field(default_factory=list)

    def __call__(self, seconds: float) -> Sequence[float]:
        connection = Connection(self.port, self.client_id, self.answers)
        try:
            connection.exchange(next(self.requests))
            samples = []
            end = time.perf_counter() + seconds
            while True:
                body, took = connection.exchange(next(self.requests))
                samples.append(took)
                self.bodies.append(body)
                if time.perf_counter() >= end:
                    return samples
        finally:
            connection.close()
