"""How sure the models are of what they answer: histograms of confidence, escalations, inputs out of range.

Labels are names from the catalogue. Like `metrics`, on the event loop only.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

BUCKETS = (0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.98, 0.99, 0.995, 1.0)
"""Upper bounds of the histogram of confidence."""
OUTCOMES = ("taken", "escalated", "held")
"""Of first answers: taken; a more accurate model answered; it could not."""


class Named(Protocol):
    """What is asked of a variant."""

    @property
    def model(self) -> str: ...

    @property
    def id(self) -> str: ...


class Confident(Protocol):
    """What is asked of a classified answer."""

    @property
    def confidence(self) -> float: ...


class _Counts:
    __slots__ = ("buckets", "outcomes", "sum")

    def __init__(self) -> None:
        self.buckets = [0] * (len(BUCKETS) + 1)
        self.outcomes = dict.fromkeys(OUTCOMES, 0)
        self.sum = 0.0


class Quality:
    """Counts first answers: what the cascade looks at, before anything is escalated."""

    def __init__(self) -> None:
        self._variants: dict[tuple[str, str], _Counts] = {}
        self._out_of_range: dict[str, int] = {}

    def observe(self, variant: Named, found: Confident, escalation: str) -> None:
        """One answer of a variant that was computed. `escalation` is the result's."""
        key = variant.model, variant.id
        counts = self._variants.get(key)
        if counts is None:
            counts = self._variants[key] = _Counts()
        counts.buckets[bisect_left(BUCKETS, found.confidence)] += 1
        counts.sum += found.confidence
        counts.outcomes[escalation or "taken"] += 1

    def out_of_range(self, model: str) -> None:
        """A request whose inputs are outside of what the model was trained on."""
        self._out_of_range[model] = self._out_of_range.get(model, 0) + 1

    def status(self) -> dict[str, dict[str, Any]]:
        """For `/status`, by `family/variant`: answers, mean confidence, outcomes and the histogram's counts."""
        return {
            f"{model}/{id_}": {
                "answers": (total := sum(counts.buckets)),
                "mean_confidence": round(counts.sum / total, 6),
                **counts.outcomes,
                "confidence": {
                    f"{bound:g}": count for bound, count in zip(BUCKETS, counts.buckets, strict=False) if count
                },
            }
            for (model, id_), counts in self._variants.items()
        }

    def families(self) -> Iterator[Metric]:
        """For Prometheus."""
        confidence = HistogramMetricFamily(
            "edge_agent_confidence", "Confidence of first answers.", labels=("model", "variant")
        )
        outcomes = CounterMetricFamily(
            "edge_agent_cascade", "First answers, by what became of them.", labels=("model", "variant", "outcome")
        )
        bounds = [*(f"{bound:g}" for bound in BUCKETS), "+Inf"]
        for key, counts in self._variants.items():
            cumulated, buckets = 0, []
            for bound, count in zip(bounds, counts.buckets, strict=True):
                cumulated += count
                buckets.append((bound, cumulated))
            confidence.add_metric(key, buckets, counts.sum)
            for outcome, count in counts.outcomes.items():
                outcomes.add_metric((*key, outcome), count)
        yield confidence
        yield outcomes
        outside = CounterMetricFamily(
            "edge_agent_out_of_range", "Requests with inputs outside of the training data's range.", labels=("model",)
        )
        for model, count in self._out_of_range.items():
            outside.add_metric((model,), count)
        yield outside


def drift_families(models: Mapping[str, Any]) -> Iterator[Metric]:
    """Gauges of the section `models` of `/status`, for variants that are watched."""
    watched = [
        (tuple(name.split("/", 1)), entry["drift"])
        for name, entry in models.items()
        if isinstance(entry, Mapping) and isinstance(entry.get("drift"), Mapping)
    ]
    for key, text in (
        ("agreement", "Share of shadowed answers that were the reference's."),
        ("accuracy", "Accuracy that selection takes the variant to have."),
        ("samples", "Shadowed answers in the window."),
        ("alarm", "1: agreement left its band."),
    ):
        family = GaugeMetricFamily(f"edge_agent_drift_{key}", text, labels=("model", "variant"))
        for name, drift in watched:
            if drift.get(key) is not None:
                family.add_metric(name, float(drift[key]))
        yield family
