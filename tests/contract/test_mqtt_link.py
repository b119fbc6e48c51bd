"""What `link.mqtt` promises, held against real brokers."""

from __future__ import annotations

import asyncio
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import paho.mqtt.client as paho
import pytest
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from agent.core.errors import LinkError
from agent.link.mqtt import (
    SOON_LOSSES,
    LinkFull,
    LinkOptions,
    LinkState,
    Message,
    MessageProperties,
    MqttLink,
    Will,
)
from hil.linkcut import LinkCut
from tests.brokers import MOSQUITTO, Broker, SilentServer, free_port, has_rumqttd, mosquitto, rumqttd, running, until

needs_mosquitto = pytest.mark.skipif(MOSQUITTO is None, reason="mosquitto is not installed")
BROKERS = [
    pytest.param(mosquitto, id="mosquitto", marks=needs_mosquitto),
    pytest.param(rumqttd, id="rumqttd", marks=pytest.mark.skipif(not has_rumqttd(), reason="no iotcore wheel")),
]


@pytest.fixture(params=BROKERS)
def broker(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Broker]:
    with running(request.param(tmp_path)) as started:
        yield started


@pytest.fixture
def mosquitto_broker(tmp_path: Path) -> Iterator[Broker]:
    if MOSQUITTO is None:
        pytest.skip("mosquitto is not installed")
    with running(mosquitto(tmp_path)) as started:
        yield started


async def run(*command: str) -> None:
    process = await asyncio.create_subprocess_exec(*command, stderr=asyncio.subprocess.PIPE)
    _, errors = await process.communicate()
    assert process.returncode == 0, errors.decode()


class Links:
    """Opens links and closes them at the end of the test."""

    def __init__(self) -> None:
        self._links: list[MqttLink] = []

    def make(self, url: str, name: str, **options: Any) -> MqttLink:
        settings = {"backoff_initial_s": 0.02, "backoff_max_s": 0.2, "connect_timeout_s": 5.0} | options
        link = MqttLink(LinkOptions(url, name, **settings), name=name)
        self._links.append(link)
        return link

    async def open(self, url: str, name: str, **options: Any) -> MqttLink:
        link = self.make(url, name, **options)
        await link.start()
        await until(lambda: link.connected, what=f"{name} connects")
        return link

    async def close(self) -> None:
        for link in self._links:
            await link.stop()


@pytest.fixture
async def links() -> Any:
    opened = Links()
    yield opened
    await opened.close()


async def test_request_and_response_with_all_properties(broker: Broker, links: Links) -> None:
    server, client = await links.open(broker.url, "server"), await links.open(broker.url, "client")
    requests: list[Message] = []
    replies: asyncio.Queue[Message] = asyncio.Queue()

    def answer(message: Message) -> None:
        requests.append(message)
        properties = MessageProperties(correlation_data=message.properties.correlation_data, user=(("status", "ok"),))
        server.publish(message.properties.response_topic or "", message.payload[::-1], properties=properties)

    await server.subscribe("lane/requests/+", answer)
    await client.subscribe("lane/replies/me", replies.put_nowait)
    properties = MessageProperties(
        "application/octet-stream", "lane/replies/me", b"\x00\xff\x01", 30, (("budget-ms", "12.5"), ("note", "größer"))
    )
    client.publish("lane/requests/a", b"\x00abc\xff", qos=1, properties=properties)
    reply = await asyncio.wait_for(replies.get(), 10)
    assert requests[0].topic == "lane/requests/a"
    assert requests[0].properties.content_type == "application/octet-stream"
    assert requests[0].properties.response_topic == "lane/replies/me"
    assert requests[0].properties.user == properties.user
    assert requests[0].qos == 1
    assert not requests[0].retain
    assert reply.payload == b"\xffcba\x00"
    assert reply.properties.correlation_data == b"\x00\xff\x01"
    assert reply.properties.get("status") == "ok"


async def test_acknowledgement_carries_the_reason(broker: Broker, links: Links) -> None:
    link = await links.open(broker.url, "publisher")
    reason_code = await asyncio.wait_for(link.publish_acknowledged("nobody/listens", b"x"), 10)
    assert reason_code in (0x00, 0x10)
    if broker.kind == "mosquitto":
        assert reason_code == 0x10, "no matching subscribers"


async def test_large_messages_pass_whole(broker: Broker, links: Links) -> None:
    link = await links.open(broker.url, "large")
    received: list[bytes] = []
    await link.subscribe("large", lambda message: received.append(message.payload))
    payloads = [bytes([number]) * 200_000 for number in range(10)]
    for payload in payloads:
        link.publish("large", payload, qos=1)
    await until(lambda: len(received) == 10, what="ten large messages")
    assert received == payloads


