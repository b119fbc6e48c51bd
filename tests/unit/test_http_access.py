"""The HTTP door with tokens: which path needs which role, what a refusal looks like, and TLS."""

from __future__ import annotations

import asyncio
import contextlib
import json
import ssl
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from http_fakes import FakeCore, malformed

from agent.config import HttpSection, LimitsSection, RateSection, SecuritySection, TlsSection, TokenSection
from agent.core.clock import SystemClock
from agent.core.errors import ConfigError, InferenceError
from agent.ingress import http_bounds
from agent.ingress.http import create_app
from agent.ingress.http_gate import needed
from agent.ingress.http_server import HttpServer
from agent.security.access import Guard
from agent.security.tokens import hashed
from agent.telemetry.metrics import Metrics
from tests.brokers import until
from tests.certs import Authority

DEADLINE_S = 20.0
QUESTION = {"model": "tiny", "inputs": [1, 2, 3, 4]}
SECURITY = SecuritySection(
    tokens=(
        TokenSection(name="looker", roles=("read",), sha256=hashed("ea_read")),
        TokenSection(name="hub", roles=("infer",), sha256=hashed("ea_infer")),
        TokenSection(name="meter", roles=("infer",), sha256=hashed("ea_meter"), producer="m7"),
        TokenSection(name="root", roles=("admin",), sha256=hashed("ea_admin")),
    )
)


def bearer(token: str) -> dict[str, str]:
    return {"authorization": f"Bearer {token}"}


def make(core: FakeCore, metrics: Metrics, section: SecuritySection = SECURITY) -> FastAPI:
    guard = Guard(section, SystemClock())
    return create_app(core, metrics, HttpSection(port=0, max_body_bytes=2000), list, guard=guard)


@pytest.fixture
def core() -> FakeCore:
    return FakeCore()


@pytest.fixture
def metrics() -> Metrics:
    return Metrics()


@contextlib.asynccontextmanager
async def asking(app: FastAPI, address: str = "10.0.0.7") -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(app, raise_app_exceptions=False, client=(address, 4711))
    async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as client:
        yield client


@pytest.fixture
async def client(core: FakeCore, metrics: Metrics) -> AsyncIterator[httpx.AsyncClient]:
    async with asking(make(core, metrics)) as client:
        yield client


# --- roles ---

LOOKING = ("/status", "/recent", "/metrics", "/ready", "/docs", "/openapi.json", "/nothing", "/explain/r1")


@pytest.mark.parametrize("path", LOOKING)
async def test_who_may_look(client: httpx.AsyncClient, path: str) -> None:
    expected = {"ea_read": True, "ea_admin": True, "ea_infer": False, "ea_meter": False}
    for token, let_in in expected.items():
        response = await client.get(path, headers=bearer(token))
        assert (response.status_code != 403) is let_in, token
        assert response.status_code != 401
    assert (await client.get(path)).status_code == 401
    assert (await client.head(path)).status_code == 401


async def test_who_may_ask(client: httpx.AsyncClient, core: FakeCore) -> None:
    codes = {
        token: (await client.post("/infer", json=QUESTION, headers=bearer(token))).status_code
        for token in ("ea_infer", "ea_meter", "ea_admin", "ea_read", "ea_wrong")
    }
    assert codes == {"ea_infer": 200, "ea_meter": 200, "ea_admin": 200, "ea_read": 403, "ea_wrong": 401}
    assert [request.asked_by for request in core.asked] == ["service:hub", "service:meter", "service:root"]


async def test_what_needs_nothing_says_nothing(client: httpx.AsyncClient, core: FakeCore) -> None:
    core.state = {"gateway": "secret-name"}
    for path in ("/health", "/"):
        response = await client.get(path)
        assert response.status_code == 200
        assert "secret-name" not in response.text


