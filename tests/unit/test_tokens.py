"""Who asks: static tokens, JSON Web Tokens, this machine; and how often they may."""

from __future__ import annotations

import base64
import hmac
import json
from datetime import date
from pathlib import Path
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from hypothesis import given
from hypothesis import strategies as st

from agent.config import JwtKeySection, JwtSection, ProducerSection, RateSection, SecuritySection, TokenSection
from agent.core.clock import ManualClock
from agent.core.errors import ConfigError, Forbidden, InferenceError, RateLimited, Unauthorized
from agent.security import jwts
from agent.security.access import Guard, is_loopback, network
from agent.security.identity import Identity
from agent.security.jwts import JwtVerifier, Rejected
from agent.security.limits import Buckets
from agent.security.repeats import BURST, WINDOW_S, Repeats
from agent.security.tokens import PREFIX, StaticTokens, hashed, new_token

NOW = 1_700_000_000.0
SECRET = b"s" * 32


def pem(key: Any) -> bytes:
    return key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


ED = ed25519.Ed25519PrivateKey.generate()
EC = ec.generate_private_key(ec.SECP256R1())


@pytest.fixture
def section(tmp_path: Path) -> JwtSection:
    (tmp_path / "ed.pem").write_bytes(pem(ED))
    (tmp_path / "ec.pem").write_bytes(pem(EC))
    (tmp_path / "secret").write_bytes(SECRET + b"\n")
    keys = (("ed", "EdDSA", "ed.pem"), ("ec", "ES256", "ec.pem"), ("hs", "HS256", "secret"))
    return JwtSection(
        issuer="https://id.example",
        audience="edge-agent/gw",
        keys=tuple(JwtKeySection(kid=kid, algorithm=alg, key_file=tmp_path / file) for kid, alg, file in keys),  # type: ignore[arg-type]
    )


def claims(**changes: Any) -> dict[str, Any]:
    whole = {
        "iss": "https://id.example",
        "aud": "edge-agent/gw",
        "sub": "alice",
        "iat": NOW,
        "exp": NOW + 900,
        "roles": ["read", "infer"],
    } | changes
    return {name: value for name, value in whole.items() if value is not None}


def token(key: Any = ED, algorithm: str = "EdDSA", kid: str | None = "ed", headers: Any = None, **changes: Any) -> str:
    return jwt.encode(claims(**changes), key, algorithm, {**({"kid": kid} if kid else {}), **(headers or {})})


# --- JSON Web Tokens ---


@pytest.mark.parametrize(
    ("key", "algorithm", "kid"), [(ED, "EdDSA", "ed"), (EC, "ES256", "ec"), (SECRET, "HS256", "hs")]
)
def test_each_key_with_its_algorithm(section: JwtSection, key: Any, algorithm: str, kid: str) -> None:
    verifier = JwtVerifier(section)
    made = token(key, algorithm, kid)
    assert verifier.known(made, NOW) is None
    assert verifier.identify(made, NOW) == Identity("user:alice", frozenset({"read", "infer"}), None, "user:alice")
    assert verifier.known(made, NOW) == verifier.identify(made, NOW)


def unsigned(header: dict[str, Any], body: dict[str, Any], signature: bytes = b"") -> str:
    def part(value: Any) -> str:
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        return base64.urlsafe_b64encode(data).rstrip(b"=").decode()

    return ".".join((part(header), part(body), part(signature)))


def confused() -> str:
    """Signed with the public key as if it were a secret."""
    signed = unsigned({"alg": "HS256", "kid": "ed"}, claims()).removesuffix(".")
    digest = hmac.digest(pem(ED), signed.encode(), "sha256")
    return f"{signed}.{base64.urlsafe_b64encode(digest).rstrip(b'=').decode()}"


