"""The cloud lane, on a real broker, with the worker's side played by the test."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from agent.config import LaneSection
from agent.core.clock import SystemClock
from agent.core.errors import TargetBusy, TargetError, TargetFailed, TargetTimeout, TargetUnavailable
from agent.core.types import InferenceRequest, TargetAnswer, Tier
from agent.link.mqtt import LinkOptions, Message, MessageProperties, MqttLink
from agent.targets.cloud import CloudLane
from agent.wire import lane as protocol
from agent.wire import oip
from tests.brokers import MOSQUITTO, Broker, mosquitto, running, until
from tests.unit.mqtt_fakes import LARGE, SMALL, catalog, request

pytestmark = pytest.mark.skipif(MOSQUITTO is None, reason="mosquitto is not installed")
TOPIC = "lanes/a"


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[Broker]:
    with running(mosquitto(tmp_path)) as started:
        yield started


@dataclass
class Rig:
    """A lane, and a link with which a test plays the worker."""

    broker: Broker
    lane: CloudLane
    far: MqttLink
    requests: list[Message]

    async def present(self, *digests: str, worker: str = "w1", expiry_s: int | None = 90) -> None:
        before = dict(self.lane._workers)
        models = tuple(protocol.ServedModel("toy", "any", digest, "fake/cpu") for digest in digests)
        presence = protocol.Presence(worker, 2, models)
        properties = MessageProperties(message_expiry_s=expiry_s)
        topic = protocol.presence_topic(TOPIC, worker)
        await self.far.publish_acknowledged(topic, presence.to_bytes(), retain=True, properties=properties)
        await until(lambda: self.lane._workers != before, what="presence arrives")

    async def ask(self, question: InferenceRequest | None = None, budget_s: float = 5.0) -> TargetAnswer:
        question = question or request(budget_s=budget_s)
        family = catalog().family("toy")
        variant = self.lane.variant_for(family, question.variant)
        assert variant is not None
        return await self.lane.infer(question, family, variant, SystemClock.monotonic() + budget_s)

    async def serve(self, digest: str = LARGE) -> None:
        topic = protocol.request_topic(TOPIC, "toy", digest)
        await self.far.subscribe(f"$share/workers/{topic}", self.requests.append)

    def reply(self, message: Message, status: str = "ok", payload: bytes | None = None, **changes: object) -> None:
        execution = protocol.Execution(LARGE, "fake/cpu", "w1", 0.001, 0.002).to_parameters() | changes
        response = oip.OipResponse("toy", {"y": np.array([[0.25, 0.75]], np.float32)}, "large", parameters=execution)
        data, length = oip.encode_response(response)
        user = ((protocol.STATUS, status), (oip.HEADER_LENGTH, str(length)))
        properties = MessageProperties(correlation_data=message.properties.correlation_data, user=user)
        self.far.publish(message.properties.response_topic or "", payload or data, properties=properties)


@pytest.fixture
async def rig(broker: Broker) -> AsyncIterator[Rig]:
    section = LaneSection(name="gpu-a", broker=broker.url, topic=TOPIC, cost_per_request=0.002)
    lane = CloudLane(section, "gw", catalog(), SystemClock(), max_bytes=1e9)
    far = MqttLink(LinkOptions(broker.url, "far"))
    await lane.start()
    await far.start()
    await until(lambda: lane.link.connected and far.connected, what="both connect")
    yield Rig(broker, lane, far, [])
    await lane.stop()
    await far.stop()


@pytest.mark.parametrize(
    ("kind", "backup", "tier", "order"),
    [
        ("gpu", False, Tier.CLOUD_GPU, 20),
        ("serverless", False, Tier.CLOUD_SERVERLESS, 30),
        ("gpu", True, Tier.CLOUD_GPU, 40),
        ("serverless", True, Tier.CLOUD_SERVERLESS, 50),
    ],
)
def test_traits(kind: str, backup: bool, tier: Tier, order: int) -> None:
    section = LaneSection.model_validate(
        {"name": "a", "broker": "mqtt://h", "kind": kind, "backup": backup, "region": "eu", "timeout_ms": 1500}
    )
    traits = CloudLane(section, "gw", catalog(), SystemClock(), max_bytes=5e6).traits
    assert (traits.name, traits.tier, traits.order, traits.backup) == ("cloud:a", tier, order, backup)
    assert (traits.region, traits.timeout_s, traits.max_bytes) == ("eu", 1.5, 5e6)


async def test_available_only_with_a_worker(rig: Rig) -> None:
    assert rig.lane.availability().reason == "no worker on lane gpu-a"
    await rig.present(SMALL)
    assert rig.lane.availability().available
    await rig.far.publish_acknowledged(protocol.presence_topic(TOPIC, "w1"), b"", retain=True)
    await until(lambda: not rig.lane.availability().available, what="the worker leaves")


async def test_not_connected_says_why(broker: Broker) -> None:
    lane = CloudLane(LaneSection(name="b", broker=broker.url), "gw", catalog(), SystemClock(), max_bytes=1e9)
    assert lane.availability().reason == "lane b is not connected: not started"


async def test_variant_is_one_that_a_worker_has(rig: Rig) -> None:
    family = catalog().family("toy")
    assert rig.lane.variant_for(family, None) is None
    await rig.present(SMALL)
    assert rig.lane.variant_for(family, None) == family.variants["small"]
    assert rig.lane.variant_for(family, "large") is None
    await rig.present(LARGE, worker="w2")
    assert rig.lane.variant_for(family, None) == family.variants["large"]
    assert rig.lane.variant_for(family, "small") == family.variants["small"]
    assert rig.lane.variant_for(family, "edge") is None


async def test_presence_that_is_not_refreshed_ends(rig: Rig) -> None:
    await rig.present(SMALL, expiry_s=1)
    rig.lane._workers["w1"].until = 0.0
    rig.lane._changed()
    assert rig.lane.availability().reason == "no worker on lane gpu-a"


@pytest.mark.parametrize(
    "payload", [b"x", b"[]", b"{}", b'{"worker": "w", "max_concurrent": 0, "models": []}', b"\xff"]
)
async def test_unusable_presence_is_counted(rig: Rig, payload: bytes) -> None:
    await rig.far.publish_acknowledged(protocol.presence_topic(TOPIC, "bad"), payload, retain=True)
    await until(lambda: rig.lane.counters.malformed == 1, what="it is counted")
    assert not rig.lane.availability().available


async def test_request_and_answer(rig: Rig) -> None:
    await rig.serve()
    await rig.present(LARGE)
    asking = asyncio.ensure_future(rig.ask(request(idempotency_key="key-1"), budget_s=4.5))
    await until(lambda: rig.requests, what="the request")
    message = rig.requests[0]
    assert message.topic == f"{TOPIC}/requests/toy/{LARGE}"
    assert message.properties.get(protocol.IDEMPOTENCY_KEY) == "key-1"
    budget_ms = float(message.properties.get(protocol.BUDGET_MS) or "nan")
    assert 0 < budget_ms <= 4500
    assert message.properties.message_expiry_s == math.ceil(budget_ms / 1e3)
    assert (message.properties.response_topic or "").startswith(f"{TOPIC}/replies/gw/")
    sent = oip.decode_request(message.payload, oip.header_length(message.properties.get(oip.HEADER_LENGTH)))
    np.testing.assert_array_equal(sent.inputs["x"], [[1, 2, 3, 4]])
    rig.reply(message)
    answer = await asking
    np.testing.assert_array_equal(answer.outputs["y"], np.array([[0.25, 0.75]], np.float32))
    assert (answer.provider, answer.queue_s, answer.compute_s) == ("fake/cpu", 0.001, 0.002)
    assert answer.link_s >= 0
    assert answer.bytes_sent == len(message.payload)
    assert rig.lane._waiting == {}


async def test_nobody_subscribed_is_told_at_once(rig: Rig) -> None:
    await rig.present(LARGE)
    with pytest.raises(TargetUnavailable, match="no worker on lane gpu-a takes requests"):
        await asyncio.wait_for(rig.ask(budget_s=60.0), 10)
    assert rig.lane.counters.unserved == 1
    assert rig.lane._waiting == {}


@pytest.mark.parametrize(
    ("status", "error"),
    [("busy", TargetBusy), ("expired", TargetTimeout), ("failed", TargetFailed), ("invalid", TargetFailed)],
)
async def test_errors_are_translated(rig: Rig, status: str, error: type[TargetError]) -> None:
    await rig.serve()
    await rig.present(LARGE)
    asking = asyncio.ensure_future(rig.ask())
    await until(lambda: rig.requests, what="the request")
    rig.reply(rig.requests[0], status, protocol.encode_error("what was wrong"))
    with pytest.raises(error, match="what was wrong"):
        await asking


@pytest.mark.parametrize(
    ("changes", "payload"),
    [
        ({"model_sha256": SMALL}, None),
        ({"queue_ms": -1}, None),
        ({"compute_ms": "fast"}, None),
        ({"provider": ""}, None),
        ({}, b"\x00\x01"),
        ({}, b"{}" + b" " * 500),
        ({}, json.dumps({"outputs": [{"name": "y", "datatype": "FP32", "shape": [2], "data": [1, 2]}]}).encode()),
    ],
)
async def test_unusable_replies_fail_the_attempt(rig: Rig, changes: dict[str, object], payload: bytes | None) -> None:
    await rig.serve()
    await rig.present(LARGE)
    asking = asyncio.ensure_future(rig.ask())
    await until(lambda: rig.requests, what="the request")
    rig.reply(rig.requests[0], payload=payload, **changes)
    with pytest.raises(TargetFailed, match="unusable reply"):
        await asking
    assert rig.lane.counters.malformed == 1


async def test_deadline_ends_the_attempt_and_the_late_reply_is_counted(rig: Rig) -> None:
    await rig.serve()
    await rig.present(LARGE)
    with pytest.raises(TargetTimeout):
        await rig.ask(budget_s=0.05)
    assert rig.lane._waiting == {}
    await until(lambda: rig.requests, what="the request")
    rig.reply(rig.requests[0])
    await until(lambda: rig.lane.counters.late == 1, what="the late reply is counted")
    with pytest.raises(TargetTimeout, match="before the request could be sent"):
        await rig.ask(budget_s=0.0)


async def test_cancelled_attempt_leaves_nothing(rig: Rig) -> None:
    await rig.serve()
    await rig.present(LARGE)
    asking = asyncio.ensure_future(rig.ask())
    await until(lambda: rig.requests, what="the request")
    asking.cancel()
    await asyncio.wait([asking])
    assert rig.lane._waiting == {}


async def test_lost_link_fails_everyone_who_waits(rig: Rig) -> None:
    await rig.serve()
    await rig.present(LARGE)
    asking = [asyncio.ensure_future(rig.ask(budget_s=60.0)) for _ in range(5)]
    await until(lambda: len(rig.requests) == 5, what="five requests")
    rig.broker.kill()
    outcomes = await asyncio.wait_for(asyncio.gather(*asking, return_exceptions=True), 10)
    assert [type(outcome) for outcome in outcomes] == [TargetUnavailable] * 5
    assert rig.lane._waiting == {}
    assert "not connected" in rig.lane.availability().reason


async def test_more_at_once_than_the_broker_acknowledges(rig: Rig) -> None:
    await rig.far.subscribe(
        f"$share/workers/{protocol.request_topic(TOPIC, 'toy', LARGE)}", lambda message: rig.reply(message)
    )
    await rig.present(LARGE)
    answers = await asyncio.gather(*(rig.ask() for _ in range(100)))
    assert len(answers) == 100
    assert rig.lane.status()["answers"] == 100


async def test_a_request_that_is_too_large_is_not_held_against_the_lane(rig: Rig) -> None:
    await rig.present(LARGE)
    connection = rig.lane.link._connection
    assert connection is not None
    connection.max_packet_bytes = 64
    with pytest.raises(TargetError, match="more than the broker takes") as refused:
        await rig.ask()
    assert not refused.value.counts
    assert rig.lane._waiting == {}
