"""What a play is worth: one number from accuracy, lateness, failure, money, bytes and load. Pure.

    utility = accuracy x A - miss x L - (cost / max_cost) x C - (bytes / BYTES_UNIT) x B - load x H

`miss` is the chance that no answer comes in time: 1 - success x (1 - late). The policy gives expectations (for `late` a
probability); who knows what happened gives 0 or 1. More accuracy or success never lowers the utility, and more of
anything else never raises it.
"""

from __future__ import annotations

from agent.config.routing import UtilityWeights

BYTES_UNIT = 10_000.0
"""Bytes on the wire that the weight of bytes is for."""
TERMS = ("accuracy", "miss", "cost", "bytes", "load")


def terms(
    weights: UtilityWeights,
    *,
    accuracy: float,
    late: float,
    success: float = 1.0,
    cost_usd: float = 0.0,
    max_cost_usd: float = 0.01,
    bytes: float = 0.0,
    load: float = 0.0,
) -> dict[str, float]:
    """The terms, signed. `accuracy`, `late`, `success` and `load` are shares, 0 to 1; `max_cost_usd` is
    `routing.max_cloud_cost`, where 0 makes every price count as ten times the limit."""
    share = cost_usd / max_cost_usd if max_cost_usd > 0 else 10.0 * (cost_usd > 0)
    return {
        "accuracy": weights.accuracy * accuracy,
        "miss": -weights.lateness * (1.0 - success * (1.0 - late)),
        "cost": -weights.cost * share,
        "bytes": -weights.bytes * bytes / BYTES_UNIT,
        "load": -weights.load * load,
    }


def utility(
    weights: UtilityWeights,
    *,
    accuracy: float,
    late: float,
    success: float = 1.0,
    cost_usd: float = 0.0,
    max_cost_usd: float = 0.01,
    bytes: float = 0.0,
    load: float = 0.0,
) -> float:
    """The sum of `terms`."""
    parts = terms(
        weights,
        accuracy=accuracy,
        late=late,
        success=success,
        cost_usd=cost_usd,
        max_cost_usd=max_cost_usd,
        bytes=bytes,
        load=load,
    )
    return sum(parts.values())
