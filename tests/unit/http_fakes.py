"""What the tests of the HTTP door share: a small catalogue and a core that answers as it is told."""

import math
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import numpy as np

from agent.config import RoutingSection
from agent.core.clock import SystemClock
from agent.core.types import InferenceRequest, InferenceResult, Tier
from agent.registry.catalog import Catalog
from agent.routing.admission import Admission
from agent.telemetry.metrics import Metrics

VARIANT = {
    "model": "tiny",
    "id": "int8",
    "path": "tiny.tflite",
    "format": "tflite",
    "quantisation": "float32",
    "targets": ["edge_gpu"],
    "version": 1,
    "sha256": "a" * 64,
    "bytes": 1000,
    "parameters": 100,
    "operators": [],
    "accuracy": {"value": 0.9, "samples": 100, "tolerance": 0.01},
    "inputs": [{"name": "x", "maps": "x", "dtype": "float32", "shape": [1, 4]}],
    "outputs": [{"name": "y", "maps": "y", "dtype": "float32", "shape": [1, 2]}],
    "script": "train.py",
}
DATA = {
    "name": "d",
    "source": "s",
    "licence": "l",
    "split": "s",
    "heldout": "h.npz",
    "heldout_sha256": "b" * 64,
    "heldout_samples": 1,
}
CATALOG = Catalog.model_validate(
    {
        "schema": 1,
        "families": {
            "tiny": {
                "name": "tiny",
                "description": "two classes",
                "task": "classification",
                "labels": ["no", "yes"],
                "inputs": [{"name": "x", "dtype": "float32", "shape": [1, 4]}],
                "outputs": [{"name": "y", "dtype": "float32", "shape": [1, 2]}],
                "data": DATA,
                "variants": {"int8": VARIANT},
            }
        },
    }
)
JSON = {"content-type": "application/json"}
RAW = {"content-type": "application/octet-stream"}


class FakeCore:
    """Answers `yes`, or does what `behave` says."""

    def __init__(self) -> None:
        self.admission = Admission(CATALOG, RoutingSection(), SystemClock(), 5.0)
        self.asked: list[InferenceRequest] = []
        self.behave: Callable[[InferenceRequest], Awaitable[None]] | None = None
        self.is_ready = (True, "")
        self.state: dict[str, Any] = {"gateway": "g", "load": {"temperature_c": math.nan}}

    async def infer(self, request: InferenceRequest) -> InferenceResult:
        self.asked.append(request)
        if self.behave is not None:
            await self.behave(request)
        return InferenceResult(
            request_id=request.id,
            model=request.model,
            variant="int8",
            model_sha256="a" * 64,
            outputs={"y": np.array([[0.1, 0.9]], np.float32)},
            label="yes",
            confidence=0.9,
            tier=Tier.EDGE_GPU,
            origin_tier=Tier.EDGE_GPU,
            target="edge_gpu",
            provider="cpu",
            latency_class=request.latency_class,
            queue_s=0,
            link_s=0,
            compute_s=0.001,
            total_s=0.001,
            deadline_met=True,
            cost_usd=0,
            cached=False,
            stale=False,
            age_s=0,
            attempts=(),
            reasons=("because",),
        )

    def ready(self) -> tuple[bool, str]:
        return self.is_ready

    def explain(self, request_id: str) -> Mapping[str, Any] | None:
        return {"request_id": request_id, "stages": []} if request_id == "known" else None

    def status(self) -> Mapping[str, Any]:
        return self.state


def malformed(metrics: Metrics, code: str) -> bool:
    return f'edge_agent_malformed_total{{code="{code}",door="http"}} 1.0' in metrics.render().decode()
