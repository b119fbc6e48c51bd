"""The HTTP door over a real socket: bodies that are large, slow or broken off, and stopping."""

import asyncio
import json
import signal
from collections.abc import AsyncIterator, Callable

import httpx
import pytest
from fastapi import FastAPI
from http_fakes import JSON, FakeCore, malformed

from agent.config import HttpSection
from agent.core.errors import LinkError
from agent.core.types import InferenceRequest
from agent.ingress.http import create_app
from agent.ingress.http_bounds import MAX_PIPELINED
from agent.ingress.http_server import HttpServer
from agent.telemetry.metrics import Metrics

DEADLINE_S = 20.0
"""For what ought to happen at once."""


@pytest.fixture
def core() -> FakeCore:
    return FakeCore()


@pytest.fixture
def metrics() -> Metrics:
    return Metrics()


@pytest.fixture
def app(core: FakeCore, metrics: Metrics) -> FastAPI:
    return create_app(core, metrics, HttpSection(port=0, max_body_bytes=2000), lambda: [{"model": "tiny"}])


@pytest.fixture
async def server(app: FastAPI) -> AsyncIterator[HttpServer]:
    server = HttpServer(app, HttpSection(port=0))
    await server.start()
    yield server
    await server.stop(0)


Stream = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@pytest.fixture
async def wire(server: HttpServer) -> AsyncIterator[Stream]:
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    yield reader, writer
    writer.close()


async def read_response(reader: asyncio.StreamReader) -> tuple[int, dict[str, str], bytes]:
    async with asyncio.timeout(DEADLINE_S):
        head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        headers = {line.partition(":")[0].lower(): line.partition(":")[2].strip() for line in head[1:] if line}
        body = await reader.readexactly(int(headers["content-length"]))
    return int(head[0].split()[1]), headers, body


QUESTION = json.dumps({"model": "tiny", "inputs": [1, 2, 3, 4]}).encode()


def post(body: bytes = QUESTION, *, length: int | None = None) -> bytes:
    length = len(body) if length is None else length
    head = f"POST /infer HTTP/1.1\r\nhost: g\r\ncontent-type: application/json\r\ncontent-length: {length}\r\n\r\n"
    return head.encode() + body


CHUNKED = b"POST /infer HTTP/1.1\r\nhost: g\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n"


async def test_several_requests_on_a_connection(wire: Stream) -> None:
    reader, writer = wire
    for _ in range(3):
        writer.write(post())
        status, headers, _ = await read_response(reader)
        assert status == 200
        assert "server" not in headers


async def test_a_body_in_pieces(wire: Stream, core: FakeCore) -> None:
    reader, writer = wire
    writer.write(CHUNKED)
    for byte in QUESTION:
        writer.write(b"1\r\n" + bytes([byte]) + b"\r\n")
        await writer.drain()
    writer.write(b"0\r\n\r\n")
    status, _, _ = await read_response(reader)
    assert status == 200
    assert len(core.asked) == 1


@pytest.mark.parametrize("announced", [True, False])
async def test_a_large_body_is_refused_and_not_kept(
    wire: Stream, app: FastAPI, metrics: Metrics, announced: bool
) -> None:
    """Also when the client writes all of it before it reads: the refusal must not be lost in a reset."""
    reader, writer = wire
    size = 1 << 20
    if announced:
        writer.write(post(b"x" * size))
    else:
        writer.write(CHUNKED + b"%x\r\n%s\r\n0\r\n\r\n" % (size, b"x" * size))
    await writer.drain()
    status, headers, body = await read_response(reader)
    assert (status, headers["connection"]) == (413, "close")
    assert json.loads(body)["error"]["code"] == "too_large"
    assert malformed(metrics, "too_large")
    assert app.state.bodies._buffered == 0


async def test_a_large_body_that_waits_to_be_asked_for(wire: Stream) -> None:
    reader, writer = wire
    writer.write(post(b"", length=1 << 30).replace(b"\r\n\r\n", b"\r\nexpect: 100-continue\r\n\r\n"))
    status, _, _ = await read_response(reader)
    assert status == 413


async def test_a_body_at_the_limit(wire: Stream) -> None:
    reader, writer = wire
    writer.write(post(QUESTION.ljust(2000)))
    assert (await read_response(reader))[0] == 200
    writer.write(post(QUESTION.ljust(2001)))
    assert (await read_response(reader))[0] == 413


async def test_a_body_that_does_not_come(wire: Stream, app: FastAPI) -> None:
    app.state.bodies._timeout_s = 0.05
    reader, writer = wire
    writer.write(post(b"{", length=100))
    status, headers, body = await read_response(reader)
    assert (status, headers["connection"]) == (408, "close")
    assert json.loads(body)["error"]["code"] == "body_timeout"
    assert app.state.bodies._buffered == 0


async def test_bodies_of_all_connections_together_are_bounded(wire: Stream, app: FastAPI) -> None:
    app.state.bodies._total = 50
    reader, writer = wire
    writer.write(post(QUESTION.ljust(60), length=100))
    status, headers, _ = await read_response(reader)
    assert (status, headers["retry-after"]) == (429, "1")
    assert app.state.bodies._buffered == 0


