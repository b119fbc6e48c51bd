"""Attacks on the HTTP door of a real daemon: each is refused with the documented code, put on record once, and changes
nothing for anybody else."""

from __future__ import annotations

import base64
import hmac
import json
import os
import shutil
import socket
import threading
import time
from pathlib import Path
from typing import Any
from urllib.parse import quote

import psutil
import pytest
from cryptography.hazmat.primitives.asymmetric import ed25519
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from fort import DIGIT, HS_SECRET, PATIENT, SECRETS, USER_KEY, Fort, user_token

from agent.cli import main
from agent.security.tokens import hashed

QUESTION = {"model": "digits", "inputs": DIGIT, "latency_class": "interactive"}


def part(value: Any) -> str:
    data = value if isinstance(value, bytes) else json.dumps(value).encode()
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def claims() -> dict[str, Any]:
    decoded: dict[str, Any] = json.loads(base64.urlsafe_b64decode(user_token().split(".")[1] + "=="))
    return decoded


def alg_none() -> str:
    return f"{part({'alg': 'none', 'kid': 'user'})}.{part(claims())}."


def public_key_as_secret() -> str:
    signed = f"{part({'alg': 'HS256', 'kid': 'user'})}.{part(claims())}"
    public = USER_KEY.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    return f"{signed}.{part(hmac.digest(public, signed.encode(), 'sha256'))}"


now = int(time.time())
TOKENS = {
    "none": lambda: None,
    "wrong": lambda: "ea_" + "x" * 43,
    "nearly right": lambda: SECRETS["asker"][:-1],
    "the hash of the right one": lambda: hashed(SECRETS["asker"]),
    "expired": lambda: user_token(iat=now - 1000, exp=now - 600),
    "alg none": alg_none,
    "the public key as a secret": public_key_as_secret,
    "another audience": lambda: user_token(aud="edge-agent/other"),
    "another issuer": lambda: user_token(iss="https://evil.example"),
    "another's signature": lambda: user_token(ed25519.Ed25519PrivateKey.generate()),
    "a life of a day": lambda: user_token(exp=int(time.time()) + 86_400),
    "longer than any": lambda: "a" * 7000,
}


@pytest.mark.parametrize("token", TOKENS.values(), ids=TOKENS)
def test_tokens_that_are_not_valid(fort: Fort, address: str, token: Any) -> None:
    shown = token()
    answer = fort.post(QUESTION, shown, address)
    assert (answer.status, answer.code) == (401, "unauthorized")
    assert answer.headers["www-authenticate"].startswith("Bearer")
    record = fort.refused_once(address, "unauthorized")
    assert record["who"] == "unknown"
    assert shown is None or shown[10:40] not in json.dumps(record)


def test_valid_ones_are_let_in(fort: Fort, address: str) -> None:
    for token, who in ((SECRETS["asker"], "service:asker"), (user_token(), "user:alice")):
        assert fort.post({**QUESTION, "request_id": who}, token, address).status == 200
        (record,) = fort.records(kind="request", request_id=who)
        assert (record["who"], record["outcome"] in ("ok", "cached")) == (who, True)
    by_secret = user_token(HS_SECRET, "HS256")
    assert fort.get("/status", by_secret, address).status == 200


@pytest.mark.parametrize(("token", "producer"), [("reader", None), ("meter", "clinic")])
def test_a_durable_request_needs_the_same(fort: Fort, address: str, token: str, producer: str | None) -> None:
    named = {} if producer is None else {"producer": producer}
    answer = fort.post({"model": "digits", "inputs": DIGIT, "delivery": "durable", **named}, SECRETS[token], address)
    assert (answer.status, answer.code) == (403, "forbidden")
    fort.refused_once(address, "forbidden")


def test_a_durable_request_is_of_whoever_has_the_token(fort: Fort) -> None:
    answer = fort.post({"model": "digits", "inputs": DIGIT, "delivery": "durable"}, SECRETS["meter"])
    assert (answer.status, answer.body["state"]) == (202, "accepted")
    request_id = answer.body["request_id"]
    fort.until(lambda: len(fort.records(request_id=request_id)) == 2, "it is answered")
    records = fort.records(request_id=request_id)
    assert [(record["kind"], record["who"], record["producer"]) for record in records] == [
        ("act", "service:meter", "meter"),
        ("request", "service:meter", "meter"),
    ]


def test_a_role_that_does_not_suffice(fort: Fort, address: str) -> None:
    answer = fort.get("/status", SECRETS["asker"], address)
    assert (answer.status, answer.code) == (403, "forbidden")
    assert fort.refused_once(address, "forbidden")["who"] == "service:asker"


