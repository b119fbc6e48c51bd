"""The MQTT door on a real broker, with a stand-in for the core."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import paho.mqtt.client as paho
import pytest

from agent.config import MqttSection, SensorSection
from agent.core.clock import SystemClock
from agent.core.errors import InferenceError, Unavailable
from agent.core.types import InferenceRequest, InferenceResult, LatencyClass
from agent.ingress import mqtt as mqtt_door
from agent.ingress.mqtt import MqttDoor
from agent.link.mqtt import LinkFull, LinkOptions, Message, MessageProperties, MqttLink
from agent.telemetry.metrics import Metrics
from tests.brokers import MOSQUITTO, Broker, mosquitto, running, until
from tests.unit.mqtt_fakes import FakeCore

pytestmark = pytest.mark.skipif(MOSQUITTO is None, reason="mosquitto is not installed")

SENSORS = {
    "plant/+/vibration": {"model": "toy", "field": "values", "scale": 0.5, "latency_class": "realtime", "priority": 9},
    "plant/raw": {"model": "toy", "format": "raw", "dtype": "int16", "scale": 0.1, "deadline_ms": 42},
    "plant/list": {"model": "toy", "name": "named", "use_cache": False},
}


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[Broker]:
    with running(mosquitto(tmp_path)) as started:
        yield started


class Rig:
    """A door, its core, and a client that sees everything that the door says."""

    def __init__(self, broker: Broker) -> None:
        self.broker = broker
        self.core = FakeCore()
        section = MqttSection(broker=broker.url, max_in_flight=4, max_payload_bytes=4096)
        sensors = {topic: SensorSection.model_validate(sensor) for topic, sensor in SENSORS.items()}
        self.metrics = Metrics()
        self.door = MqttDoor(self.core, section, sensors, "gw", self.metrics, SystemClock(), status_interval_s=0.05)
        self.client = MqttLink(LinkOptions(broker.url, "client"))
        self.replies: list[Message] = []
        self.results: list[tuple[str, Any]] = []
        self.states: list[dict[str, Any]] = []

    async def open(self) -> None:
        await self.client.subscribe("me", self.replies.append)
        await self.client.subscribe("edge/gw/results/#", self._on_result)
        await self.client.subscribe("edge/gw/status", lambda message: self.states.append(json.loads(message.payload)))
        await self.door.start()
        await self.client.start()
        await until(lambda: self.door.link.connected and self.client.connected, what="both connect")

    def _on_result(self, message: Message) -> None:
        self.results.append((message.topic.removeprefix("edge/gw/results/"), json.loads(message.payload)))

    async def ask(
        self, payload: bytes | object, kind: str | None = None, *user: tuple[str, str], model: str = "toy"
    ) -> Any:
        """The reply to one request, and the message it came in."""
        before = len(self.replies)
        data = payload if isinstance(payload, bytes) else json.dumps(payload).encode()
        properties = MessageProperties(kind, "me", b"\x00\x01", user=user)
        self.client.publish(f"edge/gw/infer/{model}", data, qos=1, properties=properties)
        await until(lambda: len(self.replies) > before, what="the reply")
        return json.loads(self.replies[-1].payload)

    async def explain(self, payload: bytes) -> Any:
        before = len(self.replies)
        self.client.publish("edge/gw/explain", payload, qos=1, properties=MessageProperties(None, "me", b"\x07"))
        await until(lambda: len(self.replies) > before, what="the reply")
        return json.loads(self.replies[-1].payload)

    async def close(self) -> None:
        if self.core.gate is not None:
            self.core.gate.set()
        await self.door.stop()
        await self.client.stop()


@pytest.fixture
async def rig(broker: Broker) -> AsyncIterator[Rig]:
    opened = Rig(broker)
    await opened.open()
    yield opened
    await opened.close()


async def test_json_request(rig: Rig) -> None:
    before = SystemClock.monotonic()
    document = {"inputs": {"x": [[1, 2, 3, 4]]}, "deadline_ms": 50, "producer": "line-1", "request_id": "r-1"}
    reply = await rig.ask(document, "application/json")
    assert (reply["request_id"], reply["label"], reply["outputs"]) == ("r-1", "yes", {"y": [[1.0, 2.0]]})
    message = rig.replies[0]
    assert message.properties.correlation_data == b"\x00\x01"
    assert message.properties.content_type == "application/json"
    assert message.properties.get("status") == "ok"
    assert message.qos == 1
    asked = rig.core.asked[0]
    assert asked.latency_class is LatencyClass.NEAR
    assert asked.producer == "line-1"
    assert before <= asked.received <= SystemClock.monotonic()
    assert asked.deadline == pytest.approx(asked.received + 0.05)


@pytest.mark.parametrize("payload", [b"known", b" known\n", b'{"request_id": "known"}'])
async def test_how_a_request_was_decided(rig: Rig, payload: bytes) -> None:
    assert await rig.explain(payload) == {"request_id": "known", "stages": []}
    assert rig.replies[0].properties.correlation_data == b"\x07"
    assert rig.replies[0].properties.get("status") == "ok"


@pytest.mark.parametrize(
    ("payload", "code"),
    [
        (b"", "not_remembered"),
        (b"x" * 3000, "not_remembered"),
        (b"\xff", "not_remembered"),
        (b"{}", "invalid_request"),
        (b'{"request_id": 7}', "invalid_request"),
        (b"{", "undecodable"),
    ],
)
async def test_what_is_no_id_of_a_request_is_refused_by_name(rig: Rig, payload: bytes, code: str) -> None:
    assert (await rig.explain(payload))["error"]["code"] == code
    assert rig.replies[0].properties.get("status") == code


async def test_an_explanation_without_a_response_topic_goes_to_the_results(rig: Rig) -> None:
    rig.client.publish("edge/gw/explain", b"known")
    await until(lambda: rig.results, what="the explanation")
    assert rig.results == [("explain", {"request_id": "known", "stages": []})]


async def test_raw_request_with_options(rig: Rig) -> None:
    data = np.array([1, 2, 3, 4], "<i2").tobytes()
    options = [("dtype", "int16"), ("scale", "0.5"), ("deadline_ms", "20"), ("priority", "9"), ("use_cache", "false")]
    reply = await rig.ask(data, "application/octet-stream", *options, ("allowed_regions", "eu,us"))
    assert reply["outputs"] == {"y": [[0.5, 1.0]]}
    asked = rig.core.asked[0]
    assert (asked.priority, asked.use_cache, asked.allowed_regions) == (9, False, {"eu", "us"})


async def test_the_producer_in_the_topic_is_who_asks(rig: Rig) -> None:
    for document in ({}, {"producer": "line-1"}):
        reply = await rig.ask({"inputs": [1, 2, 3, 4], **document}, model="toy/line-1")
        assert reply["label"] == "yes"
    assert {(asked.producer, asked.asked_by) for asked in rig.core.asked} == {("line-1", "mqtt:line-1")}
    refused = await rig.ask({"inputs": [1, 2, 3, 4], "producer": "line-2"}, model="toy/line-1")
    assert (refused["error"]["code"], refused["error"]["field"]) == ("forbidden", "producer")
    refused = await rig.ask(b"", "application/octet-stream", ("producer", "line-2"), model="toy/line-1")
    assert refused["error"]["code"] == "forbidden"
    refused = await rig.ask({"inputs": [1, 2, 3, 4]}, model=f"toy/{'x' * 129}")
    assert (refused["error"]["code"], refused["error"]["field"]) == ("invalid_request", "producer")
    assert len(rig.core.asked) == 2


async def test_on_the_shared_topic_a_request_says_who_asks(rig: Rig) -> None:
    await rig.ask({"inputs": [1, 2, 3, 4], "producer": "line-1"})
    await rig.ask({"inputs": [1, 2, 3, 4]})
    asked = [(request.producer, request.asked_by) for request in rig.core.asked]
    assert asked == [("line-1", "mqtt"), ("anonymous", "mqtt")]


async def test_without_a_response_topic_the_result_is_published(rig: Rig) -> None:
    rig.client.publish("edge/gw/infer/toy", b'{"inputs": [1, 2, 3, 4]}')
    await until(lambda: rig.results, what="the result")
    assert rig.results[0][0] == "infer/toy"
    assert rig.results[0][1]["label"] == "yes"


async def test_mqtt_3_client(rig: Rig) -> None:
    old = paho.Client(paho.CallbackAPIVersion.VERSION2, protocol=paho.MQTTv311)
    old.connect("127.0.0.1", rig.broker.port)
    old.loop_start()
    old.publish("edge/gw/infer/toy", '{"inputs": [1, 2, 3, 4]}', qos=1)
    old.publish("plant/list", "[1, 2, 3, 4]")
    await until(lambda: len(rig.results) == 2, what="both results")
    old.disconnect()
    old.loop_stop()
    assert {name for name, _ in rig.results} == {"infer/toy", "named"}


@pytest.mark.parametrize(
    ("payload", "kind", "field", "code"),
    [
        (b"", None, "(payload)", "undecodable"),
        (b"{", None, "(payload)", "undecodable"),
        (b"\xff\xfe", None, "(payload)", "undecodable"),
        (b"[" * 4000, None, "(payload)", "undecodable"),
        (b'{"inputs": "' + b"\xc3\x28" + b'"}', None, "(payload)", "undecodable"),
        (b" " * 5000, None, "(payload)", "too_large"),
        (b"[1, 2, 3, 4]", None, "(body)", "invalid_request"),
        (b"{}", None, "inputs", "invalid_request"),
        ({"inputs": [1, 2, 3, 4], "colour": "red"}, None, "colour", "invalid_request"),
        ({"inputs": [1, 2, 3, 4], "model": "other"}, None, "model", "invalid_request"),
        ({"inputs": [1, 2, 3, 4], "model": 5}, None, "model", "invalid_request"),
        ({"inputs": [1, 2, 3]}, None, "inputs.x", "invalid_request"),
        ({"inputs": ["a", 2, 3, 4]}, None, "inputs.x", "invalid_request"),
        ({"inputs": [[1], [2, 3], 4]}, None, "inputs.x", "invalid_request"),
        (b'{"inputs": [1, 2, 3, NaN]}', None, "inputs.x", "invalid_request"),
        (b'{"inputs": [1, 2, 3, 1e999]}', None, "inputs.x", "invalid_request"),
        ({"inputs": [1, 2, 3, 10**400]}, None, "inputs.x", "invalid_request"),
        ({"inputs": {"z": [1]}}, None, "inputs.z", "invalid_request"),
        ({"inputs": [1, 2, 3, 4], "deadline_ms": "soon"}, None, "deadline_ms", "invalid_request"),
        (b'{"inputs": [1, 2, 3, 4], "deadline_ms": NaN}', None, "deadline_ms", "invalid_request"),
        ({"inputs": [1, 2, 3, 4]}, "text/html", "content-type", "invalid_request"),
        (b"12345", "application/octet-stream", "inputs.x", "invalid_request"),
        (b"\x00\x00\xc0\x7f" * 4, "application/octet-stream", "inputs.x", "invalid_request"),
    ],
)
async def test_malformed_requests_are_named_and_counted(
    rig: Rig, payload: object, kind: str | None, field: str, code: str
) -> None:
    reply = await rig.ask(payload, kind)
    assert (reply["error"]["code"], reply["error"]["field"]) == (code, field)
    assert rig.replies[-1].properties.get("status") == code
    assert rig.core.asked == []
    assert rig.door.counters.malformed == 1
    assert (await rig.ask({"inputs": [1, 2, 3, 4], "model": "toy"}))["label"] == "yes"


@pytest.mark.parametrize(
    ("option", "field"),
    [
        (("dtype", "complex"), "dtype"),
        (("scale", "nan"), "scale"),
        (("deadline_ms", "x"), "deadline_ms"),
        (("priority", "1.5"), "priority"),
        (("use_cache", "maybe"), "use_cache"),
        (("colour", "red"), "colour"),
        (("model", "other"), "model"),
    ],
)
async def test_wrong_options_are_named(rig: Rig, option: tuple[str, str], field: str) -> None:
    reply = await rig.ask(bytes(16), "application/octet-stream", option)
    assert reply["error"]["field"] == field


async def test_unknown_model(rig: Rig) -> None:
    reply = await rig.ask({"inputs": [1]}, model="nothing")
    assert reply["error"]["code"] == "unknown_model"
    assert "toy" in reply["error"]["message"]


async def test_refusals_and_faults_of_the_core_are_told(rig: Rig) -> None:
    def refuse(request: InferenceRequest) -> InferenceResult:
        raise Unavailable("everything is down", retry_after_s=2)

    rig.core.answer = refuse
    assert (await rig.ask({"inputs": [1, 2, 3, 4]}))["error"]["code"] == "unavailable"

    def fail(request: InferenceRequest) -> InferenceResult:
        raise ZeroDivisionError

    rig.core.answer = fail
    assert (await rig.ask({"inputs": [1, 2, 3, 4]}))["error"]["code"] == InferenceError.code
    rig.core.answer = None
    assert (await rig.ask({"inputs": [1, 2, 3, 4]}))["label"] == "yes"


async def test_too_many_at_once_are_refused(rig: Rig) -> None:
    rig.core.gate = asyncio.Event()
    for _ in range(4):
        rig.client.publish("edge/gw/infer/toy", b'{"inputs": [1, 2, 3, 4]}')
    await until(lambda: len(rig.core.asked) == 4, what="four are being answered")
    reply = await rig.ask({"inputs": [1, 2, 3, 4]})
    assert reply["error"]["code"] == "overloaded"
    assert reply["error"]["retry_after_s"] == 1.0
    rig.core.gate.set()
    await until(lambda: len(rig.results) == 4, what="the four answers")
    assert rig.door.in_flight == 0


@pytest.mark.parametrize("response_topic", ["a/#", "edge/gw/infer/toy", "\x7f"])
async def test_odd_response_topics_harm_nobody(rig: Rig, response_topic: str) -> None:
    properties = MessageProperties(response_topic=response_topic)
    message = Message("edge/gw/infer/toy", b'{"inputs": [1, 2, 3, 4]}', 0, False, properties, SystemClock.monotonic())
    rig.door._on_request(message)
    await until(lambda: rig.door.in_flight == 0, what="it is answered")
    assert (await rig.ask({"inputs": [1, 2, 3, 4]}))["label"] == "yes"
    assert rig.door.counters.requests == 2, "an answer is not taken for a request"


@pytest.mark.parametrize(
    ("topic", "payload", "sensor", "outputs"),
    [
        ("plant/pump-1/vibration", b'{"values": [2, 4, 6, 8], "at": 17}', "pump-1", [1.0, 2.0]),
        ("plant/p \xe4/vibration", b'{"values": [2, 4, 6, 8]}', "p--", [1.0, 2.0]),
        ("plant/raw", np.array([10, 20, 30, 40], "<i2").tobytes(), "raw", [1.0, 2.0]),
        ("plant/list", b"[1, 2, 3, 4]", "named", [1.0, 2.0]),
        ("plant/list", b'{"inputs": {"x": [1, 2, 3, 4]}, "unit": "g"}', "named", [1.0, 2.0]),
    ],
)
async def test_sensor_readings(rig: Rig, topic: str, payload: bytes, sensor: str, outputs: list[float]) -> None:
    rig.client.publish(topic, payload)
    await until(lambda: rig.results, what="the result")
    name, result = rig.results[0]
    assert name == result["sensor"] == sensor == rig.core.asked[0].producer
    assert result["outputs"]["y"][0] == pytest.approx(outputs)


async def test_sensor_settings_reach_the_request(rig: Rig) -> None:
    rig.client.publish("plant/pump-1/vibration", b'{"values": [2, 4, 6, 8]}')
    rig.client.publish("plant/raw", bytes(8))
    rig.client.publish("plant/list", b"[1, 2, 3, 4]")
    await until(lambda: len(rig.core.asked) == 3, what="three readings")
    vibration, raw, named = rig.core.asked
    assert (vibration.latency_class, vibration.priority) == (LatencyClass.REALTIME, 9)
    assert raw.deadline - raw.received == pytest.approx(0.042)
    assert not named.use_cache


@pytest.mark.parametrize(
    ("topic", "payload", "field"),
    [
        ("plant/a/vibration", b"nonsense", "(payload)"),
        ("plant/a/vibration", b"[1, 2, 3, 4]", "values"),
        ("plant/a/vibration", b'{"values": "many"}', "inputs.x"),
        ("plant/a/vibration", b'{"values": null}', "inputs.x"),
        ("plant/a/vibration", b'{"values": [1, 2, 3, NaN]}', "inputs.x"),
        ("plant/raw", b"123", "inputs.x"),
        ("plant/list", b"{}", "inputs"),
        ("plant/list", b" " * 5000, "(payload)"),
    ],
)
async def test_malformed_readings_are_named(rig: Rig, topic: str, payload: bytes, field: str) -> None:
    rig.client.publish(topic, payload)
    await until(lambda: rig.results, what="the error")
    assert rig.results[0][1]["error"]["field"] == field
    assert rig.results[0][1]["sensor"]
    assert rig.door.counters.malformed == 1


async def test_slow_sensor_does_not_hold_up_others(rig: Rig) -> None:
    rig.core.gate = asyncio.Event()
    rig.client.publish("plant/pump-1/vibration", b'{"values": [2, 4, 6, 8]}')
    await until(lambda: len(rig.core.asked) == 1, what="the first reading")
    rig.client.publish("plant/pump-1/vibration", b'{"values": [2, 4, 6, 8]}')
    await until(lambda: rig.results, what="the second is refused")
    assert rig.results[0][1]["error"]["code"] == "overloaded"
    rig.client.publish("plant/pump-2/vibration", b'{"values": [2, 4, 6, 8]}')
    await until(lambda: len(rig.core.asked) == 2, what="another sensor's reading is taken")


async def test_retained_messages_are_not_asked_again(rig: Rig) -> None:
    await rig.client.publish_acknowledged("plant/list", b"[1, 2, 3, 4]", retain=True)
    await until(lambda: len(rig.core.asked) == 1, what="it is asked once")
    late = MqttDoor(
        rig.core,
        MqttSection(broker=rig.broker.url),
        {"plant/list": SensorSection(model="toy")},
        "other",
        Metrics(),
        SystemClock(),
    )
    await late.start()
    await until(lambda: late.counters.replayed == 1, what="the retained reading comes and is left out")
    await late.stop()
    assert len(rig.core.asked) == 1


async def test_status_is_retained_changes_and_ends_offline(rig: Rig) -> None:
    await until(lambda: rig.states, what="a status")
    assert rig.states[-1]["state"] == "online"
    assert rig.states[-1]["ready"] is True
    assert rig.states[-1]["targets"][0]["name"] == "gateway"
    rig.core.readiness = (False, "no target can be asked")
    await until(lambda: rig.states[-1]["reason"] == "no target can be asked", what="the change")
    rig.door.link._connection._close_socket()  # type: ignore[union-attr]
    await until(lambda: rig.states[-1]["state"] == "offline", what="the last will")
    await until(lambda: rig.states[-1]["state"] == "online", what="it is back")
    await rig.door.stop()
    await until(lambda: rig.states[-1]["state"] == "offline", what="the goodbye")


async def test_what_is_kept_is_retained_replaced_and_there_again_after_a_reconnect(rig: Rig) -> None:
    told: list[Message] = []
    await rig.client.subscribe("edge/gw/alarms/#", told.append)
    rig.door.keep("alarms/drift/toy/small", {"active": False})
    rig.door.keep("alarms/drift/toy/small", {"active": True})
    await until(lambda: len(told) == 2, what="both")
    assert told[-1].topic == "edge/gw/alarms/drift/toy/small"
    assert json.loads(told[-1].payload) == {"gateway": "gw", "active": True}
    rig.door.link._connection._close_socket()  # type: ignore[union-attr]
    await until(lambda: len(told) == 3, what="it is said again")
    late = MqttLink(LinkOptions(rig.broker.url, "late"))
    kept: list[Message] = []
    await late.subscribe("edge/gw/alarms/#", kept.append)
    await late.start()
    await until(lambda: kept, what="who comes later hears of it")
    assert kept[0].retain
    assert json.loads(kept[0].payload)["active"] is True
    await late.stop()


async def test_an_alarm_for_which_there_was_no_room_is_published_later(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[Message] = []
    await rig.client.subscribe("edge/gw/alarms/#", told.append)

    def full(*given: Any, **named: Any) -> None:
        raise LinkFull("the window is full")

    with monkeypatch.context() as patch:
        patch.setattr(rig.door.link, "publish", full)
        rig.door.keep("alarms/outbox", {"active": True})
    await until(lambda: told, what="it is said when there is room")
    assert json.loads(told[0].payload) == {"gateway": "gw", "active": True}


async def test_closed_door_answers_what_is_inside(rig: Rig) -> None:
    rig.core.gate = asyncio.Event()
    rig.client.publish("edge/gw/infer/toy", b'{"inputs": [1, 2, 3, 4]}')
    await until(lambda: rig.core.asked, what="one is inside")
    await rig.door.close_door()
    await rig.client.publish_acknowledged("edge/gw/infer/toy", b'{"inputs": [1, 2, 3, 4]}')
    rig.core.gate.set()
    await until(lambda: rig.results, what="the answer")
    assert len(rig.core.asked) == 1


async def test_a_broker_that_hangs_does_not_use_up_the_time_to_stop(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    async def never(topic_filter: str) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(rig.door.link, "unsubscribe", never)
    monkeypatch.setattr(mqtt_door, "STOP_S", 0.05)
    async with asyncio.timeout(5):
        await rig.door.close_door()
