"""Replaying a trace: what is read, what is filled in, and what is told of it."""

import json
from pathlib import Path
from typing import Any

import pytest
from sim_fakes import catalog, config, stage

from agent.config import Config
from hil.sim import replay, trace
from hil.sim.rebuild import places_of_trace, rebuild
from hil.sim.setting import Misuse

TARGETS = {
    "edge_mcu": {"tier": "edge_mcu", "order": 0, "cost_usd": 0.0},
    "edge_gpu": {"tier": "edge_gpu", "order": 10, "cost_usd": 0.0},
    "cloud:gpu": {"tier": "cloud_gpu", "order": 20, "cost_usd": 0.0004},
}
COMMON = {"region": None, "backup": False, "max_concurrent": 8, "parallel": 2}
VARIANTS = {"edge_mcu": "mcu-int8", "edge_gpu": "gateway-fp16", "cloud:gpu": "cloud-fp32"}


def header(**changes: Any) -> dict[str, Any]:
    models = {
        family.name: {id_: {"sha256": variant.sha256} for id_, variant in family.variants.items()}
        for family in catalog().families.values()
    }
    targets = {name: {**about, **COMMON} for name, about in TARGETS.items()}
    return {"kind": "header", "schema": 1, "models": models, "targets": targets, **changes}


def candidate(target: str, excluded: str | None = None, p50_ms: float = 2.0) -> dict[str, Any]:
    estimate = {
        "p50_ms": p50_ms,
        "p95_ms": 2 * p50_ms,
        "service_ms": p50_ms / 2,
        "link_ms": p50_ms / 2,
        "measured": True,
        "bytes": 500,
    }
    about = TARGETS[target]
    return {
        "target": target,
        "tier": about["tier"],
        "variant": VARIANTS[target],
        "excluded": excluded,
        "estimate": estimate,
    }


def request(
    number: int, target: str = "edge_gpu", *, outcome: str = "ok", gone: tuple[str, ...] = (), **changes: Any
) -> dict[str, Any]:
    """One that was answered by `target` in 2 ms, or failed there after 3."""
    tried = {
        "target": target,
        "tier": TARGETS[target]["tier"],
        "variant": VARIANTS[target],
        "outcome": outcome,
        "elapsed_ms": 2.0 if outcome == "ok" else 3.0,
    }
    answered = outcome == "ok"
    return {
        "kind": "request",
        "schema": 1,
        "at": 1000.0 + number,
        "request": {
            "id": f"r{number}",
            "model": "digits",
            "producer": "meter",
            "variant": None,
            "latency_class": "near",
            "deadline_ms": 100.0,
            "priority": 5,
            "max_retries": 5,
            "timeout_ms": None,
            "allowed_regions": [],
            "use_cache": False,
            "accuracy": "adaptive",
            "input": {"digest": f"{number:032x}"},
            "truth": "3",
            **changes,
        },
        "stages": [
            {
                "stage": "route",
                "decision": {
                    "candidates": [candidate(name, "unavailable" if name in gone else None) for name in TARGETS]
                },
                "attempts": [tried],
            }
        ],
        "outcome": {
            "status": "computed" if answered else "refused",
            "tier": TARGETS[target]["tier"] if answered else None,
            "target": target if answered else None,
            "variant": VARIANTS[target] if answered else None,
            "label": "3" if answered else None,
            "correct": True if answered else None,
            "confidence": 0.99 if answered else None,
            "queue_ms": 0.0,
            "link_ms": 1.5,
            "compute_ms": 0.5,
            "total_ms": 2.5 if answered else 3.5,
            "deadline_met": answered,
            "cost_usd": TARGETS[target]["cost_usd"],
            "escalation": "",
        },
    }


def written(path: Path, *lines: dict[str, Any] | str) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def told(path: Path, policy: Config | None = None) -> dict[str, replay.Row]:
    rows, _ = replay.tell(trace.read(path), stage(), policy or config(), 1)
    return rows


def test_what_is_no_request_is_skipped(tmp_path: Path) -> None:
    path = written(tmp_path / "t", header(), request(0), {"kind": "news"}, '{"kind": "request", "cut', request(1))
    found = trace.read(path)
    assert [record.at_s for record in found.records] == [0.0, 1.0]
    assert found.skipped == 2


@pytest.mark.parametrize(
    ("lines", "why"),
    [
        ([], "is no trace: it has no header"),
        ([header()], "holds no recorded request"),
        (["not a trace"], "is no trace: line 1"),
        ([header(schema=2), request(0)], "schema 2"),
    ],
)
def test_what_is_no_trace_is_refused(tmp_path: Path, lines: list[Any], why: str) -> None:
    with pytest.raises(Misuse, match=why):
        trace.read(written(tmp_path / "t", *lines))


