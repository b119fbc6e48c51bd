"""The doors of a whole gateway, asked as the README says, and what happens when its parts are killed under traffic."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gateway import GATEWAY, Client, Gateway, Traffic, wait_until

from agent.registry.tensors import dequantise, quantise

OVERRUN_S = 0.1
"""How much later than its deadline an answer may be, the client's own time included."""


def test_each_tier_answers_what_suits_it(gateway: Gateway) -> None:
    values, _ = gateway.sample("digits")
    motion, _ = gateway.sample("motion")
    fast = gateway.infer(model="digits", inputs=values, variant="mcu-int8", deadline_ms=50, use_cache=False)[1]
    near = gateway.infer(model="motion", inputs=motion, latency_class="near", use_cache=False)[1]
    batch = gateway.infer(model="digits", inputs=values, latency_class="batch", accuracy="high", use_cache=False)[1]
    assert [fast["tier"], near["tier"], batch["tier"]] == ["edge_mcu", "edge_gpu", "cloud_gpu"]
    for answer, kind in ((fast, "edge_mcu"), (near, "edge_gpu"), (batch, "cloud")):
        variant = gateway.catalog.family(answer["model"]).variant_for(kind)
        assert variant is not None
        assert answer["model_sha256"] == variant.sha256
        assert answer["variant"] == variant.id
        assert answer["provider"]
        assert answer["reasons"]
        assert 0 < answer["confidence"] <= 1
        assert answer["cached"] is answer["stale"] is False
    assert batch["cost_usd"] == pytest.approx(0.001)


def test_the_microcontroller_gives_the_reference_runtimes_very_bytes(gateway: Gateway) -> None:
    tflite_micro = pytest.importorskip("tflite_micro")
    variant = gateway.catalog.family("digits").variants["mcu-int8"]
    reference = tflite_micro.runtime.Interpreter.from_file(str(gateway.catalog.path(variant)), arena_size=65536)
    for index in range(25):
        values, _ = gateway.sample("digits", index)
        reference.set_input(quantise(np.array(values, np.float32), variant.inputs[0]), 0)
        reference.invoke()
        expected = dequantise(reference.get_output(0), variant.outputs[0])
        answer = gateway.infer(
            model="digits", inputs=values, variant="mcu-int8", use_cache=False, latency_class="interactive"
        )[1]
        assert answer["tier"] == "edge_mcu", answer
        assert np.array_equal(np.array(answer["outputs"]["probabilities"], np.float32), expected)


def test_a_repeated_input_is_answered_from_the_cache_and_says_so(gateway: Gateway) -> None:
    values, _ = gateway.sample("digits", 77)
    first = gateway.infer(model="digits", inputs=values)[1]
    second = gateway.infer(model="digits", inputs=values)[1]
    assert (second["cached"], second["stale"], second["tier"]) == (True, False, first["tier"])
    assert second["age_s"] >= 0
    assert second["outputs"] == first["outputs"]


@pytest.mark.parametrize(
    ("document", "field"),
    [
        ({"model": "digits"}, "inputs"),
        ({"model": "digits", "inputs": [1, 2, 3]}, "inputs.image"),
        ({"model": "digits", "inputs": [0] * 64, "priority": 11}, "priority"),
        ({"model": "digits", "inputs": [0] * 64, "speed": "fast"}, "speed"),
        ({"model": "digits", "inputs": [0] * 64, "deadline_ms": -5}, "deadline_ms"),
    ],
)
def test_bad_requests_are_refused_by_name(gateway: Gateway, document: dict[str, object], field: str) -> None:
    code, answer = gateway.infer(**document)
    assert code == 400
    assert answer["error"]["code"] == "invalid_request"
    assert answer["error"]["field"] == field


def test_mosquitto_rr_gets_the_answer(gateway: Gateway) -> None:
    values, _ = gateway.sample("digits", 3)
    answer = subprocess.run(
        [
            *("mosquitto_rr", "-V", "5", "-p", str(gateway.local_port), "-W", "10"),
            *("-t", f"edge/{GATEWAY}/infer/digits", "-e", "my/answers", "-m", json.dumps({"inputs": values})),
        ],
        capture_output=True,
        check=True,
        timeout=20,
    )
    document = json.loads(answer.stdout)
    assert document.get("model") == "digits", document


