"""A cloud lane as it is deployed: a broker, workers in processes of their own, models that ship."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agent.config import LaneSection
from agent.core.clock import SystemClock
from agent.core.errors import TargetTimeout, TargetUnavailable
from agent.core.types import InferenceRequest, LatencyClass, TargetAnswer
from agent.registry.catalog import Catalog, load_catalog
from agent.registry.tensors import classify
from agent.targets.cloud import CloudLane
from tests.brokers import MOSQUITTO, Broker, has_rumqttd, mosquitto, rumqttd, running, until

ROOT = Path(__file__).resolve().parents[2]
CATALOG = ROOT / "models" / "catalog.yaml"
START_S = 60.0

BROKERS = [
    pytest.param(mosquitto, id="mosquitto", marks=pytest.mark.skipif(MOSQUITTO is None, reason="no mosquitto")),
    pytest.param(rumqttd, id="rumqttd", marks=pytest.mark.skipif(not has_rumqttd(), reason="no iotcore wheel")),
]


@pytest.fixture(params=BROKERS)
def broker(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Broker]:
    with running(request.param(tmp_path)) as started:
        yield started


class Rig:
    """A gateway's lane, and workers as child processes."""

    def __init__(self, broker: Broker, tmp_path: Path, catalog: Catalog) -> None:
        self.broker = broker
        self.catalog = catalog
        self._tmp_path = tmp_path
        self.workers: dict[str, subprocess.Popen[bytes]] = {}
        lane = LaneSection(name="gpu-a", broker=broker.url, topic="lanes/a")
        self.lane = CloudLane(lane, "gw", catalog, SystemClock(), max_bytes=1e9)

    def launch(self, name: str, *options: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "agent.cli", "worker", "--broker", self.broker.url, "--topic", "lanes/a"]
        command += ["--id", name, "--catalog", str(CATALOG), *options]
        with (self._tmp_path / f"{name}.log").open("wb") as log:
            worker = self.workers[name] = subprocess.Popen(command, cwd=ROOT, stderr=log)
        return worker

    def log(self, name: str) -> str:
        return (self._tmp_path / f"{name}.log").read_text()

    async def present(self, *names: str) -> None:
        def all_there() -> bool:
            for name in names:
                assert self.workers[name].poll() is None, self.log(name)
            return self.lane._workers.keys() == set(names)

        await until(all_there, START_S, f"{names} are present")

    async def ask(self, sample: int = 0, budget_s: float = 10.0, **changes: Any) -> TargetAnswer:
        now = SystemClock.monotonic()
        request = InferenceRequest(
            id=f"r{sample}-{now}",
            model="digits",
            inputs={"image": np.full((1, 8, 8, 1), sample % 17, np.float32)},
            latency_class=LatencyClass.INTERACTIVE,
            received=now,
            deadline=now + budget_s,
            **changes,
        )
        family = self.catalog.family("digits")
        variant = self.lane.variant_for(family, None)
        assert variant is not None
        answer = await self.lane.infer(request, family, variant, now + budget_s)
        label, confidence = classify(answer.outputs, family)
        assert label in family.labels
        assert 0 < confidence <= 1
        return answer

    async def close(self) -> None:
        await self.lane.stop()
        for worker in self.workers.values():
            worker.kill()
            worker.wait()


@pytest.fixture
async def rig(broker: Broker, tmp_path: Path) -> AsyncIterator[Rig]:
    opened = Rig(broker, tmp_path, load_catalog(CATALOG))
    await opened.lane.start()
    yield opened
    await opened.close()


async def test_two_workers_share_and_leave_in_order(rig: Rig) -> None:
    rig.launch("w1")
    rig.launch("w2")
    await rig.present("w1", "w2")
    answers = [await rig.ask(sample) for sample in range(20)]
    assert all(answer.compute_s > 0 and "onnxruntime" in answer.provider for answer in answers)
    rig.workers["w1"].send_signal(signal.SIGTERM)
    await until(lambda: rig.lane._workers.keys() == {"w2"}, what="w1 leaves")
    assert await asyncio.to_thread(rig.workers["w1"].wait, 10) == 0
    # Nothing is lost on the way: what comes now goes to the one that is left.
    assert len([await rig.ask(sample) for sample in range(5)]) == 5
    computed = [int(rig.log(name).count('"computed"')) for name in ("w1",)]
    assert computed == [1], "the worker says at the end what it did"


async def test_worker_killed_in_the_middle_of_a_request(rig: Rig) -> None:
    worker = rig.launch("w1", "--delay-ms", "60000")
    await rig.present("w1")
    began = SystemClock.monotonic()
    asking = asyncio.ensure_future(rig.ask(budget_s=1.0))
    await until(lambda: rig.lane.counters.requests == 1, what="the request is on its way")
    worker.kill()
    with pytest.raises((TargetTimeout, TargetUnavailable)):
        await asking
    assert SystemClock.monotonic() - began < 2.0
    await until(lambda: not rig.lane.availability().available, what="its will clears its presence")
    assert rig.lane.availability().reason == "no worker on lane gpu-a"


async def test_injected_delay_counts_as_link_time(rig: Rig) -> None:
    rig.launch("w1", "--delay-ms", "100")
    await rig.present("w1")
    answer = await rig.ask()
    assert answer.link_s >= 0.1
    assert answer.compute_s < 0.1


async def test_broker_restarts_under_everybody(rig: Rig) -> None:
    rig.launch("w1")
    await rig.present("w1")
    await rig.ask()
    rig.broker.kill()
    await until(lambda: not rig.lane.availability().available, what="the lane notices")
    rig.broker.start()
    await rig.present("w1")
    await rig.ask(1)


async def test_command_line_mistakes_are_named(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "agent.cli", "worker", "--broker", "http://h", "--topic", "a/#", "--id", "a b"]
    command += ["--ca-file", "/none", "--drain-s", "-1"]
    process = await asyncio.create_subprocess_exec(*command, cwd=ROOT, stderr=asyncio.subprocess.PIPE)
    _, errors = await process.communicate()
    assert process.returncode == 2
    for option in ("--broker", "--topic", "--id", "--ca-file", "--drain-s"):
        assert option in errors.decode()