def test_models_that_the_catalogue_does_not_have_are_named(tmp_path: Path) -> None:
    other = header(models={"digits": {"mcu-int8": {"sha256": "0" * 64}}})
    with pytest.raises(Misuse, match="digits/mcu-int8 is another file"):
        trace.check_models(trace.read(written(tmp_path / "t", other, request(0))), catalog())
    with pytest.raises(Misuse, match="asks for faces"):
        trace.check_models(trace.read(written(tmp_path / "t", header(), request(0, model="faces"))), catalog())


def test_the_same_decisions_take_the_recorded_time(tmp_path: Path) -> None:
    path = written(tmp_path / "t", header(), *(request(number) for number in range(20)))
    rows = told(path)
    recorded, again = rows["as recorded"], rows["the same decisions, simulated"]
    assert recorded.p50_ms == pytest.approx(2.5)
    assert again.p50_ms == pytest.approx(2.5)
    assert again.tiers == recorded.tiers == {"edge_gpu": 20}
    assert recorded.accuracy == again.accuracy == 1.0


def test_what_failed_fails_again(tmp_path: Path) -> None:
    lines = [
        request(number, outcome="failed" if number % 2 else "ok", producer=f"meter-{number}") for number in range(10)
    ]
    rows = told(written(tmp_path / "t", header(), *lines))
    assert rows["as recorded"].refused == rows["the same decisions, simulated"].refused == 0.5
    assert rows["under this configuration"].refused == 0.0, "another target was there"


def test_a_target_is_away_while_the_trace_says_so(tmp_path: Path) -> None:
    lines = [
        request(number, "cloud:gpu", gone=("edge_gpu", "edge_mcu") if 5 <= number < 10 else ()) for number in range(15)
    ]
    for line in lines:
        line["outcome"]["confidence"] = None
    rows = told(written(tmp_path / "t", header(), *lines))
    assert rows["as recorded"].tiers == {"cloud_gpu": 15}
    found = rebuild(trace.read(tmp_path / "t"), catalog(), stage().samples, stage().times, config())
    assert [found.weather["edge_gpu"].gone(now) for now in (4.9, 5.0, 9.9, 10.0)] == [False, True, True, False]
    assert rows["under this configuration"].tiers["cloud_gpu"] >= 5
    assert rows["under this configuration"].cost_usd < rows["as recorded"].cost_usd


def test_what_was_not_in_the_trace_is_said(tmp_path: Path) -> None:
    path = written(tmp_path / "t", header(), request(0))
    found = rebuild(trace.read(path), catalog(), stage().samples, stage().times, config())
    assert any("inputs are not in the trace" in line for line in found.filled)
    assert any("edge_mcu digits/mcu-int8" in line for line in found.filled)


def test_a_stand_in_was_answered_as_rightly(tmp_path: Path) -> None:
    wrong = request(0)
    wrong["outcome"]["correct"] = False
    found = rebuild(
        trace.read(written(tmp_path / "t", header(), wrong, request(1))),
        catalog(),
        stage().samples,
        stage().times,
        config(),
    )
    assert found.samples["digits"].right["gateway-fp16"].tolist() == [False, True]


def test_where_no_label_is_known_no_accuracy_is_told(tmp_path: Path) -> None:
    line = request(0, truth=None)
    line["outcome"]["correct"] = None
    rows = told(written(tmp_path / "t", header(), line))
    assert {row.accuracy for row in rows.values()} == {None}
    assert "unknown" in replay.table(rows)[1]


def test_the_configuration_says_what_a_target_may_run(tmp_path: Path) -> None:
    path = written(tmp_path / "t", header(), *(request(number) for number in range(10)))
    sizes = config().routing.model_size_thresholds.model_copy(update={"edge_mcu": 0.00005, "edge_gpu": 0.0001})
    routing = config().routing.model_copy(update={"model_size_thresholds": sizes})
    gateway = config().edge_gpu.model_copy(update={"enabled": False})
    for policy in (config().model_copy(update={"routing": routing}), config().model_copy(update={"edge_gpu": gateway})):
        rows = told(path, policy)
        assert rows["the same decisions, simulated"].tiers == {"edge_gpu": 10}
        assert "edge_gpu" not in rows["under this configuration"].tiers


def test_the_limits_are_those_of_the_configuration(tmp_path: Path) -> None:
    gateway = config().edge_gpu.model_copy(update={"max_concurrent": 3, "workers": 2})
    lane = config().cloud.lanes[0].model_copy(update={"timeout_ms": 700.0})
    cloud = config().cloud.model_copy(update={"lanes": (lane,)})
    policy = config().model_copy(update={"edge_gpu": gateway, "cloud": cloud})
    found = trace.read(written(tmp_path / "t", header(), request(0)))
    traits = {place.traits.name: place.traits for place in places_of_trace(found, policy)}
    assert (traits["edge_gpu"].max_concurrent, traits["edge_gpu"].parallel) == (3, 2)
    assert traits["cloud:gpu"].timeout_s == 0.7
