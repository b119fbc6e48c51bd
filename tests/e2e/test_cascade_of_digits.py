"""The cascade over the held-out digits: real models, a board with the real firmware's protocol, a real worker."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from gateway import GATEWAY, Client, Gateway, wait_until

from agent.registry.calibration import Calibration, Cascade
from hil.processes import Stage

SAMPLES = 450
OVERRUN_MS = 100
"""How late an answer may be on a machine that does other things as well."""


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    with Stage(tmp_path_factory.mktemp("cascade")) as stage:
        gateway = Gateway(stage)
        board = {"port": str(gateway.mcu_port), "timeout_ms": 5000}
        shadow = {"rate": 1.0, "per_hour": 1000, "usd_per_day": 10, "max_queued": 1000}
        gateway.start(edge_gpu={"enabled": False}, edge_mcu=board, shadow=shadow, drift={"window": 450})
        yield gateway


def ask(gateway: Gateway, index: int, **options: Any) -> tuple[dict[str, Any], str]:
    values, label = gateway.sample("digits", index)
    document = {"latency_class": "near", "deadline_ms": 5000, "use_cache": False, "shadow": False}
    code, answer = gateway.infer(model="digits", inputs=values, **(document | options))
    assert code == 200, answer
    return answer, label


def promised(gateway: Gateway) -> tuple[Calibration, Cascade]:
    calibration = gateway.catalog.family("digits").variants["mcu-int8"].calibration
    assert calibration is not None
    assert calibration.cascade is not None
    return calibration, calibration.cascade


def test_the_cascade_is_as_right_as_the_cloud_and_asks_it_for_a_quarter_at_most(gateway: Gateway) -> None:
    right = escalated = 0
    for index in range(SAMPLES):
        answer, label = ask(gateway, index, shadow=True)
        right += answer["label"] == label
        escalated += answer["escalation"] == "escalated"
        assert answer["calibrated"]
        tiers = [attempt["tier"] for attempt in answer["attempts"] if attempt["outcome"] == "ok"]
        if answer["escalation"] == "escalated":
            assert (answer["tier"], tiers) == ("cloud_gpu", ["edge_mcu", "cloud_gpu"])
            assert answer["cost_usd"] == pytest.approx(0.001)
        else:
            assert (answer["escalation"], answer["tier"], tiers) == ("", "edge_mcu", ["edge_mcu"]), answer
            assert answer["confidence"] >= promised(gateway)[1].threshold - 1e-6
    cloud = gateway.catalog.family("digits").variants["cloud-fp32"].accuracy.value
    cascade = promised(gateway)[1]
    assert right / SAMPLES >= cloud - 0.005
    assert cascade.low <= right / SAMPLES <= cascade.high
    assert escalated / SAMPLES <= 0.25
    spread = 3 * (cascade.offload * (1 - cascade.offload) / SAMPLES) ** 0.5
    assert escalated / SAMPLES == pytest.approx(cascade.offload, abs=spread)


def test_what_was_shadowed_agrees_as_often_as_when_calibrated(gateway: Gateway) -> None:
    def watched() -> dict[str, Any]:
        drift: dict[str, Any] = gateway.get("/status")["models"]["digits/mcu-int8"]["drift"]
        return drift

    wait_until(lambda: watched()["samples"] == SAMPLES, "every answer asked again")
    drift, shadow = watched(), gateway.get("/status")["shadow"]
    assert drift["agreement"] == pytest.approx(promised(gateway)[1].agreement, abs=1e-4)
    assert not drift["alarm"]
    assert shadow["free"] + shadow["answered"] == SAMPLES
    assert shadow["cost_usd"] == pytest.approx(0.001 * shadow["answered"])


def unsure(gateway: Gateway) -> int:
    return next(index for index in range(SAMPLES) if ask(gateway, index)[0]["escalation"] == "escalated")


def test_an_answer_that_cannot_be_escalated_is_held(gateway: Gateway) -> None:
    index = unsure(gateway)
    answer, _ = ask(gateway, index, allowed_regions=["elsewhere"])
    assert (answer["escalation"], answer["tier"]) == ("held", "edge_mcu")
    assert any("not sure" in reason for reason in answer["reasons"])
    assert any("elsewhere" in reason or "region" in reason for reason in answer["reasons"])


def test_a_held_answer_is_no_answer_to_the_next_request(gateway: Gateway) -> None:
    index = unsure(gateway)
    assert ask(gateway, index, allowed_regions=["elsewhere"])[0]["escalation"] == "held"
    answer, _ = ask(gateway, index, use_cache=True)
    assert (answer["escalation"], answer["cached"]) == ("escalated", False)
    assert ask(gateway, index, use_cache=True)[0]["cached"]


def test_a_cloud_that_hangs_costs_no_answer_and_no_deadline(gateway: Gateway) -> None:
    index = unsure(gateway)
    for worker in (gateway.worker_1, gateway.worker_2):  # type: ignore[attr-defined]
        worker.pause()
    try:
        answer, _ = ask(gateway, index, deadline_ms=500)
    finally:
        for worker in (gateway.worker_1, gateway.worker_2):  # type: ignore[attr-defined]
            worker.resume()
    assert (answer["escalation"], answer["tier"]) == ("held", "edge_mcu")
    assert answer["timing_ms"]["total"] <= 500 + OVERRUN_MS
    assert [attempt["outcome"] for attempt in answer["attempts"]] == ["ok", "timeout"]


def test_the_mode_decides(gateway: Gateway) -> None:
    index = unsure(gateway)
    assert ask(gateway, index, accuracy="high")[0]["tier"] == "cloud_gpu"
    taken, _ = ask(gateway, index, accuracy="acceptable")
    assert (len(taken["attempts"]), taken["escalation"]) == (1, "")


def test_drift_is_told_to_whoever_subscribes(gateway: Gateway) -> None:
    client = Client(gateway.local_port, f"edge/{GATEWAY}/alarms/drift/#")
    try:
        told = client.next()
    finally:
        client.close()
    assert (told["variant"], told["active"]) in {("mcu-int8", False), ("gateway-fp16", False)}


def test_inputs_that_are_not_what_they_were_raise_the_alarm(gateway: Gateway) -> None:
    client = Client(gateway.local_port, f"edge/{GATEWAY}/alarms/drift/digits/mcu-int8")
    assert client.next()["active"] is False
    shuffled = np.random.default_rng(0).permutation(64)
    for index in range(SAMPLES):
        values = np.array(gateway.sample("digits", index)[0]).ravel()[shuffled].tolist()
        gateway.infer(model="digits", inputs=values, use_cache=False, latency_class="near", deadline_ms=5000)
        if client.messages:
            break
    told = client.next()
    client.close()
    assert told["active"] is True
    assert told["interval"][1] < told["band_low"] < told["expected"]
    status = gateway.get("/status")
    assert status["models"]["digits/mcu-int8"]["drift"]["accuracy"] < 0.9
    assert [part["reason"] for part in status["components"] if part["name"] == "drift"] == [
        "digits/mcu-int8: agree less with the cloud than they did"
    ]
