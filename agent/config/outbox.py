"""What must not be lost: the outbox, and which results are passed on to the cloud."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from agent.config.base import Name, Section, Topic

WEEK_S = 7 * 86_400


class OutboxSection(Section):
    """Durable requests and results on disk, until they are answered and delivered."""

    enabled: bool = False
    max_rows: int = Field(default=100_000, ge=1, le=10_000_000)
    max_bytes: int = Field(default=256 << 20, ge=4096, le=1 << 40)
    """Of what is stored; the file is about a third larger."""
    max_age_s: float = Field(default=WEEK_S, gt=0, le=52 * WEEK_S)
    """After so much running time an item is given up: a request is answered with `expired`, a message is dropped."""
    full: Literal["reject", "drop_oldest"] = "reject"
    """What happens to a new item when a bound is reached: it is refused, or the oldest are dropped for it."""
    commit_wait_ms: float = Field(default=50, ge=0, le=1000)
    """How long the first item of a commit waits for others: one write to the disk for all of them."""
    commit_rows: int = Field(default=64, ge=1, le=1024)
    """Items after which a commit does not wait any longer."""
    max_waiting: int = Field(default=4096, ge=1, le=100_000)
    """Items that wait for their commit; one more is refused."""
    max_in_flight: int = Field(default=64, ge=1, le=1024)
    """Messages to a broker that it has not acknowledged; its Receive Maximum may lower it."""
    max_asked: int = Field(default=8, ge=1, le=256)
    """Durable requests that are being answered at once, one of each producer."""
    drain_per_s: float = Field(default=1000, gt=0, le=1_000_000)
    """Messages handed to a broker in a second, and requests begun, each."""
    retry_max_s: float = Field(default=30, gt=0, le=3600)
    """The longest wait between two tries of one producer's request."""
    session_expiry_s: int = Field(default=86_400, ge=1, le=0xFFFF_FFFE)
    """How long the gateway's broker keeps durable requests while the daemon is away."""


class UplinkSection(Section):
    """Where results of sensors with `uplink: true` are passed on to."""

    lane: Name | None = None
    """Of `cloud.lanes`: its broker is used, over a connection of its own. None: there is no uplink."""
    topic: Topic = "edge-agent/results"
    """Results go to `{topic}/{gateway}/{sensor}`."""
    message_expiry_s: int | None = Field(default=None, ge=1, le=0xFFFF_FFFE)
    """How long the broker keeps a result for a subscriber that is away; None: `outbox.max_age_s`."""


class DurableSections(Section):
    """Mixed into the whole tree."""

    outbox: OutboxSection = OutboxSection()
    uplink: UplinkSection = UplinkSection()

    @model_validator(mode="after")
    def _needs_outbox(self) -> Self:
        if self.uplink.lane is not None and not self.outbox.enabled:
            raise ValueError("uplink needs outbox.enabled: true")
        return self
