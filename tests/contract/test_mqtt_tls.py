"""TLS, client certificates and the access list that ships, on a real mosquitto."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import socket
import ssl
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from agent.config import LimitsSection, MqttSection, RateSection, SecuritySection, SensorSection
from agent.core.clock import ManualClock, SystemClock
from agent.ingress.mqtt import MqttDoor
from agent.link.mqtt import LinkOptions, LinkState, Message, MessageProperties, MqttLink
from agent.security.access import Guard
from agent.security.certificates import Watch, peer_certificate
from agent.telemetry.metrics import Metrics
from tests.brokers import MOSQUITTO, Broker, mosquitto, running, until
from tests.certs import Authority, Pair, as_shipped
from tests.unit.mqtt_fakes import FakeCore

pytestmark = pytest.mark.skipif(MOSQUITTO is None, reason="mosquitto is not installed")
WAIT_S = 10.0


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path / "ca")


@pytest.fixture
def broker(tmp_path: Path, authority: Authority) -> Iterator[Broker]:
    with running(as_shipped(tmp_path, authority, authority.sign("broker"))) as started:
        yield started


class Devices:
    """Links with certificates, closed at the end."""

    def __init__(self, broker: Broker, ca: Path) -> None:
        self._broker = broker
        self._ca = ca
        self._links: list[MqttLink] = []

    def make(self, name: str, pair: Pair | None, **options: Any) -> MqttLink:
        files = {} if pair is None else {"cert_file": pair.cert, "key_file": pair.key}
        settings = {"broker": f"mqtts://127.0.0.1:{self._broker.port}", "ca_file": self._ca, **files, **options}
        link = MqttLink(LinkOptions(client_id=name, **settings))
        self._links.append(link)
        return link

    async def up(self, name: str, pair: Pair) -> MqttLink:
        link = self.make(name, pair)
        await link.start()
        await until(lambda: link.connected, WAIT_S, name)
        return link

    async def refused(self, link: MqttLink) -> LinkState:
        await link.start()
        await until(lambda: link.state.reason not in ("", "not started"), WAIT_S, "a reason")
        assert not link.connected
        return link.state

    async def close(self) -> None:
        await asyncio.gather(*(link.stop() for link in self._links))


@pytest.fixture
async def devices(broker: Broker, authority: Authority) -> AsyncIterator[Devices]:
    devices = Devices(broker, authority.ca)
    yield devices
    await devices.close()


# --- certificates ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["none", "expired", "of another authority", "for servers"])
async def test_client_certificates_that_are_refused(
    devices: Devices, authority: Authority, tmp_path: Path, kind: str
) -> None:
    """Each says what is wrong, and is tried again only after the longest back-off."""
    pair, says = {
        "none": (None, "wants a client certificate"),
        "expired": (authority.sign("old", days=-1, client=True), "client certificate has expired"),
        "of another authority": (Authority(tmp_path / "b", "b").sign("m7", client=True), "client certificate"),
        "for servers": (authority.sign("m7"), "client certificate"),
    }[kind]
    state = await devices.refused(devices.make("m7", pair))
    assert says in state.reason
    assert state.permanent
    assert re.search(r"next try in [3-6]\d s", state.reason), state.reason


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("expired", "not trusted: certificate has expired"),
        ("for another host", "not trusted: .*not valid for '127.0.0.1'"),
        ("of another authority", "not trusted: unable to get local issuer certificate"),
    ],
)
async def test_brokers_that_are_not_trusted(tmp_path: Path, authority: Authority, kind: str, says: str) -> None:
    other = Authority(tmp_path / "b", "b")
    server = {
        "expired": lambda: authority.sign("broker", days=-1),
        "for another host": lambda: authority.sign("broker", hosts=("elsewhere.example",)),
        "of another authority": lambda: other.sign("broker"),
    }[kind]()
    with running(as_shipped(tmp_path, authority, server)) as broker:
        devices = Devices(broker, authority.ca)
        state = await devices.refused(devices.make("m7", authority.sign("m7", client=True)))
        await devices.close()
    assert re.search(says, state.reason), state.reason
    assert state.permanent


async def test_a_broker_that_speaks_no_tls(tmp_path: Path, authority: Authority) -> None:
    with running(mosquitto(tmp_path)) as broker:
        devices = Devices(broker, authority.ca)
        state = await devices.refused(devices.make("m7", None))
        await devices.close()
    # It takes the greeting for a broken packet and closes: without a word, or with one that is not TLS.
    assert re.search(r"not speak TLS on this port|cannot connect|TLS failed", state.reason), state.reason


async def test_a_broker_that_speaks_an_older_tls_only(devices: Devices, authority: Authority) -> None:
    pair = authority.sign("broker")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pair.cert, pair.key)
    context.maximum_version = ssl.TLSVersion.TLSv1_2

    def greet(listener: socket.socket) -> None:
        accepted, _ = listener.accept()
        with contextlib.suppress(OSError), accepted, context.wrap_socket(accepted, server_side=True):
            pass

    with socket.create_server(("127.0.0.1", 0)) as listener:
        greeting = asyncio.create_task(asyncio.to_thread(greet, listener))
        url = f"mqtts://127.0.0.1:{listener.getsockname()[1]}"
        state = await devices.refused(devices.make("m7", None, broker=url))
        await greeting
    assert (state.permanent, "does not speak TLS 1.3" in state.reason) == (True, True), state.reason


async def test_when_certificates_end_is_known(devices: Devices, authority: Authority, tmp_path: Path) -> None:
    """Of one's own from its file, of the broker's from the connection."""
    soon, later = authority.sign("m7", days=10, client=True), authority.sign("m8", days=50, client=True)
    link = await devices.up("m7", soon)
    broker = peer_certificate("mqtt broker", link.peer_certificate)
    assert broker is not None
    (tmp_path / "broken.crt").write_text("nothing")
    clock = ManualClock(wall=SystemClock.wall())
    watch = Watch({"soon": soon.cert, "later": later.cert, "broken": tmp_path / "broken.crt"}, 14)
    alarms = watch.look([broker], clock.monotonic(), clock.wall())
    assert [alarm.split(":")[0] for alarm in alarms] == ["soon", "broken"]
    assert {one["name"]: one["days_left"] for one in watch.status()} == {
        "soon": pytest.approx(10, abs=0.1),
        "later": pytest.approx(50, abs=0.1),
        "broken": None,
        "mqtt broker": pytest.approx(30, abs=0.1),
    }
    clock.jump(20 * 86_400)
    assert "ended 10.0 days ago" in watch.look([broker], clock.monotonic(), clock.wall())[0]


async def test_an_alarm_is_said_once_a_day(authority: Authority, caplog: pytest.LogCaptureFixture) -> None:
    pair = authority.sign("m7", days=3)
    watch = Watch({"http.tls.cert_file": pair.cert}, 14)
    for hour in range(48):
        watch.look([], 1000.0 + 3600 * hour, SystemClock.wall())
    assert [record.levelname for record in caplog.records] == ["WARNING"] * 2
    assert caplog.records[0].certificate == "http.tls.cert_file"  # type: ignore[attr-defined]


# --- the access list -------------------------------------------------------------------------------------------------


class Gateway:
    """The daemon's door with its own certificate, and a core that answers."""

    def __init__(self, broker: Broker, authority: Authority, **settings: Any) -> None:
        pair = authority.sign("edge-agent", client=True)
        section = MqttSection(
            broker=f"mqtts://127.0.0.1:{broker.port}",
            ca_file=authority.ca,
            cert_file=pair.cert,
            key_file=pair.key,
            **settings,
        )
        limits = LimitsSection(producer=RateSection(per_s=0.01, burst=5))
        self.core = FakeCore()
        guard = Guard(SecuritySection(limits=limits), SystemClock())
        sensors = {"sensors/+": SensorSection(model="toy")}
        self.door = MqttDoor(self.core, section, sensors, "gw", Metrics(), SystemClock(), guard=guard)

    async def __aenter__(self) -> Gateway:
        await self.door.start()
        await until(lambda: self.door.link.connected, WAIT_S, "the door")
        assert self.door.link.refused_filters == []
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.door.stop()


