"""Metrics: what is counted, what Prometheus reads, and that nothing grows without a bound."""

import re
import time
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from agent.core.errors import DeadlineExceeded, Overloaded
from agent.core.types import Attempt, InferenceResult, LatencyClass, Tier
from agent.telemetry import metrics as module
from agent.telemetry.metrics import Metrics

GPU_OK = Attempt("edge_gpu", Tier.EDGE_GPU, "int8", "ok", 0.001)


def answer(**changes: Any) -> InferenceResult:
    fields: dict[str, Any] = {
        "request_id": "r1",
        "model": "digits",
        "variant": "int8",
        "model_sha256": "a" * 64,
        "outputs": {},
        "label": "3",
        "confidence": 0.98,
        "tier": Tier.EDGE_GPU,
        "origin_tier": Tier.EDGE_GPU,
        "target": "edge_gpu",
        "provider": "xnnpack",
        "latency_class": LatencyClass.NEAR,
        "queue_s": 0.0,
        "link_s": 0.0,
        "compute_s": 0.001,
        "total_s": 0.0012,
        "deadline_met": True,
        "cost_usd": 0.0,
        "cached": False,
        "stale": False,
        "age_s": 0.0,
        "attempts": (GPU_OK,),
        "reasons": (),
    }
    return InferenceResult(**{**fields, **changes})