async def test_broker_killed_then_back(broker: Broker, links: Links) -> None:
    link = await links.open(broker.url, "survivor")
    received: list[bytes] = []
    states: list[bool] = []
    await link.subscribe("after/+", lambda message: received.append(message.payload))
    link.on_state(lambda state: states.append(state.connected))
    pending = asyncio.ensure_future(_never_acknowledged(link))
    broker.kill()
    await until(lambda: not link.connected, what="the loss is noticed")
    assert link.state.reason
    with pytest.raises(LinkError, match="not connected"):
        link.publish("after/loss", b"x")
    await asyncio.wait_for(pending, 5)
    broker.start()
    await until(lambda: link.connected, what="it connects again")
    link.publish("after/loss", b"again", qos=1)
    await until(lambda: received, what="the subscription is there again")
    assert received == [b"again"]
    assert states[0] is False
    assert states[-1] is True
    assert link.counters.connects == 2
    assert link.counters.losses == 1


async def _never_acknowledged(link: MqttLink) -> None:
    """Publishes without end; returns when the link is lost. Every publish ends one way or the other."""
    while True:
        try:
            await link.publish_acknowledged("somewhere", b"x" * 100)
        except LinkError:
            return


async def test_silent_broker_is_not_connected(links: Links) -> None:
    server = SilentServer()
    try:
        link = links.make(server.url, "patient", connect_timeout_s=0.2)
        await link.start()
        await until(lambda: "did not answer within 0.2 s" in link.state.reason, what="the attempt is given up")
        assert not link.connected
        assert not link.state.permanent
    finally:
        server.close()


async def test_half_open_connection_is_found_by_keep_alive(broker: Broker, links: Links) -> None:
    """A cable that is pulled tells nobody: no FIN, no RST. After one and a half intervals without a word the link is
    down, with the reason, and comes back when the cable does."""
    cable = LinkCut(free_port(), broker.port)
    await cable.start()
    try:
        link = links.make(f"mqtt://127.0.0.1:{cable.port}", "far", keepalive_s=1, connect_timeout_s=0.5)
        await link.start()
        await until(lambda: link.connected, what="connected")
        cable.cut()
        await until(lambda: not link.connected, 20.0, "the silence noticed")
        assert "not even an answer to a PINGREQ" in link.state.reason and not link.state.permanent
        assert link.reading() == ("down", link.state.reason)
        cable.mend()
        await until(lambda: link.connected, 20.0, "connected again")
    finally:
        await cable.stop()


async def test_nothing_listens(links: Links) -> None:
    link = links.make(f"mqtt://127.0.0.1:{free_port()}", "early")
    await link.start()
    await until(lambda: "refused" in link.state.reason.lower(), what="connection refused")
    assert not link.state.permanent


async def test_wrong_password_is_permanent_and_says_so(tmp_path: Path, links: Links) -> None:
    if MOSQUITTO is None or shutil.which("mosquitto_passwd") is None:
        pytest.skip("mosquitto is not installed")
    passwords = tmp_path / "passwords"
    await run("mosquitto_passwd", "-c", "-b", str(passwords), "gateway", "right")
    with running(mosquitto(tmp_path, f"allow_anonymous false\npassword_file {passwords}\nuser root")) as broker:
        good = await links.open(broker.url, "good", username="gateway", password="right")
        bad = links.make(broker.url, "bad", username="gateway", password="wrong", backoff_max_s=3600.0)
        await bad.start()
        await until(lambda: bad.state.permanent, what="the refusal")
        assert "refused" in bad.state.reason
        assert "next try in 3600 s" in bad.state.reason
        assert not bad.connected
        assert good.connected


async def test_publishes_in_flight_are_bounded(mosquitto_broker: Broker, links: Links) -> None:
    link = await links.open(mosquitto_broker.url, "bounded", max_unacknowledged=3)
    acknowledged: list[object] = []
    for _ in range(3):
        link.publish("a", b"x", qos=1, acknowledged=acknowledged.append)
    with pytest.raises(LinkFull, match="3 messages"):
        link.publish("a", b"x", qos=1)
    await until(lambda: len(acknowledged) == 3, what="the acknowledgements")
    link.publish("a", b"x", qos=1, acknowledged=acknowledged.append)
    await until(lambda: len(acknowledged) == 4, what="room again")


