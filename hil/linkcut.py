"""A TCP relay that can be cut: what a pulled network cable looks like to both ends. While it is cut nothing passes and
nothing is refused; when it is mended, what was held by the ends flows again. It can also be slow, narrow, and reset."""

from __future__ import annotations

import asyncio
import socket
import struct
from contextlib import suppress

CHUNK = 65536
_RESET = struct.pack("ii", 1, 0)
"""SO_LINGER with no time: close sends RST."""


class LinkCut:
    """Relays `127.0.0.1:port` to `127.0.0.1:upstream`."""

    def __init__(self, port: int, upstream: int) -> None:
        self.port = port
        self._upstream = upstream
        self._open = asyncio.Event()
        self._open.set()
        self._server: asyncio.Server | None = None
        self._relays: set[asyncio.Task[None]] = set()
        self._ends: set[asyncio.StreamWriter] = set()
        self.bytes = 0
        """What passed, both ways."""
        self.delay_s = 0.0
        """Each way, of every piece of up to 64 KiB."""
        self.bytes_per_s = 0.0
        """Each way; 0: as fast as it goes."""

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", self.port)

    def cut(self) -> None:
        """From now on bytes stay where they are."""
        self._open.clear()

    def mend(self) -> None:
        self._open.set()

    def reset(self) -> None:
        """Break every connection, as a firewall does that has forgotten it."""
        for end in self._ends:
            raw = end.get_extra_info("socket")
            with suppress(OSError):
                raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            end.transport.abort()

    async def stop(self) -> None:
        if self._server:
            self._server.close()
        for relay in self._relays:
            relay.cancel()
        await asyncio.gather(*self._relays, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await self._open.wait()
        try:
            far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self._upstream)
        except OSError:
            writer.close()
            return
        for source, sink in ((reader, far_writer), (far_reader, writer)):
            self._ends.add(sink)
            relay = asyncio.create_task(self._relay(source, sink))
            self._relays.add(relay)
            relay.add_done_callback(self._relays.discard)

    async def _relay(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while data := await source.read(CHUNK):
                await asyncio.sleep(self.delay_s + (len(data) / self.bytes_per_s if self.bytes_per_s else 0.0))
                await self._open.wait()
                self.bytes += len(data)
                sink.write(data)
                await sink.drain()
            await self._open.wait()  # a FIN does not get through either
        self._ends.discard(sink)
        sink.close()
