"""The microcontroller tier with fake boards, in virtual time."""

from __future__ import annotations

import asyncio
import json
import logging
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from fake_mcu import EMPTY_SLOT, HELLO, MODEL_SHA256, FakeMcu, Line, LoopClock, active_slot, virtual_time

from agent.config import McuSection
from agent.core.errors import (
    LinkError,
    TargetBusy,
    TargetError,
    TargetFailed,
    TargetTimeout,
    TargetUnavailable,
)
from agent.core.types import InferenceRequest, LatencyClass
from agent.registry.catalog import Catalog, Family, Variant
from agent.targets.mcu import McuTarget
from agent.targets.mcu_board import SYNC_PINGS
from agent.wire.codes import Capability, MessageType

OTHER_SHA256 = bytes(range(32))


def variant(sha256: bytes, accuracy: float) -> dict[str, Any]:
    return {
        "path": "x.tflite",
        "format": "tflite",
        "quantisation": "int8",
        "targets": ["edge_mcu"],
        "version": 1,
        "sha256": sha256.hex(),
        "bytes": 1000,
        "parameters": 100,
        "operators": ["SOFTMAX"],
        "accuracy": {"value": accuracy, "samples": 10, "tolerance": 0.1},
        "inputs": [{"name": "i", "maps": "x", "dtype": "int8", "shape": [1, 16], "scale": 0.5, "zero_point": -8}],
        "outputs": [{"name": "o", "maps": "y", "dtype": "int8", "shape": [1, 4], "scale": 0.25, "zero_point": 4}],
        "script": "x.py",
    }


CATALOG = Catalog.model_validate(
    {
        "schema": 1,
        "families": {
            "toy": {
                "name": "toy",
                "description": "toy",
                "task": "classification",
                "labels": ["a", "b", "c", "d"],
                "inputs": [{"name": "x", "dtype": "float32", "shape": [1, 16]}],
                "outputs": [{"name": "y", "dtype": "float32", "shape": [1, 4]}],
                "data": {
                    "name": "n",
                    "source": "s",
                    "licence": "l",
                    "split": "s",
                    "heldout": "h",
                    "heldout_sha256": "0" * 64,
                    "heldout_samples": 1,
                },
                "variants": {
                    "small": variant(MODEL_SHA256, 0.8) | {"model": "toy", "id": "small"},
                    "better": variant(OTHER_SHA256, 0.9) | {"model": "toy", "id": "better"},
                },
            }
        },
    }
)
FAMILY: Family = CATALOG.family("toy")
SMALL: Variant = FAMILY.variants["small"]
INPUT = np.arange(16, dtype=np.float32).reshape(1, 16) / 2


class Bench:
    """Ports by name; what is not in `boards` is unplugged."""

    def __init__(self, boards: dict[str, FakeMcu], **settings: Any) -> None:
        self.boards = boards
        self.lines: dict[str, Line] = {}
        self.opened: list[tuple[str, float]] = []
        self.error: LinkError | None = None
        section = McuSection(ports=tuple(boards), timeout_ms=settings.pop("timeout_ms", 1000), **settings)
        self.target = McuTarget(section, CATALOG, LoopClock(), connect=self.connect, random=lambda: 1.0)

    async def connect(self, port: str, baud: int) -> Line:
        self.opened.append((port, now()))
        if self.error is not None:
            raise self.error
        if port not in self.boards:
            raise LinkError(f"{port}: unplugged: no such device")
        self.lines[port] = Line(self.boards[port], port)
        return self.lines[port]

    def unplug(self, port: str) -> FakeMcu:
        self.lines[port].unplug("unplugged: Input/output error")
        return self.boards.pop(port)

    async def started(self) -> McuTarget:
        await self.target.start()
        await asyncio.sleep(0.01)
        return self.target

    async def ask(self, deadline_s: float = 5.0) -> Any:
        return await self.target.infer(REQUEST, FAMILY, SMALL, now() + deadline_s)


REQUEST = InferenceRequest(
    id="r", model="toy", inputs={"x": INPUT}, latency_class=LatencyClass.NEAR, received=0, deadline=0
)


