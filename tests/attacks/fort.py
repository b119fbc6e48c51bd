"""A daemon as it would stand in a field cabinet, with tokens, users, TLS to its broker and an audit trail."""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jwt
from cryptography.hazmat.primitives.asymmetric import ed25519
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from agent.security.audit_file import audit_files, read_lines
from agent.security.tokens import hashed, new_token
from hil.processes import Stage, free_port
from tests.certs import Authority

LIMIT_S = 20.0
SECRETS = {name: new_token() for name in ("reader", "asker", "meter")}
HS_SECRET = "hmac-secret-that-nobody-may-see-0123456789"
USER_KEY = ed25519.Ed25519PrivateKey.generate()
PAYLOAD = 13.374213
"""A value that stands for what a patient's sensor measured: in no log may it be found."""
PATIENT = "Ada-Lovelace-1815"
DIGIT = [PAYLOAD] + [0.0] * 63


def user_token(key: Any = USER_KEY, algorithm: str = "EdDSA", **changes: Any) -> str:
    now = int(time.time())
    claims = {"iss": "https://id.example", "aud": "edge-agent/fort", "sub": "alice", "iat": now, "exp": now + 300}
    kid = "hs" if algorithm == "HS256" else "user"
    return jwt.encode({**claims, "roles": ["infer", "read"], **changes}, key, algorithm, {"kid": kid})


class Answer:
    """Status, headers and decoded body of one response."""

    def __init__(self, response: http.client.HTTPResponse) -> None:
        self.status = response.status
        self.headers = {name.lower(): value for name, value in response.getheaders()}
        data = response.read()
        self.text = data.decode()
        self.body: dict[str, Any] = json.loads(data) if data.startswith(b"{") else {}

    @property
    def code(self) -> str:
        return str(self.body["error"]["code"])


