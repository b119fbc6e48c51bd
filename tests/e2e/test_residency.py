"""Inputs that must stay in a region stay there, through the whole daemon: also when that region is down, and whatever a
request says."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

import paho.mqtt.client as mqtt
import pytest
from gateway import Client, wait_until
from paho.mqtt.enums import CallbackAPIVersion

from hil.processes import Process, Stage, free_port

RULED, SENSOR, KEPT = "ward-3", "sensors/ward-4", "kept/+"


class Regions:
    """A gateway without a runtime of its own and two lanes, a cheap one in the US and a dear one in the EU. What is
    sent into each is counted."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self.port, self.http_port = free_port(), free_port()
        self.sent = {"us": 0, "eu": 0}
        self.inputs = 0

    def start(self) -> None:
        self.stage.broker("broker", self.port)
        url = f"mqtt://127.0.0.1:{self.port}"
        self._spy = mqtt.Client(CallbackAPIVersion.VERSION2, protocol=mqtt.MQTTv5)
        self._spy.on_message = self._on_message
        self._spy.on_connect = lambda client, *_: client.subscribe("lanes/+/requests/#", qos=1)
        self._spy.connect("127.0.0.1", self.port)
        self._spy.loop_start()
        self.workers: dict[str, Process] = {name: self.stage.worker(name, url, f"lanes/{name}") for name in self.sent}
        lanes = [
            {"name": "us", "broker": url, "topic": "lanes/us", "region": "us-east", "cost_per_request": 0.0},
            {"name": "eu", "broker": url, "topic": "lanes/eu", "region": "eu-west", "cost_per_request": 0.009},
        ]
        self.stage.daemon(
            {
                "gateway": {"id": "regions", "state_dir": str(self.stage.folder / "state")},
                "edge_gpu": {"enabled": False},
                "cloud": {"lanes": lanes},
                "mqtt": {"broker": url},
                "http": {"port": self.http_port},
                "producers": {RULED: {"allowed_regions": ["eu-west"]}},
                "sensors": {
                    SENSOR: {"model": "digits", "latency_class": "batch", "allowed_regions": ["eu-west"]},
                    KEPT: {"model": "digits", "durable": True, "uplink": True, "use_cache": False},
                },
                "outbox": {"enabled": True, "commit_wait_ms": 0},
                "uplink": {"lane": "us"},
                "security": {"audit": {"enabled": True, "fsync_s": 0}},
            }
        )
        wait_until(lambda: all(target["available"] for target in self.status()["targets"]), "both lanes")

    def stop(self) -> None:
        self._spy.disconnect()
        self._spy.loop_stop()

    def _on_message(self, _client: object, _data: object, message: mqtt.MQTTMessage) -> None:
        self.sent[message.topic.split("/")[1]] += 1

    def status(self) -> dict[str, Any]:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.http_port}/status", timeout=10) as response:
            document: dict[str, Any] = json.load(response)
        return document

    def new_input(self) -> list[float]:
        """One that was never asked before."""
        self.inputs += 1
        return [float(self.inputs % 17), float(self.inputs // 17 % 17)] + [0.0] * 62

    def infer(self, inputs: list[float] | None = None, **document: Any) -> tuple[int, dict[str, Any]]:
        asked = {"model": "digits", "latency_class": "batch", "inputs": inputs or self.new_input(), **document}
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.http_port}/infer", json.dumps(asked).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=30) as response:
                return response.status, json.load(response)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)

    def settled(self, us: int, eu: int) -> None:
        """So many were sent into each lane. The broker keeps the order, so that once a marker is here all is."""
        seen = []
        self._spy.message_callback_add("lanes/marker/requests", lambda *_: seen.append(1))
        self._spy.publish("lanes/marker/requests", b"", qos=1)
        wait_until(lambda: seen, "the marker")
        assert self.sent == {"us": us, "eu": eu}


@pytest.fixture(scope="module")
def regions(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Regions]:
    with Stage(tmp_path_factory.mktemp("regions")) as stage:
        regions = Regions(stage)
        regions.start()
        yield regions
        regions.stop()


@pytest.fixture(autouse=True)
def from_zero(regions: Regions) -> None:
    regions.settled(**regions.sent)
    regions.sent.update(us=0, eu=0)


def test_without_a_rule_the_cheap_lane_is_taken(regions: Regions) -> None:
    """Or the tests below would show nothing."""
    for _ in range(3):
        assert regions.infer()[1]["target"] == "cloud:us"
    regions.settled(us=3, eu=0)


def test_a_request_may_name_its_regions(regions: Regions) -> None:
    for _ in range(3):
        assert regions.infer(allowed_regions=["eu-west", "moon"])[1]["target"] == "cloud:eu"
    regions.settled(us=0, eu=3)