def now() -> float:
    return asyncio.get_running_loop().time()


@virtual_time
async def test_an_answer_with_all_its_times() -> None:
    mcu = FakeMcu(compute_s=0.02)
    bench = Bench({"/dev/a": mcu})
    target = await bench.started()
    assert target.availability().available
    assert target.variant_for(FAMILY, None) is SMALL
    answer = await bench.ask()
    # 0, 0.5, 1, 1.5 at scale 0.5, zero point -8, and back at scale 0.25, zero point 4.
    assert answer.outputs["y"].tolist() == [[-3.0, -2.75, -2.5, -2.25]]
    assert answer.provider == "fake none-of-yours 1.0"
    assert answer.queue_s == pytest.approx(1e-5)
    assert answer.compute_s == pytest.approx(0.02)
    assert answer.link_s < 0.001
    assert answer.bytes_sent > 40
    assert answer.bytes_received > 20
    await target.stop()


@virtual_time
async def test_the_least_loaded_board_is_asked_and_equals_take_turns() -> None:
    boards = {"/dev/a": FakeMcu(compute_s=0.01), "/dev/b": FakeMcu(compute_s=0.01)}
    bench = Bench(boards)
    await bench.started()
    for _ in range(6):
        await bench.ask()
    assert [mcu.runs for mcu in boards.values()] == [3, 3]
    boards["/dev/a"].compute_s = 10
    stuck = asyncio.create_task(bench.ask(60))
    await asyncio.sleep(0)
    for _ in range(4):
        await bench.ask()
    assert [mcu.runs for mcu in boards.values()] == [3, 7]
    stuck.cancel()
    await bench.target.stop()


@virtual_time
async def test_one_unplugged_board_leaves_the_other_and_comes_back() -> None:
    bench = Bench({"/dev/a": FakeMcu(), "/dev/b": FakeMcu()})
    target = await bench.started()
    mcu = bench.unplug("/dev/a")
    await asyncio.sleep(0)
    for _ in range(3):
        await bench.ask()
    assert bench.boards["/dev/b"].runs == 3
    assert target.availability().available
    state = target.status()["ports"][0]
    assert state["state"] == "waiting"
    assert state["reason"] == "/dev/a: unplugged: Input/output error"
    bench.boards["/dev/a"] = mcu
    await asyncio.sleep(6)
    for _ in range(4):
        await bench.ask()
    assert mcu.runs == 2
    assert target.status()["ports"][0]["connects"] == 2
    await target.stop()


@virtual_time
async def test_without_boards_it_says_why() -> None:
    bench = Bench({"/dev/a": FakeMcu(), "/dev/b": FakeMcu()})
    target = await bench.started()
    for port in ("/dev/a", "/dev/b"):
        bench.unplug(port)
    await asyncio.sleep(3)
    availability = target.availability()
    assert not availability.available
    assert availability.reason == "/dev/a: unplugged: no such device; /dev/b: unplugged: no such device"
    assert target.variant_for(FAMILY, None) is None
    with pytest.raises(TargetUnavailable, match="unplugged"):
        await bench.ask()
    await target.stop()
    assert McuTarget(McuSection(), CATALOG, LoopClock()).availability().reason == "no ports are configured"


@virtual_time
async def test_a_permanent_error_waits_longest_at_once() -> None:
    bench = Bench({"/dev/a": FakeMcu()})
    bench.error = LinkError("/dev/a: no permission", permanent=True)
    target = await bench.started()
    await asyncio.sleep(12)
    times = [at for _, at in bench.opened]
    assert [round(b - a) for a, b in pairwise(times)] == [2] * 6
    assert target.availability().reason == "/dev/a: no permission"
    await target.stop()


@virtual_time
async def test_the_back_off_grows_while_a_port_is_missing() -> None:
    bench = Bench({"/dev/a": FakeMcu()})
    bench.error = LinkError("/dev/a: unplugged")
    target = await bench.started()
    await asyncio.sleep(12)
    times = [at for _, at in bench.opened]
    gaps = [round(b - a, 1) for a, b in pairwise(times)]
    assert gaps[:7] == [0.1, 0.2, 0.4, 0.8, 1.6, 2.0, 2.0]
    await target.stop()


