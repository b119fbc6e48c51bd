"""The state of one part of the daemon, as `/status`, the metrics and the retained status show it."""

from __future__ import annotations

from enum import StrEnum
from typing import Any, NamedTuple, Self

from agent.core.clock import Clock


class ComponentState(StrEnum):
    STARTING = "starting"
    UP = "up"
    DEGRADED = "degraded"
    DOWN = "down"


class Reading(NamedTuple):
    """The state of a part as it is now, and why it is not `up`."""

    state: ComponentState
    reason: str = ""

    @classmethod
    def working(cls, trouble: str) -> Self:
        """Of a part that goes on whatever the trouble."""
        return cls(ComponentState.DEGRADED if trouble else ComponentState.UP, trouble)

    @classmethod
    def there(cls, there: bool, reason: str = "") -> Self:
        """Of a part that can be used or not; with a reason although it can, it is degraded."""
        return cls.working(reason) if there else cls(ComponentState.DOWN, reason)


def shown(name: str, state: ComponentState, reason: str, since: float, clock: Clock) -> dict[str, Any]:
    """One of `components` in `/status`. `since` is monotonic; also shown as seconds ago, and as Unix time."""
    since_s = clock.monotonic() - since
    return {
        "name": name,
        "state": state.value,
        "reason": reason,
        "since_s": round(since_s, 3),
        "since": round(clock.wall() - since_s, 3),
    }
