"""What a play is worth, and how likely it is to be late."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.config import RoutingSection, UtilityWeights
from agent.routing.utility import MIN_SPREAD, late, terms, utility

SHARES = st.floats(0, 1)
FACTS = st.fixed_dictionaries(
    {
        "accuracy": SHARES,
        "late": SHARES,
        "success": SHARES,
        "cost_usd": st.floats(0, 1),
        "bytes": st.floats(0, 1e6),
        "load": SHARES,
    }
)
TIMES = st.floats(1e-5, 10)
SPREADS = st.floats(1, 50)


@pytest.mark.parametrize(
    ("left_ms", "chance"), [(10, 0.5), (20, 0.05), (40, 0.0005), (5, 0.95), (0, 1.0), (-1, 1.0), (80, 0.0), (1e6, 0.0)]
)
def test_the_chance_of_being_late_goes_through_both_quantiles(left_ms: float, chance: float) -> None:
    assert late(0.010, 0.020, left_ms / 1e3) == pytest.approx(chance, abs=1e-4)


def test_beyond_three_times_the_way_to_p95_less_than_one_in_a_million_is_late() -> None:
    assert 0 < late(0.010, 0.020, 0.0799) < 1e-6


def test_what_never_varied_is_taken_to_vary_a_little() -> None:
    assert late(0.010, 0.010, 0.010 * MIN_SPREAD) == pytest.approx(0.05)
    assert late(0.0, 0.0, 0.001) == 0.0


@given(p50=TIMES, spread=SPREADS, left=TIMES, more=st.floats(1, 3))
def test_more_time_and_a_quicker_target_are_never_later(p50: float, spread: float, left: float, more: float) -> None:
    chance = late(p50, p50 * spread, left)
    assert 0.0 <= chance <= 1.0
    assert late(p50, p50 * spread, left * more) <= chance
    assert late(p50 * more, p50 * more * spread, left) >= chance


def test_by_hand() -> None:
    weights = UtilityWeights(accuracy=1, lateness=2, cost=0.3, bytes=0.01, load=0.05)
    parts = terms(weights, accuracy=0.9, late=0.1, success=0.8, cost_usd=0.002, bytes=5000, load=0.5)
    assert parts == pytest.approx({"accuracy": 0.9, "miss": -0.56, "cost": -0.06, "bytes": -0.005, "load": -0.025})
    assert utility(weights, accuracy=0.9, late=0.1, success=0.8, cost_usd=0.002, bytes=5000, load=0.5) == pytest.approx(
        0.25
    )


def test_where_nothing_may_be_spent_every_price_is_ten_times_too_much() -> None:
    free = terms(UtilityWeights(), accuracy=1, late=0, max_cost_usd=0.0)
    dear = terms(UtilityWeights(), accuracy=1, late=0, cost_usd=1e-9, max_cost_usd=0.0)
    assert (free["cost"], dear["cost"]) == (0.0, -5.0)


@given(facts=FACTS, better=FACTS, weights=st.sampled_from(["realtime", "near", "interactive", "batch"]))
def test_better_in_every_respect_is_never_worth_less(
    facts: dict[str, float], better: dict[str, float], weights: str
) -> None:
    of_class: UtilityWeights = getattr(RoutingSection().weights, weights)
    best = {key: (max if key in ("accuracy", "success") else min)(value, better[key]) for key, value in facts.items()}
    assert utility(of_class, **best) >= utility(of_class, **facts) - 1e-12
    for key, value in best.items():
        assert utility(of_class, **{**facts, key: value}) >= utility(of_class, **facts) - 1e-12
    assert math.isclose(utility(of_class, **facts), sum(terms(of_class, **facts).values()))
