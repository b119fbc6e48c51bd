"""A trace of the real daemon, with all of its tiers, replayed by the simulator."""

import asyncio
import json
import time
from pathlib import Path

import numpy as np
import pytest

from agent import cli
from agent.registry.catalog import load_catalog
from agent.registry.locate import catalog_path
from hil.processes import Stage
from hil.sim import stack, validate
from hil.sim.answers import run_models
from hil.sim.load import Load

SECONDS, REQUESTS_PER_S = 4.0, 15.0
WRITTEN_S = 10.0


def test_what_the_daemon_recorded_can_be_replayed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    catalog = load_catalog(catalog_path(None))
    samples = run_models(catalog)
    load = Load(30, REQUESTS_PER_S / 30, SECONDS)
    asks = load.asks({name: len(found) for name, found in samples.items()}, np.random.default_rng(1))
    trace = tmp_path / "requests.jsonl"
    with Stage() as stage:
        port = stack.start(stage, catalog, trace)
        asyncio.run(validate.ask_daemon(port, catalog, samples, asks))
        end = time.monotonic() + WRITTEN_S
        while trace.read_bytes().count(b'"kind":"request"') < len(asks) and time.monotonic() < end:
            time.sleep(0.05)
    answered = tmp_path / "rows.json"
    policy = tmp_path / "cloudless.yaml"
    policy.write_text("routing: {max_cloud_cost: 0.0}\n")
    assert cli.main(["replay", str(trace), "--json", str(answered), "--policy", str(policy)]) == 0
    shown = capsys.readouterr().out
    assert f"{len(asks)} requests" in shown
    rows = json.loads(answered.read_text())
    recorded, again = rows["as recorded"], rows["the same decisions, simulated"]
    assert recorded["accuracy"] > 0.9
    assert sum(recorded["tiers"].values()) + round(recorded["refused"] * len(asks)) == len(asks)
    # Who answered is what was recorded, but for what the cache or a race between two targets decided.
    for tier in ("edge_gpu", "edge_mcu", "cloud_gpu"):
        assert abs(again["tiers"].get(tier, 0) - recorded["tiers"].get(tier, 0)) <= 0.1 * len(asks)
    assert rows["under this configuration"]["tiers"].keys() & {"edge_gpu", "edge_mcu"}


def test_a_file_that_is_no_trace_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("hello\n")
    assert cli.main(["replay", str(path)]) == 2
    assert "is no trace: line 1" in capsys.readouterr().err
    assert cli.main(["replay", str(tmp_path / "nothing")]) == 2
    assert "no such file" in capsys.readouterr().err
