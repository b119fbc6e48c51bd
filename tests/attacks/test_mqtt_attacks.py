"""Attacks on the MQTT door of a real daemon by devices that have a certificate of their own, and by others."""

from __future__ import annotations

import itertools
import json
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from fort import DIGIT, PATIENT, Fort

from agent.link.mqtt import LinkOptions, Message, MessageProperties, MqttLink
from tests.brokers import until
from tests.certs import Authority, Pair

WAIT_S = 20.0
REFUSED = 0x87
"""MQTT 5 reason code: not authorized."""
_numbers = itertools.count()


class Device:
    """A device with a certificate, and what was answered to it."""

    def __init__(self, fort: Fort, name: str, pair: Pair | None) -> None:
        files = {} if pair is None else {"cert_file": pair.cert, "key_file": pair.key}
        self.name = name
        self.fort = fort
        url = f"mqtts://127.0.0.1:{fort.broker_port}"
        self.link = MqttLink(LinkOptions(broker=url, client_id=name, ca_file=fort.authority.ca, **files))
        self.answers: list[Message] = []

    async def connect(self) -> None:
        await self.link.subscribe(f"clients/{self.name}/answers", self.answers.append)
        await self.link.subscribe(f"edge/fort/results/{self.name}", self.answers.append)
        await self.link.start()
        await until(lambda: self.link.connected, WAIT_S, f"{self.name} is connected")

    async def ask(
        self, payload: bytes, model: str = "digits", kind: str = "infer", **properties: Any
    ) -> dict[str, Any]:
        back = MessageProperties("application/json", response_topic=f"clients/{self.name}/answers", **properties)
        await self.link.publish_acknowledged(f"edge/fort/{kind}/{model}/{self.name}", payload, properties=back)
        return await self.answer()

    async def answer(self) -> dict[str, Any]:
        await until(lambda: self.answers, WAIT_S, "an answer")
        decoded: dict[str, Any] = json.loads(self.answers.pop(0).payload)
        return decoded

    def denied(self, topic: str) -> list[str]:
        """What the broker wrote of it."""
        return [line for line in self.fort.broker_lines(f"Denied PUBLISH from {self.name} ") if f"'{topic}'" in line]

    def refused_once(self, code: str) -> None:
        (record,) = self.fort.records(kind="refusal", who=f"mqtt:{self.name}")
        assert record["outcome"] == code
        (event,) = self.fort.events(f'"who":"mqtt:{self.name}"')
        assert json.loads(event)["outcome"] == code


@pytest.fixture
async def device(fort: Fort) -> AsyncIterator[Device]:
    name = f"device-{next(_numbers)}"
    device = Device(fort, name, fort.authority.sign(name, client=True))
    await device.connect()
    yield device
    await device.link.stop()


QUESTION = json.dumps({"inputs": DIGIT, "deadline_ms": 2000}).encode()


async def test_a_device_is_answered(device: Device, fort: Fort) -> None:
    answer = await device.ask(QUESTION)
    (record,) = fort.records(kind="request", request_id=answer["request_id"])
    assert (record["who"], record["producer"]) == (f"mqtt:{device.name}", device.name)
    await device.link.publish_acknowledged(f"sensors/{device.name}", json.dumps(DIGIT).encode())
    reading = await device.answer()
    (record,) = fort.records(kind="request", request_id=reading["request_id"])
    assert record["who"] == f"sensor:{device.name}"


def test_certificates_are_watched(fort: Fort) -> None:
    def seen() -> dict[str, float]:
        return {one["name"]: one["days_left"] for one in fort.status()["certificates"]}

    fort.until(lambda: "mqtt broker" in seen(), "the broker's own is seen")
    assert seen() == {
        "mqtt.ca_file": pytest.approx(365, abs=0.5),
        "mqtt.cert_file": pytest.approx(30, abs=0.5),
        "mqtt broker": pytest.approx(30, abs=0.5),
    }
    (state,) = [part for part in fort.status()["components"] if part["name"] == "certificates"]
    assert state["state"] == "degraded", "they end within security.certificate_warn_days"
    assert "the certificate ends in 30.0 days" in state["reason"] or "29.9" in state["reason"]
    assert "edge_agent_certificate_days{" in fort.get("/metrics").text