@pytest.mark.parametrize(
    ("hello", "reason"),
    [
        (replace(HELLO, capabilities=Capability(0)), "without an engine"),
        (replace(HELLO, slots=(EMPTY_SLOT,)), "no model is active"),
        (replace(HELLO, slots=(active_slot(bytes(32)),)), "not in the catalogue"),
    ],
)
@virtual_time
async def test_a_board_that_cannot_answer_says_why(hello: Any, reason: str) -> None:
    bench = Bench({"/dev/a": FakeMcu(hello)})
    target = await bench.started()
    assert reason in target.availability().reason
    assert target.variant_for(FAMILY, None) is None
    await target.stop()


@virtual_time
async def test_variants_are_those_that_run_the_best_first_and_pinned_ones_only() -> None:
    bench = Bench({"/dev/a": FakeMcu(), "/dev/b": FakeMcu(replace(HELLO, slots=(active_slot(OTHER_SHA256),)))})
    target = await bench.started()
    assert target.variant_for(FAMILY, None) is FAMILY.variants["better"]
    assert target.variant_for(FAMILY, "small") is SMALL
    assert target.variant_for(FAMILY, "other") is None
    await bench.ask()
    assert bench.boards["/dev/a"].runs == 1
    await target.stop()


@virtual_time
async def test_another_model_than_expected_is_noticed() -> None:
    mcu = FakeMcu()
    bench = Bench({"/dev/a": mcu})
    target = await bench.started()
    mcu.hello = replace(mcu.hello, slots=(active_slot(OTHER_SHA256),))
    with pytest.raises(TargetUnavailable, match="MODEL_MISMATCH"):
        await bench.ask()
    await asyncio.sleep(0.1)
    assert target.variant_for(FAMILY, None) is FAMILY.variants["better"]
    await target.stop()


@virtual_time
async def test_errors_are_target_errors() -> None:
    mcu = FakeMcu(compute_s=0.02)
    bench = Bench({"/dev/a": mcu}, timeout_ms=100, max_concurrent=2)
    target = await bench.started()
    outcomes = await asyncio.gather(*(bench.ask() for _ in range(3)), return_exceptions=True)
    assert [type(outcome) for outcome in outcomes if isinstance(outcome, TargetError)] == [TargetBusy]
    mcu.compute_s = 1
    began = now()
    with pytest.raises(TargetTimeout):
        await bench.ask()
    assert now() - began == pytest.approx(0.1, abs=0.001)
    mcu.compute_s = 0.001
    await asyncio.sleep(2)
    mcu.model = lambda inputs: b"one byte too many"
    with pytest.raises(TargetFailed, match="17 bytes"):
        await bench.ask()
    mcu.model = lambda inputs: bytes(4)
    mcu.mute = {MessageType.RESULT}
    call = asyncio.create_task(bench.ask())
    await asyncio.sleep(0.01)
    bench.unplug("/dev/a")
    with pytest.raises(TargetUnavailable, match="unplugged"):
        await call
    assert target.status()["ports"][0]["in_flight"] == 0
    await target.stop()


@virtual_time
async def test_a_silent_board_is_noticed_and_opened_again() -> None:
    mcu = FakeMcu()
    bench = Bench({"/dev/a": mcu}, health_check_interval=2)
    target = await bench.started()
    assert target.status()["ports"][0]["round_trip_ms"] is not None
    mcu.mute = set(MessageType)
    await asyncio.sleep(7)
    assert "2 PINGs" in target.availability().reason
    mcu.mute = set()
    await asyncio.sleep(10)
    assert target.availability().available
    await target.stop()


