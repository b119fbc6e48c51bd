"""SIGHUP: the configuration is read again, and applied whole or not at all, while somebody asks."""

from __future__ import annotations

import json
import os
import signal
import socket
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest
import yaml
from gateway import GATEWAY, Client, Gateway, Traffic, wait_until

from hil.processes import Stage, free_port


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    with Stage(tmp_path_factory.mktemp("reload")) as stage:
        gateway = Gateway(stage)
        gateway.start_broker()
        gateway.start_cloud_broker()
        gateway.start_worker("worker-1")
        gateway.daemon = stage.daemon(configuration(gateway))
        wait_until(gateway.complete, "every tier available")
        yield gateway


def configuration(gateway: Gateway) -> dict[str, Any]:
    return gateway.config() | {"edge_mcu": {"enabled": False}, "security": {"audit": {"enabled": True}}}


def reload(gateway: Gateway, document: Any) -> dict[str, Any]:
    """Write the file and have it read. Returns `settings` of the status when that is through."""
    before = gateway.get("/status")["settings"]
    text = document if isinstance(document, str) else yaml.safe_dump(document)
    (gateway.stage.folder / "daemon.yaml").write_text(text)
    os.kill(gateway.daemon.pid, signal.SIGHUP)

    def through() -> dict[str, Any] | None:
        try:
            now = gateway.get("/status")["settings"]
        except OSError:  # where another port is tried, or the former one is gone back to
            return None
        return now if (now["applied"], now["refused"]) != (before["applied"], before["refused"]) else None

    return wait_until(through, "the reload")


def component(gateway: Gateway) -> dict[str, Any]:
    return next(part for part in gateway.get("/status")["components"] if part["name"] == "settings")


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ("cloud: [", "cannot be read as YAML"),
        ({"cloud": {"lanes": [{"name": "gpu", "broker": "http://x", "topic": "t"}]}}, "cloud.lanes.0.broker"),
        ({"sensors": {"sensors/meter": {"model": "no-such-model"}}}, "must be one of"),
        ({"models": {"catalog": "/nonexistent/catalog.yaml"}}, "No such file"),
    ],
    ids=["no YAML", "a broker that is none", "an unknown model", "no catalogue"],
)
def test_what_is_wrong_is_named_and_nothing_changes(gateway: Gateway, change: Any, fault: str) -> None:
    before = gateway.get("/status")
    text = change if isinstance(change, str) else configuration(gateway) | change
    settings = reload(gateway, text)
    assert fault in settings["problem"]
    assert settings["sha256"] == before["settings"]["sha256"]
    assert settings["generation"] == before["settings"]["generation"]
    assert component(gateway)["state"] == "degraded" and fault in component(gateway)["reason"]
    assert fault in gateway.daemon.tail(1 << 20)
    code, answer = gateway.infer(model="digits", inputs=gateway.sample("digits")[0])
    assert code == 200 and answer["tier"] != "fallback"
    assert gateway.get("/status")["uptime_s"] > before["uptime_s"]


def test_a_change_is_applied_and_no_request_is_refused(gateway: Gateway) -> None:
    traffic = Traffic(gateway, deadline_ms=5000)
    traffic.start()
    wait_until(lambda: len(traffic.outcomes) > 20, "traffic")
    answers = Client(gateway.local_port, f"edge/{GATEWAY}/results/late")
    changed = configuration(gateway)
    changed["sensors"] = {"sensors/late": {"model": "digits", "name": "late", "use_cache": False}}
    changed["cloud"]["lanes"][0]["name"] = "renamed"
    stranger = urllib.request.Request(f"{gateway.url}/status", headers={"Authorization": "Bearer ea_nobody"})
    with pytest.raises(urllib.error.HTTPError):
        urllib.request.urlopen(stranger)
    before = gateway.get("/status")
    answered, refused = before["counters"]["answered"], before["security"]["refused"]
    settings = reload(gateway, changed)
    assert (settings["problem"], component(gateway)["state"]) == ("", "up")
    wait_until(gateway.complete, "every tier available")
    assert "cloud:renamed" in gateway.targets() and "cloud:gpu" not in gateway.targets()
    wait_until(lambda: gateway.get("/status")["doors"]["mqtt"]["connected"], "the door")
    answers.publish("sensors/late", json.dumps({"inputs": gateway.sample("digits")[0]}))
    assert answers.next()["tier"] == "edge_gpu"
    assert gateway.get("/status")["counters"]["answered"] > answered, "counters go on"
    assert gateway.get("/status")["security"]["refused"] == refused != {}
    outcomes = traffic.stop()
    assert {code for code, _, _ in outcomes} == {200}
    trail = "".join(path.read_text() for path in (gateway.stage.folder / "state" / "audit").iterdir())
    assert '"what":"reload","changed":["cloud.lanes","sensors.' in trail
    answers.close()


def test_the_same_again_is_read_again(gateway: Gateway) -> None:
    """Keys and certificates in other files may have changed, of which the configuration has only the names."""
    document = yaml.safe_load((gateway.stage.folder / "daemon.yaml").read_text())
    before = gateway.get("/status")["settings"]
    once = {"model": "digits", "inputs": gateway.sample("digits")[0], "use_cache": False, "idempotency_key": "once"}
    _, first = gateway.infer(**once)
    settings = reload(gateway, document)
    assert settings["sha256"] == before["sha256"]
    assert settings["generation"] == before["generation"] + 1
    _, again = gateway.infer(**once)
    assert again["cached"] and "same idempotency key" in again["reasons"][0], "answers under their keys outlive it"
    assert again["outputs"] == first["outputs"]
    assert first["request_id"] in {one["request_id"] for one in gateway.get("/recent")}, "and so do the latest"
    wait_until(gateway.complete, "every tier available")


def test_another_address_of_the_same_port(gateway: Gateway) -> None:
    """`localhost` first, which is the same door; then all of them, which the daemon's own would keep it from."""
    document = yaml.safe_load((gateway.stage.folder / "daemon.yaml").read_text())
    port = gateway.get("/status")["doors"]["http"]["port"]
    for http in ({"host": "localhost", "port": port}, {"host": "127.0.0.1", "port": port}):
        settings = reload(gateway, document | {"http": http})
        assert settings["problem"] == ""
        wait_until(gateway.complete, "every tier available")


def test_what_only_a_start_can_tell_brings_the_former_one_back(gateway: Gateway) -> None:
    before = gateway.get("/status")["settings"]
    former = yaml.safe_load((gateway.stage.folder / "daemon.yaml").read_text())
    with socket.create_server(("127.0.0.1", free_port())) as taken:
        settings = reload(gateway, former | {"http": {"port": taken.getsockname()[1]}})
    assert "cannot listen on" in settings["problem"]
    assert settings["sha256"] == before["sha256"]
    wait_until(gateway.complete, "every tier available")
    code, answer = gateway.infer(model="digits", inputs=gateway.sample("digits")[0], use_cache=False)
    assert (code, answer["tier"]) == (200, "edge_gpu")


def test_it_still_stops_as_asked(gateway: Gateway) -> None:
    assert gateway.daemon.terminate() == 0
