"""What becomes of a board's own samples: published or escalated; and the threshold that the board gets."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from agent import cli
from agent.build import build_targets
from agent.config import Config, McuSection, RoutingSection, StreamSection
from agent.core.clock import ManualClock
from agent.core.errors import ConfigError, Unavailable
from agent.core.streamed import Streamed
from agent.core.types import InferenceRequest, InferenceResult, LatencyClass, Tier
from agent.ingress.streams import StreamDoor
from agent.registry.catalog import Catalog, Variant
from agent.routing.admission import Admission
from agent.targets.mcu_stream import spec_of
from agent.wire.codes import SendInputs
from tests.fakes import INPUT, PROBABILITIES, family_document, make_catalog, variant_document


class Core:
    """Answers escalations as told."""

    def __init__(self, catalog: Catalog, clock: ManualClock) -> None:
        self.admission = Admission(catalog, RoutingSection(), clock, 5.0)
        self.asked: list[InferenceRequest] = []
        self.error: Unavailable | None = None
        self.gate = asyncio.Event()
        self.gate.set()
        self.stale = False

    async def infer(self, request: InferenceRequest) -> InferenceResult:
        self.asked.append(request)
        await self.gate.wait()
        if self.error is not None:
            raise self.error
        return _better(request, stale=self.stale)

    def ready(self) -> tuple[bool, str]:
        return True, ""

    def status(self) -> Mapping[str, Any]:
        return {}


def _better(request: InferenceRequest, *, stale: bool) -> InferenceResult:
    return InferenceResult(
        request_id=request.id,
        model="toy",
        variant="medium",
        model_sha256="b" * 64,
        outputs={"probabilities": PROBABILITIES},
        label="walk",
        confidence=0.99,
        tier=Tier.FALLBACK if stale else Tier.EDGE_GPU,
        origin_tier=Tier.EDGE_GPU,
        target="edge_gpu",
        provider="p",
        latency_class=request.latency_class,
        queue_s=0.0,
        link_s=0.0,
        compute_s=0.0,
        total_s=0.002,
        deadline_met=True,
        cost_usd=0.0,
        cached=stale,
        stale=stale,
        age_s=0.0,
        attempts=(),
        reasons=("edge_gpu: score 1",),
    )


class Bench:
    def __init__(self, **section: Any) -> None:
        self.clock = ManualClock()
        self.clock.advance(100.0)
        self.core = Core(make_catalog(), self.clock)
        self.published: list[tuple[str, Mapping[str, Any]]] = []
        self.observed: list[InferenceResult] = []
        settings = StreamSection.model_validate({"name": "arm", "model": "toy"} | section)
        self.door = StreamDoor(
            self.core,
            [settings],
            lambda name, document: self.published.append((name, document)),
            self.observed.append,
            self.clock,
        )

    def take(self, sure: float = 0.7, *, inputs: bool = True, taken_ago_s: float | None = 0.004) -> None:
        outputs = np.array([[1 - sure, sure, 0.0]], np.float32)
        now = self.clock.monotonic()
        self.door.take(
            Streamed(
                stream="arm",
                variant="small",
                model_sha256="a" * 64,
                provider="host fake",
                outputs={"probabilities": outputs},
                inputs={"window": INPUT} if inputs else None,
                taken_at=None if taken_ago_s is None else now - taken_ago_s,
                bound_s=0.0002,
                received_at=now,
                compute_s=0.001,
                seq=41,
                skipped=2,
                lost=1,
            )
        )

    async def done(self) -> None:
        await self.door.stop(1.0)


async def test_a_sure_answer_is_published_as_the_boards_own() -> None:
    bench = Bench(threshold=0.6)
    bench.take()
    ((name, document),) = bench.published
    assert name == document["sensor"] == "arm"
    assert (document["tier"], document["target"], document["variant"]) == ("edge_mcu", "edge_mcu", "small")
    assert document["label"] == "walk"
    assert document["confidence"] == pytest.approx(0.7)
    assert document["timing_ms"] == {"queue": 0.0, "link": 3.0, "compute": 1.0, "total": 4.0}
    assert document["age_s"] == 0.004
    assert document["reasons"] == ["edge_mcu: streamed by the board"]
    assert document["sample"] == {
        "seq": 41,
        "taken_at": pytest.approx(bench.clock.wall() - 0.004),
        "time_error_ms": 0.2,
        "skipped": 2,
        "lost": 1,
    }
    assert [answer.tier for answer in bench.observed] == [Tier.EDGE_MCU]
    assert bench.core.asked == []


async def test_an_unsure_one_is_asked_of_the_other_tiers_from_the_moment_of_its_sample() -> None:
    bench = Bench(threshold=0.8, priority=9, allowed_regions=["eu"], latency_class="realtime")
    bench.take()
    await bench.done()
    (request,) = bench.core.asked
    assert request.avoid == {Tier.EDGE_MCU}
    assert (request.priority, request.allowed_regions, request.producer) == (9, {"eu"}, "arm")
    assert request.asked_by == "sensor:arm"
    assert request.latency_class is LatencyClass.REALTIME
    assert request.received == pytest.approx(bench.clock.monotonic() - 0.004)
    assert np.array_equal(request.inputs["window"], INPUT)
    ((_, document),) = bench.published
    assert document["tier"] == "edge_gpu"
    assert document["reasons"] == [
        "edge_mcu: streamed by the board",
        "edge_mcu: 70.0% sure, below 80.0%: escalated",
        "edge_gpu: score 1",
    ]
    assert bench.observed == []  # the pipeline has counted it


@pytest.mark.parametrize("how", ["refused", "stale"])
async def test_when_escalation_fails_the_boards_answer_stands_and_says_so(how: str) -> None:
    bench = Bench()
    bench.core.error = Unavailable("no target could answer") if how == "refused" else None
    bench.core.stale = how == "stale"
    bench.take()
    await bench.done()
    ((_, document),) = bench.published
    assert (document["tier"], document["stale"]) == ("edge_mcu", False)
    assert document["reasons"][-1].startswith("edge_mcu: 70.0% sure, below 80.0%; escalated: no")
    assert bench.door.status()["arm"] == {"results": 1, "escalated": 1, "improved": 0, "held": 1, "in_flight": 0}


async def test_without_inputs_there_is_nothing_to_escalate() -> None:
    bench = Bench()
    bench.take(inputs=False)
    assert bench.published[0][1]["reasons"][-1].endswith("its inputs were not sent")


async def test_inputs_that_nobody_else_would_take_leave_the_boards_answer() -> None:
    """What a board has of whole numbers, by its scale, need not be whole numbers."""
    bench = Bench()
    family = family_document(inputs=[{"name": "window", "dtype": "int16", "shape": [1, 4]}])
    bench.core.admission = Admission(make_catalog(toy=family), RoutingSection(), bench.clock, 5.0)
    bench.take()
    ((_, document),) = bench.published
    assert document["tier"] == "edge_mcu"
    assert "cannot be escalated: inputs.window: holds a value that int16 cannot" in document["reasons"][-1]
    assert bench.door.status()["arm"] == {"results": 1, "escalated": 0, "improved": 0, "held": 1, "in_flight": 0}


async def test_escalations_in_flight_are_bounded() -> None:
    bench = Bench(max_escalations=2)
    bench.core.gate.clear()
    for _ in range(5):
        bench.take()
    await asyncio.sleep(0)
    assert bench.door.status()["arm"]["in_flight"] == 2
    assert [document["tier"] for _, document in bench.published] == ["edge_mcu"] * 3
    bench.core.gate.set()
    await bench.done()
    assert len(bench.published) == 5


async def test_without_the_boards_time_an_answer_counts_from_its_arrival() -> None:
    bench = Bench(threshold=0.0)
    bench.take(taken_ago_s=None)
    document = bench.published[0][1]
    assert document["sample"]["taken_at"] is None
    assert document["timing_ms"]["total"] == 1.0


async def test_a_deadline_that_passed_on_the_way_is_told() -> None:
    bench = Bench(threshold=0.0, deadline_ms=3)
    bench.take()
    assert bench.published[0][1]["deadline_met"] is False


async def test_a_publisher_that_fails_does_not_end_the_stream() -> None:
    bench = Bench(threshold=0.0)

    def fail(name: str, document: Mapping[str, Any]) -> None:
        raise RuntimeError("broker")

    bench.door._publish = fail
    bench.take()
    assert len(bench.observed) == 1


def _variant(**changes: Any) -> Variant:
    return Variant.model_validate({**variant_document("edge_mcu", **changes), "model": "toy", "id": "small"})


@pytest.mark.parametrize(("threshold", "expected"), [(0.0, -128), (0.5, 0), (0.8, 77), (0.99609375, 127)])
def test_the_threshold_in_the_outputs_own_unit(threshold: float, expected: int) -> None:
    outputs = [{"name": "out", "maps": "p", "shape": [1, 3], "dtype": "int8", "scale": 1 / 256, "zero_point": -128}]
    section = StreamSection(name="a", model="toy", threshold=threshold)
    spec = spec_of(section, _variant(outputs=outputs))
    assert (spec.send_inputs, spec.threshold) == (SendInputs.BELOW, expected)
    # The least byte that counts as sure, and only from there on.
    assert (expected + 128) / 256 >= threshold - 1e-6
    assert (expected - 1 + 128) / 256 < threshold or expected == -128


def test_what_the_board_cannot_judge_it_sends_whole() -> None:
    section = StreamSection(name="a", model="toy")
    plain = [{"name": "out", "maps": "p", "shape": [1, 3], "dtype": "float32"}]
    assert spec_of(section, _variant(outputs=plain)).send_inputs is SendInputs.ALWAYS
    assert spec_of(StreamSection(name="a", model="toy", send_inputs="never"), _variant(outputs=plain)).send_inputs == 0


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"ports": ["/a"], "streams": [{"name": "n", "model": "m", "port": "/b"}]}, "is none of ports"),
        ({"ports": ["/a", "/b"], "streams": [{"name": "n", "model": "m"}]}, "needs port or uid"),
        ({"port": "/a", "streams": [{"name": "n", "model": "m"}] * 2}, "the same name"),
        (
            {"port": "/a", "streams": [{"name": "n", "model": "m"}, {"name": "o", "model": "m"}]},
            "of the same board",
        ),
        ({"port": "/a", "streams": [{"name": "n", "model": "m", "port": "/a", "uid": "0" * 16}]}, "not both"),
        ({"port": "/a", "streams": [{"name": "n", "model": "m", "uid": "12"}]}, "uid"),
        ({"port": "/a", "streams": [{"name": "n", "model": "m", "interval_ms": 0}]}, "interval_ms"),
    ],
)
def test_mistakes_of_the_configuration_are_told(section: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        McuSection.model_validate(section)


def test_streams_need_a_broker() -> None:
    mcu = {"port": "/a", "streams": [{"name": "n", "model": "m"}]}
    with pytest.raises(ValidationError, match="need mqtt"):
        Config.model_validate({"edge_mcu": mcu, "mqtt": {"enabled": False}})


def test_a_stream_of_a_model_that_is_not_there_is_refused_at_the_start() -> None:
    mcu = {"port": "/a", "streams": [{"name": "n", "model": "nothing"}]}
    config = Config.model_validate({"edge_mcu": mcu})
    with pytest.raises(ConfigError, match="n: no model 'nothing'"):
        build_targets(config, make_catalog(), ManualClock())


def test_check_names_a_stream_of_a_model_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("edge_mcu: {port: /a, streams: [{name: n, model: nothing}]}\n")
    assert cli.main(["check", str(path)]) == 2
    assert "edge_mcu.streams.0.model: must be one of" in capsys.readouterr().err
