"""The types that every floor shares: a request, its answer, and what happened in between.

What is made for every request is a named tuple: as immutable as a frozen dataclass, and made in a fifth of the time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, NamedTuple, TypeAlias

import numpy.typing as npt

Tensor: TypeAlias = npt.NDArray[Any]
Described: TypeAlias = Mapping[str, tuple[str, tuple[int, ...]]]
"""Tensors of a model file by name: dtype and shape."""
Tensors: TypeAlias = Mapping[str, Tensor]


class LatencyClass(StrEnum):
    """How soon an answer is of use. The limits are settings (`routing.latency_thresholds`)."""

    REALTIME = "realtime"
    NEAR = "near"
    INTERACTIVE = "interactive"
    BATCH = "batch"


class Complexity(StrEnum):
    """How much a model asks of the machine that runs it, from its size and parameter count."""

    SIMPLE = "simple"
    MEDIUM = "medium"
    COMPLEX = "complex"


class AccuracyMode(StrEnum):
    """How right an answer has to be, and what may be spent on that. `docs/cascade.md` has the rules."""

    HIGH = "high"
    """The most accurate variant that can answer in time."""
    ACCEPTABLE = "acceptable"
    """Whatever routing prefers among variants at or above `accuracy.floor`."""
    ADAPTIVE = "adaptive"
    """A cascade: a small model's answer where it is sure, a more accurate model's where it is not."""


class Tier(StrEnum):
    """Where an answer was computed. `fallback` is the cache, when nothing could be asked."""

    EDGE_MCU = "edge_mcu"
    EDGE_GPU = "edge_gpu"
    CLOUD_GPU = "cloud_gpu"
    CLOUD_SERVERLESS = "cloud_serverless"
    FALLBACK = "fallback"

    @property
    def is_cloud(self) -> bool:
        return self in (Tier.CLOUD_GPU, Tier.CLOUD_SERVERLESS)


@dataclass(frozen=True, slots=True)
class InferenceRequest:
    """One question. Made by an ingress through `routing.admission`, which checks it against the catalogue.

    `inputs` are the family's canonical tensors, by name. `received` and `deadline` are monotonic seconds.
    """

    id: str
    model: str
    inputs: Tensors
    latency_class: LatencyClass
    received: float
    deadline: float
    priority: int = 5
    """1 (least) to 10 (most)."""
    max_retries: int = 5
    """How many further targets may be tried after the first one failed."""
    timeout_ms: float | None = None
    """Upper bound on any single attempt, below the target's own."""
    variant: str | None = None
    """Only this variant of the model will do."""
    producer: str = "anonymous"
    idempotency_key: str | None = None
    allowed_regions: frozenset[str] = frozenset()
    """Cloud regions that may see the inputs. Empty: any."""
    use_cache: bool = True
    """Whether a fresh cached answer to the same input will do. A stale one is always better than none."""
    avoid: frozenset[Tier] = frozenset()
    """Tiers that are not asked: they gave the answer that this request is to improve on."""
    accuracy: AccuracyMode = AccuracyMode.ADAPTIVE
    explain: bool = False
    """Whether the answer is to carry how its target was chosen."""
    shadow: bool = True
    """Whether the inputs may be asked again of a cloud variant in the background, to watch the edge's accuracy."""
    out_of_range: bool = False
    """Whether an input holds values outside of what the model was trained on; `notes` say which."""
    metadata: Mapping[str, str] = field(default_factory=dict)
    durable: bool = False
    """Whether it is to be kept on the disk until it is answered, and the answer until it is delivered."""
    uplink: bool = False
    """Whether the answer is also passed on to the cloud."""
    notes: tuple[str, ...] = ()
    """What is odd about the inputs, in words; they head the reasons of the answer."""
    asked_by: str = ""
    """As whom the door knows the caller, for the record: `security.identity`."""


