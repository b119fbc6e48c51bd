"""What a play is worth: one number from accuracy, lateness, failure, money, bytes and load. Pure.

    utility = accuracy x A - miss x L - (cost / max_cost) x C - (bytes / BYTES_UNIT) x B - load x H

`miss` is the chance that no answer comes in time: 1 - success x (1 - late). The policy gives expectations (for `late` a
probability); who knows what happened gives 0 or 1. More accuracy or success never lowers the utility, and more of
anything else never raises it.
"""

from __future__ import annotations

from math import erfc, log, sqrt

from agent.config import UtilityWeights

BYTES_UNIT = 10_000.0
"""Bytes on the wire that the weight of bytes is for."""
FREE_LIMIT_SHARE = 10.0
"""What a lane that costs anything counts as in units of `max_cloud_cost`, where that is 0."""
Z95 = 1.6448536269514722
"""Standard deviations from the median to the 95th percentile of a normal distribution."""
MIN_SPREAD = 1.1
"""p95 is taken to be at least this much above p50: no measurement is surer than that of the next attempt."""
_SCALE = Z95 / sqrt(2.0)


def late(p50_s: float, p95_s: float, left_s: float) -> float:
    """Chance of taking longer than `left_s`: that of a lognormal distribution through the two quantiles.

    Times of a service have no upper bound and a long tail to the right; their logarithms are about normal. Beyond three
    times the (logarithmic) distance from p50 to p95, where less than one in a million is left, the answer is 0.
    """
    if left_s <= 0.0:
        return 1.0
    if p50_s <= 0.0:
        return float(p95_s > left_s)
    spread = p95_s / p50_s
    if spread < MIN_SPREAD:
        spread = MIN_SPREAD
    if left_s >= p50_s * spread * spread * spread:
        return 0.0
    return 0.5 * erfc(_SCALE * log(left_s / p50_s) / log(spread))


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
    `routing.max_cloud_cost`; where it is 0, any price counts as ten times the limit."""
    share = cost_usd / max_cost_usd if max_cost_usd > 0 else FREE_LIMIT_SHARE * (cost_usd > 0)
    return {
        "accuracy": weights.accuracy * accuracy,
        "miss": 0.0 - weights.lateness * (1.0 - success * (1.0 - late)),
        "cost": 0.0 - weights.cost * share,
        "bytes": 0.0 - weights.bytes * bytes / BYTES_UNIT,
        "load": 0.0 - weights.load * load,
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
