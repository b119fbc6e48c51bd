"""Stand-ins for what routing and the pipeline work with: a small catalogue, requests, and targets told what to do."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pytest

from agent.core.clock import Clock, ManualClock
from agent.core.component import Reading
from agent.core.types import Attempt, InferenceRequest, LatencyClass, TargetAnswer, Tier
from agent.registry.catalog import Catalog, Family, TargetKind, Variant
from agent.routing.router import NoAnswer, Router
from agent.targets.base import AVAILABLE, Availability, TargetTraits

PATIENCE_S = 5.0
"""No test waits this long; one that would hang fails instead."""
UNPLUGGED = Availability(False, "unplugged")
LABELS = ("rest", "walk", "run")
INPUT = np.array([[0.5, -1.0, 2.0, 0.0]], np.float32)
PROBABILITIES = np.array([[0.1, 0.7, 0.2]], np.float32)

Behaviour = Callable[[InferenceRequest, Variant, float], Awaitable[TargetAnswer]]


def variant_document(kind: TargetKind = "edge_gpu", **changes: Any) -> dict[str, Any]:
    quantised = {"dtype": "int8", "scale": 0.0625, "zero_point": -3} if kind == "edge_mcu" else {"dtype": "float32"}
    return {
        "path": f"toy/{kind}.tflite",
        "format": "tflite",
        "quantisation": "int8" if kind == "edge_mcu" else "float32",
        "targets": [kind],
        "version": 1,
        "sha256": {"edge_mcu": "a", "edge_gpu": "b", "cloud": "c"}[kind] * 64,
        "bytes": {"edge_mcu": 4_000, "edge_gpu": 40_000, "cloud": 400_000}[kind],
        "parameters": {"edge_mcu": 900, "edge_gpu": 9_000, "cloud": 90_000}[kind],
        "operators": ["FULLY_CONNECTED"],
        "accuracy": {"value": 0.95, "samples": 40, "tolerance": 0.05},
        "inputs": [{"name": "in", "maps": "window", "shape": [1, 4], **quantised}],
        "outputs": [{"name": "out", "maps": "probabilities", "shape": [1, 3], **quantised}],
        "script": "train.py",
    } | changes


def family_document(**changes: Any) -> dict[str, Any]:
    return {
        "description": "What the wearer does",
        "task": "classification",
        "labels": list(LABELS),
        "inputs": [{"name": "window", "dtype": "float32", "shape": [1, 4]}],
        "outputs": [{"name": "probabilities", "dtype": "float32", "shape": [1, 3]}],
        "data": {
            "name": "d",
            "source": "s",
            "licence": "l",
            "split": "s",
            "heldout": "toy/heldout.npz",
            "heldout_sha256": "d" * 64,
            "heldout_samples": 40,
        },
        "variants": {
            "small": variant_document("edge_mcu"),
            "medium": variant_document("edge_gpu"),
            "large": variant_document("cloud"),
        },
    } | changes


def make_catalog(**families: Mapping[str, Any]) -> Catalog:
    """As `load_catalog` gives it, without files. One family `toy`, unless others are given."""
    document = {name: dict(family) for name, family in (families or {"toy": family_document()}).items()}
    for name, family in document.items():
        family["name"] = name
        family["variants"] = {id_: {**variant, "model": name, "id": id_} for id_, variant in family["variants"].items()}
    return Catalog.model_validate({"schema": 1, "families": document})


def make_request(clock: Clock, deadline_ms: float = 100.0, **changes: Any) -> InferenceRequest:
    now = clock.monotonic()
    fields: dict[str, Any] = {
        "id": "r1",
        "model": "toy",
        "inputs": {"window": INPUT},
        "latency_class": LatencyClass.NEAR,
        "received": now,
        "deadline": now + deadline_ms / 1e3,
    }
    return InferenceRequest(**(fields | changes))


def make_answer(provider: str = "fake", *, compute_s: float = 0.001, link_s: float = 0.0005) -> TargetAnswer:
    return TargetAnswer({"probabilities": PROBABILITIES}, provider, queue_s=0.0, link_s=link_s, compute_s=compute_s)


async def answers(request: InferenceRequest, variant: Variant, deadline: float) -> TargetAnswer:
    return make_answer()


async def hangs(request: InferenceRequest, variant: Variant, deadline: float) -> TargetAnswer:
    await asyncio.Event().wait()
    raise AssertionError("nobody sets that event")


def raises(error: BaseException) -> Behaviour:
    async def behaviour(request: InferenceRequest, variant: Variant, deadline: float) -> TargetAnswer:
        raise error

    return behaviour


KINDS: Mapping[Tier, TargetKind] = {
    Tier.EDGE_MCU: "edge_mcu",
    Tier.EDGE_GPU: "edge_gpu",
    Tier.CLOUD_GPU: "cloud",
    Tier.CLOUD_SERVERLESS: "cloud",
}


class FakeTarget:
    """A `Target` that does what its `behaviour` says, and remembers what it was asked."""

    def __init__(self, tier: Tier, behaviour: Behaviour = answers, **traits: Any) -> None:
        order = {Tier.EDGE_MCU: 0, Tier.EDGE_GPU: 10, Tier.CLOUD_GPU: 20, Tier.CLOUD_SERVERLESS: 30}[tier]
        fields: dict[str, Any] = {
            "name": tier.value,
            "tier": tier,
            "order": order,
            "max_concurrent": 4,
            "timeout_s": 5.0,
            "max_bytes": 1e9,
        }
        self.traits = TargetTraits(**(fields | traits))
        self.behaviour = behaviour
        self.state = AVAILABLE
        self.asked: list[tuple[InferenceRequest, Variant, float]] = []
        self.running = 0
        self.begun = asyncio.Event()

    def parts(self) -> Mapping[str, Reading]:
        return {}

    def alive(self) -> bool:
        return True

    def availability(self) -> Availability:
        return self.state

    def variant_for(self, family: Family, pinned: str | None) -> Variant | None:
        return family.variant_for(KINDS[self.traits.tier], pinned)

    def variants_for(self, family: Family, pinned: str | None) -> Sequence[Variant]:
        return family.variants_for(KINDS[self.traits.tier], pinned)

    async def infer(self, request: InferenceRequest, family: Family, variant: Variant, deadline: float) -> TargetAnswer:
        self.asked.append((request, variant, deadline))
        self.begun.set()
        self.running += 1
        try:
            return await self.behaviour(request, variant, deadline)
        finally:
            self.running -= 1

    async def start(self) -> None: ...

    async def stop(self) -> None: ...

    def status(self) -> Mapping[str, Any]:
        return {"asked": len(self.asked)}


def after(clock: ManualClock, seconds: float, then: Behaviour = answers) -> Behaviour:
    """What takes so long by the clock, and then does this."""

    async def behaviour(request: InferenceRequest, variant: Variant, deadline: float) -> TargetAnswer:
        clock.advance(seconds)
        return await then(request, variant, deadline)

    return behaviour


def outcomes(attempts: Iterable[Attempt]) -> list[tuple[str, str]]:
    return [(attempt.target, attempt.outcome) for attempt in attempts]


async def failure(router: Router, request: InferenceRequest, family: Family) -> NoAnswer:
    with pytest.raises(NoAnswer) as caught:
        async with asyncio.timeout(PATIENCE_S):
            await router.run(request, family)
    return caught.value