def test_a_sensor_reading_is_answered_on_its_results_topic(gateway: Gateway) -> None:
    values, _ = gateway.sample("digits", 5)
    client = Client(gateway.local_port, f"edge/{GATEWAY}/results/meter")
    client.publish("sensors/meter", json.dumps({"inputs": values, "request_id": "reading-1"}))
    answer = client.next()
    assert (answer["request_id"], answer["sensor"]) == ("reading-1", "meter")
    client.publish("sensors/meter", b'{"inputs": [1, 2')
    assert client.next()["error"]["code"] == "undecodable"
    client.close()


def test_the_command_line_asks_and_shows(gateway: Gateway, tmp_path: Path) -> None:
    np.save(tmp_path / "sample.npy", np.array(gateway.sample("digits", 9)[0], np.float32))
    command = [sys.executable, "-m", "agent.cli"]
    asked = subprocess.run(
        [*command, "infer", "digits", str(tmp_path / "sample.npy"), "--url", gateway.url],
        capture_output=True,
        text=True,
        check=True,
        timeout=30,
    )
    assert "sure" in asked.stdout
    assert "why" in asked.stdout
    shown = subprocess.run(
        [*command, "status", "--url", gateway.url], capture_output=True, text=True, check=True, timeout=30
    )
    assert "edge_mcu" in shown.stdout


def check_outcomes(traffic: Traffic) -> None:
    """Every request was answered or got a described error by its deadline; whatever is stale says so; none failed at
    more than the one component that was killed."""
    outcomes = traffic.stop()
    assert len(outcomes) > 10
    for code, answer, took_s in outcomes:
        assert took_s < traffic.deadline_ms / 1e3 + OVERRUN_S, (took_s, answer)
        if code == 200:
            assert answer["stale"] == (answer["tier"] == "fallback")
            failed = [one for one in answer["attempts"] if one["outcome"] not in ("ok", "cancelled")]
            assert len(failed) <= 1, answer["attempts"]
        else:
            assert answer["error"]["code"] in ("unavailable", "deadline_exceeded", "overloaded"), answer
            assert answer["error"]["message"]
            assert answer["reasons"]


def test_a_killed_microcontroller_is_replaced_by_the_next_tier_and_comes_back(gateway: Gateway) -> None:
    traffic = Traffic(gateway)
    traffic.start()
    wait_until(lambda: len(traffic.outcomes) > 5, "traffic")
    gateway.mcu.kill()
    wait_until(lambda: not gateway.available("edge_mcu"), "the microcontroller gone")
    before = len(traffic.outcomes)
    wait_until(lambda: len(traffic.outcomes) > before + 15, "traffic without it")
    gateway.start_mcu()
    wait_until(lambda: gateway.available("edge_mcu"), "the microcontroller back")
    check_outcomes(traffic)
    assert all(code == 200 for code, _, _ in traffic.outcomes), "two other tiers could answer"


def test_a_killed_worker_is_replaced_by_the_other(gateway: Gateway) -> None:
    traffic = Traffic(gateway)
    traffic.start()
    wait_until(lambda: traffic.seen(lambda answer: answer["tier"] == "cloud_gpu"), "a cloud answer")
    gateway.worker_1.kill()  # type: ignore[attr-defined]
    before = len(traffic.outcomes)
    wait_until(
        lambda: any(a.get("tier") == "cloud_gpu" for _, a, _ in traffic.outcomes[before + 10 :]), "the other worker"
    )
    gateway.start_worker("worker-1")
    check_outcomes(traffic)
    assert all(code == 200 for code, _, _ in traffic.outcomes), "the edge could answer"


def test_killed_brokers_cost_no_request(gateway: Gateway) -> None:
    traffic = Traffic(gateway)
    traffic.start()
    wait_until(lambda: traffic.seen(lambda answer: answer["tier"] == "cloud_gpu"), "a cloud answer")
    gateway.cloud_broker.kill()
    gateway.broker.kill()
    wait_until(lambda: not gateway.available("cloud:gpu"), "the lane gone")
    gateway.start_cloud_broker()
    gateway.start_broker()
    wait_until(lambda: gateway.available("cloud:gpu"), "the lane back")
    check_outcomes(traffic)
    assert all(code == 200 for code, _, _ in traffic.outcomes), "the edge could answer"
    values, _ = gateway.sample("digits", 6)

    def answered() -> bool:
        client = Client(gateway.local_port, f"edge/{GATEWAY}/results/meter")
        client.publish("sensors/meter", json.dumps(values))
        try:
            return bool(wait_until(lambda: client.messages, "an answer at the door", 2.0))
        except AssertionError:
            return False
        finally:
            client.close()

    wait_until(answered, "the MQTT door open again")