def scrape(metrics: Metrics) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    return {
        (sample.name.removeprefix("edge_agent_"), frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(metrics.render().decode())
        for sample in family.samples
    }


def value(metrics: Metrics, name: str, **labels: str) -> float | None:
    return scrape(metrics).get((name, frozenset(labels.items())))


def test_an_answer_is_counted_everywhere() -> None:
    metrics = Metrics()
    metrics.started()
    assert value(metrics, "active_requests") == 1
    metrics.answered(answer())
    assert value(metrics, "active_requests") == 0
    assert value(metrics, "requests_total", tier="edge_gpu", target="edge_gpu", status="computed") == 1
    assert value(metrics, "attempts_total", target="edge_gpu", outcome="ok") == 1
    assert value(metrics, "deadlines_total", latency_class="near", result="met") == 1
    assert value(metrics, "deadlines_total", latency_class="near", result="missed") == 0
    assert value(metrics, "cache_results_total", result="miss") == 1


def test_the_cache_and_the_bill() -> None:
    metrics = Metrics()
    attempt = Attempt("eu-west", Tier.CLOUD_GPU, "fp32", "ok", 0.2)
    lane = {"tier": Tier.CLOUD_GPU, "origin_tier": Tier.CLOUD_GPU, "target": "eu-west", "attempts": (GPU_OK, attempt)}
    for result in (
        answer(cached=True),
        answer(tier=Tier.FALLBACK, cached=True, stale=True),
        answer(tier=Tier.FALLBACK, cached=True, stale=True, same_input=False, deadline_met=False),
        answer(**lane, cost_usd=0.004),
        answer(**lane, cost_usd=0.001),
    ):
        metrics.started()
        metrics.answered(result)
    assert [value(metrics, "cache_results_total", result=kind) for kind in ("fresh", "stale", "miss")] == [1, 2, 2]
    assert [value(metrics, "stale_answers_total", same_input=same) for same in ("true", "false")] == [1, 1]
    assert value(metrics, "cost_usd_total", lane="eu-west") == pytest.approx(0.005)
    assert value(metrics, "cost_usd_total", lane="edge_gpu") is None
    counters = metrics.counters()
    assert counters["by_tier"] == {"fallback": 2, "cloud_gpu": 2}, "a fresh cached answer was not computed again"
    assert (counters["requests"], counters["answered"], counters["cached"], counters["stale"]) == (5, 5, 1, 2)
    assert (counters["deadline_hits"], counters["cost_usd"]) == (4, 0.005)


def test_refusals() -> None:
    metrics = Metrics()
    late = DeadlineExceeded("time ran out")
    late.attempts = (Attempt("eu-west", Tier.CLOUD_GPU, "fp32", "timeout", 0.2), GPU_OK._replace(hedge=True))
    late.cost_usd = 0.003
    for error in (late, Overloaded("256 requests in flight")):
        metrics.started()
        metrics.refused(error, LatencyClass.REALTIME)
    metrics.started()
    metrics.abandoned()
    metrics.malformed("http")
    metrics.malformed("mqtt", "unknown_model")
    assert metrics.active == 0
    assert value(metrics, "refusals_total", code="overloaded", latency_class="realtime") == 1
    assert value(metrics, "deadlines_total", latency_class="realtime", result="missed") == 1
    assert value(metrics, "attempts_total", target="eu-west", outcome="timeout") == 1
    assert value(metrics, "hedges_total", target="edge_gpu", outcome="ok") == 1
    assert value(metrics, "cost_usd_total", lane="eu-west") == pytest.approx(0.003), "refused, and charged all the same"
    assert value(metrics, "requests_total", tier="none", target="none", status="abandoned") == 1
    assert value(metrics, "malformed_total", door="http", code="undecodable") == 1
    assert value(metrics, "malformed_total", door="mqtt", code="unknown_model") == 1
    assert metrics.counters()["refused"] == 2


@pytest.mark.parametrize("limit", ["0.01", "0.1", "0.5"])
def test_an_answer_at_a_class_limit_falls_below_it(limit: str) -> None:
    """Otherwise the share of answers within 10, 100 and 500 ms could not be read off the histogram."""
    metrics = Metrics()
    for seconds in (float(limit), float(limit) + 1e-6):
        metrics.started()
        metrics.answered(answer(total_s=seconds))
    labels = {"latency_class": "near", "tier": "edge_gpu"}
    assert value(metrics, "request_duration_seconds_bucket", **labels, le=limit) == 1
    assert value(metrics, "request_duration_seconds_bucket", **labels, le="+Inf") == 2
    assert value(metrics, "request_duration_seconds_count", **labels) == 2
    assert value(metrics, "request_duration_seconds_sum", **labels) == pytest.approx(2 * float(limit) + 1e-6)


def test_state_is_read_at_the_scrape() -> None:
    metrics = Metrics()
    state: dict[str, Any] = {
        "ready": True,
        "targets": [
            {
                "name": "mcu-0",
                "tier": "edge_mcu",
                "available": True,
                "in_flight": 2,
                "max_concurrent": 4,
                "breaker": {"state": "half_open"},
                "service_ms": {"p50": 12.5, "p95": None},
                "detail": {
                    "ports": [{"port": "/dev/ttyACM0", "state": "up", "counters": {"frames_sent": 7}}, "odd"],
                    "models": ["a", "b"],
                    "window": 4,
                },
            },
            "not a target",
        ],
        "cache": {"entries": 3},
        "load": {"cpu_percent": 41.5, "temperature_c": None, "accelerator": {"busy_percent": 80}},
        "components": [{"name": "mqtt", "state": "up"}, {"name": "broker", "state": "down"}],
    }
    metrics.watch(lambda: state)
    assert value(metrics, "target_available", target="mcu-0", tier="edge_mcu") == 1
    assert value(metrics, "target_in_flight", target="mcu-0", tier="edge_mcu") == 2
    assert value(metrics, "breaker_state", target="mcu-0", state="half_open") == 1
    assert value(metrics, "breaker_state", target="mcu-0", state="open") == 0
    assert value(metrics, "target_service_seconds", target="mcu-0", quantile="0.5") == 0.0125
    assert value(metrics, "target_service_seconds", target="mcu-0", quantile="0.95") is None
    assert value(metrics, "target_reading", target="mcu-0", reading="ports./dev/ttyACM0.counters.frames_sent") == 7
    assert value(metrics, "load", reading="accelerator.busy_percent") == 80
    assert value(metrics, "component_up", component="broker") == 0
    state["targets"][0]["available"] = False
    assert value(metrics, "target_available", target="mcu-0", tier="edge_mcu") == 0


@pytest.mark.parametrize("broken", [{"targets": None, "load": 3}, {"targets": [{}], "components": "none"}, {}])
def test_a_state_of_another_shape_costs_gauges_only(broken: dict[str, Any]) -> None:
    metrics = Metrics()
    metrics.watch(lambda: broken)
    assert value(metrics, "active_requests") == 0


def test_a_state_that_raises_is_counted() -> None:
    metrics = Metrics()

    def status() -> dict[str, Any]:
        raise RuntimeError("a part is broken")

    metrics.watch(status)
    assert value(metrics, "status_failures_total") == 1
    assert value(metrics, "active_requests") == 0


def test_series_are_bounded() -> None:
    metrics = Metrics()
    for number in range(3 * module.MAX_SERIES):
        metrics.started()
        metrics.answered(answer(target=f"t{number}", attempts=(Attempt(f"t{number}", Tier.EDGE_GPU, "v", "ok", 0),)))
    text = metrics.render().decode()
    assert text.count("edge_agent_requests_total{") <= module.MAX_SERIES + 1
    assert text.count("edge_agent_attempts_total{") <= module.MAX_SERIES + 1
    assert metrics.counters()["answered"] == 3 * module.MAX_SERIES, "what has no series of its own is counted as other"
    metrics.watch(lambda: {"load": {str(number): {str(n): n for n in range(100)} for number in range(100)}})
    assert metrics.render().decode().count("edge_agent_load{") == module.MAX_READINGS


def test_labels_that_need_escaping() -> None:
    metrics = Metrics()
    metrics.malformed('a"b\\c\nd')
    assert value(metrics, "malformed_total", door='a"b\\c\nd', code="undecodable") == 1


def test_the_documentation_lists_every_metric_and_no_other() -> None:
    metrics = Metrics()
    metrics.watch(lambda: {"ready": True})
    exported = set(re.findall(r"^# TYPE edge_agent_(\w+)", metrics.render().decode(), re.MULTILINE))
    page = (Path(__file__).resolve().parents[2] / "docs" / "operations.md").read_text()
    table = page[page.index("| name (`edge_agent_") : page.index("## Alarms")]
    documented = {
        name for row in re.findall(r"^\| (`.*?`) \|", table, re.MULTILINE) for name in re.findall(r"\w+", row)
    }
    assert documented == exported
    for key in metrics.counters():
        assert re.search(rf"^  .*\b{key}\b", page, re.MULTILINE), f"counters.{key}"


def test_counting_is_cheap() -> None:
    """The budget is 5 us for each request; the test allows a slow machine ten times that."""
    metrics = Metrics()
    result = answer()
    begin = time.process_time()
    for _ in range(10_000):
        metrics.started()
        metrics.answered(result)
    assert (time.process_time() - begin) / 10_000 < 50e-6
