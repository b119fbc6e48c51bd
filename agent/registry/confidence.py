"""An answer's class, and how sure the variant that gave it may be taken to be."""

from __future__ import annotations

from typing import NamedTuple

from agent.core.types import Tensors
from agent.registry.calibration import confidence, least_probability
from agent.registry.catalog import Family, Variant
from agent.registry.tensors import classify


class Classified(NamedTuple):
    """`confidence` is calibrated where the catalogue has a calibration, else the model's own probability. `sure`: it
    reaches the variant's threshold; also where there is none, since nothing says then what should be asked again."""

    label: str
    confidence: float
    calibrated: bool
    sure: bool


def classified(outputs: Tensors, family: Family, variant: Variant) -> Classified:
    """From the family's canonical outputs."""
    label, own = classify(outputs, family)
    calibration = variant.calibration
    if calibration is None:
        return Classified(label, own, False, True)
    probabilities = outputs[family.outputs[0].name].ravel()
    least = least_probability(variant.outputs[0].scale, len(family.labels))
    worth = confidence(probabilities, calibration.temperature, least)
    sure = calibration.cascade is None or worth >= calibration.cascade.threshold
    return Classified(label, worth, True, sure)
