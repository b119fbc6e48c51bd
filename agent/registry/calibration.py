"""What a variant's confidence is worth: the part of the catalogue that `edge-agent models calibrate` writes.

Confidence is the largest class probability after temperature scaling (Guo, Pleiss, Sun, Weinberger 2017, On Calibration
of Modern Neural Networks): with p the model's own probabilities and T the temperature,

    confidence = max(p)^(1/T) / sum(p^(1/T))

which is the softmax of the logits over T. Probabilities of coarse outputs are first raised to what rounding may have
hidden: half a step, shared among the classes. Scaling never changes which class is the largest.
"""

from __future__ import annotations

from math import sqrt
from typing import Annotated, Self

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, model_validator

Share = Annotated[float, Field(ge=0, le=1)]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Probabilities = npt.NDArray[np.floating]

LEAST_PROBABILITY = 1e-7
"""Of any class of a float output: about half a step of a float32 near 1."""
FEW_CLASSES = 64
"""Up to so many, plain numbers are quicker than an array of them."""
Z95, Z99 = 1.959964, 2.575829
"""Two-sided quantiles of the normal distribution."""


class Cascade(BaseModel):
    """What a variant does as the first stage of a cascade, on the held-out data.

    `threshold` is the least confidence with which its answer is taken; what is below is asked of `reference`, the
    family's most accurate variant. `max_loss` is the share of answers that may become wrong by that, the aim of the
    fit. `offload` and `accuracy` are what cross-validation found: share asked again, and share right in the end, with
    the 95 % interval of the latter. `agreement` is the share of all its answers that are the reference's;
    `right_if_agreed` and `right_if_not` are the shares right of those that are, and that are not.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    threshold: float = Field(ge=0, le=2)
    """Above 1: no answer is taken."""
    max_loss: Share
    offload: Share
    accuracy: Share
    low: Share
    high: Share
    reference: str
    reference_sha256: Digest
    agreement: Share
    right_if_agreed: Share
    right_if_not: Share

    @model_validator(mode="after")
    def _interval(self) -> Self:
        if not self.low <= self.accuracy <= self.high:
            raise ValueError("accuracy must be between low and high")
        return self


class Calibration(BaseModel):
    """Of one variant. `sha256` is the file it was fitted to, `data_sha256` the held-out data, of `samples` inputs."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    temperature: float = Field(gt=0, le=100)
    samples: int = Field(ge=1)
    data_sha256: Digest
    sha256: Digest
    cascade: Cascade | None = None
    """None: for the most accurate variant, which is asked last."""


def least_probability(scale: float | None, classes: int) -> float:
    """What no probability is taken to be below. `scale`: the step of a quantised output; None: a float output."""
    return LEAST_PROBABILITY if scale is None else scale / (2 * classes)


def confidence(probabilities: Probabilities, temperature: float, least: float) -> float:
    """Calibrated confidence of one answer; `probabilities` are of shape [classes] and need not sum to 1."""
    if len(probabilities) <= FEW_CLASSES:
        values: list[float] = probabilities.tolist()
        top, power = max(max(values), least), 1.0 / temperature
        total: float = sum([(value / top if value > least else least / top) ** power for value in values])
        return 1.0 / total
    raised = np.maximum(probabilities, least)
    powers = (raised / raised.max()) ** (1.0 / temperature)
    return float(1.0 / powers.sum())


def wilson(successes: float, samples: float, z: float = Z95) -> tuple[float, float]:
    """Score interval of a share (E. B. Wilson 1927), (0, 1) without samples. `successes` may be weighted."""
    if samples <= 0:
        return 0.0, 1.0
    share, square = successes / samples, z * z
    centre = (share + square / (2 * samples)) / (1 + square / samples)
    half = z * sqrt(share * (1 - share) / samples + square / (4 * samples * samples)) / (1 + square / samples)
    return max(0.0, min(share, centre - half)), min(1.0, max(share, centre + half))
