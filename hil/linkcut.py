"""A TCP relay that can be cut: what a pulled network cable looks like to both ends. While it is cut nothing passes and
nothing is refused; when it is mended, what was held by the ends flows again."""

from __future__ import annotations

import asyncio
from contextlib import suppress

CHUNK = 65536


class LinkCut:
    """Relays `127.0.0.1:port` to `127.0.0.1:upstream`."""

    def __init__(self, port: int, upstream: int) -> None:
        self.port = port
        self._upstream = upstream
        self._open = asyncio.Event()
        self._open.set()
        self._server: asyncio.Server | None = None
        self._relays: set[asyncio.Task[None]] = set()
        self.bytes = 0
        """What passed, both ways."""

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", self.port)

    def cut(self) -> None:
        """From now on bytes stay where they are."""
        self._open.clear()

    def mend(self) -> None:
        self._open.set()

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
            relay = asyncio.create_task(self._relay(source, sink))
            self._relays.add(relay)
            relay.add_done_callback(self._relays.discard)

    async def _relay(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while data := await source.read(CHUNK):
                await self._open.wait()
                self.bytes += len(data)
                sink.write(data)
                await sink.drain()
        sink.close()
