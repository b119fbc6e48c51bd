"""What cloud lanes may use of money, bytes and requests, and what is kept of how requests went."""

from __future__ import annotations

from pydantic import Field

from agent.config.base import Priority, Section

MAX_USD = 1_000_000
MAX_BYTES = 1 << 50
MAX_REQUESTS = 1_000_000_000


class AmountsSection(Section):
    """Limits. None: no limit. 0: nothing at all."""

    usd_per_minute: float | None = Field(default=None, ge=0, le=MAX_USD)
    usd_per_hour: float | None = Field(default=None, ge=0, le=MAX_USD)
    usd_per_day: float | None = Field(default=None, ge=0, le=MAX_USD)
    bytes_per_minute: int | None = Field(default=None, ge=0, le=MAX_BYTES)
    """Sent and received, `overhead_bytes` included."""
    bytes_per_hour: int | None = Field(default=None, ge=0, le=MAX_BYTES)
    bytes_per_day: int | None = Field(default=None, ge=0, le=MAX_BYTES)
    requests_per_minute: int | None = Field(default=None, ge=0, le=MAX_REQUESTS)
    requests_per_hour: int | None = Field(default=None, ge=0, le=MAX_REQUESTS)
    requests_per_day: int | None = Field(default=None, ge=0, le=MAX_REQUESTS)


class BudgetsSection(AmountsSection):
    """Limits of all lanes together, and how every limit is kept."""

    burst: float = Field(default=0.25, gt=0, le=1)
    """The share of a limit that may be used at once; what was used comes back evenly over the window."""
    borrow: float = Field(default=0.25, ge=0, le=1)
    """The share of a limit by which requests of high priority may run ahead of that pace; never beyond the limit."""
    borrow_priority: Priority = 8
    """From here on a priority is high."""
    overhead_bytes: int = Field(default=700, ge=0, le=1_000_000)
    """Counted for each request on top of its payloads: topics, properties, acknowledgements, headers of TCP and IP."""
    count_time_off: bool = False
    """Whether time counts during which the machine was off, as the wall clock tells it."""