def test_another_producer_than_ones_own(fort: Fort, address: str) -> None:
    answer = fort.post({**QUESTION, "producer": "clinic"}, SECRETS["meter"], address)
    assert (answer.status, answer.code) == (403, "forbidden")
    fort.refused_once(address, "forbidden")


# --- bodies ----------------------------------------------------------------------------------------------------------

GIGABYTE = 1 << 30


def memory(fort: Fort) -> int:
    return int(psutil.Process(fort.daemon.pid).memory_info().rss)


def head(fields: str) -> bytes:
    return (
        f"POST /infer HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {SECRETS['asker']}\r\n"
        f"Content-Type: application/json\r\n{fields}\r\n\r\n"
    ).encode()


@pytest.mark.parametrize("announced", [True, False], ids=["announced", "chunked"])
def test_a_gigabyte(fort: Fort, address: str, announced: bool) -> None:
    """It is refused long before it is there, and takes no memory."""
    before = memory(fort)
    piece = b"7," * 32_768
    framed = piece if announced else b"%x\r\n%s\r\n" % (len(piece), piece)
    sent = 0
    with socket.create_connection(("127.0.0.1", fort.http_port), 20, (address, 0)) as wire:
        wire.sendall(head(f"Content-Length: {GIGABYTE}" if announced else "Transfer-Encoding: chunked"))
        wire.settimeout(20)
        try:
            while sent < GIGABYTE:
                wire.sendall(framed)
                sent += len(piece)
        except OSError:
            pass
        assert sent < GIGABYTE // 8, "the connection is closed"
    fort.refused_once(address, "too_large")
    assert memory(fort) - before < 64 << 20
    assert fort.post(QUESTION).status == 200


def test_a_large_body_gets_to_see_why(fort: Fort, address: str) -> None:
    answer = fort.post(b"[" + b"7," * (1 << 20) + b"7]", address=address)
    assert (answer.status, answer.code, answer.headers["connection"]) == (413, "too_large", "close")
    fort.refused_once(address, "too_large")


def test_without_a_token_a_body_is_not_even_read(fort: Fort, address: str) -> None:
    answer = fort.post(b"[" * 100_000, None, address)
    assert (answer.status, answer.code) == (401, "unauthorized")
    fort.refused_once(address, "unauthorized")


def test_slow_bodies_and_slow_heads(fort: Fort, address: str) -> None:
    """Of both at once, so that one wait is enough. Meanwhile everybody else is answered."""
    with (
        socket.create_connection(("127.0.0.1", fort.http_port), 30, (address, 0)) as body,
        socket.create_connection(("127.0.0.1", fort.http_port), 30, (address, 0)) as header,
    ):
        body.sendall(head("Content-Length: 1000") + b"[")
        header.sendall(b"GET /status HTTP/1.1\r\nX: ")
        assert fort.post(QUESTION).status == 200
        found = body.makefile("rb").read()
        assert found.startswith(b"HTTP/1.1 408 ")
        assert b"body_timeout" in found
        assert header.recv(4096) == b"", "closed"
    records = fort.records(kind="refusal", **{"from": address})
    assert sorted(record["outcome"] for record in records) == ["body_timeout", "head_timeout"]
    logged = [json.loads(line)["outcome"] for line in fort.events(f'"from":"{address}"')]
    assert sorted(logged) == ["body_timeout", "head_timeout"]


def test_many_silent_connections(fort: Fort, address: str) -> None:
    """Fewer than the server has room for; everybody else is answered."""
    wires = [socket.create_connection(("127.0.0.1", fort.http_port), 20, (address, 0)) for _ in range(300)]
    assert fort.post(QUESTION).status == 200
    for wire in wires:
        wire.close()


HEADS: dict[str, tuple[bytes, bytes, str]] = {
    "a length and chunks": (b"Content-Length: 4\r\nTransfer-Encoding: chunked", b"400", "malformed"),
    "a header without a colon": (b"no colon", b"400", "malformed"),
    "a header of 100,000 bytes": (b"X: " + b"a" * 100_000, b"431", "head_too_large"),
    "a thousand headers": (
        b"\r\n".join(b"X-%d: " % number + b"a" * 90 for number in range(1000)),
        b"431",
        "head_too_large",
    ),
}


@pytest.mark.parametrize(("fields", "status", "code"), HEADS.values(), ids=HEADS)
def test_heads_that_are_wrong(fort: Fort, address: str, fields: bytes, status: bytes, code: str) -> None:
    with socket.create_connection(("127.0.0.1", fort.http_port), 20, (address, 0)) as wire:
        wire.sendall(b"POST /infer HTTP/1.1\r\nHost: localhost\r\n" + fields + b"\r\n\r\n")
        assert wire.makefile("rb").read().startswith(b"HTTP/1.1 " + status)
    fort.refused_once(address, code)


