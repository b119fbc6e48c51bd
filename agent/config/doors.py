"""The doors: HTTP, MQTT, and the topics of sensors."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from agent.config.base import ClassName, Name, Priority, Section
from agent.config.broker import BrokerSection
from agent.config.cascade import AccuracyName


class MqttSection(BrokerSection):
    """The gateway's own broker: sensors and local clients."""

    enabled: bool = True
    broker: str = "mqtt://127.0.0.1:1883"
    keepalive_s: int = Field(default=15, ge=1, le=3600)
    max_payload_bytes: int = Field(default=1 << 20, ge=64, le=256 << 20)
    max_in_flight: int = Field(default=128, ge=1, le=65_535)
    """Messages from the broker that are being answered at once (the MQTT 5 Receive Maximum)."""
    shared_requests: bool = True
    """Whether `edge/{gateway}/infer/{model}` is open, where a request itself says who asks. False: only
    `edge/{gateway}/infer/{model}/{producer}`, which the broker's access list can tie to a certificate."""


class TlsSection(Section):
    """The daemon's own certificate, for TLS 1.3."""

    cert_file: Path
    """PEM: the certificate, then those between it and the authority's."""
    key_file: Path


class HttpSection(Section):
    enabled: bool = True
    host: str = "127.0.0.1"
    port: int = Field(default=8080, ge=0, le=65_535)
    """0: any free port, printed in the log."""
    max_body_bytes: int = Field(default=1 << 20, ge=64, le=256 << 20)
    max_connections_per_address: int = Field(default=64, ge=1, le=512)
    """Of another machine's connections at once; one more is closed unanswered."""
    tls: TlsSection | None = None
    allow_plaintext: bool = False
    """Listen on an address other than loopback without TLS: tokens, questions and answers can be read on the way."""

    @property
    def on_loopback(self) -> bool:
        return self.host in ("127.0.0.1", "::1", "localhost")

    @model_validator(mode="after")
    def _remote(self) -> Self:
        if not self.on_loopback and self.tls is None and not self.allow_plaintext:
            raise ValueError(
                f"host {self.host!r} is not loopback: give tls, or allow_plaintext: true if that is meant; and "
                "security.tokens or security.jwt, if there are none (`edge-agent token new` makes a token)"
            )
        return self


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
    accuracy: AccuracyName | None = None
    """None: `accuracy.mode`."""
    shadow: bool = True
    """Whether readings may be asked again of the cloud in the background, where `shadow.rate` says so."""
    allowed_regions: tuple[Name, ...] = Field(default=(), max_length=32)
    durable: bool = False
    """Readings are kept on the disk until they are answered, and answers until they are delivered; class `batch`."""
    uplink: bool = False
    """Answers are also passed on to the cloud, over `uplink`."""
