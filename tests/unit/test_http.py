"""The HTTP door in process: what callers send, what they are told, and the pages."""

from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from http_fakes import JSON, RAW, FakeCore, malformed

from agent.config import HttpSection, RoutingSection
from agent.core.clock import SystemClock
from agent.core.errors import DeadlineExceeded, InferenceError, Overloaded, Unavailable
from agent.core.types import InferenceRequest, LatencyClass
from agent.ingress import http_models
from agent.ingress.http import create_app
from agent.registry.catalog import load_catalog
from agent.registry.locate import catalog_path
from agent.routing import admission as admission_module
from agent.routing.admission import Admission
from agent.telemetry.metrics import Metrics


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
async def client(app: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as client:
        yield client


# --- what callers send ---


async def test_json(client: httpx.AsyncClient, core: FakeCore) -> None:
    question = {"model": "tiny", "inputs": {"x": [[1, 2, 3, 4]]}, "deadline_ms": 50, "request_id": "r7"}
    response = await client.post("/infer", json=question)
    assert response.status_code == 200
    answer = response.json()
    assert (answer["request_id"], answer["label"]) == ("r7", "yes")
    assert answer["outputs"]["y"] == [pytest.approx([0.1, 0.9])]
    (request,) = core.asked
    assert request.latency_class is LatencyClass.NEAR
    assert request.deadline - request.received == pytest.approx(0.05)


async def test_raw_bytes(client: httpx.AsyncClient, core: FakeCore) -> None:
    options = (
        "model=tiny&dtype=int8&scale=0.5&deadline_ms=9&priority=7&use_cache=false&allowed_regions=eu,us&producer=p"
    )
    response = await client.post(f"/infer?{options}&outputs=false", content=bytes([2, 4, 6, 255]), headers=RAW)
    assert response.status_code == 200
    assert "outputs" not in response.json()
    (request,) = core.asked
    assert request.inputs["x"].tolist() == [[1, 2, 3, -0.5]]
    assert (request.latency_class, request.priority, request.use_cache) == (LatencyClass.REALTIME, 7, False)
    assert (request.allowed_regions, request.producer) == (frozenset({"eu", "us"}), "p")


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"", "EOF while parsing a value at line 1 column 0"),
        (b'{"model": "tiny",}', "trailing comma at line 1 column 18"),
        (b"[" * 1900, "recursion limit exceeded"),
        (b'{"a":' * 300, "recursion limit exceeded"),
        (b"\xff\xfe\x00", "line 1 column 1"),
        (b'{"a": "\xed\xa0\x80"}', "line 1"),
        (b'{"a":1} x', "trailing characters at line 1 column 9"),
    ],
)
async def test_what_is_not_json(client: httpx.AsyncClient, metrics: Metrics, body: bytes, says: str) -> None:
    response = await client.post("/infer", content=body, headers=JSON)
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "undecodable"
    assert says in response.json()["error"]["message"]
    assert malformed(metrics, "undecodable")


async def test_nan_is_refused_by_the_name_of_its_tensor(client: httpx.AsyncClient) -> None:
    for value in (b"NaN", b"-Infinity", b"1e999"):
        body = b'{"model": "tiny", "inputs": [1, 2, 3, %s]}' % value
        response = await client.post("/infer", content=body, headers=JSON)
        assert response.status_code == 400
        assert response.json()["error"]["field"] == "inputs.x"


@pytest.mark.parametrize(
    ("document", "status", "field"),
    [
        ([], 400, "(body)"),
        ({"inputs": [1]}, 400, "model"),
        ({"model": "tiny"}, 400, "inputs"),
        ({"model": "huge", "inputs": [1]}, 404, "model"),
        ({"model": "tiny", "inputs": [1, 2]}, 400, "inputs.x"),
        ({"model": "tiny", "inputs": [1e39, 0, 0, 0]}, 400, "inputs.x"),
        ({"model": "tiny", "inputs": [10**400, 0, 0, 0]}, 400, "inputs.x"),
        ({"model": "tiny", "inputs": [1, 2, 3, 4], "priority": 11}, 400, "priority"),
        ({"model": "tiny", "inputs": [1, 2, 3, 4], "sudo": True}, 400, "sudo"),
    ],
)
async def test_a_wrong_document_names_the_field(
    client: httpx.AsyncClient, document: Any, status: int, field: str
) -> None:
    response = await client.post("/infer", json=document)
    assert (response.status_code, response.json()["error"].get("field")) == (status, field)


