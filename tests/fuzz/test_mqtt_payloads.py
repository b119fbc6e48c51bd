"""Whatever is published to the daemon and to a worker, each question is answered, refusals by name; nothing dies."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

sys.path.insert(0, str(Path(__file__).parents[1] / "e2e"))

from gateway import GATEWAY, Client, Gateway, wait_until

from agent.wire import lane
from hil.processes import Stage
from tests.brokers import MOSQUITTO
from tests.fuzz.payloads import BATCH, FEW, PAYLOADS

pytestmark = pytest.mark.skipif(MOSQUITTO is None, reason="mosquitto is not installed")

SENSORS = {
    "sensors/json": {"model": "digits", "name": "json", "latency_class": "interactive", "use_cache": False},
    "sensors/raw": {"model": "digits", "name": "raw", "format": "raw", "dtype": "float32"},
    "sensors/field": {"model": "motion", "name": "field", "field": "value", "scale": 0.5},
    "sensors/kept": {"model": "digits", "name": "kept", "durable": True},
}


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    with Stage(tmp_path_factory.mktemp("payloads")) as stage:
        gateway = Gateway(stage)
        gateway.start_broker()
        gateway.start_cloud_broker()
        gateway.start_worker("worker-1")
        changes = {"edge_mcu": {"enabled": False}, "outbox": {"enabled": True}, "sensors": SENSORS}
        gateway.daemon = stage.daemon(gateway.config() | changes)
        wait_until(gateway.complete, "every tier available")
        yield gateway
        for process in (gateway.daemon, gateway.worker_1):
            assert process.alive()
            assert "Traceback" not in process.tail(1 << 24)
        wait_until(lambda: gateway.get("/status")["counters"]["active"] == 0, "nothing in flight")


def asked(number: int, back: str) -> Properties:
    properties = Properties(PacketTypes.PUBLISH)
    properties.ResponseTopic, properties.CorrelationData = back, str(number).encode()
    properties.MessageExpiryInterval = 30
    properties.UserProperty = [(lane.BUDGET_MS, "2000")]
    return properties


def answers_to(port: int, topic: str, payloads: list[bytes]) -> dict[int, Any]:
    """By number: the last answer to each."""
    client = Client(port, "fuzz/answers")
    for number, payload in enumerate(payloads):
        client.publish(topic, payload, asked(number, "fuzz/answers"))

    def by_number() -> dict[int, Any]:
        return {int(message.properties.CorrelationData): message for message in list(client.messages)}

    wait_until(lambda: len(by_number()) == len(payloads), "an answer to each")
    client.close()
    return by_number()


@pytest.mark.parametrize("topic", ["infer/digits", "infer/motion", "infer/nothing", "durable/digits", "explain"])
def test_each_question_is_answered(gateway: Gateway, topic: str) -> None:
    @FEW
    @given(st.lists(PAYLOADS, min_size=BATCH, max_size=BATCH))
    def ask(payloads: list[bytes]) -> None:
        for number, message in answers_to(gateway.local_port, f"edge/{GATEWAY}/{topic}", payloads).items():
            document = json.loads(message.payload)
            if "error" in document:
                assert document["error"]["code"] and document["error"]["message"], payloads[number]
            elif topic.startswith("infer"):
                assert document["label"] and document["tier"], payloads[number]

    ask()


@pytest.mark.parametrize("sensor", SENSORS)
def test_readings_that_make_no_sense_are_told_of(gateway: Gateway, sensor: str) -> None:
    """Each reading has its result or its refusal on the sensor's topic, in whatever order."""
    name = SENSORS[sensor]["name"]

    @FEW
    @given(st.lists(PAYLOADS.filter(len), min_size=BATCH, max_size=BATCH))
    def publish(payloads: list[bytes]) -> None:
        results = Client(gateway.local_port, f"edge/{GATEWAY}/results/{name}")
        for payload in payloads:
            results.publish(sensor, payload)
        if SENSORS[sensor].get("durable"):  # a repeat is known, and has no second answer
            wait_until(lambda: not any(gateway.get("/status")["outbox"]["rows"].values()), "nothing is kept")
        else:
            wait_until(lambda: len(results.messages) >= len(payloads), "a result for each")
        for message in list(results.messages):
            document = json.loads(message.payload)
            assert "error" in document or document["label"]
        results.close()

    publish()


def test_a_worker_answers_whatever_it_is_sent(gateway: Gateway) -> None:
    variant = gateway.catalog.family("digits").variants["cloud-fp32"]
    topic = lane.request_topic("lanes/gpu", "digits", variant.sha256)

    @FEW
    @given(st.lists(PAYLOADS, min_size=BATCH, max_size=BATCH, unique=True))
    def ask(payloads: list[bytes]) -> None:
        for message in answers_to(gateway.cloud_port, topic, payloads).values():
            status = dict(message.properties.UserProperty)[lane.STATUS]
            assert status in (lane.OK, lane.INVALID, lane.FAILED, lane.BUSY, lane.EXPIRED)
            assert status == lane.OK or lane.decode_error(message.payload) != "(no usable message)"

    ask()