async def test_topics_outside_the_access_list(device: Device, fort: Fort) -> None:
    before = len(fort.records(kind="request"))
    for topic in (
        "sensors/other",
        "edge/fort/infer/digits/other",
        "edge/fort/infer/digits",
        f"edge/fort/infer/digits/{device.name}/x",
        "edge/fort/durable/digits/other",
        "edge/fort/durable/digits",
        "edge/fort/results/other",
        "edge/fort/status",
        "clients/other/answers",
    ):
        assert await device.link.publish_acknowledged(topic, QUESTION) == REFUSED, topic
        await until(partial(device.denied, topic), WAIT_S, f"the broker writes down that {topic} was refused")
        assert len(device.denied(topic)) == 1, topic
    assert len(fort.records(kind="request")) == before


@pytest.mark.parametrize("kind", ["none", "expired", "of another authority"])
async def test_wrong_certificates(fort: Fort, tmp_path: Path, kind: str) -> None:
    name = f"stranger-{next(_numbers)}"
    pair = {
        "none": lambda: None,
        "expired": lambda: fort.authority.sign(name, days=-1, client=True),
        "of another authority": lambda: Authority(tmp_path).sign(name, client=True),
    }[kind]()
    stranger = Device(fort, name, pair)
    before = len(why_refused(fort))
    await stranger.link.start()
    await until(lambda: stranger.link.state.permanent, WAIT_S, "it is refused for good")
    await stranger.link.stop()
    assert fort.records(who=f"mqtt:{name}") == [], "it does not get as far as the daemon"
    fort.until(lambda: len(why_refused(fort)) > before, "the broker says why")
    assert len(why_refused(fort)) == before + 1, why_refused(fort)[before:]


def why_refused(fort: Fort) -> list[str]:
    """Mosquitto's words for a handshake that fails: the second, where all of it had come when the connection was
    accepted."""
    return [*fort.broker_lines("OpenSSL Error"), *fort.broker_lines("Client connection from 127.0.0.1 failed: error:")]


PAYLOADS = {
    "another producer": (json.dumps({"inputs": DIGIT, "producer": "clinic"}).encode(), "forbidden"),
    "another model": (json.dumps({"inputs": DIGIT, "model": "motion"}).encode(), "invalid_request"),
    "a depth bomb": (b"[" * 500_000, "undecodable"),
    "NaN": (json.dumps({"inputs": [float("nan")] * 64}).encode(), "invalid_request"),
    "a wrong shape": (json.dumps({"inputs": [[1.0] * 9] * 9}).encode(), "invalid_request"),
    "too large": (b"[" + b"7," * 600_000 + b"7]", "too_large"),
    "nothing": (b"", "undecodable"),
}


@pytest.mark.parametrize(("payload", "code"), PAYLOADS.values(), ids=PAYLOADS)
async def test_payloads_that_are_wrong(device: Device, payload: bytes, code: str) -> None:
    answer = await device.ask(payload)
    assert answer["error"]["code"] == code
    device.refused_once(code)


@pytest.mark.parametrize("model", ["..", "...", "%2e%2e%2fetc", "digits\\..\\x", "passwd"])
async def test_path_tricks_in_model_names(device: Device, model: str) -> None:
    assert (await device.ask(QUESTION, model))["error"]["code"] == "unknown_model"
    device.refused_once("unknown_model")


DURABLE = json.dumps({"inputs": DIGIT, "idempotency_key": "d1"}).encode()


async def test_a_durable_request_is_on_record_when_it_is_accepted_and_when_it_is_answered(
    device: Device, fort: Fort
) -> None:
    accepted = await device.ask(DURABLE, kind="durable")
    assert accepted["state"] == "accepted"
    answer = await device.answer()
    assert (answer["request_id"], answer["tier"]) == (accepted["request_id"], "edge_gpu")
    records = fort.records(request_id=accepted["request_id"])
    assert [(record["kind"], record["outcome"]) for record in records] == [("act", "accepted"), ("request", "ok")]
    assert {(record["who"], record["producer"]) for record in records} == {(f"mqtt:{device.name}", device.name)}