@pytest.mark.parametrize(
    ("query", "field"),
    [
        ("", "model"),
        ("model=tiny&dtype=object", "dtype"),
        ("model=tiny&dtype=float32&scale=nan", "scale"),
        ("model=tiny&scale=x", "scale"),
        ("model=tiny&priority=1.5", "priority"),
        ("model=tiny&priority=" + "9" * 3000, "priority"),
        ("model=tiny&deadline_ms=soon", "deadline_ms"),
        ("model=tiny&deadline_ms=-1", "deadline_ms"),
        ("model=tiny&use_cache=1", "use_cache"),
        ("model=tiny&colour=red", "colour"),
        ("model=tiny&model=tiny", "(query)"),
        ("model", "(query)"),
        ("model=%ff", "(query)"),
        ("x=" + "y" * 5000, "(query)"),
        ("&".join(f"k{n}=1" for n in range(100)), "(query)"),
        ("model=tiny&outputs=no", "outputs"),
    ],
)
async def test_a_wrong_parameter_is_named(client: httpx.AsyncClient, query: str, field: str) -> None:
    response = await client.post(f"/infer?{query}", content=b"\0" * 16, headers=RAW)
    assert (response.status_code, response.json()["error"].get("field")) == (400, field)


async def test_options_of_a_document_belong_into_it(client: httpx.AsyncClient) -> None:
    response = await client.post("/infer?priority=7", json={"model": "tiny", "inputs": [1, 2, 3, 4]})
    assert (response.status_code, response.json()["error"]["field"]) == (400, "priority")


@pytest.mark.parametrize("kind", ["", "text/plain", "application/x-www-form-urlencoded", "application/jsonp"])
async def test_other_content_types(client: httpx.AsyncClient, metrics: Metrics, kind: str) -> None:
    """Among them all that a page of another site could send without being asked by the browser first."""
    headers = {"content-type": kind} if kind else {}
    response = await client.post("/infer", content=b"{}", headers=headers)
    assert response.status_code == 415
    assert malformed(metrics, "unsupported_media_type")


async def test_json_with_a_charset(client: httpx.AsyncClient) -> None:
    body = b'{"model": "tiny", "inputs": [1, 2, 3, 4]}'
    headers = {"content-type": "Application/JSON; charset=utf-8"}
    assert (await client.post("/infer", content=body, headers=headers)).status_code == 200


# --- what the core says ---


@pytest.mark.parametrize(
    ("error", "status", "retry_after"),
    [
        (Overloaded("full", retry_after_s=0.2), 429, "1"),
        (Overloaded("full"), 429, None),
        (Unavailable("nothing", retry_after_s=41.5), 503, "42"),
        (DeadlineExceeded("late", retry_after_s=1), 504, None),
    ],
)
async def test_refusals(
    client: httpx.AsyncClient, core: FakeCore, error: InferenceError, status: int, retry_after: str | None
) -> None:
    async def refuse(request: InferenceRequest) -> None:
        error.request_id = request.id
        raise error

    core.behave = refuse
    response = await client.post("/infer", json={"model": "tiny", "inputs": [1, 2, 3, 4], "request_id": "r"})
    assert response.status_code == status
    assert response.headers.get("retry-after") == retry_after
    assert response.json() == error.to_dict()


async def test_a_fault_of_the_daemon_is_not_shown(client: httpx.AsyncClient, core: FakeCore) -> None:
    async def fail(request: InferenceRequest) -> None:
        raise RuntimeError("the password is hunter2")

    core.behave = fail
    response = await client.post("/infer", json={"model": "tiny", "inputs": [1, 2, 3, 4]})
    assert response.status_code == 500
    assert response.json()["error"]["code"] == "internal"
    assert "hunter2" not in response.text


# --- state ---


async def test_state(client: httpx.AsyncClient, core: FakeCore) -> None:
    assert (await client.get("/health")).json() == {"status": "alive"}
    assert (await client.get("/ready")).json() == {"ready": True, "reason": ""}
    core.is_ready = (False, "no target can be asked")
    response = await client.get("/ready")
    assert (response.status_code, response.json()["reason"]) == (503, "no target can be asked")
    assert (await client.get("/status")).json() == {"gateway": "g", "load": {"temperature_c": None}}
    assert (await client.get("/recent")).json() == [{"model": "tiny"}]
    assert (await client.head("/health")).status_code == 200
    response = await client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=")
    assert b"edge_agent_active_requests 0.0" in response.content


