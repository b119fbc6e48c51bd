"""Bounds on HTTP connections before there is a request: how many of one address, how long and how large a head may be.

uvicorn bounds neither. Without them a stranger who opens connections and says nothing has all of them.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable
from typing import ClassVar, NamedTuple, NoReturn

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from agent.core.errors import InferenceError, InvalidRequest, Overloaded
from agent.security.access import is_loopback, network

HEAD_S = 10.0
"""From the first byte of a connection, or the first of a further request on it, to the end of the headers."""
MAX_HEAD_BYTES = 64 << 10
MAX_PIPELINED = 16
"""Requests of one connection that wait behind the one being answered. uvicorn keeps as many as come in one read, which
are tens of thousands, for as long as the client takes to read the answers."""

_TOO_LARGE = b"HTTP/1.1 431 Request Header Fields Too Large\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"
_ERRORS = logging.getLogger("uvicorn.error.connection")
"""uvicorn's warnings of a connection are said here by name and address, or are advice to its developer."""
_ERRORS.setLevel(logging.ERROR)

Refused = Callable[[InferenceError, str], None]
"""Called with what was refused, and the address."""


class HeadTimeout(InvalidRequest):
    """The headers did not arrive in time; the connection is closed without a word."""

    code = "head_timeout"
    http_status = 408


class HeadTooLarge(InvalidRequest):
    """The headers have no end."""

    code = "head_too_large"
    http_status = 431


class Malformed(InvalidRequest):
    """What came is no HTTP, or could be read in two ways."""

    code = "malformed"


class Bounds(NamedTuple):
    """What the connections of one server share. `open_now` leaves out this machine's own addresses."""

    per_address: int
    refused: Refused
    open_now: Counter[str]


class Bounded(HttpToolsProtocol):
    """One connection. `bounded_protocol` makes the class that knows the bounds."""

    bounds: ClassVar[Bounds]

    _head_timer: asyncio.TimerHandle | None = None
    _head_bytes = 0
    _field_bytes = 0
    _counted = ""
    _fault: InferenceError | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self.logger = _ERRORS
        super().connection_made(transport)
        address = self.client[0] if self.client else ""
        if not is_loopback(address):
            self._counted = network(address)
            self.bounds.open_now[self._counted] += 1
            if self.bounds.open_now[self._counted] > self.bounds.per_address:
                self.bounds.refused(
                    Overloaded(f"more than {self.bounds.per_address} connections of one address"), address
                )
                transport.abort()
                return
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._head_done()
        if self._counted:
            self.bounds.open_now[self._counted] -= 1
            if not self.bounds.open_now[self._counted]:
                del self.bounds.open_now[self._counted]
            self._counted = ""
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        before = self.cycle
        super().data_received(data)
        if self.cycle is not before:  # a head has ended, in most cases the only one and whole
            self._head_done()
            return
        if self._head_timer is None:
            if before is not None and not before.response_complete:
                return  # of its body
            self._await_head()
        self._head_bytes += len(data)
        if self._head_bytes > MAX_HEAD_BYTES:
            self._end(HeadTooLarge(f"headers of more than {MAX_HEAD_BYTES} bytes"))

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._field_bytes = 0

    def on_url(self, url: bytes) -> None:
        super().on_url(url)
        self._count_field(len(url))

    def on_header(self, name: bytes, value: bytes) -> None:
        super().on_header(name, value)
        self._count_field(len(name) + len(value) + len(": \r\n"))

    def _count_field(self, size: int) -> None:
        """A head that came in one piece has an end before it is known how long it is."""
        self._field_bytes += size
        if self._field_bytes > MAX_HEAD_BYTES:
            self._stop(HeadTooLarge(f"headers of more than {MAX_HEAD_BYTES} bytes"))

    def on_headers_complete(self) -> None:
        super().on_headers_complete()
        if len(self.pipeline) > MAX_PIPELINED:
            self.pipeline.clear()
            self._stop(Overloaded(f"more than {MAX_PIPELINED} requests wait on one connection"))

    def _stop(self, fault: InferenceError) -> NoReturn:
        """The parser stops, and has the connection told."""
        self._fault = fault
        raise fault

    def send_400_response(self, msg: str) -> None:
        fault = self._fault or Malformed(f"(connection): {msg}", field="(connection)")
        self.bounds.refused(fault, self.client[0] if self.client else "")
        if isinstance(fault, Overloaded):
            self.transport.abort()  # who does not read would keep what was to be said
        elif isinstance(fault, HeadTooLarge):
            self.transport.write(_TOO_LARGE)
            self.transport.close()
        else:
            super().send_400_response(msg)

    def _await_head(self) -> None:
        self._head_bytes = 0
        self._head_timer = self.loop.call_later(HEAD_S, self._late)

    def _late(self) -> None:
        self._end(HeadTimeout(f"the headers did not arrive within {HEAD_S:g} seconds"))

    def _head_done(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _end(self, error: InferenceError) -> None:
        self._head_done()
        if self.transport.is_closing():
            return
        if self._head_bytes:  # or it never said a word: a browser that opened one in advance
            self.bounds.refused(error, self.client[0] if self.client else "")
        if isinstance(error, HeadTooLarge):
            self.transport.write(_TOO_LARGE)
        self.transport.close()


def bounded_protocol(per_address: int, refused: Refused) -> type[Bounded]:
    """uvicorn's protocol with these bounds. `per_address` does not hold for this machine's own addresses."""
    return type("BoundedProtocol", (Bounded,), {"bounds": Bounds(per_address, refused, Counter())})
