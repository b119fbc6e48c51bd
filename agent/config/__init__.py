"""The configuration: one validated, frozen tree. `config_load` reads it from a YAML file and the environment.

Every bound of the daemon is a setting here, with a default that suits a 1 GB gateway. Units are in the names.
"""

from __future__ import annotations

import platform
import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal, Self

from pydantic import Field, SerializerFunctionWrapHandler, field_serializer, field_validator, model_validator

from agent.config.base import NAME_PATTERN, TOPIC_PATTERN, ClassName, Name, Priority, Section, Substituted, Topic
from agent.config.broker import BrokerSection, check_broker_url, check_topic_filter
from agent.config.budgets import AmountsSection, BudgetsSection
from agent.config.cascade import AccuracyName, AccuracySection, DriftSection, ShadowSection
from agent.config.doors import HttpSection, MqttSection, SensorSection, TlsSection
from agent.config.outbox import DurableSections, OutboxSection, UplinkSection
from agent.config.overload import ClassShares, LimitSection, OverloadSection, RetryBudgetSection, WaitingSection
from agent.config.routing import (
    BreakerSection,
    ClassWeights,
    LatencyThresholds,
    ModelSizeThresholds,
    ParameterThresholds,
    RoutingSection,
    UtilityWeights,
)
from agent.config.security import (
    AuditField,
    AuditSection,
    JwtKeySection,
    JwtSection,
    LimitsSection,
    Masking,
    ProducerSection,
    RateSection,
    Role,
    SecuritySection,
    TokenSection,
)
from agent.config.streams import StreamSection
from agent.config.tiers import CloudSection, GpuSection, LaneSection, McuSection

__all__ = [
    "NAME_PATTERN",
    "TOPIC_PATTERN",
    "AccuracyName",
    "AccuracySection",
    "AmountsSection",
    "AuditField",
    "AuditSection",
    "BreakerSection",
    "BrokerSection",
    "BudgetsSection",
    "ClassName",
    "ClassShares",
    "ClassWeights",
    "CloudSection",
    "Config",
    "DriftSection",
    "FallbackSection",
    "GatewaySection",
    "GpuSection",
    "HttpSection",
    "JwtKeySection",
    "JwtSection",
    "LaneSection",
    "LatencyThresholds",
    "LimitSection",
    "LimitsSection",
    "Masking",
    "McuSection",
    "ModelSizeThresholds",
    "ModelsSection",
    "MonitoringSection",
    "MqttSection",
    "Name",
    "OutboxSection",
    "OverloadSection",
    "ParameterThresholds",
    "Priority",
    "ProducerSection",
    "RateSection",
    "RetryBudgetSection",
    "Role",
    "RoutingSection",
    "Section",
    "SecuritySection",
    "SensorSection",
    "ShadowSection",
    "StreamSection",
    "Substituted",
    "TlsSection",
    "TokenSection",
    "Topic",
    "UplinkSection",
    "UtilityWeights",
    "WaitingSection",
    "check_broker_url",
    "check_topic_filter",
]


class GatewaySection(Section):
    id: Name = Field(default_factory=lambda: re.sub(r"[^A-Za-z0-9_.-]", "-", platform.node())[:64] or "gateway")
    state_dir: Path = Path("/var/lib/edge-agent")
    """Absolute: where the daemon was started from must not decide where its state is."""
    drain_timeout_s: float = Field(default=5.0, ge=0, le=300)
    """How long a stop waits for requests in flight."""

    @field_validator("state_dir", mode="after")
    @classmethod
    def _absolute(cls, value: Path) -> Path:
        if not value.is_absolute():
            raise ValueError("must be absolute")
        return value


class ModelsSection(Section):
    catalog: Path | None = None
    """`catalog.yaml`; None: the one that ships."""
    trusted_keys: tuple[Annotated[str, Field(min_length=1, max_length=4096)], ...] = Field(default=(), max_length=16)
    """Public Ed25519 keys whose signatures of models count: names of PEM files, or 64 hex digits each. Empty: the board
    decides alone."""
    require_signed: bool = True
    """Whether a catalogue other than the one that ships must be signed with a trusted key. False: its models are looked
    through, tried in a disposable process, and run in a process of their own."""
    trial_memory_mb: int = Field(default=1024, ge=64, le=1 << 20)
    """What the disposable process may take for one model, beyond what it has when it starts."""
    trial_s: float = Field(default=60, ge=1, le=3600)
    """How long opening one model and running it may take there."""


