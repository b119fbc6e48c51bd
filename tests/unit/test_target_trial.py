"""A daemon that finds a board in trial: proves and confirms, has it taken back, or leaves it alone."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from fake_mcu import HELLO_1_1, MODEL_SHA256, FakeMcu, Line, LoopClock, active_slot, virtual_time
from test_target_mcu import CATALOG, FAMILY, OTHER_SHA256, SMALL

from agent.config import McuSection
from agent.registry.catalog import Catalog
from agent.targets.mcu import McuTarget
from agent.wire.codes import Capability, MessageType, Rollback, SlotState

FORMER = replace(active_slot(OTHER_SHA256), state=SlotState.STORED)
IN_TRIAL = replace(HELLO_1_1, slots=(FORMER, replace(active_slot(), index=1, state=SlotState.TRIAL)))


@pytest.fixture
def catalog(tmp_path: Path) -> Catalog:
    """With a self-test of the model in trial: what the fake answers."""
    inputs = np.arange(48, dtype=np.int8).reshape(3, 1, 16)
    np.savez(tmp_path / "small.npz", inputs=inputs, outputs=inputs[:, 0, :4])
    small = SMALL.model_copy(update={"selftest": "small.npz"})
    family = FAMILY.model_copy(update={"variants": {**FAMILY.variants, "small": small}})
    return CATALOG.model_copy(update={"families": {"toy": family}, "root": tmp_path})


async def started(mcu: FakeMcu, catalog: Catalog, *, require_signed_updates: bool = False) -> McuTarget:
    async def connect(port: str, baud: int) -> Line:
        return Line(mcu, port)

    section = McuSection(ports=("/dev/a",), require_signed_updates=require_signed_updates)
    target = McuTarget(section, catalog, LoopClock(), connect=connect, random=lambda: 1.0)
    await target.start()
    return target


async def until_said(caplog: pytest.LogCaptureFixture, message: str) -> str:
    """The reason in the first log entry of that name."""
    for _ in range(1000):
        for record in caplog.records:
            if record.msg == message:
                return str(vars(record).get("reason"))
        await asyncio.sleep(0.05)
    raise AssertionError(f"{message!r} was not said: {[record.msg for record in caplog.records]}")


@virtual_time
async def test_a_known_model_is_proved_and_confirmed(catalog: Catalog, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "agent.targets")
    mcu = FakeMcu(IN_TRIAL)
    target = await started(mcu, catalog)
    await asyncio.sleep(0)
    assert target.variant_for(FAMILY, None) is None, "what is not confirmed answers nobody"
    await until_said(caplog, "trial confirmed")
    assert mcu.runs == 3
    variant = target.variant_for(FAMILY, None)
    assert variant is not None and variant.id == "small"
    assert target.status()["ports"][0]["in_trial"] is False
    await target.stop()


@virtual_time
async def test_a_model_that_answers_wrongly_is_taken_back(catalog: Catalog, caplog: pytest.LogCaptureFixture) -> None:
    mcu = FakeMcu(IN_TRIAL)
    mcu.model = lambda inputs: bytes([inputs[0] + 9, *inputs[1:4]])
    target = await started(mcu, catalog)
    reason = await until_said(caplog, "trial failed")
    assert "sample 0: output byte 0 is off by 9" in reason and "the former model" in reason
    board = target.status()["ports"][0]
    assert (board["model_sha256"], board["rollback"], board["in_trial"]) == (OTHER_SHA256.hex(), "requested", False)
    variant = target.variant_for(FAMILY, None)
    assert variant is not None and variant.id == "better"
    await target.stop()


@virtual_time
async def test_it_is_left_alone_without_a_self_test(catalog: Catalog, caplog: pytest.LogCaptureFixture) -> None:
    mcu = FakeMcu(IN_TRIAL)
    target = await started(mcu, CATALOG)
    assert "no self-test" in await until_said(caplog, "trial left alone")
    assert mcu.runs == 0
    assert "is in trial, not confirmed yet" in target.availability().reason
    mcu.roll_back(Rollback.TIMEOUT)  # the board's own bound
    mcu.say(MessageType.HELLO, 0, mcu.hello.to_bytes())
    assert await until_said(caplog, "board took its last model back") == "the model was not confirmed in time"
    assert target.availability().available
    await target.stop()


@pytest.mark.parametrize("verifies", [False, True])
@virtual_time
async def test_a_policy_of_signed_updates_holds_here_too(
    catalog: Catalog, caplog: pytest.LogCaptureFixture, verifies: bool
) -> None:
    caplog.set_level(logging.INFO, "agent.targets")
    able = Capability.ENGINE | Capability.ED25519 if verifies else Capability.ENGINE
    mcu = FakeMcu(replace(IN_TRIAL, capabilities=able))
    target = await started(mcu, catalog, require_signed_updates=True)
    if verifies:
        await until_said(caplog, "trial confirmed")
    else:
        assert "did not check a signature" in await until_said(caplog, "trial left alone")
        assert mcu.hello.trial is not None
    await target.stop()


@virtual_time
async def test_a_board_that_comes_back_in_trial_again_is_settled_again(
    catalog: Catalog, caplog: pytest.LogCaptureFixture
) -> None:
    """The line was lost in the middle of the proof."""
    caplog.set_level(logging.INFO, "agent.targets")
    mcu = FakeMcu(IN_TRIAL, compute_s=1.0)
    lines: list[Line] = []

    async def connect(port: str, baud: int) -> Line:
        lines.append(Line(mcu, port))
        return lines[-1]

    target = McuTarget(McuSection(ports=("/dev/a",)), catalog, LoopClock(), connect=connect, random=lambda: 1.0)
    await target.start()
    while mcu.runs < 1:  # noqa: ASYNC110 virtual time
        await asyncio.sleep(0.1)
    lines[0].unplug()
    assert "may be in trial still" in await until_said(caplog, "trial failed")
    await until_said(caplog, "trial confirmed")
    assert len(lines) == 2
    assert mcu.hello.active is not None and mcu.hello.active.sha256 == MODEL_SHA256
    await target.stop()
