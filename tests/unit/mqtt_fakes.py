"""A small catalogue, and stand-ins for what is behind a worker and behind a door."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from agent.config import RoutingSection
from agent.core.clock import SystemClock
from agent.core.errors import InferenceError
from agent.core.types import InferenceRequest, InferenceResult, LatencyClass, Tensors, Tier
from agent.durable.records import Return
from agent.link.mqtt import LinkState, Message, MessageProperties
from agent.registry.catalog import Catalog, Variant
from agent.routing.admission import Admission
from agent.runtimes.base import LoadedModel, ModelFile, RunOutcome
from agent.store.outbox import Receipt

SMALL, LARGE = "a" * 64, "b" * 64


def floats(count: int) -> tuple[str, tuple[int, ...]]:
    """A tensor of one row, as a load describes it."""
    return "float32", (1, count)


def _variant(sha256: str, accuracy: float, targets: Sequence[str] = ("cloud",)) -> dict[str, Any]:
    return {
        "path": "none.onnx",
        "format": "onnx",
        "quantisation": "float32",
        "targets": targets,
        "version": 1,
        "sha256": sha256,
        "bytes": 1,
        "parameters": 1,
        "operators": [],
        "accuracy": {"value": accuracy, "samples": 10, "tolerance": 0.1},
        "inputs": [{"name": "in", "maps": "x", "dtype": "float32", "shape": [1, 4]}],
        "outputs": [{"name": "out", "maps": "y", "dtype": "float32", "shape": [1, 2]}],
        "script": "none",
    }


def catalog() -> Catalog:
    """One model, `toy`: four numbers in, two probabilities out; two cloud variants and one for the gateway."""
    variants = {
        "small": _variant(SMALL, 0.8),
        "large": _variant(LARGE, 0.9),
        "edge": _variant("c" * 64, 0.7, ["edge_gpu"]),
    }
    for name, variant in variants.items():
        variant |= {"model": "toy", "id": name}
    family = {
        "name": "toy",
        "description": "test",
        "task": "classification",
        "labels": ["no", "yes"],
        "inputs": [{"name": "x", "dtype": "float32", "shape": [1, 4]}],
        "outputs": [{"name": "y", "dtype": "float32", "shape": [1, 2]}],
        "data": {
            "name": "none",
            "source": "none",
            "licence": "none",
            "split": "none",
            "heldout": "none",
            "heldout_sha256": "d" * 64,
            "heldout_samples": 1,
        },
        "variants": variants,
    }
    return Catalog.model_validate({"schema": 1, "families": {"toy": family}})


class FakePool:
    """Answers with the first two inputs. `gate` holds runs back; `served` limits what can be loaded."""

    def __init__(self, served: Sequence[str] = (SMALL, LARGE)) -> None:
        self.served = served
        self.runs: list[str] = []
        self.gate: asyncio.Event | None = None
        self.error: Exception | None = None
        self.closed = False

    async def load_all(self, files: Sequence[ModelFile]) -> Mapping[str, LoadedModel | Exception]:
        return {
            file.sha256: LoadedModel(file, "fake 1", "fake/cpu", (0.001,), {"in": floats(4)}, {"out": floats(2)})
            if file.sha256 in self.served
            else ValueError("not here")
            for file in files
        }

    async def run(self, sha256: str, inputs: Tensors, deadline: float) -> RunOutcome:
        self.runs.append(sha256)
        if self.gate is not None:
            await self.gate.wait()
        if self.error is not None:
            raise self.error
        return RunOutcome({"out": inputs["in"][:, :2]}, "fake/cpu", 0.002, 0.003)

    async def close(self) -> None:
        self.closed = True


def request(values: Sequence[float] = (1, 2, 3, 4), *, budget_s: float = 5.0, **changes: Any) -> InferenceRequest:
    now = SystemClock.monotonic()
    settings: dict[str, Any] = {
        "id": f"request-{now}",
        "model": "toy",
        "inputs": {"x": np.array([values], np.float32)},
        "latency_class": LatencyClass.NEAR,
        "received": now,
        "deadline": now + budget_s,
    }
    return InferenceRequest(**(settings | changes))


def result(request: InferenceRequest, variant: Variant) -> InferenceResult:
    return InferenceResult(
        request_id=request.id,
        model=request.model,
        variant=variant.id,
        model_sha256=variant.sha256,
        outputs={"y": request.inputs["x"][:, :2]},
        label="yes",
        confidence=0.75,
        tier=Tier.EDGE_GPU,
        origin_tier=Tier.EDGE_GPU,
        target="gateway",
        provider="fake/cpu",
        latency_class=request.latency_class,
        queue_s=0.0,
        link_s=0.0,
        compute_s=0.001,
        total_s=0.002,
        deadline_met=True,
        cost_usd=0.0,
        cached=False,
        stale=False,
        age_s=0.0,
        attempts=(),
        reasons=(),
    )


class FakeCore:
    """Answers everything, or what `answer` says; keeps what it was asked."""

    def __init__(self) -> None:
        self.catalog = catalog()
        self.admission = Admission(self.catalog, RoutingSection(), SystemClock(), 5.0)
        self.asked: list[InferenceRequest] = []
        self.gate: asyncio.Event | None = None
        self.answer: Callable[[InferenceRequest], InferenceResult] | None = None
        self.readiness = (True, "")

    async def infer(self, request: InferenceRequest) -> InferenceResult:
        self.asked.append(request)
        if self.gate is not None and request.metadata.get("wait") != "no":
            await self.gate.wait()
        if self.answer is not None:
            return self.answer(request)
        return result(request, self.catalog.family(request.model).variants["edge"])

    def ready(self) -> tuple[bool, str]:
        return self.readiness

    def explain(self, request_id: str) -> Mapping[str, Any] | None:
        return {"request_id": request_id, "stages": []} if request_id == "known" else None

    def status(self) -> Mapping[str, Any]:
        return {"targets": [{"name": "gateway", "tier": "edge_gpu", "available": True, "reason": ""}]}


class FakeLink:
    """Keeps what is subscribed to and published."""

    def __init__(self) -> None:
        self.callbacks: dict[str, Callable[[Message], None]] = {}
        self.listeners: list[Callable[[LinkState], None]] = []
        self.unrouted: Callable[[Message], None] | None = None
        self.published: list[tuple[str, str, dict[str, Any]]] = []

    def on_state(self, listener: Callable[[LinkState], None]) -> None:
        self.listeners.append(listener)

    def lost(self) -> None:
        for listener in self.listeners:
            listener(LinkState(False, 0.0, "lost"))

    async def subscribe(self, topic: str, callback: Callable[[Message], None], **_: Any) -> None:
        self.callbacks[topic] = callback

    def publish(self, topic: str, payload: bytes, *, properties: MessageProperties) -> None:
        self.published.append((topic, properties.get("status") or "", json.loads(payload)))


class FakeDesk:
    def __init__(self) -> None:
        self.link = FakeLink()
        self.accepted: list[InferenceRequest] = []
        self.fault: InferenceError | None = None

    async def accept(self, request: InferenceRequest, back: Return, key: str | None, *, repeat: bool) -> Receipt:
        if self.fault is not None:
            raise self.fault
        self.accepted.append(request)
        return Receipt((len(self.accepted),), f"id{len(self.accepted)}")


ROOT = Path(__file__).resolve().parents[2]
