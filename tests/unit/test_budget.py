"""Budgets: what the cap and the pace let go, what survives a restart, and that no window is ever exceeded."""

from __future__ import annotations

import json
from typing import Any

import pytest
from budget_fakes import DAY_S, HOUR_S, LANE, OTHER, PRICES, Paper, budget, byte_limit, spent, usd
from hypothesis import given
from hypothesis import strategies as st

from agent.routing.budget import Budget, Receipt, Terms
from agent.routing.meter import SLOTS, Allowance, nano_usd


def as_many_as_go(made: Budget, now: float, cost_usd: float, **how: Any) -> int:
    count = 0
    while spent(made, now, cost_usd, **how):
        count += 1
    return count


# --- cap and pace ----------------------------------------------------------------------------------------------------


def test_a_burst_goes_at_once_and_the_rest_comes_back_evenly() -> None:
    made = budget(usd(1.0), burst=0.25, borrow=0)
    assert as_many_as_go(made, 0, 0.01) == 25
    assert "ahead of its pace, again in 864.0 s" in made.objection(LANE, 0.01, 0, 5, 0)
    assert as_many_as_go(made, HOUR_S, 0.01) == 4  # 1 / 24 of a dollar


def test_high_priority_runs_ahead_of_the_pace_up_to_a_bound_and_others_wait_for_it() -> None:
    made = budget(usd(1.0), burst=0.25, borrow=0.25, priority=8)
    assert as_many_as_go(made, 0, 0.01) == 25
    assert as_many_as_go(made, 0, 0.01, priority=7) == 0
    assert as_many_as_go(made, 0, 0.01, priority=8) == 25
    assert as_many_as_go(made, 0.25 * DAY_S, 0.01) == 0  # what was borrowed has come back, and no more
    assert as_many_as_go(made, 0.26 * DAY_S, 0.01) == 1


def test_nobody_gets_beyond_the_cap() -> None:
    made = budget(usd(1.0), burst=1, borrow=1)
    assert as_many_as_go(made, 0, 0.01, priority=10) == 100
    assert "0 USD left, needs 0.01 USD" in made.objection(LANE, 0.01, 0, 10, 0)
    assert as_many_as_go(made, DAY_S - 1, 0.01, priority=10) == 0
    assert as_many_as_go(made, DAY_S * (1 + 1 / SLOTS), 0.01, priority=10) == 100


def test_a_steady_load_can_use_nearly_all_of_a_limit() -> None:
    made = budget(usd(1.0), burst=0.1)
    used = [second for second in range(0, int(5 * DAY_S), 60) if spent(made, float(second), 0.0008)]
    assert 0.95 < len([second for second in used if second >= 4 * DAY_S]) * 0.0008 <= 1.0


def test_a_request_larger_than_the_burst_goes_when_nothing_is_ahead_of_the_pace() -> None:
    made = budget(Allowance("", "requests", "minute", 2), burst=0.25)
    assert spent(made, 0, 0)
    assert not spent(made, 29, 0)
    assert spent(made, 30, 0)


def test_a_request_larger_than_the_limit_never_goes() -> None:
    assert "0.5 USD left, needs 0.6 USD" in budget(usd(0.5)).objection(LANE, 0.6, 0, 10, 0)


def test_a_limit_of_nothing_lets_nothing_go_but_what_is_free() -> None:
    made = budget(usd(0))
    assert made.objection(LANE, 0.001, 0, 10, 0)
    assert made.objection(LANE, 0.0, 0, 10, 0) == ""


def test_the_gateways_limit_is_for_all_lanes_and_a_lanes_own_for_it_alone() -> None:
    made = budget(usd(1.0), usd(0.1, scope=LANE), burst=1)
    assert as_many_as_go(made, 0, 0.01) == 10
    assert "of cloud:eu" in made.objection(LANE, 0.01, 0, 5, 0)
    assert as_many_as_go(made, 0, 0.01, lane=OTHER) == 90
    assert "of 1 USD per day" in made.objection(OTHER, 0.01, 0, 5, 0)


def test_what_no_limit_is_about_is_free() -> None:
    made = budget(usd(0), usd(0, scope=LANE))
    assert made.objection("edge_gpu", 5.0, 10**12, 1, 0) == ""
    receipt = made.spend("edge_gpu", 5.0, 10**12, 0)
    made.settle(receipt, 6.0, 10**13, 0)
    assert all(entry["used"] == 0 for entry in made.left(0))


def test_a_tenth_of_a_cent_a_hundred_thousand_times_is_a_hundred_dollars_exactly() -> None:
    made = budget(usd(1000.0), burst=1)
    for _ in range(100_000):
        made.spend(LANE, 0.001, 0, 0)
    assert made.left(0)[0]["used"] == 100.0
    assert nano_usd(1e-12) == 1


# --- settling --------------------------------------------------------------------------------------------------------