async def test_brokers_receive_maximum_lowers_the_bound(tmp_path: Path, links: Links) -> None:
    if MOSQUITTO is None:
        pytest.skip("mosquitto is not installed")
    with running(mosquitto(tmp_path, "max_inflight_messages 2")) as broker:
        link = await links.open(broker.url, "lowered")
        link.publish("a", b"x", qos=1)
        link.publish("a", b"x", qos=1)
        with pytest.raises(LinkFull, match="2 messages"):
            link.publish("a", b"x", qos=1)


async def test_what_the_broker_would_not_take_is_refused_here(tmp_path: Path, links: Links) -> None:
    if MOSQUITTO is None:
        pytest.skip("mosquitto is not installed")
    with running(mosquitto(tmp_path, "max_packet_size 1000")) as broker:
        link = await links.open(broker.url, "modest")
        with pytest.raises(LinkError, match="more than the broker takes"):
            link.publish("a", b"x" * 1000, qos=1)
        assert await asyncio.wait_for(link.publish_acknowledged("a", b"x" * 100), 10) == 0x10
        with pytest.raises(ValueError, match="wildcard"):
            link.publish("a/#", b"x")


async def test_will_is_published_only_without_a_goodbye(broker: Broker, links: Links) -> None:
    watcher = await links.open(broker.url, "watcher")
    wills: list[tuple[str, bytes]] = []
    await watcher.subscribe("will/+", lambda message: wills.append((message.topic, message.payload)))
    polite = await links.open(broker.url, "polite", will=Will("will/polite", b"gone"))
    await polite.stop()
    rude = await links.open(broker.url, "rude", will=Will("will/rude", b"gone"))
    rude._connection._close_socket()  # type: ignore[union-attr]
    await until(lambda: wills, what="the will of the one that vanished")
    assert wills == [("will/rude", b"gone")]


async def test_refused_subscription_is_kept_and_the_link_stays(tmp_path: Path, links: Links) -> None:
    if MOSQUITTO is None:
        pytest.skip("mosquitto is not installed")
    acl = tmp_path / "acl"
    acl.write_text("topic readwrite open/#\n")
    with running(mosquitto(tmp_path, f"acl_file {acl}\nuser root")) as broker:
        link = await links.open(broker.url, "limited")
        await link.subscribe("open/a", lambda message: None)
        await link.subscribe("$share/g/open/b", lambda message: None)
        assert link.refused_filters == []
        assert link.connected


async def test_failing_callback_ends_nothing(mosquitto_broker: Broker, links: Links) -> None:
    link = await links.open(mosquitto_broker.url, "clumsy")
    received: list[bytes] = []

    def fail(message: Message) -> None:
        raise RuntimeError("a mistake")

    await link.subscribe("bad", fail)
    await link.subscribe("good", lambda message: received.append(message.payload))
    link.publish("bad", b"1", qos=1)
    link.publish("good", b"2", qos=1)
    await until(lambda: received, what="the message after it")
    assert link.counters.callback_errors == 1
    assert link.connected


async def test_shared_subscription_splits_messages(broker: Broker, links: Links) -> None:
    received: dict[str, list[bytes]] = {"a": [], "b": []}
    for name, messages in received.items():
        link = await links.open(broker.url, name)
        await link.subscribe("$share/group/work/#", lambda message, into=messages: into.append(message.payload))
    sender = await links.open(broker.url, "sender")
    for number in range(40):
        await sender.publish_acknowledged("work/item", str(number).encode())
    await until(lambda: len(received["a"]) + len(received["b"]) == 40, what="all messages, once each")
    assert received["a"]
    assert received["b"]
    assert sorted(int(item) for items in received.values() for item in items) == list(range(40))


async def test_own_messages_do_not_come_back_with_no_local(mosquitto_broker: Broker, links: Links) -> None:
    link, other = await links.open(mosquitto_broker.url, "self"), await links.open(mosquitto_broker.url, "other")
    received: list[bytes] = []
    await link.subscribe("loop", lambda message: received.append(message.payload), no_local=True)
    await link.publish_acknowledged("loop", b"own")
    await other.publish_acknowledged("loop", b"theirs")
    await until(lambda: received, what="the other's message")
    assert received == [b"theirs"]


