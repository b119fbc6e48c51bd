"""The configuration: one validated, frozen tree. `config_load` reads it from a YAML file and the environment.

Every bound of the daemon is a setting here, with a default that suits a 1 GB gateway. Units are in the names.
"""

from __future__ import annotations

import platform
import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal, Self, get_args
from urllib.parse import urlsplit

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SecretStr,
    SerializerFunctionWrapHandler,
    ValidationInfo,
    field_serializer,
    field_validator,
    model_validator,
)

NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$"
TOPIC_PATTERN = r"^[^#+\x00]{1,200}$"
Name = Annotated[str, Field(pattern=NAME_PATTERN)]
Topic = Annotated[str, Field(pattern=TOPIC_PATTERN)]
Priority = Annotated[int, Field(ge=1, le=10)]
ClassName = Literal["realtime", "near", "interactive", "batch"]


class Substituted(str):
    """Text that came from `${…}`: the only text that is read as a number or as true and false."""

    __slots__ = ()


class Section(BaseModel):
    """A strict part of the tree: unknown keys are refused, and so are values of another type.

    `timeout_ms: "50"` and `port: true` are mistakes, not a number; `enabled: 1` is not a truth value. A whole number
    will do where a fraction is allowed. Only what `${…}` stands for, which is always text, is read as what its key
    takes. Values of `EDGE_AGENT__…` variables are YAML, so they have types of their own.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, hide_input_in_errors=True)

    @field_validator("*", mode="before")
    @classmethod
    def _type_as_meant(cls, value: object, info: ValidationInfo) -> object:
        field = cls.model_fields[info.field_name or ""]
        allowed = {field.annotation, *get_args(field.annotation)}  # also of a Literal
        if allowed & {int, float, 0} and (isinstance(value, bool) or type(value) is str):
            raise ValueError(_not_a_number(value, info.field_name or ""))
        if bool in allowed and not isinstance(value, bool | Substituted):
            raise ValueError("must be true or false")
        return value


def _not_a_number(value: object, key: str) -> str:
    if isinstance(value, str) and re.fullmatch(r"\s*[\d.]+\s*[A-Za-zµ%]+\s*", value):
        named = key.endswith(("_ms", "_s", "_bytes"))
        return f"must be a number without a unit{'; the unit is in the name of the key' if named else ''}"
    quoted = isinstance(value, str) and re.fullmatch(r"\s*-?[\d.]+\s*", value)
    return "must be a number without quotes" if quoted else "must be a number"


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


class RoutingSection(Section):
    max_cloud_cost: float = Field(default=0.01, ge=0)
    """USD for one request; a dearer lane is used only where no edge tier can answer, or by priority."""
    edge_preference: float = Field(default=0.7, gt=0, le=1)
    """An edge target is kept while its score is at least this share of the best cloud score."""
    latency_thresholds: LatencyThresholds = LatencyThresholds()
    model_size_thresholds: ModelSizeThresholds = ModelSizeThresholds()
    parameter_thresholds: ParameterThresholds = ParameterThresholds()
    breaker: BreakerSection = BreakerSection()
    max_in_flight: int = Field(default=256, ge=1, le=100_000)
    """Requests in the daemon at once; one more is refused with `overloaded`."""


class McuSection(Section):
    enabled: bool = True
    ports: tuple[str, ...] = ()
    """Serial ports, one microcontroller each; empty: the tier is off. `port` is accepted for a single one."""
    baud: int = Field(default=921_600, ge=1200, le=20_000_000)
    timeout_ms: float = Field(default=50, gt=0, le=60_000)
    max_concurrent: int = Field(default=4, ge=1, le=64)
    """Open requests for each microcontroller; the window it advertises may lower it."""
    health_check_interval: float = Field(default=5, gt=0, le=3600)
    """Seconds between PINGs on an idle line."""

    @model_validator(mode="before")
    @classmethod
    def _single_port(cls, data: object) -> object:
        if isinstance(data, dict) and "port" in data:
            if "ports" in data:
                raise ValueError("give either port or ports, not both")
            data = {**data, "ports": [data["port"]]}
            del data["port"]
        return data

    @field_validator("ports", mode="after")
    @classmethod
    def _distinct(cls, ports: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(ports)) != len(ports):
            raise ValueError("names the same port twice")
        return ports


class GpuSection(Section):
    """The gateway's own runtime; called `edge_gpu` also where it runs on the CPU."""

    enabled: bool = True
    providers: tuple[Literal["tensorrt", "cuda", "cpu"], ...] = Field(default=("tensorrt", "cuda", "cpu"), min_length=1)
    """ONNX Runtime execution providers, in order of preference."""
    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    """For LiteRT models: `auto` takes the GPU accelerator where it loads, else XNNPACK on the CPU."""
    strict_provider: bool = False
    """Refuse to start rather than run on another provider than the first one named."""
    timeout_ms: float = Field(default=200, gt=0, le=600_000)
    max_concurrent: int = Field(default=5, ge=1, le=256)
    threads: int = Field(default=1, ge=1, le=64)
    """XNNPACK / ONNX Runtime threads for each inference."""
    workers: int = Field(default=2, ge=1, le=64)
    """Threads that run inferences at once."""
    inline_below_ms: float = Field(default=0.5, ge=0, le=5)
    """Inferences that measure faster than this run on the event loop: a hand-over to a thread costs more. 0: never."""
    isolation: Literal["thread", "process"] = "thread"
    """`process`: run the runtime in a child process, so that an accelerator that hangs takes nothing else along."""