BAD = {
    "no token at all": "x",
    "three dots": "a.b.c",
    "alg none": unsigned({"alg": "none", "kid": "ed"}, claims()),
    "alg NoNe": unsigned({"alg": "NoNe", "kid": "ed"}, claims()),
    "the public key as a secret": confused(),
    "another key's algorithm": token(EC, "ES256", "ed"),
    "an unknown kid": token(kid="nobody"),
    "no kid": token(kid=None),
    "a kid that is a path": token(kid="../../dev/null"),
    "a key in the header": token(headers={"jwk": {"kty": "oct", "k": "AA"}}),
    "an address of keys in the header": token(headers={"jku": "https://evil.example"}),
    "critical extensions": token(headers={"crit": ["b64"], "b64": False}),
    "another's signature": token(ed25519.Ed25519PrivateKey.generate()),
    "another audience": token(aud="edge-agent/other"),
    "no audience": token(aud=None),
    "another issuer": token(iss="https://evil.example"),
    "no issuer": token(iss=None),
    "no subject": token(sub=None),
    "a subject of another line": token(sub="a\nb"),
    "no expiry": token(exp=None),
    "no issue time": token(iat=None),
    "expired": token(iat=NOW - 1000, exp=NOW - 100),
    "from the future": token(iat=NOW + 100, exp=NOW + 900),
    "not yet valid": token(nbf=NOW + 100),
    "too long a life": token(exp=NOW + 901),
    "expiry that is text": unsigned({"alg": "EdDSA", "kid": "ed"}, claims(exp="9")),
    "an expiry of infinity": token(exp=1e300),
    "longer than a header": token(padding="x" * 5000),
}


@pytest.mark.parametrize("shown", BAD.values(), ids=BAD)
def test_refused(section: JwtSection, shown: str) -> None:
    verifier = JwtVerifier(section)
    with pytest.raises(Rejected):
        verifier.identify(shown, NOW)
    assert verifier.known(shown, NOW) is None


def test_a_token_that_was_good_is_not_good_for_ever(section: JwtSection) -> None:
    verifier = JwtVerifier(section)
    made = token()
    verifier.identify(made, NOW)
    last = NOW + 900 + section.leeway_s - 1
    assert verifier.known(made, last) is not None
    assert verifier.known(made, last + 1) is None
    with pytest.raises(Rejected, match="expired"):
        verifier.identify(made, last + 1)


def test_only_so_many_are_remembered(section: JwtSection, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jwts, "REMEMBERED", 3)
    verifier = JwtVerifier(section)
    made = [token(sub=f"user-{number}") for number in range(5)]
    for one in made:
        verifier.identify(one, NOW)
    assert [verifier.known(one, NOW) is not None for one in made] == [False, False, True, True, True]


@pytest.mark.parametrize(
    ("claimed", "roles"),
    [("read infer", {"read", "infer"}), (["admin", "root", 7], {"admin"}), (None, set()), (7, set()), ("", set())],
)
def test_roles_that_do_not_exist_count_for_nothing(section: JwtSection, claimed: Any, roles: set[str]) -> None:
    assert JwtVerifier(section).identify(token(roles=claimed), NOW).roles == roles


@given(st.text(max_size=200) | st.binary(max_size=200).map(lambda data: data.decode("latin-1")))
def test_no_text_crashes_the_verifier(text: str) -> None:
    verifier = JwtVerifier.__new__(JwtVerifier)
    verifier._section = JwtSection.model_construct(audience="a", issuer="i", leeway_s=0, max_lifetime_s=900)
    verifier._keys, verifier._good = {"ed": ("EdDSA", ED.public_key())}, jwts.OrderedDict()
    with pytest.raises(Rejected):
        verifier.identify(text, NOW)


@pytest.mark.parametrize(
    ("algorithm", "data", "says"),
    [
        ("HS256", b"short", "at least 32 bytes, found 5"),
        ("EdDSA", b"no key", "holds no public key"),
        ("EdDSA", pem(EC), "Ed25519"),
        ("ES256", pem(ec.generate_private_key(ec.SECP384R1())), "P-256"),
        ("RS256", pem(rsa.generate_private_key(65537, 1024)), "2048 bits"),
        ("EdDSA", ED.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()), "holds no public key"),
    ],
)
def test_keys_that_cannot_be_used(tmp_path: Path, algorithm: Any, data: bytes, says: str) -> None:
    (tmp_path / "key").write_bytes(data)
    key = JwtKeySection(kid="k", algorithm=algorithm, key_file=tmp_path / "key")
    with pytest.raises(ConfigError, match=says) as caught:
        JwtVerifier(JwtSection(issuer="i", audience="a", keys=(key,)))
    assert data.decode("latin-1") not in str(caught.value)