async def listening(link: MqttLink, topic_filter: str) -> list[Message]:
    heard: list[Message] = []
    await link.subscribe(topic_filter, heard.append)
    return heard


VALUES = b"[1, 2, 3, 4]"
REFUSED = 0x87
"""MQTT 5 reason code: not authorized."""


async def test_each_device_has_its_own_topics(devices: Devices, broker: Broker, authority: Authority) -> None:
    m7 = await devices.up("m7", authority.sign("m7", client=True))
    m8 = await devices.up("m8", authority.sign("m8", client=True))
    own, all_results = await listening(m7, "edge/gw/results/m7"), await listening(m8, "edge/gw/results/#")
    async with Gateway(broker, authority) as gateway:
        assert await m7.publish_acknowledged("sensors/m7", VALUES) == 0
        await until(lambda: own, WAIT_S, "the answer")
        assert json.loads(own[0].payload)["sensor"] == "m7"
        for topic in (
            "sensors/m7",
            "edge/gw/infer/toy/m7",
            "edge/gw/infer/toy",
            "edge/gw/status",
            "edge/gw/results/m7",
        ):
            assert await m8.publish_acknowledged(topic, VALUES) == REFUSED, topic
        assert await m8.publish_acknowledged("sensors/m8", VALUES) == 0
        await until(lambda: all_results, WAIT_S, "its own answer")
        assert {message.topic for message in all_results} == {"edge/gw/results/m8"}, "and nobody else's"
        assert [request.producer for request in gateway.core.asked] == ["m7", "m8"]


