"""The trace that ships, and the times that the simulator draws from for each kind of request."""

import json
from pathlib import Path

import pytest
from sim_fakes import config, stage

from agent.core.types import LatencyClass
from hil.sim import figures, tiers, trace, workloads
from hil.sim.load import STANDARD
from hil.sim.play import play
from hil.sim.tiers import Spread, Times


def test_the_trace_that_ships_is_of_the_standard_mix_and_the_shipped_models() -> None:
    found = trace.read(workloads.TRACE)
    trace.check_models(found, stage().catalog)
    assert found.skipped == 0
    assert len(found.records) > 1000
    assert {record.kind.latency_class for record in found.records} == {kind.latency_class for kind in STANDARD}
    assert all("inputs" not in record.request and record.truth is not None for record in found.records)
    assert workloads.TRACE.stat().st_size < 500_000


def test_the_recorded_workload_is_answered_much_as_it_was() -> None:
    found = trace.read(workloads.TRACE)
    run = play(*workloads.recorded(stage(), config(), 1), config())
    was = sum(record.outcome["status"] != "refused" for record in found.records) / len(found.records)
    replayed = figures.of_courses(run.courses)
    assert replayed.requests == len(found.records)
    assert 1 - replayed.refused / replayed.requests == pytest.approx(was, abs=0.01)
    edge = [record.outcome["tier"] for record in found.records if record.outcome["status"] == "computed"]
    assert replayed.edge == pytest.approx(sum(tier.startswith("edge") for tier in edge) / len(edge), abs=0.05)


def test_each_kind_of_request_has_its_own_time_in_the_daemon(tmp_path: Path) -> None:
    own = {"digits realtime": Spread([0.002, 0.002])}
    times = Times({}, {}, Spread([0.001, 0.001]), {}, own)
    path = tmp_path / "tiers.json"
    path.write_text(json.dumps(times.to_dict()))
    for found in (times, tiers.load(path)):
        assert found.own_of("digits", LatencyClass.REALTIME).mean == pytest.approx(0.002)
        assert found.own_of("digits", LatencyClass.BATCH).mean == pytest.approx(0.001)
        assert found.own_of("motion", LatencyClass.REALTIME).mean == pytest.approx(0.001)
