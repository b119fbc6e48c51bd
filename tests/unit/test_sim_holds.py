"""What must hold of routing under load and faults: in virtual time, on the real pipeline, with simulated tiers."""

import pytest
from sim_fakes import config, stage

from agent.core.types import LatencyClass
from hil.sim import crowd, figures, judge, workloads
from hil.sim.play import play
from hil.sim.strategies import ALWAYS_CLOUD

TEN_THOUSAND = 10_000


@pytest.mark.parametrize("patient", [False, True], ids=["the daemon's bounds", "room for all"])
def test_ten_thousand_at_once(patient: bool) -> None:
    found = crowd.crowd(stage(), config(), TEN_THOUSAND, patient=patient)
    assert found.asked == TEN_THOUSAND == sum(found.answered.values()) + sum(found.refused.values())
    assert found.unexplained == 0
    assert set(found.answered) == {kind.value for kind in LatencyClass}, "a class was starved"
    waiting = config().routing.overload.waiting
    assert found.most_waiting <= (TEN_THOUSAND if patient else waiting.total)
    assert found.peak_kb < crowd.MOST_KB
    if patient:
        assert sum(found.answered.values()) >= 0.99 * TEN_THOUSAND
        # Nobody's last answer comes much later than everybody's: the lower classes got their part all along.
        assert max(found.longest_s.values()) < 3 * min(found.longest_s.values()) + 1.0


def test_healthy_tiers_do_not_feel_what_goes_wrong_elsewhere() -> None:
    found = crowd.disturbed(stage(), config(), 30.0)
    assert {one.case for one in found} == set(crowd.CASES)
    slow = [f"{one.case}: {one.tier}: {one.ratio:.2f}" for one in found if one.ratio > crowd.TOLERANCE]
    assert slow == []


def test_the_standard_workload() -> None:
    scenario = workloads.standard(60.0, 1)["poisson"]
    ours, cloud = (play(stage(), scenario, config(), strategy) for strategy in (crowd.OURS, ALWAYS_CLOUD))
    verdicts = judge.routing(
        figures.of_courses(ours.courses), figures.by_class(ours)["near"], figures.of_courses(cloud.courses)
    )
    assert [f"{one.what}: {one.text}" for one in verdicts if not one.met] == []