class BrokerSection(Section):
    """How to reach an MQTT broker."""

    broker: str
    """`mqtt://host:port` or `mqtts://host:port`."""
    username: str | None = None
    password: SecretStr | None = None
    ca_file: Path | None = None
    cert_file: Path | None = None
    key_file: Path | None = None

    @field_validator("broker", mode="after")
    @classmethod
    def _broker_url(cls, value: str) -> str:
        return check_broker_url(value)

    @model_validator(mode="after")
    def _tls(self) -> Self:
        if (self.cert_file is None) != (self.key_file is None):
            raise ValueError("cert_file and key_file go together")
        if (self.ca_file or self.cert_file) and not self.broker.startswith("mqtts://"):
            raise ValueError("ca_file, cert_file and key_file need an mqtts:// broker")
        return self


class LaneSection(BrokerSection):
    """One way into the cloud."""

    name: Name
    kind: Literal["gpu", "serverless"] = "gpu"
    topic: Topic = "edge-agent/lanes/default"
    cost_per_request: float = Field(default=0.001, ge=0, le=1000)
    timeout_ms: float = Field(default=5000, gt=0, le=600_000)
    max_concurrent: int = Field(default=100, ge=1, le=10_000)
    region: Name | None = None
    backup: bool = False
    """Asked only after the lanes that are not backups."""


class CloudSection(Section):
    lanes: tuple[LaneSection, ...] = Field(default=(), max_length=16)

    @model_validator(mode="after")
    def _distinct(self) -> Self:
        names = [lane.name for lane in self.lanes]
        if len(set(names)) != len(names):
            raise ValueError("two lanes have the same name")
        return self


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


class MqttSection(BrokerSection):
    """The gateway's own broker: sensors and local clients."""

    enabled: bool = True
    broker: str = "mqtt://127.0.0.1:1883"
    keepalive_s: int = Field(default=15, ge=1, le=3600)
    max_payload_bytes: int = Field(default=1 << 20, ge=64, le=256 << 20)
    max_in_flight: int = Field(default=128, ge=1, le=65_535)
    """Messages from the broker that are being answered at once (the MQTT 5 Receive Maximum)."""


