"""A board that samples a sensor of its own, through the real daemon, over a real broker."""

from __future__ import annotations

import json
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gateway import GATEWAY, Client, Gateway, wait_until

from agent.registry.tensors import dequantise
from hil.processes import Stage
from hil.samples import table

NAME = "meter"
INTERVAL_MS = 25
THRESHOLD = 0.9


class StreamGateway(Gateway):
    """Without a cloud: what the board is not sure of goes to the gateway's own runtime."""

    def start_stream(self, **changes: Any) -> None:
        self.samples = self.stage.folder / "digits.table"
        self.samples.write_bytes(table(self.catalog, "digits"))
        self.start_broker()
        self.start_mcu()
        stream = {"name": NAME, "model": "digits", "interval_ms": INTERVAL_MS, "threshold": THRESHOLD} | changes
        config = self.config() | {"cloud": {"lanes": []}, "sensors": {}}
        config["edge_mcu"] = {"port": str(self.mcu_port), "health_check_interval": 1, "streams": [stream]}
        self.daemon = self.stage.daemon(config)
        wait_until(self.complete, "every tier available")
        self.results = Client(self.local_port, f"edge/{GATEWAY}/results/{NAME}")

    def start_mcu(self) -> None:
        model = self.catalog.path(self.catalog.family("digits").variants["mcu-int8"])
        options = ("--control", str(self.control_path), "--model", str(model), "--samples", str(self.samples))
        self.mcu = self.stage.virtual_mcu(self.mcu_port, *options)

    def board(self) -> dict[str, Any]:
        ports: list[dict[str, Any]] = self.targets()["edge_mcu"]["detail"]["ports"]
        return ports[0]

    def collected(self, count: int) -> list[dict[str, Any]]:
        """The next results."""
        return [self.results.next() for _ in range(count)]


@pytest.fixture(scope="module")
def streamed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StreamGateway]:
    with Stage(tmp_path_factory.mktemp("streams")) as stage:
        gateway = StreamGateway(stage)
        gateway.start_stream()
        yield gateway
        gateway.results.close()


def test_each_sample_has_a_whole_answer(streamed: StreamGateway) -> None:
    variant = streamed.catalog.family("digits").variants["mcu-int8"]
    own = [answer for answer in streamed.collected(60) if answer["tier"] == "edge_mcu"]
    assert len(own) > 20
    for answer in own:
        assert answer["sensor"] == NAME
        assert answer["model_sha256"] == variant.sha256
        assert answer["provider"].startswith("host ")
        assert answer["reasons"][0] == "edge_mcu: streamed by the board"
        assert answer["confidence"] >= THRESHOLD or "being escalated" in answer["reasons"][-1]
        assert not answer["cached"] and not answer["stale"]
        assert answer["timing_ms"]["compute"] > 0
    known = own[-1]
    assert known["sample"]["time_error_ms"] < 1
    assert 0 <= known["age_s"] < 5
    assert known["sample"]["taken_at"] == pytest.approx(time.time(), abs=20)


def test_results_are_those_of_the_samples_and_none_is_lost(streamed: StreamGateway) -> None:
    tflite_micro = pytest.importorskip("tflite_micro")
    variant = streamed.catalog.family("digits").variants["mcu-int8"]
    reference = tflite_micro.runtime.Interpreter.from_file(str(streamed.catalog.path(variant)), arena_size=65536)
    data, size = streamed.samples.read_bytes(), 64
    rows: dict[bytes, int] = {}
    for number, at in enumerate(range(0, len(data), size)):
        reference.set_input(np.frombuffer(data[at : at + size], np.int8).reshape(variant.inputs[0].shape), 0)
        reference.invoke()
        rows.setdefault(dequantise(reference.get_output(0), variant.outputs[0]).tobytes(), number)
    for answer in streamed.collected(60):
        if answer["tier"] == "edge_mcu":
            assert np.array(answer["outputs"]["probabilities"], np.float32).tobytes() in rows
    assert len(rows) > len(data) // size // 2
    assert streamed.board()["stream"]["lost"] == 0


def test_what_the_board_is_not_sure_of_is_escalated(streamed: StreamGateway) -> None:
    def unsure() -> dict[str, Any] | None:
        found = [json.loads(message.payload) for message in streamed.results.messages]
        return next((answer for answer in found if answer["tier"] != "edge_mcu"), None)

    better = wait_until(unsure, "an escalated sample")
    assert better["tier"] == "edge_gpu"
    assert better["reasons"][0] == "edge_mcu: streamed by the board"
    assert better["reasons"][1].endswith(f"below {THRESHOLD:.1%}: escalated")
    assert better["model_sha256"] != streamed.catalog.family("digits").variants["mcu-int8"].sha256
    status = streamed.get("/status")
    assert status["doors"]["streams"][NAME]["improved"] > 0


def test_requests_are_answered_meanwhile(streamed: StreamGateway) -> None:
    values, _ = streamed.sample("digits", 3)
    for _ in range(20):
        answer = streamed.infer(model="digits", inputs=values, variant="mcu-int8", use_cache=False)[1]
        assert answer["tier"] == "edge_mcu", answer
    assert streamed.board()["stream"]["state"] == "streaming"


def test_the_clock_is_known_to_a_millisecond_and_truly(streamed: StreamGateway) -> None:
    with streamed.control as control:
        board_s, ours_s = control.clock()
    board = streamed.board()
    assert board["clock_error_ms"] < 1
    assert abs(board["clock_offset_s"] - (board_s - ours_s)) * 1e3 <= board["clock_error_ms"]


def test_metrics_tell_of_the_stream(streamed: StreamGateway) -> None:
    with urllib.request.urlopen(f"{streamed.url}/metrics", timeout=10) as response:
        text = response.read().decode()
    port = f"ports.{streamed.mcu_port}"
    for reading in (f"{port}.stream.results", f"{port}.clock_error_ms", f"{port}.stream.skipped"):
        assert f'edge_agent_target_reading{{reading="{reading}",target="edge_mcu"}}' in text
    assert f'edge_agent_doors{{reading="streams.{NAME}.escalated"}}' in text


@pytest.mark.parametrize("fault", ["reset", "replug", "killed"])
def test_a_stream_begins_again_by_itself(streamed: StreamGateway, fault: str) -> None:
    starts = streamed.board()["stream"]["starts"]
    if fault == "killed":
        streamed.mcu.kill()
        streamed.start_mcu()
    else:
        with streamed.control as control:
            if fault == "reset":
                control.reset()
            else:
                control.unplug()
                control.plug()
    wait_until(lambda: (streamed.board()["stream"] or {}).get("starts", 0) > starts, "the stream begun again")
    streamed.results.messages.clear()
    assert streamed.collected(5)


def test_when_nothing_else_can_be_asked_the_boards_answer_is_published_and_says_so(tmp_path: Path) -> None:
    with Stage(tmp_path) as stage:
        gateway = StreamGateway(stage)
        gateway.start_stream(threshold=1.0, deadline_ms=0.001)
        answers = gateway.collected(10)
        assert {answer["tier"] for answer in answers} == {"edge_mcu"}
        assert any("; escalated: " in answer["reasons"][-1] for answer in answers), answers[0]["reasons"]
        gateway.results.close()
