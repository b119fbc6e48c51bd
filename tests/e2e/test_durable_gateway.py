"""Durable delivery through a real gateway: what was accepted is answered and delivered, whatever dies meanwhile."""

from __future__ import annotations

import itertools
import json
import threading
from collections import Counter
from collections.abc import Iterator
from http.client import HTTPException
from pathlib import Path
from typing import Any

import pytest
from gateway import GATEWAY, LIMIT_S, Client, Gateway, wait_until
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from hil.processes import Stage

DRAIN_S = 5.0
"""`gateway.drain_timeout_s`, by default."""
SETTINGS = {"enabled": True, "retry_max_s": 1, "commit_wait_ms": 5}


@pytest.fixture(scope="module")
def durable(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    with Stage(tmp_path_factory.mktemp("durable")) as stage:
        gateway = Gateway(stage)
        gateway.start_broker()
        gateway.start_cloud_broker()
        gateway.start_worker("worker-1")
        restart(gateway)
        yield gateway


def configuration(gateway: Gateway) -> dict[str, Any]:
    return gateway.config() | {
        "edge_mcu": {"enabled": False},
        "outbox": SETTINGS,
        "uplink": {"lane": "gpu"},
        "sensors": {
            "sensors/kept": {"model": "digits", "durable": True, "use_cache": False},
            "sensors/told": {"model": "digits", "uplink": True, "latency_class": "interactive", "use_cache": False},
        },
    }


def restart(gateway: Gateway) -> None:
    gateway.daemon = gateway.stage.daemon(configuration(gateway))
    wait_until(gateway.complete, "every tier available")
    wait_until(lambda: outbox(gateway)["routes"]["local"]["connected"], "the durable link")


def outbox(gateway: Gateway) -> dict[str, Any]:
    status: dict[str, Any] = gateway.get("/status")["outbox"]
    return status


class Receiver:
    """Knows by its idempotency key what it has seen already."""

    def __init__(self, port: int, topic: str) -> None:
        self.client = Client(port, topic)
        self.read = 0

    def deliveries(self) -> list[tuple[str, str, dict[str, Any]]]:
        """Key, status and document of every result, repeats included."""
        found = []
        for message in list(self.client.messages):
            user = dict(message.properties.UserProperty)
            if "idempotency-key" in user:
                found.append((user["idempotency-key"], user["status"], json.loads(message.payload)))
        return found

    def seen(self) -> dict[str, dict[str, Any]]:
        """What the application sees: the first of each key."""
        first: dict[str, dict[str, Any]] = {}
        for key, _, document in self.deliveries():
            first.setdefault(key, document)
        return first

    def by_request(self) -> Counter[str]:
        return Counter(document["request_id"] for document in self.seen().values())


def ask(gateway: Gateway, request_id: str, **changes: Any) -> dict[str, Any]:
    values, _ = gateway.sample("digits", len(request_id))
    return {"model": "digits", "inputs": values, "request_id": request_id, "idempotency_key": request_id, **changes}


def test_accepted_by_http_and_delivered_by_mqtt(durable: Gateway) -> None:
    receiver = Receiver(durable.local_port, f"edge/{GATEWAY}/results/durable/digits")
    code, accepted = durable.infer(**ask(durable, "http-1", delivery="durable"))
    assert code == 202
    assert accepted["state"] == "accepted"
    assert accepted["result_topic"] == f"edge/{GATEWAY}/results/durable/digits"
    wait_until(lambda: receiver.by_request()["http-1"], "the result")
    assert receiver.seen()[accepted["id"]]["label"]
    assert durable.infer(**ask(durable, "http-1", delivery="durable")) == (202, accepted | {"duplicate": True})
    code, refused = durable.infer(**ask(durable, "http-1", delivery="durable", accuracy="high"))
    assert (code, refused["error"]["field"]) == (400, "idempotency_key")
    code, refused = durable.infer(**ask(durable, "x", delivery="durable", latency_class="near"))
    assert (code, refused["error"]["field"]) == (400, "latency_class")
    wait_until(lambda: not outbox(durable)["rows"], "an empty outbox")
    assert receiver.by_request() == {"http-1": 1}
    receiver.client.close()


def test_accepted_by_mqtt_and_told_so(durable: Gateway) -> None:
    receiver = Receiver(durable.local_port, "mine/results")
    properties = Properties(PacketTypes.PUBLISH)
    properties.ResponseTopic, properties.CorrelationData = "mine/results", b"c1"
    topic = f"edge/{GATEWAY}/durable/digits"
    receiver.client.publish(topic, json.dumps(ask(durable, "mqtt-1")), properties)
    wait_until(lambda: receiver.by_request()["mqtt-1"], "the result")
    first, last = receiver.client.messages
    assert (dict(first.properties.UserProperty)["status"], first.properties.CorrelationData) == ("accepted", b"c1")
    assert (dict(last.properties.UserProperty)["status"], last.properties.CorrelationData) == ("ok", b"c1")
    receiver.client.publish(topic, json.dumps({"inputs": [1]}), properties)
    wait_until(lambda: len(receiver.client.messages) == 3, "the refusal")
    assert dict(receiver.client.messages[2].properties.UserProperty)["status"] == "invalid_request"
    receiver.client.publish(
        f"edge/{GATEWAY}/infer/digits", json.dumps(ask(durable, "m", delivery="durable")), properties
    )
    wait_until(lambda: len(receiver.client.messages) == 4, "the refusal")
    assert f"edge/{GATEWAY}/durable/digits" in json.loads(receiver.client.messages[3].payload)["error"]["message"]
    receiver.client.close()


def test_nothing_accepted_is_lost_when_the_daemon_is_killed(durable: Gateway) -> None:
    """Requests and readings, the daemon killed among them and away for some: each is answered, and seen once."""
    receiver = Receiver(durable.local_port, f"edge/{GATEWAY}/results/#")
    values, _ = durable.sample("digits", 3)
    sent = 0
    for life in range(4):
        for number in range(30):
            topic = f"edge/{GATEWAY}/durable/digits/client"
            receiver.client.publish(topic, json.dumps(ask(durable, f"{life}-{number}")))
            reading = json.dumps({"inputs": values, "request_id": f"r{life}-{number}"})
            receiver.client.publish("sensors/kept", reading)
            sent += 2
        if life < 3:
            wait_until(lambda life=life: receiver.by_request()[f"{life}-{3 * life}"], "some of the results")
            durable.daemon.kill()
            receiver.client.publish(f"edge/{GATEWAY}/durable/digits/client", json.dumps(ask(durable, f"away-{life}")))
            sent += 1
            restart(durable)
    wait_until(lambda: len(receiver.by_request()) >= sent, "every result")
    wait_until(lambda: not outbox(durable)["rows"], "an empty outbox")
    assert set(receiver.by_request().values()) == {1}
    order = [document["request_id"] for document in receiver.seen().values() if document.get("sensor") == "kept"]
    assert order == [f"r{life}-{number}" for life in range(4) for number in range(30)]
    receiver.client.close()


def test_sigterm_under_load_loses_nothing_that_was_accepted(durable: Gateway) -> None:
    """Callers at every door when the daemon is told to stop. Whose request it read gets an answer or a described
    refusal; whoever was told `accepted` gets the result after the restart. Its trail says which requests it read."""
    assert durable.daemon.terminate() == 0
    durable.daemon = durable.stage.daemon(configuration(durable) | {"security": {"audit": {"enabled": True}}})
    wait_until(durable.complete, "every tier available")
    receiver = Receiver(durable.local_port, f"edge/{GATEWAY}/results/durable/digits")
    told: dict[str, tuple[int, dict[str, Any]]] = {}
    closed: list[str] = []

    def call(name: str, **changes: Any) -> None:
        for number in itertools.count():
            request_id = f"{name}-{number}"
            try:
                told[request_id] = durable.infer(**ask(durable, request_id, **changes))
            except (OSError, HTTPException):
                closed.append(request_id)
                return

    near = {"latency_class": "interactive", "use_cache": False}
    callers = [threading.Thread(target=call, args=(f"near{n}",), kwargs=near) for n in range(4)]
    callers += [threading.Thread(target=call, args=(f"kept{n}",), kwargs={"delivery": "durable"}) for n in range(2)]
    for caller in callers:
        caller.start()
    published = [f"sent-{number}" for number in range(40)]
    for request_id in published:
        receiver.client.publish(f"edge/{GATEWAY}/durable/digits", json.dumps(ask(durable, request_id)))
    wait_until(lambda: len(told) > 100, "traffic")
    assert durable.daemon.terminate(DRAIN_S + LIMIT_S) == 0
    for caller in callers:
        caller.join()
    assert len(closed) == len(callers), "each went on until the door was closed"
    assert {code for code, _ in told.values()} <= {200, 202, 503}
    assert all(answer["error"]["message"] for code, answer in told.values() if code == 503)
    trail = [json.loads(line) for path in sorted(audit_folder(durable).glob("*.jsonl")) for line in path.open()]
    read = {line["request_id"] for line in trail if line["kind"] == "request" or line.get("what") == "accept"}
    assert len(read & told.keys()) > 100
    assert not read & set(closed)
    accepted = {request_id for request_id, (code, _) in told.items() if code == 202}
    assert accepted
    restart(durable)
    wait_until(lambda: set(receiver.by_request()) >= accepted | set(published), "every result")
    wait_until(lambda: not outbox(durable)["rows"], "an empty outbox")
    assert set(receiver.by_request().values()) == {1}
    receiver.client.close()


def audit_folder(gateway: Gateway) -> Path:
    return gateway.stage.folder / "state" / "audit"


def test_asked_when_the_lane_is_back(durable: Gateway) -> None:
    receiver = Receiver(durable.local_port, f"edge/{GATEWAY}/results/durable/digits")
    variant = next(
        name for name, variant in durable.catalog.family("digits").variants.items() if "cloud" in variant.targets
    )
    durable.cloud_broker.kill()
    wait_until(lambda: not durable.available("cloud:gpu"), "the lane down")
    for number in range(3):
        code, _ = durable.infer(**ask(durable, f"cloud-{number}", delivery="durable", variant=variant, producer="c"))
        assert code == 202
    code, _ = durable.infer(**ask(durable, "local", delivery="durable", producer="d"))
    wait_until(lambda: receiver.by_request()["local"], "the answer to who does not need the lane")
    wait_until(lambda: outbox(durable)["rows"] == {"ask": 3}, "only what needs the lane is kept")
    assert receiver.by_request().keys() == {"local"}
    durable.start_cloud_broker()
    wait_until(lambda: len(receiver.by_request()) == 4, "the answers")
    assert list(receiver.by_request()) == ["local", "cloud-0", "cloud-1", "cloud-2"]
    assert receiver.deliveries()[-1][2]["tier"] == "cloud_gpu"
    receiver.client.close()


def test_results_reach_the_cloud_after_an_outage(durable: Gateway) -> None:
    topic = f"edge-agent/results/{GATEWAY}/told"
    local = Client(durable.local_port, f"edge/{GATEWAY}/results/told")
    values, _ = durable.sample("digits", 5)
    durable.cloud_broker.kill()
    wait_until(lambda: not durable.available("cloud:gpu"), "the lane down")
    for number in range(10):
        local.publish("sensors/told", json.dumps({"inputs": values, "request_id": f"told-{number}"}))
    wait_until(lambda: len(local.messages) == 10, "the answers on the gateway")
    wait_until(lambda: outbox(durable)["rows"] == {"uplink": 10}, "ten results kept")
    durable.daemon.kill()
    durable.start_cloud_broker()
    cloud = Receiver(durable.cloud_port, topic)
    restart(durable)
    wait_until(lambda: len(cloud.by_request()) == 10, "the results in the cloud")
    assert list(cloud.by_request()) == [json.loads(message.payload)["request_id"] for message in local.messages]
    assert set(cloud.by_request().values()) == {1}
    local.close()
    cloud.client.close()


STEPS = ("gathered", "begun", "inserted", "written", "committed", "told")
SENDING = ("publishing", "published", "acknowledged by the broker")
KILLS = [*((step, count) for count in (1, 10) for step in STEPS), *((step, 2) for step in SENDING)]


def test_killed_at_every_step_nothing_is_lost_and_nothing_seen_twice(durable: Gateway) -> None:
    """A client over HTTP asks again under the same key until it is told `accepted`; one over MQTT leaves that to the
    broker. The first times of a step belong to a request, later ones to its answer and to its deletion."""
    receiver = Receiver(durable.local_port, f"edge/{GATEWAY}/results/durable/digits")
    durable.daemon.terminate()
    acknowledged: set[str] = set()
    published: set[str] = set()
    pending: list[str] = []
    for number, (step, count) in enumerate(KILLS):
        environ = {"POWERLOSS_STEP": step, "POWERLOSS_COUNT": str(count)}
        durable.daemon = durable.stage.daemon(configuration(durable), module="hil.powerloss.daemon", environ=environ)
        for item in range(40):
            pending.append(f"h{number}-{item}")
            receiver.client.publish(f"edge/{GATEWAY}/durable/digits", json.dumps(ask(durable, f"m{number}-{item}")))
            published.add(f"m{number}-{item}")
            try:
                while pending:
                    code, _ = durable.infer(**ask(durable, pending[0], delivery="durable"))
                    assert code == 202
                    acknowledged.add(pending.pop(0))
            except OSError:
                break
        wait_until(lambda: not durable.daemon.alive(), f"the kill at {step!r}")
    restart(durable)
    wait_until(lambda: set(receiver.by_request()) >= acknowledged | published, "every result")
    wait_until(lambda: not outbox(durable)["rows"], "an empty outbox")
    assert set(receiver.by_request().values()) == {1}
    assert len(acknowledged) > len(KILLS)
    receiver.client.close()


def test_a_damaged_outbox_is_named(durable: Gateway) -> None:
    assert durable.daemon.terminate() == 0
    path = Path(durable.stage.folder) / "state" / "outbox" / "outbox.sqlite"
    data = bytearray(path.read_bytes())
    data[4096:12288] = b"\xa5" * 8192
    path.write_bytes(data)
    restart(durable)
    aside = wait_until(lambda: outbox(durable)["set_aside"], "the damage found")
    assert (path.parent / aside).exists()
    listener = Client(durable.local_port, f"edge/{GATEWAY}/alarms/outbox")
    wait_until(lambda: listener.messages and aside in json.loads(listener.messages[-1].payload)["reason"], "the alarm")
    components = {part["name"]: part for part in durable.get("/status")["components"]}
    assert components["outbox"]["state"] == "degraded"
    assert aside in components["outbox"]["reason"]
    listener.close()
    code, _ = durable.infer(**ask(durable, "after", delivery="durable"))
    assert code == 202
