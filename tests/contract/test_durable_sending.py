"""What delivery promises of a broker's refusals and of connections that end, held against real brokers."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from agent.config import OutboxSection
from agent.core.clock import SystemClock
from agent.durable.asker import put
from agent.durable.records import IDEMPOTENCY_KEY, LOCAL
from agent.durable.sender import Sender
from agent.link.mqtt import LinkOptions, Message, MqttLink
from agent.store.outbox import Item, Outbox
from tests.brokers import MOSQUITTO, Broker, mosquitto, running, until

pytestmark = pytest.mark.skipif(MOSQUITTO is None, reason="mosquitto is not installed")
SETTINGS = OutboxSection(enabled=True, commit_wait_ms=0, max_in_flight=8, drain_per_s=100_000, retry_max_s=1)


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[Broker]:
    with running(mosquitto(tmp_path)) as broker:
        yield broker


class Rig:
    """An outbox, a sender and somebody who listens."""

    def __init__(self, folder: Path, broker: Broker, settings: OutboxSection = SETTINGS, **options: Any) -> None:
        loop = asyncio.get_running_loop()
        clock = SystemClock()
        self.outbox = Outbox(
            folder / "outbox.sqlite", settings, clock, deliver=lambda call: void(loop.call_soon_threadsafe(call))
        )
        fast = {"backoff_initial_s": 0.02, "backoff_max_s": 0.1}
        self.link = MqttLink(LinkOptions(broker.url, "sender", **fast, **options), clock)
        self.listener = MqttLink(LinkOptions(broker.url, "listener", **fast), clock)
        self.sender = Sender(LOCAL, self.outbox, self.link, settings, clock)
        self.outbox.stored = lambda fresh: self.sender.wake()
        self.got: list[Message] = []
        self.most_in_flight = 0

    async def start(self) -> None:
        await self.listener.subscribe("out/#", self._heard)
        await self.listener.start()
        await until(lambda: self.listener.connected)
        self.outbox.start()
        await until(lambda: self.outbox.ready)
        await self.link.start()
        self.work = asyncio.create_task(self.sender.work())

    def _heard(self, message: Message) -> None:
        self.most_in_flight = max(self.most_in_flight, self.sender.in_flight)
        self.got.append(message)

    async def store(self, *names: str, topic: str = "out/x", body: bytes = b"{}") -> None:
        head = json.dumps({"topic": topic, "status": "ok", "correlation": "0a0b"}).encode()
        await put(self.outbox, [Item(LOCAL, "p", name, head, body) for name in names])

    def seen(self) -> list[str]:
        """The first of each idempotency key, in the order in which they came."""
        return list(dict.fromkeys(str(message.properties.get(IDEMPOTENCY_KEY)) for message in self.got))

    async def empty(self) -> None:
        await until(lambda: not self.outbox.rows(LOCAL), what="an empty outbox")

    async def stop(self) -> None:
        self.work.cancel()
        await self.link.stop()
        await self.listener.stop()
        await asyncio.to_thread(self.outbox.close)


def void(_: object) -> None:
    return None


@pytest.fixture
async def rig(tmp_path: Path, broker: Broker) -> AsyncIterator[Rig]:
    rig = Rig(tmp_path, broker)
    await rig.start()
    yield rig
    await rig.stop()


async def test_delivered_in_order_with_their_properties_and_deleted(rig: Rig) -> None:
    names = [str(number) for number in range(300)]
    await rig.store(*names)
    await rig.empty()
    await until(lambda: len(rig.got) == 300)
    assert rig.seen() == names
    properties = rig.got[0].properties
    assert (properties.get("status"), properties.correlation_data) == ("ok", b"\x0a\x0b")
    assert properties.message_expiry_s is not None
    assert SETTINGS.max_age_s - 60 < properties.message_expiry_s <= SETTINGS.max_age_s
    assert rig.most_in_flight <= SETTINGS.max_in_flight
    assert rig.sender.status()["delivered"] == 300
    assert rig.outbox.stats()["events"]["delivered"] == 300


async def test_a_broker_that_dies_loses_nothing(rig: Rig, broker: Broker) -> None:
    await rig.store(*(str(number) for number in range(50)))
    await until(lambda: len(rig.got) >= 10)
    broker.kill()
    await rig.store(*(str(number) for number in range(50, 100)))
    await until(lambda: not rig.link.connected)
    broker.start()
    await rig.empty()
    # What the broker had acknowledged and not passed on died with it; nothing else may be missing.
    assert rig.outbox.stats()["events"]["delivered"] == 100
    later = {str(number) for number in range(50, 100)}
    await until(lambda: len(later & set(rig.seen())) + rig.sender.counters.unheard >= 50)


async def test_what_can_never_be_delivered_is_given_up_and_counted(rig: Rig) -> None:
    await rig.store("wrong topic", topic="a/+/b")
    await put(rig.outbox, [Item(LOCAL, "p", "no head", b"not json", b"")])
    await rig.store("fine")
    await rig.empty()
    await until(lambda: rig.got)
    assert rig.seen() == ["fine"]
    assert rig.sender.counters.undeliverable == 2
    assert rig.outbox.stats()["events"]["undeliverable"] == 2


async def test_too_large_for_the_broker(tmp_path: Path) -> None:
    with running(mosquitto(tmp_path, "max_packet_size 2000")) as broker:
        rig = Rig(tmp_path, broker)
        await rig.start()
        await rig.store("large", body=bytes(5000))
        await rig.store("small")
        await rig.empty()
        await until(lambda: rig.got)
        assert rig.seen() == ["small"]
        await rig.stop()


async def test_a_refusal_holds_the_route_and_is_tried_again(tmp_path: Path) -> None:
    """The broker's access list forbids a topic; when it allows it, what waited comes in order."""
    acl = tmp_path / "acl"
    acl.write_text("topic read out/#\n")
    with running(mosquitto(tmp_path, f"acl_file {acl}\nuser root")) as broker:
        rig = Rig(tmp_path, broker)
        await rig.start()
        await rig.store("1", "2", "3")
        await until(lambda: rig.sender.counters.refused, what="a refusal")
        assert rig.outbox.rows(LOCAL) == 3
        acl.write_text("topic readwrite out/#\n")
        broker.kill()
        broker.start()
        await rig.empty()
        await until(lambda: len(rig.got) >= 3 or rig.sender.counters.unheard)
        assert rig.sender.counters.undeliverable == 0
        await rig.stop()


