"""Streams: boards that sample a sensor of their own."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from agent.config.base import ClassName, Name, Priority, Section


class StreamSection(Section):
    """What one board samples, and what becomes of its answers."""

    name: Name
    """Results go to `edge/{gateway}/results/{name}`."""
    model: str
    """The board must run this family."""
    port: str | None = None
    """Of `edge_mcu.ports`; None: whichever port the board with `uid` is on, or the only one."""
    uid: str | None = Field(default=None, pattern=r"^[0-9a-f]{16}$")
    """The board's unique id, as `edge-agent mcu info` prints it."""
    source: int = Field(default=0, ge=0, le=255)
    """Which of the board's sensors."""
    interval_ms: int = Field(default=100, ge=1, le=3_600_000)
    threshold: float = Field(default=0.8, ge=0, le=1)
    """Answers that the board is less sure of than this are escalated, if their inputs were sent."""
    send_inputs: Literal["never", "below", "always"] = "below"
    credits: int = Field(default=16, ge=1, le=1024)
    """Results that may be under way; a board without credit keeps its newest and skips the others."""
    max_escalations: int = Field(default=4, ge=1, le=64)
    """Escalated samples in flight; further ones keep the board's answer."""
    latency_class: ClassName = "near"
    deadline_ms: float | None = Field(default=None, gt=0, le=3_600_000)
    """From the moment of the sample."""
    priority: Priority = 5
    allowed_regions: tuple[Name, ...] = Field(default=(), max_length=32)

    @model_validator(mode="after")
    def _one_board(self) -> Self:
        if self.port is not None and self.uid is not None:
            raise ValueError("give either port or uid, not both")
        return self
