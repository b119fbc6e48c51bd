"""How right answers have to be, and how that is watched."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from agent.config.base import Section

AccuracyName = Literal["high", "acceptable", "adaptive"]


class AccuracySection(Section):
    mode: AccuracyName = "adaptive"
    """For requests that name none. `adaptive`: a small model's answer where it is sure, else a more accurate model's;
    `acceptable`: whatever routing prefers at or above `floor`; `high`: the most accurate that can answer in time."""
    floor: float = Field(default=0.9, ge=0, le=1)
    """The accuracy below which a variant is not asked for `acceptable` requests."""


class ShadowSection(Section):
    """Edge answers that are asked again of the cloud in the background, to see whether the edge is still right."""

    rate: float = Field(default=0.0, ge=0, le=1)
    """Share of edge answers; 0: none. What it costs comes on top of what requests cost."""
    per_hour: int = Field(default=60, ge=1, le=100_000)
    usd_per_day: float = Field(default=0.1, ge=0)
    timeout_ms: float = Field(default=5000, gt=0, le=600_000)
    max_queued: int = Field(default=16, ge=1, le=1000)
    """Samples that wait for their turn; one more is dropped."""


class DriftSection(Section):
    """When agreement with the cloud is no longer what it was on the held-out data."""

    window: int = Field(default=500, ge=20, le=10_000)
    """Latest samples of each variant that count."""
    min_samples: int = Field(default=50, ge=10, le=10_000)
    """Before which there is no alarm."""
    margin: float = Field(default=0.02, ge=0, lt=1)
    """By which agreement may be below the interval of the held-out data."""

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.min_samples > self.window:
            raise ValueError("min_samples must not exceed window: there would never be an alarm")
        return self