async def test_what_is_not_there(client: httpx.AsyncClient) -> None:
    response = await client.get("/nothing")
    assert (response.status_code, response.json()["error"]["code"]) == (404, "not_found")
    response = await client.get("/infer")
    assert (response.status_code, response.headers["allow"]) == (405, "POST")
    assert response.json()["error"]["code"] == "method_not_allowed"


# --- explanations ---


async def test_how_a_request_was_decided(client: httpx.AsyncClient) -> None:
    response = await client.get("/explain/known")
    assert (response.status_code, response.json()) == (200, {"request_id": "known", "stages": []})


@pytest.mark.parametrize("request_id", ["unknown", "a/b c", "%3Cscript%3E", "\u00e9" * 200])
async def test_a_request_that_is_not_remembered(client: httpx.AsyncClient, request_id: str) -> None:
    response = await client.get(f"/explain/{request_id}")
    document = response.json()
    assert (response.status_code, document["error"]["code"]) == (404, "not_remembered")
    assert document["error"]["field"] == "request_id"
    assert len(document["error"]["message"]) < 300
    http_models.RefusalDocument.model_validate(document)


# --- documents and pages ---


async def test_the_openapi_document(client: httpx.AsyncClient) -> None:
    api = (await client.get("/openapi.json")).json()
    operation = api["paths"]["/infer"]["post"]
    codes = {"200", "202", "400", "401", "403", "404", "408", "413", "415", "429", "503", "504"}
    assert set(operation["responses"]) == codes
    assert set(operation["requestBody"]["content"]) == {"application/json", "application/octet-stream"}
    schemas = api["components"]["schemas"]
    for reference in {line.split("#/components/schemas/")[1] for line in _references(api)}:
        assert reference in schemas
    assert schemas["InferDocument"]["examples"]
    assert schemas["AnswerDocument"]["examples"]
    parameters = {parameter["name"] for parameter in operation["parameters"]}
    assert {"model", "dtype", "scale", "deadline_ms", "outputs"} <= parameters


def _references(node: Any) -> list[str]:
    if isinstance(node, dict):
        own = [node["$ref"]] if isinstance(node.get("$ref"), str) else []
        return own + [reference for value in node.values() for reference in _references(value)]
    return [reference for value in node for reference in _references(value)] if isinstance(node, list) else []


async def test_the_document_says_what_is_true(client: httpx.AsyncClient) -> None:
    assert set(http_models.InferDocument.model_fields) == admission_module._KEYS
    response = await client.post("/infer", json={"model": "tiny", "inputs": [1, 2, 3, 4]})
    http_models.AnswerDocument.model_validate(response.json())
    assert set(response.json()) == set(http_models.AnswerDocument.model_fields) - {"explanation"}
    http_models.RefusalDocument.model_validate((await client.post("/infer", json=[])).json())
    for model in (http_models.AnswerDocument, http_models.RefusalDocument, http_models.InferDocument):
        schema = model.model_config["json_schema_extra"]
        assert isinstance(schema, dict)
        for example in schema["examples"]:  # type: ignore[union-attr]
            model.model_validate(example)


def test_the_example_is_a_question_to_the_models_that_ship() -> None:
    catalog = load_catalog(catalog_path(None))
    example = http_models.InferDocument.model_json_schema()["examples"][0]
    request = Admission(catalog, RoutingSection(), SystemClock(), 5.0).from_document(example)
    assert request.model == "digits"


@pytest.mark.parametrize("path", ["/", "/docs"])
async def test_pages_need_nothing_from_outside(client: httpx.AsyncClient, path: str) -> None:
    response = await client.get(path)
    assert response.headers["content-type"] == "text/html; charset=utf-8"
    policy = response.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    for reference in ("http://", "https://", "src=", "@import", "url("):
        assert reference not in response.text.replace("http://www.w3.org/2000/svg", "")
    for handler in (" onclick", " style=", "innerHTML", "eval("):
        assert handler not in response.text, "the policy forbids it, or it would show what it is sent as HTML"


async def test_the_docs_page_lists_the_operations(client: httpx.AsyncClient) -> None:
    page = (await client.get("/docs")).text
    for text in ("POST /infer", "GET /metrics", "deadline_ms", "too_large", "Retry-After"):
        assert text in page


async def test_the_page_is_one_small_document(client: httpx.AsyncClient) -> None:
    page = (await client.get("/")).text
    assert "--edge_mcu:" in page, "the style is in it"
    assert 'get("/status")' in page, "the script is in it"
    assert len(page) < 60_000
