"""What decides where a request goes: classes, limits, weights, breakers."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from agent.config.base import ClassName, Section
from agent.config.overload import OverloadSection


class LatencyThresholds(Section):
    """Milliseconds. A deadline up to `realtime` makes a request realtime, and so on; above `interactive` it is
    interactive up to `batch`, and batch beyond."""

    realtime: float = Field(default=10, gt=0)
    near_realtime: float = Field(default=100, gt=0)
    interactive: float = Field(default=500, gt=0)
    batch: float = Field(default=1000, gt=0)

    @model_validator(mode="after")
    def _ascending(self) -> Self:
        if not self.realtime < self.near_realtime < self.interactive < self.batch:
            raise ValueError("must ascend: realtime < near_realtime < interactive < batch")
        return self


class ModelSizeThresholds(Section):
    """Megabytes (10^6 bytes): the largest model file each tier takes. `edge_mcu` and `edge_gpu` also bound what counts
    as simple and medium."""

    edge_mcu: float = Field(default=1, gt=0)
    edge_gpu: float = Field(default=10, gt=0)
    cloud: float = Field(default=1000, gt=0)

    @model_validator(mode="after")
    def _ascending(self) -> Self:
        if not self.edge_mcu <= self.edge_gpu <= self.cloud:
            raise ValueError("must ascend: edge_mcu <= edge_gpu <= cloud")
        return self


class ParameterThresholds(Section):
    """Number of weights below which a model counts as simple, and as medium."""

    simple: int = Field(default=10_000, ge=1)
    medium: int = Field(default=1_000_000, ge=1)

    @model_validator(mode="after")
    def _ascending(self) -> Self:
        if not self.simple <= self.medium:
            raise ValueError("must ascend: simple <= medium")
        return self


class BreakerSection(Section):
    failures: int = Field(default=5, ge=1, le=1000)
    """Consecutive failures that open the breaker."""
    error_rate: float = Field(default=0.5, gt=0, le=1)
    """Share of failures among the last `window` outcomes that opens it."""
    window: int = Field(default=20, ge=2, le=1000)
    backoff_initial_s: float = Field(default=0.5, gt=0)
    backoff_max_s: float = Field(default=120.0, gt=0)

    @model_validator(mode="after")
    def _order(self) -> Self:
        if self.backoff_initial_s > self.backoff_max_s:
            raise ValueError("backoff_initial_s must not exceed backoff_max_s")
        return self


class UtilityWeights(Section):
    """How much each term of the utility counts, in units of a right answer (`accuracy` 1)."""

    accuracy: float = Field(default=1.0, ge=0, le=1000)
    lateness: float = Field(default=1.0, ge=0, le=1000)
    """For no answer in time."""
    cost: float = Field(default=0.5, ge=0, le=1000)
    """For `max_cloud_cost` USD."""
    bytes: float = Field(default=0.01, ge=0, le=1000)
    """For 10,000 bytes on the wire, both ways together."""
    load: float = Field(default=0.02, ge=0, le=1000)
    """For a target that is full."""


class RealtimeWeights(UtilityWeights):
    lateness: float = Field(default=2.0, ge=0, le=1000)
    load: float = Field(default=0.05, ge=0, le=1000)


class NearWeights(UtilityWeights):
    lateness: float = Field(default=1.5, ge=0, le=1000)


class BatchWeights(UtilityWeights):
    lateness: float = Field(default=0.5, ge=0, le=1000)
    cost: float = Field(default=0.05, ge=0, le=1000)


class ClassWeights(Section):
    """The weights of each latency class. What is left out keeps the default of its class."""

    realtime: RealtimeWeights = RealtimeWeights()
    near: NearWeights = NearWeights()
    interactive: UtilityWeights = UtilityWeights()
    batch: BatchWeights = BatchWeights()


class RoutingSection(Section):
    policy: Literal["utility", "scorecard"] = "utility"
    """`utility`: what is expected of each target and variant, weighed; `scorecard`: the fixed table of points."""
    weights: ClassWeights = ClassWeights()
    """Of `policy: utility`."""
    hysteresis: float = Field(default=0.01, ge=0, le=1)
    """What was chosen last stays while nothing else is worth this much more."""
    high_tolerance: float = Field(default=0.005, ge=0, le=1)
    """How far below the most accurate that can answer in time `accuracy: high` still takes for as accurate."""
    probe_after_s: float = Field(default=60.0, gt=0, le=86_400)
    """A target not asked for so long is tried again, where it could be the better one."""
    probe_share: float = Field(default=0.02, ge=0, le=0.5)
    """Share of the requests that pass it by which may be spent on that; 0: none."""
    probe_metered: bool = False
    """Whether metered lanes are tried so as well."""
    hedge_classes: tuple[ClassName, ...] = ("realtime", "near")
    """Where the deadline allows one try only, a second target is asked as well once the first one is late."""
    hedge_metered: bool = False
    """Whether the second may be a metered lane."""
    max_cloud_cost: float = Field(default=0.01, ge=0)
    """USD for one request; a dearer lane is used only where no edge tier can answer, or by priority."""
    edge_preference: float = Field(default=0.7, gt=0, le=1)
    """An edge target is kept while its score is at least this share of the best cloud score."""
    latency_thresholds: LatencyThresholds = LatencyThresholds()
    model_size_thresholds: ModelSizeThresholds = ModelSizeThresholds()
    parameter_thresholds: ParameterThresholds = ParameterThresholds()
    breaker: BreakerSection = BreakerSection()
    max_in_flight: int = Field(default=256, ge=1, le=100_000)
    """Requests in the daemon at once; further ones wait in line, or are refused with `overloaded`."""
    overload: OverloadSection = OverloadSection()
    explain_last: int = Field(default=256, ge=0, le=100_000)
    """Requests of which `/explain` can tell how they were decided; the oldest is forgotten first."""