class TargetAnswer(NamedTuple):
    """What one target returns from one attempt. Times are seconds.

    `link_s` is what the attempt took besides queueing and computing at the far end.
    """

    outputs: Tensors
    provider: str
    queue_s: float
    link_s: float
    compute_s: float
    bytes_sent: int = 0
    bytes_received: int = 0


class Attempt(NamedTuple):
    """One try on one target: `outcome` is `ok`, the code of a `TargetError`, or `cancelled`: another answered first."""

    target: str
    tier: Tier
    variant: str
    outcome: str
    elapsed_s: float
    error: str | None = None
    hedge: bool = False
    """Whether it was begun while another was still under way, because that one was late."""

    def to_dict(self) -> dict[str, Any]:
        attempt: dict[str, Any] = {
            "target": self.target,
            "tier": self.tier.value,
            "variant": self.variant,
            "outcome": self.outcome,
            "elapsed_ms": round(self.elapsed_s * 1e3, 3),
        }
        if self.error is not None:
            attempt["error"] = self.error
        if self.hedge:
            attempt["hedge"] = True
        return attempt


class InferenceResult(NamedTuple):
    """One answer, and everything a caller needs to decide how far to trust it.

    `tier` is where it was computed, or `fallback` when it is a stale cache entry; `origin_tier` is where it was
    computed in either case. `age_s` is 0 unless `cached`, or streamed by a board: then it is the age of the sample.
    """

    request_id: str
    model: str
    variant: str
    model_sha256: str
    outputs: Tensors
    label: str | None
    confidence: float | None
    """Highest class probability, 0 to 1; None where the model has no labels, and for an answer to an earlier input."""
    tier: Tier
    origin_tier: Tier
    target: str
    provider: str
    latency_class: LatencyClass
    queue_s: float
    link_s: float
    compute_s: float
    total_s: float
    deadline_met: bool
    cost_usd: float
    cached: bool
    stale: bool
    age_s: float
    attempts: tuple[Attempt, ...]
    reasons: tuple[str, ...]
    same_input: bool = True
    """False: a producer's last known answer, to an earlier input, served because nothing could be asked."""
    calibrated: bool = False
    """Whether `confidence` was fitted on held-out data; otherwise it is what the model says of itself."""
    escalation: str = ""
    """Of a cascade: `escalated`, a more accurate model was asked and answered; `held`, it could not, and this is the
    small model's answer, which was not sure. Empty: neither."""
    out_of_range: bool = False
    """Whether an input holds values outside of what the model was trained on."""
    explanation: Mapping[str, Any] | None = None
    """How the target was chosen, in plain JSON types, for a request with `explain`."""

    def to_dict(self, *, with_outputs: bool = True) -> dict[str, Any]:
        """The answer as every door shows it: plain JSON types, times in milliseconds."""
        answer: dict[str, Any] = {
            "request_id": self.request_id,
            "model": self.model,
            "label": self.label,
            "confidence": None if self.confidence is None else round(self.confidence, 6),
            "calibrated": self.calibrated,
            "out_of_range": self.out_of_range,
            "escalation": self.escalation,
            "tier": self.tier.value,
            "origin_tier": self.origin_tier.value,
            "target": self.target,
            "variant": self.variant,
            "model_sha256": self.model_sha256,
            "provider": self.provider,
            "latency_class": self.latency_class.value,
            "timing_ms": {
                "queue": round(self.queue_s * 1e3, 3),
                "link": round(self.link_s * 1e3, 3),
                "compute": round(self.compute_s * 1e3, 3),
                "total": round(self.total_s * 1e3, 3),
            },
            "deadline_met": self.deadline_met,
            "cost_usd": self.cost_usd,
            "cached": self.cached,
            "stale": self.stale,
            "same_input": self.same_input,
            "age_s": round(self.age_s, 3),
            "attempts": [attempt.to_dict() for attempt in self.attempts],
            "reasons": list(self.reasons),
        }
        if self.explanation is not None:
            answer["explanation"] = dict(self.explanation)
        if with_outputs:
            answer["outputs"] = {name: value.tolist() for name, value in self.outputs.items()}
        return answer
