"""The least HTTP/1.1 client: raw sockets kept open, so that what is measured is the server."""

from __future__ import annotations

import selectors
import socket
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

READ_BYTES = 262_144
TIMEOUT_S = 10.0


class HttpFault(OSError):
    """The server answered with something else than 200, or not at all."""


def post(path: str, body: bytes, content_type: str) -> bytes:
    """A whole request, ready to be sent again and again."""
    head = (
        f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: {content_type}\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


class Connection:
    """One keep-alive connection with at most one request open."""

    def __init__(self, port: int) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), TIMEOUT_S)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._received = b""
        self.sent_at = 0.0

    def send(self, request: bytes) -> None:
        self.sent_at = time.perf_counter()
        self.socket.sendall(request)

    def receive(self) -> bytes | None:
        """The body of the answer once all of it is there. Raises `HttpFault` unless it is a 200."""
        piece = self.socket.recv(READ_BYTES)
        data = self._received = self._received + piece if self._received else piece
        end = data.find(b"\r\n\r\n")
        if not piece:
            raise HttpFault("the server closed the connection")
        if end < 0:
            return None
        start = data.index(b"content-length: ") + 16
        length = int(data[start : data.index(b"\r\n", start)])
        if len(data) < end + 4 + length:
            return None
        self._received = b""
        if not data.startswith(b"HTTP/1.1 200"):
            raise HttpFault(f"answered {data[:12]!r}: {data[end + 4 :][:200]!r}")
        return data[end + 4 :]

    def close(self) -> None:
        self.socket.close()


@dataclass(slots=True)
class OneByOne:
    """One client that asks again as soon as it was answered. Keeps the latest bodies."""

    port: int
    requests: Iterator[bytes]
    bodies: list[bytes] = field(default_factory=list)

    def __call__(self, seconds: float) -> Sequence[float]:
        connection = Connection(self.port)
        samples = []
        end = time.perf_counter() + seconds
        try:
            self._exchange(connection)
            while True:
                samples.append(self._exchange(connection))
                if time.perf_counter() >= end:
                    return samples
        finally:
            connection.close()

    def _exchange(self, connection: Connection) -> float:
        request = next(self.requests)
        connection.send(request)
        while (body := connection.receive()) is None:
            pass
        took = time.perf_counter() - connection.sent_at
        self.bodies.append(body)
        return took


@dataclass(slots=True)
class Crowd:
    """Many clients at once, each with one request open. Gives requests per second; keeps the latencies by block."""

    port: int
    requests: Iterator[bytes]
    clients: int
    latencies: list[list[float]] = field(default_factory=list)

    def __call__(self, seconds: float) -> Sequence[float]:
        connections = [Connection(self.port) for _ in range(self.clients)]
        try:
            with selectors.DefaultSelector() as selector:
                for connection in connections:
                    selector.register(connection.socket, selectors.EVENT_READ, connection)
                    connection.send(next(self.requests))
                return [self._drive(selector, seconds)]
        finally:
            for connection in connections:
                connection.close()

    def _drive(self, selector: selectors.BaseSelector, seconds: float) -> float:
        block: list[float] = []
        began = time.perf_counter()
        while (now := time.perf_counter()) < began + seconds or not block:
            ready = selector.select(TIMEOUT_S)
            if not ready:
                raise HttpFault(f"no answer for {TIMEOUT_S:.0f} s")
            for key, _ in ready:
                connection: Connection = key.data
                if connection.receive() is not None:
                    block.append(time.perf_counter() - connection.sent_at)
                    connection.send(next(self.requests))
        self.latencies.append(block)
        return len(block) / (now - began)