async def test_tls(tmp_path: Path, links: Links) -> None:
    if MOSQUITTO is None or shutil.which("openssl") is None:
        pytest.skip("mosquitto or openssl is not installed")
    key, cert = tmp_path / "key.pem", tmp_path / "cert.pem"
    subject = ["-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"]
    new = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", *subject]
    await run(*new, "-keyout", str(key), "-out", str(cert))
    port = free_port()
    extra = f"listener {port} 127.0.0.1\ncertfile {cert}\nkeyfile {key}\nuser root"
    with running(mosquitto(tmp_path, extra, port)):
        url = f"mqtts://127.0.0.1:{port}"
        link = await links.open(url, "secure", ca_file=cert)
        received: list[bytes] = []
        await link.subscribe("secret", lambda message: received.append(message.payload))
        for number in range(50):
            link.publish("secret", bytes([number]) * 40_000)
        await until(lambda: len(received) == 50, what="all messages through TLS")
        distrustful = links.make(url, "distrustful")
        await distrustful.start()
        await until(lambda: distrustful.state.permanent, what="the certificate is refused")
        assert "not trusted" in distrustful.state.reason


async def test_stop_while_connecting_leaves_nothing(links: Links) -> None:
    server = SilentServer()
    try:
        link = links.make(server.url, "hasty")
        await link.start()
        await asyncio.wait_for(link.stop(), 2)
        assert not link.connected
    finally:
        server.close()


CONNACK = b"\x20\x03\x00\x00\x00"


@pytest.mark.parametrize(
    ("answer", "says", "permanent"),
    [
        pytest.param(b"\x20\x02\x00\x01", "protocol version", True, id="MQTT 3.1.1 only"),
        pytest.param(b"\x20\x03\x00\x86\x00", "user name or password", True, id="bad password"),
        pytest.param(b"\x20\x03\x00\x88\x00", "unavailable", False, id="server unavailable"),
        pytest.param(CONNACK + b"\xe0\x02\x8e\x00", "taken over", True, id="session taken over"),
        pytest.param(CONNACK + b"\xe0\x02\x8b\x00", "shutting down", False, id="server shutting down"),
        pytest.param(CONNACK + b"\xf0\x00", "", False, id="packet of type 15"),
        pytest.param(CONNACK + b"\x30\x05\x00\x02\xff\xff\x00", "unusable", False, id="topic not UTF-8"),
        pytest.param(CONNACK + b"\x30\x07\x00\x01a\x7f\x26\x00\x01", "unusable", False, id="property cut off"),
        pytest.param(b"HTTP/1.1 400 Bad Request\r\n\r\n", "", False, id="an HTTP server"),
        pytest.param(b"", "", False, id="a hang-up"),
    ],
)
async def test_bad_answer_is_told(answer: bytes, says: str, permanent: bool, links: Links) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(100)
        writer.write(answer)
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    link = links.make(f"mqtt://127.0.0.1:{server.sockets[0].getsockname()[1]}", "puzzled", backoff_max_s=3600.0)
    states: list[LinkState] = []
    link.on_state(states.append)
    await link.start()
    await until(lambda: states and not states[-1].connected, what="a reason")
    assert says in states[-1].reason.lower()
    assert states[-1].permanent == permanent
    server.close()


async def test_two_clients_with_one_id_do_not_fight_for_ever(mosquitto_broker: Broker, links: Links) -> None:
    both = [links.make(mosquitto_broker.url, "same", backoff_max_s=3600.0) for _ in range(2)]
    for link in both:
        await link.start()
    await until(lambda: any(link.state.permanent for link in both), what="one of them gives way")
    loser = next(link for link in both if link.state.permanent)
    assert "another client with the id same may be connected; next try in" in loser.state.reason
    assert loser.counters.losses <= SOON_LOSSES + 1
    winner = next(link for link in both if link is not loser)
    await until(lambda: winner.connected, what="the other one has the connection")


def test_properties_are_packed_as_paho_packs_them() -> None:
    ours = MessageProperties("application/json", "a/b", b"\x01\x02", 7, (("k", "v"), ("k", "w")))
    theirs = Properties(PacketTypes.PUBLISH)
    theirs.ContentType, theirs.ResponseTopic, theirs.CorrelationData = "application/json", "a/b", b"\x01\x02"
    theirs.MessageExpiryInterval = 7
    theirs.UserProperty = [("k", "v"), ("k", "w")]
    assert MessageProperties.from_bytes(bytes(theirs.pack())) == (ours, len(theirs.pack()))
    back, _ = Properties(PacketTypes.PUBLISH).unpack(ours.to_bytes())
    assert back.json() == theirs.json()


def test_paho_still_has_the_places_that_are_replaced() -> None:
    assert callable(paho.Client._handle_publish)
    assert callable(paho.Client._handle_pubackcomp)
    assert socket.TCP_NODELAY
