"""uvicorn inside the daemon's own event loop: bound to a port before it says so, stopped within a limit."""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import socket
import ssl
from collections.abc import Callable, Generator
from typing import Any

import uvicorn

from agent.config import HttpSection, TlsSection
from agent.core.errors import ConfigError, LinkError, plain_words
from agent.ingress.http_bounds import Refused, bounded_protocol

MAX_CONNECTIONS = 512
"""More are answered 503 by uvicorn and closed."""
BACKLOG = 128
HANDSHAKE_S = 5.0
"""For a TLS handshake."""
KEEP_ALIVE_S = 30
"""Longer than the seconds between two polls of a dashboard, so that they share a connection."""

FIRST_WORDS_S = 0.05
"""Between letting nobody in any more and closing idle connections: whoever was let in last gets to ask."""


class HttpServer:
    """Serves one ASGI application. `port` is the real one once `start` has returned.

    `refused` is told of connections that end before there is a request. Raises `ConfigError` for a certificate that
    cannot be used.
    """

    def __init__(self, app: Any, settings: HttpSection, refused: Refused = lambda error, address: None) -> None:
        self._host = settings.host
        self.port = settings.port
        self._tls = settings.tls
        self._certificate = None if settings.tls is None else _version(settings.tls)
        self._context = None if settings.tls is None else server_context(settings.tls)
        self._settings = uvicorn.Config(
            app,
            http=bounded_protocol(settings.max_connections_per_address, refused),
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
        self._server = _Embedded(self._settings, self._context)
        self._task: asyncio.Task[None] | None = None
        self._listener: socket.socket | None = None
        self._closing = False

    async def start(self, listener: socket.socket | None = None) -> int:
        """Begin to serve at `listener`, or bind first; return the port. Raises `LinkError`."""
        self._listener = listener = listener or self._bind()
        self.port = listener.getsockname()[1]
        self._server = _Embedded(self._settings, self._context)
        # The server closes what it is given; who connects while this one stops and the next one starts waits meanwhile.
        self._task = asyncio.create_task(self._server.serve(sockets=[listener.dup()]), name="http-server")
        up = asyncio.create_task(self._server.up.wait())
        await asyncio.wait((self._task, up), return_when=asyncio.FIRST_COMPLETED)
        if not up.done():
            up.cancel()
            listener.close()
            self._listener = None
            await self._task
            raise LinkError(f"http: did not start on {self._host}:{self.port}")
        return self.port

    async def keep(self, serving: Callable[[], None]) -> None:
        """Until cancelled; calls `serving` once the server runs. One that had ended is begun again where it was: who
        knocks meanwhile waits. Raises what it ends with although nobody stopped it, or `LinkError`."""
        if not self._closing and (self._task is None or self._task.done()):
            await self.start(self._listener)
        serving()
        if self._task is not None:
            task = self._task
            await asyncio.wait((task,))
            if not self._closing:
                for server in self._server.servers:
                    server.close()
                error = None if task.cancelled() else task.exception()
                raise error or LinkError(f"http: the server on {self._host}:{self.port} has ended")
        await asyncio.Event().wait()

    async def stop(self, limit_s: float) -> None:
        """Accept nothing new, let requests finish for `limit_s`, then cancel them."""
        self._closing = True
        if self._listener is not None:  # at once: the system accepts whoever comes as long as one of us listens
            self._listener.close()
            self._listener = None
        if self._task is None:
            return
        for server in self._server.servers:
            server.close()
        await asyncio.sleep(FIRST_WORDS_S)
        self._server.config.timeout_graceful_shutdown = math.ceil(limit_s)
        self._server.should_exit = True
        await asyncio.wait((self._task,), timeout=math.ceil(limit_s) + 1)
        self._task.cancel()
        await asyncio.wait((self._task,))  # what it ended with is `keep`'s to tell
        cancelled = set(self._server.server_state.tasks)
        if cancelled:
            await asyncio.wait(cancelled, timeout=1)
        self._task = None

    def hand_over(self) -> socket.socket | None:
        """Take the listening socket away, before `stop`: it stays open, for the next server."""
        listener, self._listener = self._listener, None
        return listener

    def renew_certificate(self) -> bool:
        """Use what is in the certificate's files for new connections, if they have changed. Raises `ConfigError` if
        that cannot be used; the old one stays."""
        if self._context is None or self._tls is None or (version := _version(self._tls)) == self._certificate:
            return False
        server_context(self._tls)  # apart at first: of a pair that does not fit together nothing must be taken
        self._context.load_cert_chain(self._tls.cert_file, self._tls.key_file, password=_no_password)
        self._certificate = version
        return True

    @property
    def connections(self) -> int:
        """Open now."""
        return len(self._server.server_state.connections)

    def status(self) -> dict[str, Any]:
        """For `doors.http` of `/status`."""
        return {
            "host": self._host,
            "port": self.port,
            "tls": self._context is not None,
            "connections": self.connections,
            "max_connections": MAX_CONNECTIONS,
        }

    def _bind(self) -> socket.socket:
        family = socket.AF_INET6 if ":" in self._host else socket.AF_INET
        both = self._host == "::" and socket.has_dualstack_ipv6()
        try:
            return socket.create_server((self._host, self.port), family=family, backlog=BACKLOG, dualstack_ipv6=both)
        except OSError as error:
            raise LinkError(f"http: cannot listen on {self._host}:{self.port}: {_reason(error)}") from None


def _reason(error: OSError) -> str:
    """`create_server` repeats the address behind the system's own words."""
    return plain_words(OSError(error.errno, os.strerror(error.errno)) if error.errno and error.errno > 0 else error)


class _Embedded(uvicorn.Server):
    """A server that leaves signals to the daemon and says when it is up."""

    def __init__(self, config: uvicorn.Config, context: ssl.SSLContext | None) -> None:
        super().__init__(config)
        self._context = context
        self.up = asyncio.Event()

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """As uvicorn's, with a limit on TLS handshakes: until one ends there is no connection that could be bounded."""
        await self.lifespan.startup()
        protocol: Any = self.config.http_protocol_class
        self.servers = [
            await asyncio.get_running_loop().create_server(
                lambda: protocol(config=self.config, server_state=self.server_state, app_state=self.lifespan.state),
                sock=listener,
                ssl=self._context,
                backlog=BACKLOG,
                ssl_handshake_timeout=None if self._context is None else HANDSHAKE_S,
            )
            for listener in sockets or ()
        ]
        self.started = True
        self.up.set()


def server_context(tls: TlsSection) -> ssl.SSLContext:
    """TLS 1.3 and nothing else. Raises `ConfigError`."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    try:
        context.load_cert_chain(tls.cert_file, tls.key_file, password=_no_password)
    except (OSError, ssl.SSLError) as error:
        reason = getattr(error, "reason", None) or getattr(error, "strerror", None) or error
        raise ConfigError([f"http.tls: {tls.cert_file} and {tls.key_file} cannot be used: {reason}"]) from None
    return context


def _version(tls: TlsSection) -> tuple[int, ...]:
    """Changes when one of the files does."""
    with contextlib.suppress(OSError):
        return tls.cert_file.stat().st_mtime_ns, tls.key_file.stat().st_mtime_ns
    return ()


def _no_password() -> str:
    """Or OpenSSL would ask for it on the terminal."""
    return ""