def test_an_address_without_end(fort: Fort, address: str) -> None:
    with socket.create_connection(("127.0.0.1", fort.http_port), 20, (address, 0)) as wire:
        wire.sendall(b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert wire.makefile("rb").read().startswith(b"HTTP/1.1 431 ")
    fort.refused_once(address, "head_too_large")


# --- documents -------------------------------------------------------------------------------------------------------

DOCUMENTS: dict[str, tuple[bytes, int, str]] = {
    "a depth bomb of arrays": (b"[" * 500_000, 400, "undecodable"),
    "a depth bomb of objects": (b'{"a":' * 150_000, 400, "undecodable"),
    "a depth bomb that is closed": (
        b'{"model":"digits","inputs":' + b"[" * 5000 + b"]" * 5000 + b"}",
        400,
        "undecodable",
    ),
    "NaN": (json.dumps({**QUESTION, "inputs": [float("nan")] * 64}).encode(), 400, "invalid_request"),
    "infinity": (json.dumps({**QUESTION, "inputs": [float("inf")] * 64}).encode(), 400, "invalid_request"),
    "beyond float32": (json.dumps({**QUESTION, "inputs": [1e300] * 64}).encode(), 400, "invalid_request"),
    "too few values": (json.dumps({**QUESTION, "inputs": [1.0] * 63}).encode(), 400, "invalid_request"),
    "too many values": (json.dumps({**QUESTION, "inputs": [1.0] * 65}).encode(), 400, "invalid_request"),
    "ragged rows": (json.dumps({**QUESTION, "inputs": [[1.0], [1.0, 2.0]]}).encode(), 400, "invalid_request"),
    "a number of a thousand digits": (b'{"model":"digits","inputs":[' + b"9" * 1000 + b"]}", 400, "invalid_request"),
    "text for numbers": (json.dumps({**QUESTION, "inputs": ["x" * 1000] * 64}).encode(), 400, "invalid_request"),
    "a key that nobody knows": (json.dumps({**QUESTION, "__proto__": 1}).encode(), 400, "invalid_request"),
    "a patient for a key": (json.dumps({**QUESTION, PATIENT: 1}).encode(), 400, "invalid_request"),
    "a patient for an input": (json.dumps({**QUESTION, "inputs": {PATIENT: [1.0]}}).encode(), 400, "invalid_request"),
    "many small arrays": (b'{"model":"digits","inputs":[' + b"[]," * 100_000 + b"1]}", 400, "undecodable"),
    "a deadline of a year": (json.dumps({**QUESTION, "deadline_ms": 3e10}).encode(), 400, "invalid_request"),
    "no UTF-8": (b'{"model":"\xff\xfe"}', 400, "undecodable"),
    "nothing": (b"", 400, "undecodable"),
}


@pytest.mark.parametrize(("body", "status", "code"), DOCUMENTS.values(), ids=DOCUMENTS)
def test_documents_that_are_wrong(fort: Fort, address: str, body: bytes, status: int, code: str) -> None:
    answer = fort.post(body, address=address)
    assert (answer.status, answer.code) == (status, code)
    assert answer.body["error"]["message"]
    fort.refused_once(address, code)


MODELS = (
    "../../../../etc/passwd",
    "/etc/passwd",
    "digits/../motion",
    "digits\x00",
    "..%2f..%2fetc",
    "file:///etc/passwd",
    "",
)


def opened(fort: Fort) -> set[str]:
    """Without what it reads of its own load, several times a second."""
    paths = {file.path for file in psutil.Process(fort.daemon.pid).open_files()}
    return {path for path in paths if not path.startswith("/proc/")}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("kind", ["document", "query", "variant"])
def test_path_tricks_in_model_names(fort: Fort, address: str, model: str, kind: str) -> None:
    before = opened(fort)
    if kind == "query":
        raw = {"Content-Type": "application/octet-stream"}
        answer = fort.post(bytes(256), address=address, path=f"/infer?model={quote(model, safe='')}", headers=raw)
    elif kind == "variant":
        answer = fort.post({**QUESTION, "variant": model}, address=address)
    else:
        answer = fort.post({**QUESTION, "model": model}, address=address)
    assert answer.status in (400, 404)
    assert answer.code == ("unknown_model" if answer.status == 404 else "invalid_request")
    assert "root:" not in answer.text
    assert opened(fort) == before
    fort.refused_once(address, answer.code)


@pytest.mark.parametrize("path", ["/../../etc/passwd", "/%2e%2e/%2e%2e/etc/passwd", "//status", "/status/../health"])
def test_path_tricks_in_addresses(fort: Fort, address: str, path: str) -> None:
    assert fort.get(path, None, address).status == 401
    fort.refused_once(address, "unauthorized")
    assert fort.get(path).status == 404


# --- replay, flood ---------------------------------------------------------------------------------------------------


def test_a_replayed_request_is_answered_once(fort: Fort, address: str) -> None:
    """Byte for byte the same again: the answer comes from the first time, nothing runs and nothing is paid again."""
    question = {**QUESTION, "idempotency_key": f"key-{address}", "use_cache": False}
    first = fort.post(question, address=address)
    attempts = sum(target["requests"] for target in fort.status()["targets"])
    again = [fort.post(question, address=address) for _ in range(5)]
    assert first.status == 200
    assert not first.body["cached"]
    for answer in again:
        assert (answer.status, answer.body["cached"], answer.body["cost_usd"]) == (200, True, 0.0)
        assert "same idempotency key" in answer.body["reasons"][0]
    assert sum(target["requests"] for target in fort.status()["targets"]) == attempts
    ids = {first.body["request_id"], *(answer.body["request_id"] for answer in again)}
    records = [record for record in fort.records(kind="request") if record["request_id"] in ids]
    assert sorted(record["outcome"] for record in records) == ["cached"] * 5 + ["ok"]
    other = fort.post({**question, "inputs": [1.0] * 64}, address=address)
    assert (other.status, other.code) == (400, "invalid_request")


def test_a_flood_from_one_producer_beside_a_polite_one(fort: Fort, address: str) -> None:
    codes: list[int] = []
    stop = threading.Event()

    def flood() -> None:
        while not stop.is_set():
            answer = fort.post({**QUESTION, "producer": "loud"}, address=address)
            codes.append(answer.status)
            assert answer.status == 200 or (answer.code == "rate_limited" and int(answer.headers["retry-after"]) >= 1)

    floods = [threading.Thread(target=flood) for _ in range(8)]
    for thread in floods:
        thread.start()
    try:
        fort.until(lambda: codes.count(429) > 20, "refusals")
        polite = [
            fort.post({**QUESTION, "producer": "polite", "deadline_ms": 500, "use_cache": False}) for _ in range(20)
        ]
    finally:
        stop.set()
        for thread in floods:
            thread.join()
    assert {answer.status for answer in polite} == {200}
    assert all(answer.body["deadline_met"] for answer in polite)
    seconds_at_most = 60
    assert codes.count(200) <= 5 + 0.5 * seconds_at_most
    records = fort.records(kind="refusal", outcome="rate_limited", **{"from": address})
    assert len(records) == 5, "a flood does not fill the trail: a few, and then their number once a minute"
    assert len(fort.events(f'"from":"{address}"')) == 5, "nor the log"


# --- the trail and the logs ------------------------------------------------------------------------------------------


def test_the_trail_is_whole_and_shows_what_is_changed(fort: Fort, tmp_path: Path) -> None:
    fort.records()
    head = fort.status()["security"]["audit"]["head"]
    copy = tmp_path / "audit"
    shutil.copytree(fort.audit, copy)
    assert main(["audit", "verify", str(copy), "--anchor", head]) == 0
    path = min(copy.glob("audit-*.jsonl"))
    path.write_bytes(path.read_bytes().replace(b'"version"', b'"Version"', 1))  # of the start, which is always there
    assert main(["audit", "verify", str(copy), "--anchor", head]) == 1


def test_what_the_daemon_keeps_is_its_own(fort: Fort) -> None:
    """Whatever umask it was started with."""
    kept = [path for path in fort.audit.parent.rglob("*") if path.is_file()]
    assert {path.name for path in kept if path.stat().st_mode & 0o077} == set()
    assert any(path.suffix == ".sqlite" for path in kept)


def test_no_secret_and_no_payload_is_in_any_log(fort: Fort, address: str) -> None:
    """After requests that were answered, refused for their token, for their content, and one that names a patient."""
    told = user_token()
    private = {**QUESTION, "metadata": {"patient": PATIENT}}
    fort.post(private, address=address)
    fort.post({**private, "inputs": DIGIT[:-1]}, address=address)
    fort.post(private, "ea_wrong-token-of-a-stranger-0123456789", address)
    fort.post(private, told, address)
    fort.post(private, told[:-4], address)
    fort.records()
    fort.nothing_private(wrong_token="wrong-token-of-a-stranger", user_token=told[-60:-10])
    environment = Path(f"/proc/{fort.daemon.pid}/cmdline").read_bytes()
    assert all(token.encode() not in environment for token in SECRETS.values())
    assert os.stat(next(fort.audit.glob("*.jsonl"))).st_mode & 0o077 == 0