@pytest.mark.parametrize(
    ("method", "path", "role"),
    [
        ("GET", "/health", "nothing"),
        ("POST", "/health", "admin"),
        ("POST", "/infer", "infer"),
        ("GET", "/infer", "read"),
        ("POST", "/infer/", "admin"),
        ("POST", "//infer", "admin"),
        ("POST", "/explain", "read"),
        ("GET", "/health/../status", "read"),
        ("PUT", "/config", "admin"),
        ("DELETE", "/", "admin"),
        ("OPTIONS", "/infer", "infer"),
    ],
)
def test_roles_by_path(method: str, path: str, role: str) -> None:
    assert needed(method, path) == role


async def test_every_route_is_behind_the_gate(core: FakeCore, metrics: Metrics) -> None:
    """Also one that somebody adds without a thought of it."""
    app = make(core, metrics)
    app.add_api_route("/new", lambda: "open", methods=["GET", "POST"])
    async with asking(app) as client:
        for route in app.routes:
            path = route.path  # type: ignore[attr-defined]
            for method in route.methods or ():  # type: ignore[attr-defined]
                response = await client.request(method, path)
                assert (response.status_code == 401) or path in ("/", "/health"), (method, path)


# --- refusals ---


async def test_what_a_refusal_says(client: httpx.AsyncClient, metrics: Metrics) -> None:
    nobody = await client.get("/status")
    assert nobody.headers["www-authenticate"] == 'Bearer realm="edge-agent"'
    wrong = await client.get("/status", headers=bearer("ea_wrong"))
    assert wrong.headers["www-authenticate"] == 'Bearer realm="edge-agent", error="invalid_token"'
    assert nobody.json() == wrong.json()
    assert nobody.json()["error"] == {
        "code": "unauthorized",
        "message": "a valid token is needed: Authorization: Bearer …",
    }
    role = await client.get("/status", headers=bearer("ea_infer"))
    assert role.status_code == 403
    assert role.headers["www-authenticate"] == 'Bearer realm="edge-agent", error="insufficient_scope"'
    assert role.json()["error"] == {"code": "forbidden", "message": "this needs the role read"}
    assert malformed(metrics, "forbidden")


async def test_nobody_learns_which_models_there_are(client: httpx.AsyncClient) -> None:
    answers = [await client.post("/infer", json={**QUESTION, "model": model}) for model in ("tiny", "none", "../etc")]
    assert {(answer.status_code, answer.text) for answer in answers} == {(401, answers[0].text)}


async def test_two_tokens_are_none(core: FakeCore, metrics: Metrics) -> None:
    async with asking(make(core, metrics)) as client:
        headers = [("authorization", "Bearer ea_read"), ("authorization", "Bearer ea_admin")]
        assert (await client.get("/status", headers=headers)).status_code == 401


async def test_a_token_in_the_address_is_not_looked_at(client: httpx.AsyncClient) -> None:
    assert (await client.get("/status?access_token=ea_read&token=ea_read")).status_code == 401


async def test_a_pinned_producer_is_no_other(client: httpx.AsyncClient, core: FakeCore) -> None:
    for named, code in ((None, 200), ("m7", 200), ("m8", 403), (7, 403)):
        document = QUESTION if named is None else {**QUESTION, "producer": named}
        response = await client.post("/infer", json=document, headers=bearer("ea_meter"))
        assert response.status_code == code
    assert response.json()["error"]["field"] == "producer"
    assert "www-authenticate" not in response.headers
    raw = {**bearer("ea_meter"), "content-type": "application/octet-stream"}
    response = await client.post("/infer?model=tiny&producer=m8", content=bytes(16), headers=raw)
    assert response.status_code == 403
    assert {request.producer for request in core.asked} == {"m7"}


async def test_who_does_not_say_its_name_has_its_own(client: httpx.AsyncClient, core: FakeCore) -> None:
    """Or two services would get each other's last known answers."""
    await client.post("/infer", json=QUESTION, headers=bearer("ea_infer"))
    await client.post("/infer", json={**QUESTION, "producer": "line-3"}, headers=bearer("ea_infer"))
    assert [request.producer for request in core.asked] == ["hub", "line-3"]