def test_when_everything_is_away_the_answer_is_old_and_says_so(gateway: Gateway, tmp_path: Path) -> None:
    values, _ = gateway.sample("digits", 11)
    assert gateway.infer(model="digits", inputs=values, producer="cellar")[0] == 200
    other, _ = gateway.sample("digits", 300)
    gateway.control.unplug()
    gateway.cloud_broker.kill()
    wait_until(lambda: not gateway.available("edge_mcu") and not gateway.available("cloud:gpu"), "both away")
    # The variant of the microcontroller runs nowhere else: for this request nothing can be asked.
    code, answer = gateway.infer(model="digits", inputs=other, producer="stranger", variant="mcu-int8")
    assert code == 503
    assert answer["error"]["code"] == "unavailable"
    assert any("ttyMCU" in reason for reason in answer["reasons"]), answer["reasons"]
    gateway.control.plug()
    gateway.start_cloud_broker()
    wait_until(gateway.complete, "everything back")


def test_a_killed_runtime_is_replaced_by_the_next_tier_and_comes_back(gateway: Gateway) -> None:
    assert gateway.daemon.terminate() == 0
    gateway.daemon = gateway.stage.daemon(gateway.config() | {"edge_gpu": {"isolation": "process"}})
    wait_until(gateway.complete, "every tier available")
    traffic = Traffic(gateway)
    traffic.start()
    wait_until(lambda: traffic.seen(lambda answer: answer["tier"] == "edge_gpu"), "an answer of the gateway")
    os.kill(gateway.targets()["edge_gpu"]["detail"]["pool"]["pid"], signal.SIGKILL)
    before = len(traffic.outcomes)
    wait_until(lambda: len(traffic.outcomes) > before + 15, "traffic without it")
    wait_until(lambda: gateway.available("edge_gpu"), "the runtime back")
    check_outcomes(traffic)
    assert all(code == 200 for code, _, _ in traffic.outcomes), "two other tiers could answer"


def test_sigterm_under_load_lets_every_request_that_came_have_its_answer(gateway: Gateway) -> None:
    """Asked of a worker that takes a second: all are in flight when the daemon is told to stop."""
    for name in ("worker-1", "worker-2"):
        getattr(gateway, name.replace("-", "_")).terminate()
    slow = gateway.stage.worker(
        "worker-slow",
        f"mqtt://127.0.0.1:{gateway.cloud_port}",
        "lanes/gpu",
        "--delay-ms",
        "1000",
        "--max-concurrent",
        "8",
    )
    wait_until(lambda: gateway.targets()["cloud:gpu"]["detail"]["workers"], "the slow worker")
    values, _ = gateway.sample("digits", 12)
    outcomes: list[tuple[int, dict[str, Any]]] = []
    ask = {"model": "digits", "inputs": values, "variant": "cloud-fp32", "deadline_ms": 8000, "use_cache": False}
    callers = [threading.Thread(target=lambda: outcomes.append(gateway.infer(**ask))) for _ in range(6)]
    for caller in callers:
        caller.start()
    wait_until(lambda: gateway.targets()["cloud:gpu"]["in_flight"] >= 6, "six in flight")
    assert gateway.daemon.terminate() == 0
    for caller in callers:
        caller.join()
    assert [code for code, _ in outcomes] == [200] * 6
    assert {answer["tier"] for _, answer in outcomes} == {"cloud_gpu"}
    slow.terminate()
    for name in ("worker-1", "worker-2"):
        gateway.start_worker(name)
    gateway.daemon = gateway.stage.daemon(gateway.config())
    wait_until(gateway.complete, "every tier available")


def test_sigterm_ends_it_with_code_0_and_the_cache_survives(gateway: Gateway) -> None:
    values, _ = gateway.sample("digits", 33)
    first = gateway.infer(model="digits", inputs=values, producer="attic")[1]
    assert gateway.daemon.terminate() == 0
    gateway.daemon = gateway.stage.daemon(gateway.config())
    second = gateway.infer(model="digits", inputs=values, producer="attic")[1]
    assert second["cached"] is True
    assert second["model_sha256"] == first["model_sha256"]