def test_what_was_reserved_and_not_used_comes_back() -> None:
    made = budget(byte_limit(1000), burst=1)
    receipt = made.spend(LANE, 0, 800, 0)
    assert made.objection(LANE, 0, 300, 5, 0)
    made.settle(receipt, 0, 100, 5)
    assert made.objection(LANE, 0, 900, 5, 5) == ""
    assert made.objection(LANE, 0, 901, 5, 5)


def test_what_the_line_adds_to_a_payload_is_counted_too() -> None:
    made = budget(byte_limit(1000), burst=1, overhead_bytes=300)
    assert made.objection(LANE, 0, 701, 5, 0)
    receipt = made.spend(LANE, 0, 700, 0)
    assert made.left(0)[0]["left"] == 0
    made.settle(receipt, 0, 200, 1)
    assert made.left(1)[0]["left"] == 500


def test_attempts_at_the_same_time_do_not_overshoot_together() -> None:
    made = budget(byte_limit(1000), burst=1)
    running: list[Receipt] = []
    while not made.objection(LANE, 0, 300, 5, 0):
        running.append(made.spend(LANE, 0, 300, 0))
    assert len(running) == 3


def test_more_than_was_reserved_is_counted_too_and_paid_back() -> None:
    made = budget(byte_limit(1000), burst=1)
    made.settle(made.spend(LANE, 0, 900, 0), 0, 1900, 1)
    (entry,) = made.left(1)
    assert (entry["used"], entry["left"]) == (1900, 0)
    assert made.objection(LANE, 0, 1, 10, DAY_S)
    assert made.objection(LANE, 0, 1, 10, 2 * DAY_S) == ""


def test_what_is_settled_long_after_gives_nothing_back_that_has_come_back_already() -> None:
    made = budget(byte_limit(1000), burst=1)
    receipt = made.spend(LANE, 0, 1000, 0)
    made.spend(LANE, 0, 1000, 2 * DAY_S)
    made.settle(receipt, 0, 0, 2 * DAY_S)
    assert made.objection(LANE, 0, 1, 10, 2 * DAY_S)


# --- over restarts ---------------------------------------------------------------------------------------------------


def restarted(kept: Any, *limits: Allowance, boot: str, now: float, wall: float = 1e9, **terms: Any) -> Budget:
    made = Budget(limits, PRICES, Terms(**terms), None)
    made.restore(kept, boot=boot, now=now, wall=wall)
    return made


def test_an_orderly_restart_loses_nothing_and_forgets_nothing() -> None:
    made = budget(usd(1.0), burst=1)
    as_many_as_go(made, 10, 0.3)
    again = restarted(json.loads(json.dumps(made.document(20))), usd(1.0), boot="boot-1", now=25, burst=1)
    assert again.left(25) == made.left(25)
    assert again.objection(LANE, 0.2, 0, 5, 10 + DAY_S)
    assert not again.objection(LANE, 0.2, 0, 5, 10 + DAY_S * (1 + 1 / SLOTS))


def test_a_crash_costs_at_most_a_lease() -> None:
    paper = Paper()
    made = budget(usd(1.0), ledger=paper, burst=1)
    assert as_many_as_go(made, 0, 0.001) == 1000
    assert paper.writes <= 110
    partly = budget(usd(1.0), ledger=(paper := Paper()), burst=1)
    for _ in range(100):
        assert spent(partly, 0, 0.001)
    again = restarted(paper.kept, usd(1.0), boot="boot-1", now=1, burst=1)
    assert 0.100 <= again.left(1)[0]["used"] <= 0.120


def test_what_was_leased_counts_from_the_restart_since_it_may_have_been_used_just_before() -> None:
    paper = Paper()
    made = budget(Allowance("", "requests", "minute", 60), ledger=paper, burst=1)
    assert spent(made, 0, 0)
    again = restarted(paper.kept, Allowance("", "requests", "minute", 60), boot="boot-1", now=50, burst=1)
    assert again.objection(LANE, 0, 0, 10, 100)
    assert again.objection(LANE, 0, 0, 10, 112) == ""


@pytest.mark.parametrize("wall", [0.0, 1e9 + 365 * DAY_S])
def test_a_wall_clock_that_jumps_changes_nothing_within_one_start_of_the_machine(wall: float) -> None:
    made = budget(usd(1.0), burst=1)
    as_many_as_go(made, 0, 0.1)
    again = restarted(made.document(1), usd(1.0), boot="boot-1", now=2, wall=wall, burst=1, count_time_off=True)
    assert again.left(2)[0]["left"] == 0


def test_after_another_start_of_the_machine_only_the_time_since_counts() -> None:
    made = budget(usd(1.0), burst=1)
    as_many_as_go(made, 0, 0.1)
    again = restarted(made.document(1), usd(1.0), boot="boot-2", now=HOUR_S, wall=1e9 + 365 * DAY_S, burst=1)
    assert again.left(HOUR_S)[0]["left"] == 0
    assert again.left(DAY_S * (1 + 1 / SLOTS))[0]["left"] == 1.0