async def test_on_this_machine_without_a_section_security(core: FakeCore, metrics: Metrics) -> None:
    app = make(core, metrics, SecuritySection())
    async with asking(app, "127.0.0.1") as here, asking(app, "10.0.0.7") as elsewhere:
        for path in ("/status", "/metrics", "/"):
            assert (await here.get(path)).status_code == 200
        assert (await here.post("/infer", json=QUESTION)).status_code == 200
        assert (await here.put("/config")).status_code == 403
        assert (await elsewhere.get("/status")).status_code == 401
        assert (await here.get("/status", headers={"host": "evil.example"})).status_code == 401


# --- rates ---


def limited(identity: int = 1000, producer: int = 1000) -> SecuritySection:
    limits = LimitsSection(
        identity=RateSection(per_s=0.1, burst=identity), producer=RateSection(per_s=0.1, burst=producer)
    )
    return SECURITY.model_copy(update={"limits": limits})


async def test_asking_too_often(core: FakeCore, metrics: Metrics) -> None:
    async with asking(make(core, metrics, limited(identity=3))) as client:
        codes = [(await client.get("/status", headers=bearer("ea_read"))).status_code for _ in range(4)]
        assert codes == [200, 200, 200, 429]
        refused = await client.get("/status", headers=bearer("ea_read"))
        assert refused.json()["error"]["code"] == "rate_limited"
        assert 9 <= int(refused.headers["retry-after"]) <= 10
        assert (await client.get("/status", headers=bearer("ea_admin"))).status_code == 200, "another has its own"


async def test_a_flood_from_one_producer_beside_a_polite_one(core: FakeCore, metrics: Metrics) -> None:
    async with asking(make(core, metrics, limited(producer=5))) as client:

        async def ask(producer: str) -> int:
            document = {**QUESTION, "producer": producer}
            return (await client.post("/infer", json=document, headers=bearer("ea_infer"))).status_code

        flood = await asyncio.gather(*(ask("loud") for _ in range(100)))
        assert sorted(set(flood)) == [200, 429]
        assert flood.count(200) == 5
        assert await ask("polite") == 200
    assert sum(request.producer == "loud" for request in core.asked) == 5


# --- the server ---


class Service:
    """A server and what it refused."""

    def __init__(self, app: FastAPI, **settings: Any) -> None:
        self.refused: list[tuple[str, str]] = []
        self.server = HttpServer(app, HttpSection(port=0, **settings), self._note)

    def _note(self, error: InferenceError, address: str) -> None:
        self.refused.append((error.code, address))


@contextlib.asynccontextmanager
async def serving(app: FastAPI, **settings: Any) -> AsyncIterator[Service]:
    service = Service(app, **settings)
    await service.server.start()
    try:
        yield service
    finally:
        await service.server.stop(0)