async def test_a_request_comes_from_whom_the_certificate_names(
    devices: Devices, broker: Broker, authority: Authority
) -> None:
    m7 = await devices.up("m7", authority.sign("m7", client=True))
    heard = await listening(m7, "clients/m7/answers")
    async with Gateway(broker, authority, shared_requests=False) as gateway:
        back = MessageProperties("application/json", response_topic="clients/m7/answers")
        for document, status in (({}, "ok"), ({"producer": "m7"}, "ok"), ({"producer": "m8"}, "forbidden")):
            payload = json.dumps({"inputs": [1, 2, 3, 4], **document}).encode()
            await m7.publish_acknowledged("edge/gw/infer/toy/m7", payload, properties=back)
            await until(lambda: heard, WAIT_S, "the answer")
            assert dict(heard.pop().properties.user)["status"] == status
        assert [(request.producer, request.asked_by) for request in gateway.core.asked] == [("m7", "mqtt:m7")] * 2


async def test_the_daemon_cannot_be_made_to_write_elsewhere(
    devices: Devices, broker: Broker, authority: Authority
) -> None:
    m7 = await devices.up("m7", authority.sign("m7", client=True))
    heard = await listening(m7, "clients/m7/answers")
    async with Gateway(broker, authority) as gateway:
        for topic in ("plant/valve/set", "sensors/m8", "clients/m7/answers"):
            back = MessageProperties("application/json", response_topic=topic)
            await m7.publish_acknowledged("edge/gw/infer/toy/m7", b'{"inputs": [1, 2, 3, 4]}', properties=back)
        await until(lambda: heard, WAIT_S, "the last answer")
        assert len(gateway.core.asked) == 3, "an answer on sensors/m8 would have been a fourth"


async def test_a_flood_from_one_producer_beside_a_polite_one(
    devices: Devices, broker: Broker, authority: Authority
) -> None:
    loud = await devices.up("loud", authority.sign("loud", client=True))
    polite = await devices.up("polite", authority.sign("polite", client=True))
    answers, refusals = await listening(polite, "edge/gw/results/polite"), await listening(loud, "edge/gw/results/loud")
    async with Gateway(broker, authority) as gateway:
        for _ in range(200):
            loud.publish("sensors/loud", VALUES)
        await loud.publish_acknowledged("sensors/loud", VALUES)
        await polite.publish_acknowledged("sensors/polite", VALUES)
        await until(lambda: answers, WAIT_S, "the polite one's answer")
        assert dict(answers[0].properties.user)["status"] == "ok"
        await until(lambda: len(refusals) == 201, WAIT_S, "an answer or a refusal for each")
        states = [dict(message.properties.user)["status"] for message in refusals]
        assert sorted(set(states)) == ["ok", "rate_limited"]
        assert states.count("ok") == 5
        assert json.loads(refusals[-1].payload)["error"]["retry_after_s"] > 0
        assert len(gateway.core.asked) == 6


async def test_whoever_has_no_certificate_is_not_answered(broker: Broker, authority: Authority) -> None:
    """Neither in plain MQTT nor through TLS."""
    greeting = b"\x10\x10\x00\x04MQTT\x05\x02\x00\x3c\x00\x00\x03abc"
    for context in (None, ssl.create_default_context(cafile=authority.ca)):
        reader, writer = await asyncio.open_connection("127.0.0.1", broker.port, ssl=context)
        writer.write(greeting)
        with contextlib.suppress(OSError):
            async with asyncio.timeout(WAIT_S):
                assert await reader.read() == b""
        writer.close()
