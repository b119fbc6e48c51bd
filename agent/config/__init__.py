"""The configuration: one validated, frozen tree. `config_load` reads it from a YAML file and the environment.

Every bound of the daemon is a setting here, with a default that suits a 1 GB gateway. Units are in the names.
"""

from __future__ import annotations

import platform
import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, Self

from pydantic import Field, SerializerFunctionWrapHandler, field_serializer, field_validator, model_validator

from agent.config.base import NAME_PATTERN, TOPIC_PATTERN, ClassName, Name, Priority, Section, Substituted, Topic
from agent.config.broker import BrokerSection, check_broker_url, check_topic_filter
from agent.config.doors import HttpSection, MqttSection, SensorSection, TlsSection
from agent.config.routing import (
    BreakerSection,
    LatencyThresholds,
    ModelSizeThresholds,
    ParameterThresholds,
    RoutingSection,
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
from agent.config.tiers import CloudSection, GpuSection, LaneSection, McuSection

__all__ = [
    "NAME_PATTERN",
    "TOPIC_PATTERN",
    "AuditField",
    "AuditSection",
    "BreakerSection",
    "BrokerSection",
    "ClassName",
    "CloudSection",
    "Config",
    "FallbackSection",
    "GatewaySection",
    "GpuSection",
    "HttpSection",
    "JwtKeySection",
    "JwtSection",
    "LaneSection",
    "LatencyThresholds",
    "LimitsSection",
    "Masking",
    "McuSection",
    "ModelSizeThresholds",
    "ModelsSection",
    "MonitoringSection",
    "MqttSection",
    "Name",
    "ParameterThresholds",
    "Priority",
    "ProducerSection",
    "RateSection",
    "Role",
    "RoutingSection",
    "Section",
    "SecuritySection",
    "SensorSection",
    "Substituted",
    "TlsSection",
    "TokenSection",
    "Topic",
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


class FallbackSection(Section):
    cache_ttl: float = Field(default=3600, ge=0)
    """Seconds for which a cached answer counts as fresh."""
    max_cache_size: int = Field(default=10_000, ge=1, le=1_000_000)
    enable_stale_results: bool = True
    stale_ttl: float = Field(default=86_400, ge=0)
    """Seconds for which an answer may still be served, labelled stale, when nothing can be asked."""

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


class Config(Section):
    """The whole tree."""

    gateway: GatewaySection = Field(default_factory=GatewaySection)
    models: ModelsSection = ModelsSection()
    routing: RoutingSection = RoutingSection()
    edge_mcu: McuSection = McuSection()
    edge_gpu: GpuSection = GpuSection()
    cloud: CloudSection = CloudSection()
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
        return self
