"""What happens when more is asked than can be answered: who waits, how many, and how much each target is given."""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from agent.config.base import Section


class ClassShares(Section):
    """Part of all places (in the daemon, and on each target) that a latency class may take: what is left above it is
    kept free for the tighter classes."""

    realtime: float = Field(default=1.0, gt=0, le=1)
    near: float = Field(default=0.9, gt=0, le=1)
    interactive: float = Field(default=0.75, gt=0, le=1)
    batch: float = Field(default=0.5, gt=0, le=1)

    @model_validator(mode="after")
    def _descending(self) -> Self:
        if not self.realtime >= self.near >= self.interactive >= self.batch:
            raise ValueError("must descend: realtime >= near >= interactive >= batch")
        return self


class WaitingSection(Section):
    """Requests that wait because every place they could take is taken."""

    realtime: int = Field(default=32, ge=0, le=100_000)
    near: int = Field(default=128, ge=0, le=100_000)
    interactive: int = Field(default=256, ge=0, le=100_000)
    batch: int = Field(default=512, ge=0, le=100_000)
    total: int = Field(default=512, ge=0, le=100_000)
    """Of all classes together: beyond it the lowest class gives way."""
    passed_over: int = Field(default=8, ge=1, le=10_000)
    """After so many places given to others while lower ones waited, the next goes to who has waited longest."""


class LimitSection(Section):
    """How many attempts a target is given at once: between `minimum` and its `max_concurrent`."""

    adaptive: bool = True
    """False: always `max_concurrent`."""
    tolerance: float = Field(default=2.0, ge=1, le=10)
    """Times by which an attempt may take longer than usual before the limit is lowered."""
    minimum: int = Field(default=2, ge=1, le=1000)
    smoothing: float = Field(default=0.2, gt=0, le=1)
    """Part of a change that one attempt makes."""
    backoff: float = Field(default=0.9, gt=0, lt=1)
    """By what a timeout, or a target that says it is busy, multiplies the limit."""


class RetryBudgetSection(Section):
    """Attempts at cloud lanes after an attempt that failed, or beside one that is late, of all requests together."""

    ratio: float = Field(default=0.1, ge=0, le=1)
    """Part of the requests in the window."""
    min_per_s: float = Field(default=2.0, ge=0, le=10_000)
    """As many are always allowed, so that a gateway that asks rarely may try again."""
    window_s: float = Field(default=10.0, ge=1, le=600)


class OverloadSection(Section):
    shares: ClassShares = ClassShares()
    waiting: WaitingSection = WaitingSection()
    limits: LimitSection = LimitSection()
    retries: RetryBudgetSection = RetryBudgetSection()
