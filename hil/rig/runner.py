"""Runs checks one after the other, each from the board's state that it asks for."""

from __future__ import annotations

import asyncio
import os
import time
import traceback
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from typing import Final

from agent.core.errors import EdgeAgentError
from hil.rig.check import Check, Failed, Findings, Outcome, Skip, Verdict
from hil.rig.protocols import RigError
from hil.rig.rig import Rig
from hil.rig.strategy import State, Strategy

LIMIT_S: Final = 400.0
"""For one check, the soak's own time not counted: more is a hang."""


def chosen(suite: Sequence[Check], patterns: Sequence[str]) -> list[Check]:
    """Those whose `group/name` matches one of the patterns; a group alone means all of it. No patterns: all."""
    if not patterns:
        return list(suite)
    return [check for check in suite if any(fnmatchcase(check.key, p) or check.group == p for p in patterns)]


async def run(
    rig: Rig,
    checks: Sequence[Check],
    show: Callable[[Outcome], None] = lambda outcome: None,
) -> list[Outcome]:
    """`show` is told of each outcome as it comes."""
    strategy, outcomes = Strategy(rig), []
    for check in checks:
        outcome = await _run(rig, strategy, check)
        outcomes.append(outcome)
        show(outcome)
    return outcomes


async def _run(rig: Rig, strategy: Strategy, check: Check) -> Outcome:
    findings, began = Findings(), time.monotonic()
    try:
        async with asyncio.timeout(LIMIT_S + rig.soak_s):
            if check.needs_board:
                state = State.BOOTED if check.model is None else State.MODEL_LOADED
                state = State.STREAMING if check.streams else state
                await strategy.to(state, check.model or "")
            began = time.monotonic()
            await check.run(rig, findings)
        missed = findings.missed()
        verdict, reason = (Verdict.FAILED, missed) if missed else (Verdict.PASSED, "")
    except Exception as error:  # a defect of the rig must not end the run either
        verdict, reason = _judge(error, LIMIT_S + rig.soak_s)
        console = rig.driver.console if check.needs_board and verdict is not Verdict.SKIPPED else None
        if console is not None and (tail := console.tail().strip()):
            findings.note(f"the board's console: {tail[-500:]}")
    if verdict is Verdict.FAILED and (busy := _busy()):
        findings.note(busy)
    return Outcome(check, verdict, time.monotonic() - began, reason, findings)


def _busy() -> str:
    """Empty unless this machine has more to do than it can."""
    load, processors = os.getloadavg()[0], os.cpu_count() or 1
    if load <= processors:
        return ""
    return (
        f"this machine is busy: a load of {load:.1f} on {processors} processors. If a time or a rate was missed, "
        "run the check again when it is not"
    )


def _judge(error: Exception, limit_s: float) -> tuple[Verdict, str]:
    """What it says that a check ended so."""
    match error:
        case Skip():
            return Verdict.SKIPPED, str(error)
        case Failed():
            return Verdict.FAILED, str(error)
        case RigError():
            return Verdict.ERROR, str(error)
        case TimeoutError():
            return Verdict.FAILED, str(error) or f"not done after {limit_s:.0f} s"
        case EdgeAgentError():
            return Verdict.FAILED, f"{type(error).__name__}: {error}"
    return Verdict.ERROR, "".join(traceback.format_exception(error, limit=-3)).strip()


def skipped(checks: Sequence[Check], reason: str) -> list[Outcome]:
    """Outcomes of checks that cannot be run here."""
    return [Outcome(check, Verdict.SKIPPED, 0.0, reason) for check in checks]
