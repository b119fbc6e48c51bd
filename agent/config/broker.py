"""How brokers are reached, and what a topic may be."""

from __future__ import annotations

from pathlib import Path
from typing import Self
from urllib.parse import urlsplit

from pydantic import SecretStr, field_validator, model_validator

from agent.config.base import Section


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