async def test_a_client_that_goes_away_while_it_sends(
    wire: Stream, server: HttpServer, metrics: Metrics, core: FakeCore
) -> None:
    _, writer = wire
    writer.write(post(b"{", length=100))
    await writer.drain()
    writer.transport.abort()
    async with asyncio.timeout(DEADLINE_S):
        await until(lambda: malformed(metrics, "disconnected"))
    assert core.asked == []
    await still_serves(server)


async def test_a_client_that_goes_away_while_it_waits(wire: Stream, server: HttpServer, core: FakeCore) -> None:
    asked, go_on, finished = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def slow(request: InferenceRequest) -> None:
        asked.set()
        await go_on.wait()
        finished.set()

    core.behave = slow
    _, writer = wire
    writer.write(post())
    async with asyncio.timeout(DEADLINE_S):
        await asked.wait()
        writer.transport.abort()
        await until(lambda: server.connections == 0)
        go_on.set()
        await finished.wait()
    core.behave = None
    await still_serves(server)


async def until(condition: Callable[[], object]) -> None:
    """For what nobody announces: goes once round the event loop between two looks."""
    while not condition():  # noqa: ASYNC110
        await asyncio.sleep(0)


async def still_serves(server: HttpServer) -> None:
    async with httpx.AsyncClient() as client:
        response = await client.post(f"http://127.0.0.1:{server.port}/infer", content=QUESTION, headers=JSON)
    assert response.status_code == 200


async def test_stopping_lets_requests_finish(app: FastAPI, core: FakeCore) -> None:
    asked, go_on = asyncio.Event(), asyncio.Event()

    async def slow(request: InferenceRequest) -> None:
        asked.set()
        await go_on.wait()

    core.behave = slow
    server = HttpServer(app, HttpSection(port=0))
    reader, writer = await asyncio.open_connection("127.0.0.1", await server.start())
    writer.write(post())
    async with asyncio.timeout(DEADLINE_S):
        await asked.wait()
        stopping = asyncio.create_task(server.stop(10))
        with pytest.raises(OSError):
            while True:
                _, probe = await asyncio.open_connection("127.0.0.1", server.port)
                probe.close()
        go_on.set()
        assert (await read_response(reader))[0] == 200
        await stopping
    writer.close()


async def test_stopping_has_a_limit(app: FastAPI, core: FakeCore) -> None:
    asked, cancelled = asyncio.Event(), asyncio.Event()

    async def hang(request: InferenceRequest) -> None:
        asked.set()
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()

    core.behave = hang
    server = HttpServer(app, HttpSection(port=0))
    _, writer = await asyncio.open_connection("127.0.0.1", await server.start())
    writer.write(post())
    async with asyncio.timeout(DEADLINE_S):
        await asked.wait()
        await server.stop(0)
    assert cancelled.is_set()
    writer.close()


async def test_a_server_that_ended_is_begun_again_where_it_was(app: FastAPI) -> None:
    """By whoever supervises it; who knocks meanwhile waits, and is served."""
    server = HttpServer(app, HttpSection(port=0))
    port = await server.start()
    serving: list[int] = []
    async with asyncio.timeout(DEADLINE_S):
        keeping = asyncio.create_task(server.keep(lambda: serving.append(server.port)))
        await until(lambda: serving)
        assert server._task is not None
        server._task.cancel()
        with pytest.raises(LinkError, match="has ended"):
            await keeping
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(post())
        keeping = asyncio.create_task(server.keep(lambda: serving.append(server.port)))
        assert (await read_response(reader))[0] == 200
        assert serving == [port, port]
        writer.close()
        await server.stop(1)
        assert not keeping.done(), "it was stopped, and has not failed"
        keeping.cancel()
    with pytest.raises(OSError):
        await asyncio.open_connection("127.0.0.1", port)


async def test_a_port_that_is_taken(app: FastAPI, server: HttpServer) -> None:
    with pytest.raises(LinkError, match=f"cannot listen on 127.0.0.1:{server.port}: "):
        await HttpServer(app, HttpSection(port=server.port)).start()


async def test_the_server_leaves_signals_alone(server: HttpServer) -> None:
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert server.status()["connections"] == 0


async def test_a_server_that_died_of_something_is_stopped_like_any_other(app: FastAPI) -> None:
    """Else nothing that is to be closed after it would be."""
    server = HttpServer(app, HttpSection(port=0))
    await server.start()

    async def fails(counter: int) -> bool:
        raise OSError(24, "Too many open files")

    server._server.on_tick = fails  # type: ignore[method-assign]
    async with asyncio.timeout(DEADLINE_S):
        with pytest.raises(OSError, match="Too many open files"):
            await server.keep(lambda: None)
        await server.stop(1)


async def test_requests_without_end_on_one_connection(app: FastAPI, server: HttpServer) -> None:
    """uvicorn keeps whatever came in one read, while a client that does not read holds up the first of them."""
    writer = (await asyncio.open_connection("127.0.0.1", server.port))[1]
    writer.write(b"GET / HTTP/1.1\r\nhost: g\r\n\r\n" * 20_000)
    most = 0

    def ended() -> bool:
        nonlocal most
        open_now = server._server.server_state.connections
        most = max(most, *(len(connection.pipeline) for connection in open_now), 0)  # type: ignore[union-attr]
        return server.connections == 0 and app.state.bodies._buffered == 0

    await asyncio.sleep(0)
    async with asyncio.timeout(DEADLINE_S):
        await until(ended)
    assert most <= MAX_PIPELINED
    writer.close()
    await still_serves(server)