class Fort:
    """The daemon, its broker, and what they wrote."""

    def __init__(self, stage: Stage, authority: Authority, broker_port: int, daemon_port: int) -> None:
        self.stage = stage
        self.authority = authority
        self.broker_port = broker_port
        self.daemon_port = daemon_port
        self.http_port = free_port()
        self.audit = stage.folder / "state" / "audit"

    def start(self) -> None:
        pair = self.authority.sign("edge-agent", client=True)
        (self.stage.folder / "user.pem").write_bytes(
            USER_KEY.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
        )
        (self.stage.folder / "hs.key").write_text(HS_SECRET)
        keys = [
            {"kid": "user", "algorithm": "EdDSA", "key_file": str(self.stage.folder / "user.pem")},
            {"kid": "hs", "algorithm": "HS256", "key_file": str(self.stage.folder / "hs.key")},
        ]
        tokens: list[dict[str, Any]] = [
            {"name": "reader", "roles": ["read"], "sha256": hashed(SECRETS["reader"])},
            {"name": "asker", "roles": ["infer"], "sha256": hashed(SECRETS["asker"])},
            {"name": "meter", "roles": ["infer"], "sha256": hashed(SECRETS["meter"]), "producer": "meter"},
        ]
        config = {
            "gateway": {"id": "fort", "state_dir": str(self.stage.folder / "state")},
            "http": {"port": self.http_port},
            "mqtt": {
                "broker": f"mqtts://127.0.0.1:{self.daemon_port}",
                "ca_file": str(self.authority.ca),
                "cert_file": str(pair.cert),
                "key_file": str(pair.key),
                "shared_requests": False,
            },
            "sensors": {"sensors/+": {"model": "digits", "latency_class": "interactive"}},
            "outbox": {"enabled": True, "commit_wait_ms": 0},
            "producers": {"loud": {"rate": {"per_s": 0.5, "burst": 5}}},
            "security": {
                "tokens": tokens,
                "jwt": {"issuer": "https://id.example", "audience": "edge-agent/fort", "keys": keys},
                "audit": {"enabled": True, "fsync_s": 0},
            },
        }
        self.daemon = self.stage.daemon(config)
        self.until(lambda: self.get("/ready").status == 200, "ready")
        self.until(lambda: self.status()["doors"]["mqtt"]["connected"], "the broker")

    # --- asking ---

    def connection(self, address: str = "127.0.0.1") -> http.client.HTTPConnection:
        """From an address of its own, so that what is said of it can be told from what is said of others."""
        return http.client.HTTPConnection("127.0.0.1", self.http_port, LIMIT_S, (address, 0))

    def get(self, path: str, token: str | None = SECRETS["reader"], address: str = "127.0.0.1") -> Answer:
        return self._ask("GET", path, None, token, address, {})

    def post(
        self,
        body: Any,
        token: str | None = SECRETS["asker"],
        address: str = "127.0.0.1",
        path: str = "/infer",
        headers: Mapping[str, str] | None = None,
    ) -> Answer:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        return self._ask("POST", path, data, token, address, {"Content-Type": "application/json", **(headers or {})})

    def _ask(
        self, method: str, path: str, body: bytes | None, token: str | None, address: str, headers: Mapping[str, str]
    ) -> Answer:
        connection = self.connection(address)
        try:
            shown = {} if token is None else {"Authorization": f"Bearer {token}"}
            connection.request(method, path, body, {**headers, **shown})
            return Answer(connection.getresponse())
        finally:
            connection.close()

    def status(self) -> dict[str, Any]:
        return self.get("/status").body

    # --- what was written ---

    def records(self, **wanted: Any) -> list[dict[str, Any]]:
        """Lines of the audit trail, once all of them are there."""
        self.until(lambda: self.status()["security"]["audit"]["waiting"] == 0, "the trail is written")
        lines = [json.loads(line) for path in audit_files(self.audit) for line in read_lines(path)]
        return [line for line in lines if all(line.get(name) == value for name, value in wanted.items())]

    def events(self, text: str) -> list[str]:
        return [line for line in self.daemon.tail(1 << 24).splitlines() if text in line]

    def refused_once(self, address: str, code: str) -> dict[str, Any]:
        """There is one line of it in the trail and one in the log, which agree."""
        (record,) = self.records(kind="refusal", **{"from": address})
        assert record["outcome"] == code
        (event,) = self.events(f'"from":"{address}"')
        assert json.loads(event)["outcome"] == code
        return record

    def written(self) -> Iterator[tuple[Path, bytes]]:
        """Every file that the daemon and the broker wrote."""
        for path in self.stage.folder.rglob("*"):
            # What was given to them, the cache of answers, and the outbox.
            kept = {".key", ".pem", ".yaml", ".sqlite", ".sqlite-wal", ".sqlite-shm", ".conf"}
            if path.is_file() and not kept & set(path.suffixes):
                yield path, path.read_bytes()

    def broker_lines(self, text: str) -> list[str]:
        lines = (self.stage.folder / "mosquitto.log").read_text(errors="replace").splitlines()
        return [line for line in lines if text in line]

    def nothing_private(self, **also: str) -> None:
        """No secret, no payload and no name of a patient is in anything that was written. `also`: what to look for
        besides."""
        needles = {
            **{f"token of {name}": token.removeprefix("ea_") for name, token in SECRETS.items()},
            "the secret of tokens": HS_SECRET,
            "the payload": str(PAYLOAD)[:7],
            "the patient": PATIENT,
            "a private key": "PRIVATE KEY",
            **also,
        }
        looked_at = {path.name for path, _ in self.written()}
        assert {"daemon.log", "mosquitto.log"} <= looked_at
        assert len(looked_at) >= 3
        for path, data in self.written():
            for what, needle in needles.items():
                assert needle.encode() not in data, f"{what} is in {path}"

    @staticmethod
    def until(condition: Callable[[], object], what: str) -> None:
        end = time.monotonic() + LIMIT_S
        while not condition():
            assert time.monotonic() < end, f"not within {LIMIT_S:g} s: {what}"
            time.sleep(0.02)