def test_time_off_counts_if_asked_for_and_is_not_paid_twice() -> None:
    terms = {"burst": 1, "count_time_off": True}
    made = budget(usd(1.0), **terms)
    as_many_as_go(made, 0, 0.1)
    far = 1e9 + 365 * DAY_S
    again = restarted(made.document(1), usd(1.0), boot="boot-2", now=5, wall=far, **terms)
    assert as_many_as_go(again, 5, 0.1) == 10
    back = restarted(again.document(6), usd(1.0), boot="boot-3", now=5, wall=1e9, **terms)
    assert as_many_as_go(back, 5, 0.1) == 0
    forth = restarted(back.document(6), usd(1.0), boot="boot-4", now=5, wall=far, **terms)
    assert as_many_as_go(forth, 5, 0.1) == 0


def test_without_the_name_of_the_start_no_time_counts() -> None:
    made = budget(usd(1.0), burst=1)
    as_many_as_go(made, 0, 0.1)
    assert restarted(made.document(1), usd(1.0), boot="", now=9 * DAY_S, burst=1).left(9 * DAY_S)[0]["left"] == 0


def test_a_limit_that_was_changed_keeps_what_was_used() -> None:
    made = budget(usd(1.0), burst=1)
    as_many_as_go(made, 0, 0.1)
    assert restarted(made.document(1), usd(3.0), boot="boot-1", now=2, burst=1).left(2)[0]["left"] == 2.0
    assert restarted(made.document(1), usd(0.5), boot="boot-1", now=2, burst=1).left(2)[0]["left"] == 0


@pytest.mark.parametrize(
    "damage",
    [
        {"schema": 2},
        {"at_ms": -1},
        {"at_ms": "1"},
        {"meters": [{"scope": "", "unit": "usd", "window": "day"}]},
        {"meters": 5},
        {"boot": "boot-1", "monotonic_ms": None},
    ],
)
def test_a_document_that_makes_no_sense_is_refused_and_then_everything_counts_as_used(damage: Any) -> None:
    made = budget(usd(1.0), burst=1)
    kept = made.document(1) | damage
    again = Budget([usd(1.0)], PRICES, Terms(burst=1))
    with pytest.raises(ValueError, match="cannot be read"):
        again.restore(kept, boot="boot-1", now=2, wall=1e9)
    again.exhaust(2)
    assert again.left(2)[0]["left"] == 0
    assert again.left(2 + DAY_S * (1 + 1 / SLOTS))[0]["left"] == 1.0


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@given(key=st.sampled_from(["schema", "boot", "monotonic_ms", "wall_ms", "at_ms", "meters"]), junk=JUNK)
def test_whatever_a_document_holds_it_is_read_or_refused(key: str, junk: Any) -> None:
    made = budget(usd(1.0), burst=1)
    as_many_as_go(made, 0, 0.1)
    kept = made.document(1)
    changed: Any = kept | {key: junk} if key != "meters" else kept | {key: [kept[key][0] | {"recent": junk}]}
    again = Budget([usd(1.0)], PRICES, Terms(burst=1))
    try:
        again.restore(changed, boot="boot-1", now=2, wall=1e9)
    except ValueError:
        again.exhaust(2)
    assert 0 <= again.left(2)[0]["left"] <= 1.0
    again.spend(LANE, 0.1, 0, 3)
    json.dumps(again.document(4))


def test_a_meter_that_claims_to_be_ahead_of_time_is_refused() -> None:
    kept = budget(usd(1.0)).document(1)
    kept["meters"][0]["at_ms"] = 10**15
    with pytest.raises(ValueError, match="out of order"):
        restarted(kept, usd(1.0), boot="boot-1", now=2)


def test_while_the_ledger_cannot_be_written_only_the_lease_is_used_and_then_nothing() -> None:
    paper = Paper(prompt=False)
    made = budget(usd(1.0), ledger=paper, burst=1)
    assert "the file is being written" in made.objection(LANE, 0.001, 0, 5, 0)
    paper.finish()
    assert as_many_as_go(made, 0, 0.001) == 20
    paper.finish("No space left on device")
    assert made.problem == "No space left on device"
    assert "cannot be recorded: No space left on device" in made.objection(LANE, 0.001, 0, 5, 1)
    made.keep(11, 1e9)
    paper.finish()
    assert made.problem == ""
    assert spent(made, 11, 0.001)


def test_what_is_used_is_written_now_and_then_although_the_lease_lasts() -> None:
    paper = Paper()
    made = budget(usd(1.0), ledger=paper)
    assert spent(made, 0, 0.001)
    before = paper.writes
    made.keep(60, 1e9)
    assert paper.writes == before
    made.keep(901, 1e9)
    assert paper.writes == before + 1
    made.keep(2000, 1e9)
    assert paper.writes == before + 1, "nothing was used since"
