"""The durable door as the guard's: who asks, how often, as which producer, and what is put on record of it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from functools import partial
from typing import Any

import pytest
from mqtt_fakes import FakeCore, FakeDesk

from agent.config import LimitsSection, MqttSection, ProducerSection, RateSection, SecuritySection, SensorSection
from agent.core.clock import ManualClock
from agent.core.errors import AuditUnavailable
from agent.ingress.durable import DurableDoor
from agent.link.mqtt import Message, MessageProperties
from agent.security.access import Guard
from agent.telemetry.metrics import Metrics
from tests.brokers import until

READING = json.dumps([1, 2, 3, 4]).encode()
QUESTION = json.dumps({"inputs": [1, 2, 3, 4]}).encode()


class Rig:
    def __init__(self, *, shared: bool = True) -> None:
        self.clock = ManualClock()
        limits = LimitsSection(identity=RateSection(per_s=1, burst=3), producer=RateSection(per_s=100, burst=100))
        producers = {"slow": ProducerSection(rate=RateSection(per_s=1, burst=1))}
        self.guard = Guard(SecuritySection(limits=limits), self.clock, producers)
        self.desk = FakeDesk()
        section = MqttSection(shared_requests=shared, max_payload_bytes=1024)
        sensors = {"plant/+": SensorSection(model="toy", durable=True)}
        self.door = DurableDoor(FakeCore(), self.desk, section, sensors, "gw", Metrics(), self.guard)  # type: ignore[arg-type]
        self.acknowledged = 0

    def _acknowledge(self) -> None:
        self.acknowledged += 1

    async def send(self, topic: str, payload: bytes = QUESTION) -> tuple[str, dict[str, Any]] | None:
        """Status and document of what is told; None: nothing, it was accepted."""
        before = self.acknowledged
        levels = topic.split("/")
        (callback,) = [
            callback
            for topic_filter, callback in self.desk.link.callbacks.items()
            if len(topic_filter.split("/")) == len(levels)
            and all(a in ("+", b) for a, b in zip(topic_filter.split("/"), levels, strict=True))
        ]
        told = len(self.desk.link.published)
        message = Message(
            topic, payload, 1, False, MessageProperties(), self.clock.monotonic(), 7, acknowledge=self._acknowledge
        )
        callback(message)
        await until(lambda: self.acknowledged > before, what="the PUBACK")
        if len(self.desk.link.published) == told:
            return None
        _, status, document = self.desk.link.published[-1]
        return status, document


@pytest.fixture
async def rig() -> AsyncIterator[Rig]:
    rig = Rig()
    await rig.door.start()
    yield rig
    await asyncio.wait_for(rig.door.close(), 5)


async def test_who_asks_is_the_producer_in_the_topic(rig: Rig) -> None:
    assert await rig.send("edge/gw/durable/toy/m7") is None
    assert await rig.send("edge/gw/durable/toy") is None
    assert await rig.send("plant/press", READING) is None
    who = [(request.asked_by, request.producer, request.durable) for request in rig.desk.accepted]
    assert who == [("mqtt:m7", "m7", True), ("mqtt", "anonymous", True), ("sensor:press", "press", True)]


async def test_nobody_asks_as_another(rig: Rig) -> None:
    told = await rig.send("edge/gw/durable/toy/m7", json.dumps({"inputs": [1, 2, 3, 4], "producer": "m8"}).encode())
    assert told is not None
    assert (told[0], told[1]["error"]["field"]) == ("forbidden", "producer")
    told = await rig.send("edge/gw/durable/toy/" + "m" * 129)
    assert told is not None
    assert (told[0], told[1]["error"]["field"]) == ("invalid_request", "producer")
    assert rig.desk.accepted == []
    assert rig.guard.refusals == {"forbidden": 1, "invalid_request": 1}


async def test_an_identity_beyond_its_rate(rig: Rig) -> None:
    outcomes = [await rig.send("edge/gw/durable/toy/m7") for _ in range(4)]
    assert outcomes[:3] == [None] * 3
    assert outcomes[3] is not None
    assert outcomes[3][0] == "rate_limited"
    assert await rig.send("edge/gw/durable/toy/m8") is None, "another one's rate is its own"
    rig.clock.advance(1.0)
    assert await rig.send("edge/gw/durable/toy/m7") is None
    assert rig.guard.refusals == {"rate_limited": 1}


@pytest.mark.parametrize(("topic", "payload"), [("edge/gw/durable/toy/slow", QUESTION), ("plant/slow", READING)])
async def test_a_producer_beyond_its_rate(rig: Rig, topic: str, payload: bytes) -> None:
    assert await rig.send(topic, payload) is None
    told = await rig.send(topic, payload)
    assert told is not None
    assert told[0] == "rate_limited"
    assert len(rig.desk.accepted) == 1


async def test_the_shared_topic_can_be_closed() -> None:
    rig = Rig(shared=False)
    await rig.door.start()
    told = await rig.send("edge/gw/durable/toy")
    assert told is not None
    assert told[0] == "forbidden"
    assert await rig.send("edge/gw/durable/toy/m7") is None


async def test_what_the_desk_refuses_is_on_record_too(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    rig.desk.fault = AuditUnavailable("the audit trail cannot be written")
    told = await rig.send("edge/gw/durable/toy/m7")
    assert told is not None
    assert told[0] == "audit_unavailable"
    (record,) = [record for record in caplog.records if record.message == "turned away"]
    assert (record.__dict__["door"], record.__dict__["who"]) == ("durable", "mqtt:m7")


async def test_too_large_is_refused_before_it_is_read(rig: Rig) -> None:
    told = await rig.send("edge/gw/durable/toy/m7", b"[" * 1025)
    assert told is not None
    assert told[0] == "too_large"


async def test_while_the_disk_stalls_nothing_is_acknowledged_on_any_connection(rig: Rig) -> None:
    """The broker sends a whole window again after a reconnect; a refusal would be acknowledged, and let more come."""
    stalled = asyncio.Event()
    accept = rig.desk.accept

    async def later(*given: Any, **named: Any) -> Any:
        await stalled.wait()
        return await accept(*given, **named)

    rig.desk.accept = later  # type: ignore[method-assign]
    rig.door._guard = Guard(SecuritySection(), rig.clock)
    take = rig.desk.link.callbacks["plant/+"]

    def send(number: int, again: bool) -> None:
        properties, now = MessageProperties(), rig.clock.monotonic()
        take(Message("plant/a", READING, 1, False, properties, now, number, again, acknowledge=rig._acknowledge))

    window = rig.door._limit
    for number in range(1, window + 1):
        send(number, False)
    rig.desk.link.lost()
    for number in range(1, window + 1):
        send(number, True)
    await asyncio.sleep(0)
    assert rig.acknowledged == 0
    stalled.set()
    await until(lambda: rig.acknowledged == window, what="what the new connection is owed")


async def test_a_leftover_subscriptions_message_has_its_turn_too(rig: Rig) -> None:
    """MQTT asks for PUBACKs in the order of the messages; some brokers end a connection that does not keep it."""
    stored = asyncio.Event()
    accept = rig.desk.accept

    async def later(*given: Any, **named: Any) -> Any:
        await stored.wait()
        return await accept(*given, **named)

    rig.desk.accept = later  # type: ignore[method-assign]
    sent: list[int] = []
    assert rig.desk.link.unrouted is not None
    callbacks = (rig.desk.link.callbacks["plant/+"], rig.desk.link.unrouted)
    for number, (topic, callback) in enumerate(zip(("plant/a", "plant/old/b"), callbacks, strict=True)):
        properties, now = MessageProperties(), rig.clock.monotonic()
        puback = partial(sent.append, number)
        callback(Message(topic, READING, 1, False, properties, now, number + 1, acknowledge=puback))
    await asyncio.sleep(0)
    assert sent == []
    stored.set()
    await until(lambda: sent == [0, 1], what="both, in their order")
