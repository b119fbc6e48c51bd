"""A family whose two edge variants are calibrated, and three targets that say how sure they are."""

from __future__ import annotations

from typing import Any

import numpy as np
from fakes import UNPLUGGED, Behaviour, FakeTarget, family_document, make_catalog, variant_document

from agent.config import RoutingSection
from agent.core.clock import Clock
from agent.core.types import InferenceRequest, TargetAnswer, Tier
from agent.registry.catalog import Catalog, Variant
from agent.routing.router import Router

THRESHOLD = 0.8
REFERENCE_SHA = "c" * 64


def cascade_document(**changes: Any) -> dict[str, Any]:
    return {
        "threshold": THRESHOLD,
        "max_loss": 0.005,
        "offload": 0.2,
        "accuracy": 0.985,
        "low": 0.97,
        "high": 0.995,
        "reference": "large",
        "reference_sha256": REFERENCE_SHA,
        "agreement": 0.94,
        "right_if_agreed": 0.995,
        "right_if_not": 0.1,
    } | changes


def calibration_document(sha256: str, cascade: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    return {
        "temperature": 1.0,
        "samples": 400,
        "data_sha256": "d" * 64,
        "sha256": sha256,
        "cascade": cascade,
    } | changes


def calibrated_family(**changes: Any) -> dict[str, Any]:
    def accuracy(value: float) -> dict[str, Any]:
        return {"value": value, "samples": 400, "tolerance": 0.05}

    small = calibration_document("a" * 64, cascade_document())
    medium = calibration_document("b" * 64, cascade_document(agreement=0.96))
    return family_document(
        variants={
            "small": variant_document("edge_mcu", accuracy=accuracy(0.93), calibration=small),
            "medium": variant_document("edge_gpu", accuracy=accuracy(0.96), calibration=medium),
            "large": variant_document("cloud", accuracy=accuracy(0.99), calibration=calibration_document("c" * 64)),
        }
        | changes
    )


def calibrated_catalog() -> Catalog:
    return make_catalog(toy=calibrated_family())


def sure(confidence: float, label: int = 1) -> Behaviour:
    """Answers with that confidence."""

    async def behaviour(request: InferenceRequest, variant: Variant, deadline: float) -> TargetAnswer:
        rest = (1.0 - confidence) / 2
        outputs = np.full((1, 3), rest, np.float32)
        outputs[0, label] = confidence
        return TargetAnswer({"probabilities": outputs}, "fake", queue_s=0.0, link_s=0.0, compute_s=0.001)

    return behaviour


class Tiers:
    """A gateway and a lane of 0.001 USD in region `eu`, which says something else and is sure; and a microcontroller,
    which is unplugged at first and, where it is not, is asked before the gateway."""

    def __init__(self, clock: Clock, **routing: Any) -> None:
        self.catalog = calibrated_catalog()
        self.family = self.catalog.family("toy")
        self.mcu = FakeTarget(Tier.EDGE_MCU, sure(0.9))
        self.mcu.state = UNPLUGGED
        self.gpu = FakeTarget(Tier.EDGE_GPU, sure(0.9))
        self.cloud = FakeTarget(Tier.CLOUD_GPU, sure(0.99, label=2), cost_usd=0.001, region="eu")
        self.settings = RoutingSection.model_validate({"policy": "utility"} | routing)
        self.targets = (self.mcu, self.gpu, self.cloud)
        self.router = Router(self.targets, self.settings, clock)