class HttpSection(Section):
    enabled: bool = True
    host: str = "127.0.0.1"
    port: int = Field(default=8080, ge=0, le=65_535)
    """0: any free port, printed in the log."""
    max_body_bytes: int = Field(default=1 << 20, ge=64, le=256 << 20)
    allow_remote: bool = False
    """Listen on an address other than loopback, without authentication. Put a proxy in front that has it."""

    @model_validator(mode="after")
    def _loopback(self) -> Self:
        if not self.allow_remote and self.host not in ("127.0.0.1", "::1", "localhost"):
            raise ValueError(f"host {self.host!r} is not loopback: set allow_remote: true if that is meant")
        return self


class MonitoringSection(Section):
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_format: Literal["json", "text"] = "json"
    status_interval_s: float = Field(default=10, gt=0, le=3600)
    """How often the retained MQTT status is refreshed, if nothing changed."""
    sample_interval_s: float = Field(default=2, gt=0, le=3600)
    """How often CPU, memory, temperature and accelerator load are read."""


class SensorSection(Section):
    """How messages on one topic become requests."""

    model: str
    name: Name | None = None
    """Results go to `edge/{gateway}/results/{name}`; None: the topic's last level, or what its `+` matched."""
    latency_class: ClassName = "near"
    deadline_ms: float | None = Field(default=None, gt=0, le=3_600_000)
    priority: Priority = 5
    format: Literal["json", "raw"] = "json"
    field: str | None = None
    """For json: the key of the payload that holds the values; None: the payload is the array, or has `inputs`."""
    dtype: Literal["float32", "float16", "int8", "uint8", "int16", "int32"] | None = None
    """For raw: how the bytes are to be read (little-endian); None: the model's own type."""
    scale: float = 1.0
    """Values are multiplied by this."""
    qos: Literal[0, 1] = 1
    use_cache: bool = True
    allowed_regions: tuple[str, ...] = ()


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
    sensors: Mapping[str, SensorSection] = Field(default_factory=dict)

    @field_validator("sensors", mode="after")
    @classmethod
    def _topics(cls, sensors: Mapping[str, SensorSection]) -> Mapping[str, SensorSection]:
        for topic in sensors:
            check_topic_filter(topic)
        return MappingProxyType(dict(sensors))

    @field_serializer("sensors", mode="wrap")
    def _plain(self, sensors: Mapping[str, SensorSection], dump: SerializerFunctionWrapHandler) -> Any:
        return dump(dict(sensors))

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if not ((self.edge_mcu.enabled and self.edge_mcu.ports) or self.edge_gpu.enabled or self.cloud.lanes):
            raise ValueError("no tier can answer: configure edge_mcu.ports, edge_gpu or cloud.lanes")
        if not self.http.enabled and not self.mqtt.enabled:
            raise ValueError("no door is open: enable http or mqtt")
        if self.sensors and not self.mqtt.enabled:
            raise ValueError("sensors need mqtt.enabled: true")
        return self


def check_broker_url(value: str) -> str:
    """Raises `ValueError` unless it is `mqtt[s]://host[:port]` without credentials."""
    parts = urlsplit(value)
    try:
        port = parts.port
    except ValueError:
        port = -1
    if parts.scheme not in ("mqtt", "mqtts") or not parts.hostname or port == -1 or parts.path not in ("", "/"):
        raise ValueError("must be mqtt://HOST[:PORT] or mqtts://HOST[:PORT]")
    if parts.username or parts.password:
        raise ValueError("must not hold credentials: use username and password")
    return value


def check_topic_filter(topic: str) -> str:
    """Raises `ValueError` unless it is a topic filter without `#` (MQTT 5, section 4.7)."""
    levels = topic.split("/")
    if not topic or len(topic) > 200 or "\x00" in topic or "#" in topic:
        raise ValueError(f"{topic[:64]!r} is not a usable topic: 1 to 200 characters, + allowed, # not")
    if any("+" in level and level != "+" for level in levels):
        raise ValueError(f"{topic!r}: + must be a whole level")
    return topic