async def test_unacknowledged_messages_come_again_in_the_same_session(tmp_path: Path, broker: Broker) -> None:
    options = LinkOptions(
        broker.url, "kept", session_expiry_s=60, manual_acknowledgement=True, backoff_initial_s=0.02, backoff_max_s=0.1
    )
    got: list[Message] = []
    first = MqttLink(options)
    await first.subscribe("in", got.append)
    await first.start()
    await until(lambda: first.connected)
    other = MqttLink(LinkOptions(broker.url, "other"))
    await other.start()
    await until(lambda: other.connected)
    for number in range(3):
        await other.publish_acknowledged("in", str(number).encode())
    await until(lambda: len(got) == 3)
    assert [message.again for message in got] == [False] * 3
    assert got[0].acknowledge is not None
    got[0].acknowledge()
    await first.stop()
    await other.publish_acknowledged("in", b"3")
    again: list[Message] = []
    second = MqttLink(options)
    await second.subscribe("in", again.append)
    await second.start()
    await until(lambda: len(again) == 3)
    assert [(message.payload, message.again) for message in again] == [(b"1", True), (b"2", True), (b"3", False)]
    assert again[0].mid == got[1].mid
    assert got[1].acknowledge is not None
    got[1].acknowledge()  # of a connection that is gone: nothing happens
    await second.stop()
    await other.stop()


async def test_a_subscription_that_a_former_daemon_left_does_not_hold_up_the_others(broker: Broker) -> None:
    """The broker keeps it with the session; what comes by it is nobody's, and is acknowledged all the same."""
    fast = {"backoff_initial_s": 0.02, "backoff_max_s": 0.1}
    options = LinkOptions(
        broker.url, "kept", session_expiry_s=60, manual_acknowledgement=True, receive_maximum=4, **fast
    )
    former = MqttLink(options)
    for topic in ("plant/old", "in"):
        await former.subscribe(topic, void)
    await former.start()
    await until(lambda: former.connected)
    await former.stop()
    other = MqttLink(LinkOptions(broker.url, "other", **fast))
    await other.start()
    await until(lambda: other.connected)
    got: list[Message] = []
    link = MqttLink(options)
    await link.subscribe("in", got.append)
    await link.start()
    await until(lambda: link.connected)
    for _ in range(8):
        await other.publish_acknowledged("plant/old", b"x")
    await other.publish_acknowledged("in", b"request")
    await until(lambda: got, what="what it does want")
    assert link.counters.unrouted == 8
    await link.stop()
    await other.stop()