# --- static tokens ---


def test_static_tokens() -> None:
    made = new_token()
    assert made.startswith(PREFIX)
    assert len({new_token() for _ in range(100)}) == 100
    other = TokenSection(name="other", roles=("read",), sha256=hashed("other"))
    own = TokenSection(name="meter", roles=("infer",), sha256=hashed(made), producer="m7", expires=date(2023, 11, 14))
    tokens = StaticTokens([other, own])
    assert tokens.identify(made, NOW) == Identity("service:meter", frozenset({"infer"}), "m7", "m7")
    assert tokens.identify(made + "x", NOW) is None
    assert tokens.identify(own.sha256, NOW) is None, "the hash is no token"
    assert tokens.identify(made, NOW + 86_400) is None, "the day after its last"


def test_whom_a_request_may_come_from() -> None:
    pinned = Identity("service:meter", frozenset(), "m7", "m7")
    assert pinned.as_producer(None) == pinned.as_producer("m7") == "m7"
    for named in ("m8", "", 7, ["m7"]):
        with pytest.raises(Forbidden):
            pinned.as_producer(named)
    free = Identity("service:hub", frozenset(), None, "hub")
    assert (free.as_producer(None), free.as_producer("m8")) == ("hub", None)


# --- the guard ---


def guard(clock: ManualClock, **settings: Any) -> Guard:
    producers = settings.pop("producers", None)
    return Guard(SecuritySection(**settings), clock, producers)


TOKEN = new_token()
TOKENS = (TokenSection(name="meter", roles=("infer",), sha256=hashed(TOKEN)),)


def test_this_machine_is_let_in_until_there_are_tokens(clock: ManualClock) -> None:
    assert guard(clock).bearer(None, "127.0.0.1", "localhost:8080").roles == {"read", "infer"}
    with pytest.raises(Unauthorized):
        guard(clock, tokens=TOKENS).bearer(None, "127.0.0.1", "localhost:8080")
    kept = guard(clock, tokens=TOKENS, open_on_loopback=("read",))
    assert kept.bearer(None, "::1", "[::1]:8080").roles == {"read"}
    with pytest.raises(Forbidden):
        kept.require(kept.bearer(None, "::1", "[::1]:8080"), "infer")


@pytest.mark.parametrize("address", ["192.168.1.7", "", "::", "fe80::1%eth0", "127.0.0.1.evil", "8.8.8.8"])
def test_others_are_not_this_machine(clock: ManualClock, address: str) -> None:
    with pytest.raises(Unauthorized):
        guard(clock).bearer(None, address, "localhost")


@pytest.mark.parametrize(
    ("host", "foreign"),
    [
        ("localhost:8080", False),
        ("127.0.0.1:8080", False),
        ("[::1]:8080", False),
        ("gateway", False),
        ("", False),
        ("app.localhost:3000", False),
        ("evil.example:8080", True),
        ("evil.example.", True),
        ("127.0.0.1.evil.example", True),
    ],
)
def test_a_page_elsewhere_cannot_ask_through_a_browser_on_this_machine(
    clock: ManualClock, host: str, foreign: bool
) -> None:
    if foreign:
        with pytest.raises(Unauthorized):
            guard(clock).bearer(None, "127.0.0.1", host)
    else:
        assert guard(clock).bearer(None, "127.0.0.1", host).name == "loopback"


def test_addresses() -> None:
    assert all(map(is_loopback, ("127.0.0.1", "127.8.8.8", "::1", "::ffff:127.0.0.1")))
    assert network("2001:db8::1") == network("2001:db8::ffff:2") != network("2001:db8:0:1::1")
    assert network("10.0.0.7") == "10.0.0.7"


@pytest.mark.parametrize("shown", [f"bearer {TOKEN}", f"Bearer {TOKEN}"], ids=["small", "large"])
def test_a_token_in_the_header(clock: ManualClock, shown: str) -> None:
    assert guard(clock, tokens=TOKENS).bearer(shown, "10.0.0.7", "gw.example").name == "service:meter"