async def raw(port: int, data: bytes) -> bytes:
    """Everything that comes back until the server closes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        async with asyncio.timeout(DEADLINE_S):
            writer.write(data)
            return await reader.read()
    finally:
        writer.close()


async def test_a_head_without_an_end_is_not_kept(core: FakeCore, metrics: Metrics) -> None:
    async with serving(make(core, metrics)) as service:
        found = await raw(service.server.port, b"GET / HTTP/1.1\r\n" + b"x-a: b\r\n" * 9000)
        assert found.startswith(b"HTTP/1.1 431 ")
        assert service.refused == [("head_too_large", "127.0.0.1")]


@pytest.mark.parametrize("start", [b"GET /health HTTP/1.1\r\nhost:", b"\r\n"])
@pytest.mark.parametrize("before", [0, 2])
async def test_a_slow_head(
    core: FakeCore, metrics: Metrics, monkeypatch: pytest.MonkeyPatch, before: int, start: bytes
) -> None:
    """Also of a further request on a connection that has served others; an empty line is no beginning of one."""
    monkeypatch.setattr(http_bounds, "HEAD_S", 0.5)
    async with serving(make(core, metrics)) as service, asyncio.timeout(DEADLINE_S):
        reader, writer = await asyncio.open_connection("127.0.0.1", service.server.port)
        for _ in range(before):
            writer.write(b"GET /health HTTP/1.1\r\nhost: g\r\n\r\n")
            assert await reader.readuntil(b'{"status":"alive"}')
        writer.write(start)
        assert await reader.read() == b""
        writer.close()
        assert service.refused == [("head_timeout", "127.0.0.1")]


async def test_a_body_has_a_time_of_its_own(core: FakeCore, metrics: Metrics) -> None:
    body = json.dumps(QUESTION).encode()
    head = f"POST /infer HTTP/1.1\r\nhost: g\r\nauthorization: Bearer ea_infer\r\ncontent-length: {len(body)}\r\n"
    head += "content-type: application/json\r\nconnection: close\r\n\r\n"
    async with serving(make(core, metrics)) as service, asyncio.timeout(DEADLINE_S):
        reader, writer = await asyncio.open_connection("127.0.0.1", service.server.port)
        state = service.server._server.server_state
        await until(lambda: state.connections)
        (connection,) = state.connections
        assert connection._head_timer is not None
        writer.write(head.encode())
        await until(lambda: connection.cycle is not None)
        assert connection._head_timer is None
        writer.write(body)
        assert (await reader.read()).startswith(b"HTTP/1.1 200 ")
        writer.close()
        assert service.refused == []


async def test_connections_of_one_address(core: FakeCore, metrics: Metrics, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_bounds, "is_loopback", lambda address: False)
    async with serving(make(core, metrics), max_connections_per_address=2) as service:
        port = service.server.port
        streams = [await asyncio.open_connection("127.0.0.1", port) for _ in range(2)]
        await until(lambda: service.server.connections == 2)
        assert await raw(port, b"") == b""
        assert service.refused == [("overloaded", "127.0.0.1")]
        for _, writer in streams:
            writer.close()
        await until(lambda: service.server.connections == 0)
        assert b"200 OK" in await raw(port, b"GET /health HTTP/1.1\r\nhost: g\r\nconnection: close\r\n\r\n")


# --- TLS ---


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


def trusting(authority: Authority) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=authority.ca)


async def test_tls_1_3_and_a_renewed_certificate(authority: Authority, core: FakeCore, metrics: Metrics) -> None:
    pair = authority.sign("gateway", days=5)
    async with serving(make(core, metrics), tls=TlsSection(cert_file=pair.cert, key_file=pair.key)) as service:
        url = f"https://localhost:{service.server.port}"

        async def end_of_certificate() -> str:
            _, writer = await asyncio.open_connection("localhost", service.server.port, ssl=trusting(authority))
            shown = writer.get_extra_info("ssl_object")
            assert shown.version() == "TLSv1.3"
            writer.close()
            return str(shown.getpeercert()["notAfter"])

        async with httpx.AsyncClient(verify=trusting(authority)) as client:
            assert (await client.get(f"{url}/status", headers=bearer("ea_read"))).status_code == 200
            assert (await client.get(f"{url}/status")).status_code == 401
        before = await end_of_certificate()
        assert not service.server.renew_certificate(), "it has not changed"
        pair.key.write_bytes(b"half a file")
        with pytest.raises(ConfigError):
            service.server.renew_certificate()
        assert await end_of_certificate() == before, "the old one stays"
        authority.sign("gateway", days=50)
        assert service.server.renew_certificate()
        assert await end_of_certificate() != before

        old = trusting(authority)
        old.maximum_version = ssl.TLSVersion.TLSv1_2
        with pytest.raises((ssl.SSLError, ConnectionError)):
            await asyncio.open_connection("localhost", service.server.port, ssl=old)
        assert await raw(service.server.port, b"GET /status HTTP/1.1\r\nhost: g\r\n\r\n") == b"", "no plain HTTP"


def test_a_certificate_that_does_not_fit(authority: Authority, core: FakeCore, metrics: Metrics) -> None:
    one, other = authority.sign("one"), authority.sign("other")
    with pytest.raises(ConfigError, match="KEY_VALUES_MISMATCH"):
        HttpServer(make(core, metrics), HttpSection(tls=TlsSection(cert_file=one.cert, key_file=other.key)))