@pytest.mark.parametrize("asked", [[], ["eu-west"], ["us-east", "eu-west"]])
def test_the_rule_of_a_producer_holds_whatever_its_requests_say(regions: Regions, asked: list[str]) -> None:
    for _ in range(3):
        assert regions.infer(producer=RULED, allowed_regions=asked)[1]["target"] == "cloud:eu"
    regions.settled(us=0, eu=3)


def test_a_rule_and_a_request_that_have_nothing_in_common_leave_no_lane(regions: Regions) -> None:
    """Nothing allowed is not the same as no rule."""
    _, answer = regions.infer(producer=RULED, allowed_regions=["us-east"])
    assert answer.get("stale", True)
    assert "not allowed" in " ".join(answer["reasons"])
    regions.settled(us=0, eu=0)


def test_a_sensor_has_its_regions(regions: Regions) -> None:
    client = Client(regions.port, "edge/regions/results/ward-4")
    for _ in range(3):
        client.publish(SENSOR, json.dumps(regions.new_input()))
        assert client.next()["target"] == "cloud:eu"
    client.close()
    regions.settled(us=0, eu=3)


def test_a_rule_holds_over_the_outbox_and_for_the_uplink(regions: Regions) -> None:
    """The uplink is the lane of us-east: what it may not see is answered, and not passed on."""
    passed_on = Client(regions.port, "edge-agent/results/regions/#")
    results = Client(regions.port, "edge/regions/results/#")
    for name, target in ((RULED, "cloud:eu"), ("free", "cloud:us")):
        results.publish(KEPT.replace("+", name), json.dumps(regions.new_input()))
        assert results.next()["target"] == target
    assert passed_on.next()["producer"] == "free"
    code, accepted = regions.infer(producer=RULED, delivery="durable", use_cache=False)
    assert (code, accepted["state"]) == (202, "accepted")
    assert results.next()["target"] == "cloud:eu"
    assert passed_on.messages == []
    for client in (passed_on, results):
        client.close()
    regions.settled(us=1, eu=2)


def test_an_answer_that_is_here_already_is_served_and_nothing_is_sent(regions: Regions) -> None:
    inputs = regions.new_input()
    assert regions.infer(inputs)[1]["target"] == "cloud:us"
    regions.settled(us=1, eu=0)
    _, answer = regions.infer(inputs, producer=RULED)
    assert (answer["cached"], answer["origin_tier"]) == (True, "cloud_gpu")
    regions.settled(us=1, eu=0)


def test_a_repeated_key_sends_nothing_elsewhere(regions: Regions) -> None:
    inputs = regions.new_input()
    for cached in (False, True, True):
        _, answer = regions.infer(inputs, producer=RULED, idempotency_key="k", use_cache=False)
        assert answer["cached"] is cached
    regions.settled(us=0, eu=1)


def test_nothing_leaves_the_region_when_it_is_down(regions: Regions) -> None:
    """The lane next to it is up, cheap and idle, and is not asked: neither for a new input nor for an old one."""
    known = regions.new_input()
    assert regions.infer(known, producer=RULED)[1]["target"] == "cloud:eu"
    regions.workers["eu"].kill()
    wait_until(lambda: not regions.status()["targets"][1]["available"] or _asks_in_vain(regions), "the lane is down")
    sent = dict(regions.sent)
    _, old = regions.infer(known, producer=RULED, use_cache=False)
    assert (old["stale"], old["same_input"], old["tier"]) == (True, True, "fallback")
    _, last = regions.infer(producer=RULED)
    assert (last["stale"], last["same_input"]) == (True, False)
    code, refused = regions.infer(producer="nobody-yet", allowed_regions=["eu-west"])
    assert (code, refused["error"]["code"]) == (503, "unavailable")
    assert regions.infer(producer="free")[1]["target"] == "cloud:us", "others go on"
    wait_until(lambda: regions.sent["us"] == sent["us"] + 1, "the one of the others")
    assert regions.sent["us"] == 1


def _asks_in_vain(regions: Regions) -> bool:
    return regions.infer(producer=RULED, deadline_ms=200)[1].get("stale", True) is True


def test_the_audit_trail_says_where_inputs_went(regions: Regions) -> None:
    wait_until(lambda: regions.status()["security"]["audit"]["waiting"] == 0, "the trail is written")
    lines = [json.loads(line) for line in (regions.stage.folder / "state/audit/audit-000000000001.jsonl").open()]
    requests = [line for line in lines if line["kind"] == "request"]
    ruled = [line for line in requests if line["producer"] in (RULED, "ward-4")]
    assert {line["region"] for line in ruled if "region" in line} == {"eu-west", None}
    assert {attempt[1] for line in ruled for attempt in line.get("attempts", ())} == {"eu-west"}
    assert "us-east" in {line.get("region") for line in requests}