class FallbackSection(Section):
    cache_ttl: float = Field(default=3600, ge=0)
    """Seconds for which a cached answer counts as fresh."""
    max_cache_size: int = Field(default=10_000, ge=1, le=1_000_000)
    enable_stale_results: bool = True
    stale_ttl: float = Field(default=86_400, ge=0)
    """Seconds for which an answer may still be served, labelled stale, when nothing can be asked."""

    write_bytes_per_day: int | None = Field(default=1 << 30, ge=1 << 20)
    """What the cache's file may write to the disk, for the sake of SD cards; beyond it answers wait in memory for their
    turn. None: no limit."""

    @model_validator(mode="after")
    def _order(self) -> Self:
        if self.stale_ttl < self.cache_ttl:
            raise ValueError("stale_ttl must be at least cache_ttl")
        return self


class MonitoringSection(Section):
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_format: Literal["json", "text"] = "json"
    status_interval_s: float = Field(default=10, gt=0, le=3600)
    """How often the retained MQTT status is refreshed, if nothing changed."""
    sample_interval_s: float = Field(default=2, gt=0, le=3600)
    """How often CPU, memory, temperature and accelerator load are read."""
    record: Path | None = None
    """A file that gets one line for each request (`docs/traces.md`). Absolute, as `gateway.state_dir` is."""
    record_payload: bool = False
    """Whether the lines hold the inputs as well."""
    record_max_bytes: int = Field(default=64 << 20, ge=4096, le=1 << 40)
    """Of one file; then it is set aside and the next one begun."""
    record_files: int = Field(default=4, ge=1, le=1000)
    """Files kept, the one being written among them."""

    @field_validator("record", mode="after")
    @classmethod
    def _absolute(cls, value: Path | None) -> Path | None:
        if value is not None and not value.is_absolute():
            raise ValueError("must be absolute")
        return value


class Config(DurableSections):
    """The whole tree."""

    gateway: GatewaySection = Field(default_factory=GatewaySection)
    models: ModelsSection = ModelsSection()
    routing: RoutingSection = RoutingSection()
    accuracy: AccuracySection = AccuracySection()
    shadow: ShadowSection = ShadowSection()
    drift: DriftSection = DriftSection()
    edge_mcu: McuSection = McuSection()
    edge_gpu: GpuSection = GpuSection()
    cloud: CloudSection = CloudSection()
    budgets: BudgetsSection = BudgetsSection()
    fallback: FallbackSection = FallbackSection()
    mqtt: MqttSection = MqttSection()
    http: HttpSection = HttpSection()
    monitoring: MonitoringSection = MonitoringSection()
    security: SecuritySection = SecuritySection()
    producers: Mapping[Name, ProducerSection] = Field(default_factory=dict, max_length=4096)
    sensors: Mapping[str, SensorSection] = Field(default_factory=dict)

    @field_validator("sensors", mode="after")
    @classmethod
    def _topics(cls, sensors: Mapping[str, SensorSection]) -> Mapping[str, SensorSection]:
        for topic in sensors:
            check_topic_filter(topic)
        return MappingProxyType(dict(sensors))

    @field_validator("producers", mode="after")
    @classmethod
    def _frozen(cls, producers: Mapping[Name, ProducerSection]) -> Mapping[Name, ProducerSection]:
        return MappingProxyType(dict(producers))

    @field_serializer("producers", "sensors", mode="wrap")
    def _plain(self, entries: Mapping[str, Section], dump: SerializerFunctionWrapHandler) -> Any:
        return dump(dict(entries))

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if not ((self.edge_mcu.enabled and self.edge_mcu.ports) or self.edge_gpu.enabled or self.cloud.lanes):
            raise ValueError("no tier can answer: configure edge_mcu.ports, edge_gpu or cloud.lanes")
        if not self.http.enabled and not self.mqtt.enabled:
            raise ValueError("no door is open: enable http or mqtt")
        if self.http.enabled and not self.http.on_loopback and not self.security.has_tokens:
            raise ValueError(
                f"http.host {self.http.host!r} is not loopback: give security.tokens or security.jwt "
                "(`edge-agent token new` makes a token)"
            )
        if self.sensors and not self.mqtt.enabled:
            raise ValueError("sensors need mqtt.enabled: true")
        if self.edge_mcu.streams and not self.mqtt.enabled:
            raise ValueError("edge_mcu.streams need mqtt.enabled: true")
        return self

    @model_validator(mode="after")
    def _durable(self) -> Self:
        if self.outbox.enabled and not self.mqtt.enabled:
            raise ValueError("outbox needs mqtt.enabled: true: results are delivered there")
        if self.uplink.lane is not None and self.uplink.lane not in [lane.name for lane in self.cloud.lanes]:
            raise ValueError(f"uplink.lane {self.uplink.lane!r} is none of cloud.lanes")
        for topic, sensor in self.sensors.items():
            if sensor.durable and not self.outbox.enabled:
                raise ValueError(f"sensors.{topic}.durable needs outbox.enabled: true")
            if sensor.uplink and self.uplink.lane is None:
                raise ValueError(f"sensors.{topic}.uplink needs uplink.lane")
        return self
