"""The HTTP door: JSON or raw tensor bytes to `InferenceRequest`, and answers, state and metrics to whoever asks.

Handlers take a request and return a response without FastAPI's dependency machinery, which would cost more than most
inferences here; the OpenAPI document says all the same what they take (`http_models`).
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, cast
from urllib.parse import parse_qsl

from fastapi import FastAPI
from fastapi.routing import APIRoute
from pydantic_core import to_json
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from agent import __version__
from agent.config import HttpSection, SecuritySection
from agent.core.clock import Clock, SystemClock
from agent.core.errors import InferenceError, InvalidRequest, Overloaded, RateLimited, UnknownKey
from agent.core.types import InferenceRequest
from agent.core.within import within
from agent.ingress import http_models, http_pages
from agent.ingress.base import Core, NotRemembered
from agent.ingress.http_gate import HttpGate, address_of, challenge
from agent.ingress.payload import MAX_OPTIONS, TooLarge, decode_json, named_producer, read_flag, read_options
from agent.security.access import Guard
from agent.security.identity import Identity
from agent.telemetry.metrics import CONTENT_TYPE, Metrics

DOOR = "http"
MAX_BUFFERED_BYTES = 32 << 20
"""Bodies of all connections together that may be in memory while they arrive."""
BODY_TIMEOUT_S = 10.0
"""How long a body may take to arrive."""
DISCARD_BYTES = 4 << 20
DISCARD_S = 1.0
"""How much of a refused body is read, so that a client that only writes gets to see the refusal."""
MAX_QUERY = 4096
TARPIT_S = 0.05
"""How long a refusal for asking too often is held back: whoever asks again at once is slowed down by it."""

Handler = Callable[[Request], Awaitable[Response]]


class BodyTimeout(InvalidRequest):
    """The body did not arrive in time."""

    code = "body_timeout"
    http_status = 408


class UnsupportedType(InvalidRequest):
    """Neither JSON nor raw bytes."""

    code = "unsupported_media_type"
    http_status = 415


class DirectRoute(APIRoute):
    """An API route that calls its endpoint with the request and sends what it returns."""

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        method = "GET" if scope["method"] == "HEAD" else scope["method"]
        allowed = self.methods or set()
        if method not in allowed:
            raise HTTPException(405, headers={"Allow": ", ".join(sorted(allowed))})
        response = await cast(Handler, self.endpoint)(Request(scope, receive))
        await response(scope, receive, send)


class Api(FastAPI):
    """The application, with a short cut: the one route that is asked all the time goes past the middleware, none of
    which has anything to do for it but to turn a fault into a 500, and past the search among the routes."""

    short_cuts: Mapping[tuple[str, str], Handler] = {}
    gate: HttpGate
    turn_away: Callable[[Request, InferenceError], Awaitable[Response]]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await super().__call__(scope, receive, send)
            return
        try:
            scope["identity"] = self.gate.admit(scope)
        except InferenceError as error:
            response = await self.turn_away(Request(scope, receive), error)
            await response(scope, receive, send)
            return
        handler = self.short_cuts.get((scope["method"], scope["path"]))
        if handler is None:
            await super().__call__(scope, receive, send)
            return
        request = Request(scope, receive)
        try:
            response = await handler(request)
        except Exception as error:
            response = await _broken(request, error)
            await response(scope, receive, send)
            raise  # for the server's log
        await response(scope, receive, send)


class Bodies:
    """Reads request bodies: bounded in size, in time, and in memory over all connections."""

    def __init__(self, limit: int, *, total: int = MAX_BUFFERED_BYTES, timeout_s: float = BODY_TIMEOUT_S) -> None:
        self._limit = limit
        self._total = max(total, limit)
        self._timeout_s = timeout_s
        self._buffered = 0

    async def read(self, request: Request) -> bytes:
        """The whole body. Raises `TooLarge`, `BodyTimeout`, `Overloaded` and `ClientDisconnect`."""
        length = request.headers.get("content-length", "")
        if length.isdecimal() and (len(length) > 18 or int(length) > self._limit):
            if "expect" not in request.headers:
                await _discard(request.receive)
            raise self._too_large(f"{length[:18]} bytes")
        try:
            return await within(self._timeout_s, self._read(request.receive))
        except TimeoutError:
            raise BodyTimeout(f"the body did not arrive within {self._timeout_s:g} seconds") from None

    async def _read(self, receive: Receive) -> bytes:
        message = await receive()
        if message["type"] == "http.request" and not message.get("more_body", False):
            body: bytes = message.get("body", b"")
            if len(body) <= self._limit:
                return body
        return await self._read_on(message, receive)

    async def _read_on(self, message: Mapping[str, Any], receive: Receive) -> bytes:
        body = bytearray()
        try:
            while True:
                if message["type"] == "http.disconnect":
                    raise ClientDisconnect
                piece = message.get("body", b"")
                body += piece
                self._buffered += len(piece)
                more = message.get("more_body", False)
                if len(body) > self._limit:
                    if more:
                        await _discard(receive)
                    raise self._too_large(f"more than {self._limit} bytes")
                if not more:
                    return bytes(body)
                if self._buffered > self._total:
                    raise Overloaded("too many bodies are arriving at once", retry_after_s=1)
                message = await receive()
        finally:
            self._buffered -= len(body)

    def _too_large(self, found: str) -> TooLarge:
        return TooLarge(f"the body must be at most {self._limit} bytes, found {found}")


async def _discard(receive: Receive) -> None:
    """Closing a connection on unread bytes resets it, and the refusal would be lost on the way."""
    left = DISCARD_BYTES
    try:
        async with asyncio.timeout(DISCARD_S):
            while left > 0:
                message = await receive()
                left -= len(message.get("body", b""))
                if not message.get("more_body", False):
                    return
    except TimeoutError:
        pass


class HttpDoor:
    """The handlers. They share the core, the metrics and the body reader."""

    def __init__(
        self,
        core: Core,
        metrics: Metrics,
        settings: HttpSection,
        recent: Callable[[], Sequence[Mapping[str, Any]]],
        clock: Clock,
        guard: Guard,
    ) -> None:
        self._core = core
        self._guard = guard
        self._metrics = metrics
        self._recent = recent
        self._clock = clock
        self.bodies = Bodies(settings.max_body_bytes)

    async def infer(self, request: Request) -> Response:
        """The best answer that can be had in time."""
        received = self._clock.monotonic()
        try:
            body = await self.bodies.read(request)
            question, with_outputs = self._question(request, body, received)
            self._guard.count_producer(question.producer)
        except InferenceError as error:
            return await self._refused(request, error)
        except ClientDisconnect:
            self._metrics.malformed(DOOR, "disconnected")
            return Response(status_code=400)
        try:
            if question.durable:
                return json_response(await self._core.accept(question), 202)
            result = await self._core.infer(question)
        except InferenceError as error:
            return refusal(error)
        return json_response(result.to_dict(with_outputs=with_outputs))

    async def turn_away(self, request: Request, error: InferenceError) -> Response:
        """A request that the gate did not let in. Its body is not read, beyond what lets the client see the refusal."""
        response = await self._refused(request, error)
        response.headers.update(challenge(error, shown="authorization" in request.headers))
        if request.method not in ("GET", "HEAD"):
            await _discard(request.receive)
            response.headers["Connection"] = "close"
        return response

    async def _refused(self, request: Request, error: InferenceError) -> Response:
        self._metrics.malformed(DOOR, error.code)
        who = request.scope.get("identity")
        name = who.name if who is not None else "unknown"
        self._guard.refused(DOOR, error, who=name, address=address_of(request.scope))
        if isinstance(error, RateLimited):
            await asyncio.sleep(min(TARPIT_S, error.retry_after_s or 0.0))
        return refusal(error)

    def _question(self, request: Request, body: bytes, received: float) -> tuple[InferenceRequest, bool]:
        query = _query(request.scope["query_string"])
        with_outputs = read_flag("outputs", query.pop("outputs", "true"))
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        admission = self._core.admission
        who: Identity = request.scope["identity"]
        if kind == "application/json":
            if query:
                raise UnknownKey(f"{next(iter(query))}: belongs into the JSON document", field=next(iter(query)))
            document = decode_json(body)
            producer = who.as_producer(named_producer(document))
            question = admission.from_document(document, producer=producer, received=received, asked_by=who.name)
            return question, with_outputs
        if kind != "application/octet-stream":
            found = repr(kind[:64]) if kind else "none"
            raise UnsupportedType(
                f"content-type: must be application/json or application/octet-stream, found {found}",
                field="content-type",
            )
        model = query.pop("model", "")
        if not model:
            raise InvalidRequest("model: is missing; raw bytes need it as a query parameter", field="model")
        raw = read_options(query.items())
        question = admission.from_bytes(
            body,
            model=model,
            options=raw.options,
            dtype=raw.dtype,
            scale=raw.scale,
            producer=who.as_producer(named_producer(raw.options)),
            received=received,
            asked_by=who.name,
        )
        return question, with_outputs

    async def health(self, request: Request) -> Response:
        """Whether the event loop turns."""
        return json_response({"status": "alive"})

    async def ready(self, request: Request) -> Response:
        """Whether some target can be asked now."""
        ready, reason = self._core.ready()
        return json_response({"ready": ready, "reason": reason}, 200 if ready else 503)

    async def explain(self, request: Request) -> Response:
        """How one of the last requests was decided: candidates, estimates, what ruled each out, attempts."""
        request_id = request.path_params["request_id"]
        explanation = self._core.explain(request_id)
        return refusal(NotRemembered(request_id)) if explanation is None else json_response(explanation)

    async def status(self, request: Request) -> Response:
        """The whole state: see `docs/operations.md`."""
        return json_response(self._core.status())

    async def recent(self, request: Request) -> Response:
        """The last answers and refusals, newest first, without their tensors."""
        return json_response(self._recent())

    async def metrics(self, request: Request) -> Response:
        """Prometheus text format."""
        return Response(self._metrics.render(), headers={"content-type": CONTENT_TYPE})


def create_app(
    core: Core,
    metrics: Metrics,
    settings: HttpSection,
    recent: Callable[[], Sequence[Mapping[str, Any]]],
    clock: Clock | None = None,
    guard: Guard | None = None,
) -> FastAPI:
    """The application. `recent` gives the last answers, newest first (`docs/operations.md`, "/recent"). `guard` None:
    as without a section `security`."""
    clock = clock or SystemClock()
    guard = guard or Guard(SecuritySection(), clock)
    app = Api(
        title="edge-agent",
        version=__version__,
        summary="One question, one deadline, three tiers.",
        docs_url=None,
        redoc_url=None,
        exception_handlers={HTTPException: _no_such_thing, Exception: _broken},
    )
    door = HttpDoor(core, metrics, settings, recent, clock, guard)
    app.gate, app.turn_away = HttpGate(guard), door.turn_away
    app.state.bodies = door.bodies

    def route(method: str, path: str, handler: Handler, operation: Mapping[str, Any] | None) -> None:
        app.router.add_api_route(
            path,
            handler,
            methods=[method],
            response_class=Response,
            route_class_override=DirectRoute,
            openapi_extra=dict(operation or {}),
            include_in_schema=operation is not None,
            description=handler.__doc__,
        )

    plain = http_models.plain_operation
    route("POST", "/infer", door.infer, http_models.infer_operation())
    app.short_cuts = {("POST", "/infer"): door.infer}
    route("GET", "/health", door.health, http_models.alive_operation())
    route("GET", "/ready", door.ready, http_models.ready_operation())
    route("GET", "/status", door.status, plain("application/json", "Targets, cache, counters, doors, load."))
    route("GET", "/explain/{request_id:path}", door.explain, http_models.explain_operation())
    route("GET", "/recent", door.recent, plain("application/json", "Answers and refusals, newest first.", many=True))
    route("GET", "/metrics", door.metrics, plain("text/plain", "Counters, histograms and gauges."))
    route("GET", "/", http_pages.status_page(), None)
    app.openapi = http_models.with_components(app.openapi)  # type: ignore[method-assign]
    route("GET", "/docs", http_pages.docs_page(app.openapi), None)
    return app


def json_response(document: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """JSON as the standard has it: NaN and infinities become null."""
    body = to_json(document, inf_nan_mode="null", fallback=str)
    return Response(body, status, headers, "application/json")


def refusal(error: InferenceError) -> Response:
    """The response to a refusal, with `Retry-After` where the time is known."""
    headers = {}
    if error.retry_after_s is not None and error.http_status in (429, 503):
        headers["Retry-After"] = str(max(1, math.ceil(error.retry_after_s)))
    if isinstance(error, TooLarge | BodyTimeout):
        headers["Connection"] = "close"
    return json_response(error.to_dict(), error.http_status, headers)


async def _no_such_thing(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    text = {404: f"no such path: {request.url.path[:128]}", 405: "no such method for this path"}
    fault = InvalidRequest(text.get(error.status_code, str(error.detail)))
    document = fault.to_dict()
    document["error"]["code"] = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, fault.code)
    return json_response(document, error.status_code, error.headers)


async def _broken(request: Request, error: Exception) -> Response:
    return json_response(InferenceError("the daemon has a fault; its log has the details").to_dict(), 500)


def _query(text: bytes) -> dict[str, str]:
    if not text:
        return {}
    try:
        pairs = parse_qsl(
            text[: MAX_QUERY + 1].decode("ascii"), True, True, "utf-8", "strict", max_num_fields=MAX_OPTIONS
        )
    except ValueError:
        pairs = None
    if pairs is None or len(text) > MAX_QUERY:
        limits = f"at most {MAX_OPTIONS} name=value pairs in {MAX_QUERY} bytes"
        raise InvalidRequest(f"the query string must be {limits}", field="(query)")
    if len(dict(pairs)) != len(pairs):
        raise InvalidRequest("the query string names a parameter twice", field="(query)")
    return dict(pairs)