async def test_a_replayed_durable_request_is_answered_once(device: Device, fort: Fort) -> None:
    await device.ask(DURABLE, kind="durable")
    await device.answer()
    assert (await device.ask(DURABLE, kind="durable"))["state"] == "accepted"
    outcomes = [record["outcome"] for record in fort.records(producer=device.name)]
    assert outcomes == ["accepted", "ok", "duplicate"]


@pytest.mark.parametrize(("payload", "code"), PAYLOADS.values(), ids=PAYLOADS)
async def test_durable_payloads_that_are_wrong(device: Device, fort: Fort, payload: bytes, code: str) -> None:
    answer = await device.ask(payload, kind="durable")
    assert answer["error"]["code"] == code
    device.refused_once(code)
    assert fort.records(what="accept", producer=device.name) == []


async def test_a_replayed_request_is_answered_once(device: Device, fort: Fort) -> None:
    question = json.dumps({"inputs": DIGIT, "idempotency_key": "k1", "use_cache": False, "deadline_ms": 2000}).encode()
    first, again = await device.ask(question), await device.ask(question)
    assert (first["cached"], again["cached"]) == (False, True)
    assert "same idempotency key" in again["reasons"][0]
    outcomes = [record["outcome"] for record in fort.records(kind="request", producer=device.name)]
    assert outcomes == ["ok", "cached"]


async def test_a_flood_of_one_device_beside_a_polite_one(device: Device, fort: Fort) -> None:
    """More at once than its rate: refused by name, told of a few times, and everybody else is answered in time."""
    back = MessageProperties("application/json", response_topic=f"clients/{device.name}/answers")
    loud = fort.authority.sign("loud", client=True)
    flood = Device(fort, "loud", loud)
    await flood.connect()
    try:
        asked = MessageProperties("application/json", response_topic="clients/loud/answers")
        for _ in range(40):
            await flood.link.publish_acknowledged("edge/fort/infer/digits/loud", QUESTION, properties=asked)
        await device.link.publish_acknowledged(f"edge/fort/infer/digits/{device.name}", QUESTION, properties=back)
        assert (await device.answer())["deadline_met"]
        await until(lambda: len(flood.answers) == 40, WAIT_S, "an answer to each")
    finally:
        await flood.link.stop()
    codes = [json.loads(answer.payload).get("error", {}).get("code", "ok") for answer in flood.answers]
    assert set(codes) == {"ok", "rate_limited"}
    assert codes.count("ok") <= 5 + 0.5 * WAIT_S
    assert len(fort.records(kind="refusal", who="mqtt:loud")) == 5
    assert len(fort.events('"who":"mqtt:loud"')) == 5


async def test_no_secret_and_no_payload_is_in_any_log(device: Device, fort: Fort) -> None:
    """After readings and questions that were answered and refused, for once and for good, with a patient's name."""
    named = {"inputs": DIGIT, "metadata": {"patient": PATIENT}}
    await device.ask(json.dumps(named).encode())
    await device.ask(json.dumps({**named, "inputs": DIGIT[:-1]}).encode())
    await device.ask(json.dumps({**named, "idempotency_key": "kept"}).encode(), kind="durable")
    await device.answer()
    await device.ask(json.dumps({**named, "priority": PATIENT}).encode(), kind="durable")
    await device.link.publish_acknowledged(f"sensors/{device.name}", json.dumps([PATIENT, *DIGIT]).encode())
    await device.answer()
    fort.records()
    fort.nothing_private()


async def test_the_name_that_the_daemon_is_connected_by(fort: Fort) -> None:
    """Whoever has it ends the daemon's connection, and takes its session with all that waits there."""
    name = f"device-{next(_numbers)}"
    pair = fort.authority.sign(name, client=True)
    options = LinkOptions(
        broker=f"mqtts://127.0.0.1:{fort.broker_port}",
        client_id="edge-agent-fort",
        ca_file=fort.authority.ca,
        cert_file=pair.cert,
        key_file=pair.key,
    )
    link = MqttLink(options)
    await link.start()
    await until(lambda: link.connected, WAIT_S, "connected")
    await link.publish_acknowledged(f"sensors/{name}", b"{}")
    await link.stop()
    assert not fort.broker_lines("Client edge-agent-fort already connected")
    assert fort.status()["doors"]["mqtt"]["connected"]
