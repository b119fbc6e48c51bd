"""uvicorn inside the daemon's own event loop: bound to a port before it says so, stopped within a limit."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import math
import socket
from collections.abc import Generator
from typing import Any

import uvicorn

from agent.config import HttpSection
from agent.core.errors import LinkError

MAX_CONNECTIONS = 512
"""More are answered 503 by uvicorn and closed."""
BACKLOG = 128
KEEP_ALIVE_S = 30
"""Longer than the seconds between two polls of a dashboard, so that they share a connection."""


class HttpServer:
    """Serves one ASGI application. `port` is the real one once `start` has returned."""

    def __init__(self, app: Any, settings: HttpSection) -> None:
        self._host = settings.host
        self.port = settings.port
        self._server = _Embedded(
            uvicorn.Config(
                app,
                http="httptools" if importlib.util.find_spec("httptools") else "h11",
                ws="none",
                lifespan="off",
                interface="asgi3",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                limit_concurrency=MAX_CONNECTIONS,
                backlog=BACKLOG,
                timeout_keep_alive=KEEP_ALIVE_S,
            )
        )
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> int:
        """Bind, begin to serve, return the port. Raises `LinkError`."""
        listener = self._bind()
        self.port = listener.getsockname()[1]
        self._task = asyncio.create_task(self._server.serve(sockets=[listener]), name="http-server")
        up = asyncio.create_task(self._server.up.wait())
        await asyncio.wait((self._task, up), return_when=asyncio.FIRST_COMPLETED)
        if not up.done():
            up.cancel()
            listener.close()
            await self._task
            raise LinkError(f"http: did not start on {self._host}:{self.port}")
        return self.port

    async def stop(self, limit_s: float) -> None:
        """Accept nothing new, let requests finish for `limit_s`, then cancel them."""
        if self._task is None:
            return
        self._server.config.timeout_graceful_shutdown = math.ceil(limit_s)
        self._server.should_exit = True
        await asyncio.wait((self._task,), timeout=math.ceil(limit_s) + 1)
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task
        cancelled = set(self._server.server_state.tasks)
        if cancelled:
            await asyncio.wait(cancelled, timeout=1)
        self._task = None

    @property
    def connections(self) -> int:
        """Open now."""
        return len(self._server.server_state.connections)

    def status(self) -> dict[str, Any]:
        """For `doors.http` of `/status`."""
        return {
            "host": self._host,
            "port": self.port,
            "connections": self.connections,
            "max_connections": MAX_CONNECTIONS,
        }

    def _bind(self) -> socket.socket:
        family = socket.AF_INET6 if ":" in self._host else socket.AF_INET
        both = self._host == "::" and socket.has_dualstack_ipv6()
        try:
            return socket.create_server((self._host, self.port), family=family, backlog=BACKLOG, dualstack_ipv6=both)
        except OSError as error:
            raise LinkError(f"http: cannot listen on {self._host}:{self.port}: {error.strerror or error}") from None


class _Embedded(uvicorn.Server):
    """A server that leaves signals to the daemon and says when it is up."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.up = asyncio.Event()

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.up.set()