@virtual_time
async def test_a_defect_in_the_supervision_is_told_and_the_port_opened_again(caplog: pytest.LogCaptureFixture) -> None:
    """A crash of one board's task is no end of it, nor of the daemon."""
    mcu, opened = FakeMcu(), 0
    bench = Bench({"/dev/a": mcu})

    async def broken_at_first(port: str, baud: int) -> Line:
        nonlocal opened
        opened += 1
        if opened < 3:
            raise ZeroDivisionError("a defect")
        return await bench.connect(port, baud)

    target = McuTarget(McuSection(ports=("/dev/a",)), CATALOG, LoopClock(), connect=broken_at_first)
    await target.start()
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert "a defect" in target.availability().reason
    assert target.parts()["board /dev/a"].state == "down"
    await asyncio.sleep(30)
    assert target.availability().available
    assert target.alive()
    assert target.parts()["board /dev/a"] == ("up", "")
    told = [record for record in caplog.records if record.msg == "task failed"]
    assert [vars(record)["component"] for record in told] == ["board /dev/a"] * 2
    await target.stop()


@virtual_time
async def test_a_line_is_pinged_whether_idle_or_busy() -> None:
    mcu = FakeMcu()
    bench = Bench({"/dev/a": mcu}, health_check_interval=2)
    target = await bench.started()

    def pings() -> int:
        return sum(frame.type == MessageType.PING for frame in mcu.seen)

    await asyncio.sleep(0.5)
    first = pings()
    assert first == SYNC_PINGS
    await asyncio.sleep(10)
    assert 4 <= pings() - first <= 6
    idle = pings()
    for _ in range(20):
        await bench.ask()
        await asyncio.sleep(0.5)
    assert 4 <= pings() - idle <= 6
    await target.stop()


@virtual_time
async def test_pings_that_a_busy_board_leaves_out_do_not_end_its_line() -> None:
    mcu = FakeMcu()
    bench = Bench({"/dev/a": mcu}, health_check_interval=2)
    target = await bench.started()
    await asyncio.sleep(1)
    mcu.mute = {MessageType.PING}
    for _ in range(100):
        await bench.ask()
        await asyncio.sleep(0.2)
    assert target.status()["ports"][0]["connects"] == 1
    await target.stop()


@virtual_time
async def test_status_is_plain_json() -> None:
    bench = Bench({"/dev/a": FakeMcu(), "/dev/b": FakeMcu()})
    target = await bench.started()
    bench.unplug("/dev/b")
    await asyncio.sleep(0)
    ports = json.loads(json.dumps(target.status()))["ports"]
    assert [port["port"] for port in ports] == ["/dev/a", "/dev/b"]
    assert ports[0]["model"] == "toy/small"
    assert ports[0]["board"] == "fake"
    assert ports[0]["counters"]["frames_received"] >= 2
    assert ports[0]["mcu_counters"]["inferences"] == 0
    await target.stop()
    assert all(port["state"] == "stopped" for port in target.status()["ports"])


@virtual_time
async def test_events_are_the_same_words_and_a_lost_board_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "agent.targets")
    bench = Bench({"/dev/a": FakeMcu()})
    target = await bench.started()
    mcu = bench.unplug("/dev/a")
    await asyncio.sleep(3)
    bench.boards["/dev/a"] = mcu
    mcu.hello = replace(mcu.hello, slots=(EMPTY_SLOT,))
    await asyncio.sleep(6)
    await target.stop()
    told = [(e.levelname, e.msg, e.args, vars(e)["port"], vars(e).get("reason")) for e in caplog.records]
    assert told == [
        ("INFO", "board ready", (), "/dev/a", None),
        ("WARNING", "board lost", (), "/dev/a", "unplugged: Input/output error"),
        ("WARNING", "board not reached", (), "/dev/a", "unplugged: no such device"),
        ("WARNING", "board cannot be asked", (), "/dev/a", "no model is active: push one with edge-agent mcu push"),
    ]
    ready, last = vars(caplog.records[0]), vars(caplog.records[-1])
    assert (ready["board"], ready["engine"], ready["model"]) == ("fake", "none-of-yours 1.0", "toy/small")
    assert last["board"] == "fake"


@virtual_time
async def test_traits() -> None:
    traits = McuTarget(McuSection(ports=("/dev/a", "/dev/b"), timeout_ms=50), CATALOG, LoopClock()).traits
    assert (traits.name, traits.order, traits.max_concurrent, traits.timeout_s) == ("edge_mcu", 0, 8, 0.05)