@pytest.mark.parametrize(
    "shown", ["", "Bearer", "Bearer ", f"Basic {TOKEN}", TOKEN, f"Bearer  {TOKEN}", "Bearer \xe4"], ids=range(7)
)
def test_headers_that_hold_none(clock: ManualClock, shown: str) -> None:
    """Also from this machine: whoever shows a token means it."""
    for tokens in (TOKENS, ()):
        with pytest.raises(Unauthorized):
            guard(clock, tokens=tokens).bearer(shown, "127.0.0.1", "localhost")


def test_nobody_learns_how_near_they_were(clock: ManualClock, section: JwtSection) -> None:
    asked = guard(clock, tokens=TOKENS, jwt=section)
    messages = set()
    for shown in (
        None,
        "Bearer x",
        f"Bearer {PREFIX}x",
        *(f"Bearer {bad}" for bad in BAD.values()),
    ):
        with pytest.raises(InferenceError) as caught:
            asked.bearer(shown, "10.0.0.7", "gw")
        messages.add(json.dumps({**caught.value.to_dict()["error"], "retry_after_s": 0}))
    assert len(messages) == 2, "and the other is rate_limited, after many bad signatures"


def test_bad_signatures_of_one_address_end_the_work_that_they_make(clock: ManualClock, section: JwtSection) -> None:
    asked = guard(clock, tokens=TOKENS, jwt=section, limits={"failures": {"per_s": 1, "burst": 3}})
    good, bad = token(), BAD["another's signature"]
    assert asked.bearer(f"Bearer {good}", "10.0.0.7", "gw").name == "user:alice"
    for _ in range(3):
        with pytest.raises(Unauthorized):
            asked.bearer(f"Bearer {bad}", "10.0.0.7", "gw")
    with pytest.raises(RateLimited) as caught:
        asked.bearer(f"Bearer {bad}", "10.0.0.7", "gw")
    assert caught.value.retry_after_s == 1
    assert asked.bearer(f"Bearer {good}", "10.0.0.7", "gw").name == "user:alice", "who is known is not locked out"
    assert asked.bearer(f"Bearer {TOKEN}", "10.0.0.7", "gw").name == "service:meter"
    with pytest.raises(Unauthorized):
        asked.bearer(f"Bearer {bad}", "10.0.0.8", "gw")


# --- rates ---


def test_a_bucket() -> None:
    buckets = Buckets(RateSection(per_s=2, burst=3), 16)
    assert [buckets.take("a", 0.0) for _ in range(4)] == [0, 0, 0, 0.5]
    assert buckets.take("b", 0.0) == 0, "another has its own"
    assert buckets.take("a", 0.5) == 0
    assert buckets.take("a", 0.5) == 0.5
    assert [buckets.take("a", 1000.0) for _ in range(4)].count(0) == 3, "never more than the burst"
    assert buckets.take("a", 900.0) > 0, "a clock that goes back gives nothing"


def test_only_so_many_buckets() -> None:
    buckets = Buckets(RateSection(per_s=1, burst=1), 16)
    buckets.take("polite", 0.0)
    for number in range(1000):
        buckets.take(f"name-{number}", 0.0)
        assert len(buckets) <= 16
    assert buckets.take("polite", 0.0) == 0, "forgotten: full again, never empty"


def test_a_producer_may_have_a_rate_of_its_own(clock: ManualClock) -> None:
    slow = ProducerSection(rate=RateSection(per_s=1, burst=1))
    asked = guard(clock, producers={"slow": slow})
    asked.count_producer("slow")
    with pytest.raises(RateLimited):
        asked.count_producer("slow")
    for _ in range(100):
        asked.count_producer("other")


def test_of_a_flood_the_first_few_and_a_number() -> None:
    repeats = Repeats()
    told = [repeats.admit("k", {"n": number}, 0.0) for number in range(100)]
    assert told == [True] * BURST + [False] * (100 - BURST)
    assert repeats.ended(WINDOW_S - 1) == []
    assert repeats.ended(WINDOW_S) == [{"n": 99, "repeated": 100 - BURST}]
    assert repeats.ended(2 * WINDOW_S) == []
    assert repeats.admit("k", {}, WINDOW_S)
