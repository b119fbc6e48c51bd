"""The board's clock as the gateway knows it, and how soon a board that has died is missed."""

from __future__ import annotations

import asyncio
import random
from typing import Final

from agent.link.serial import open_serial
from agent.link.session import Session
from agent.link.timesync import SAMPLES
from agent.targets.mcu_board import PING_FAILURES, PING_TIMEOUT_S, SYNC_PINGS, Board, BoardState
from hil.rig.check import Findings, Skip, check, require
from hil.rig.protocols import BoardClock
from hil.rig.rig import Rig

BOUND_LIMIT_MS: Final = 1.0
INTERVAL_S: Final = 0.5
ROUNDS: Final = 12
PINGS: Final = 2
"""Each time: on a busy machine one alone may have had bad luck."""
DRIFT_PPM: Final = 80.0
ANSWER_S: Final = 5.0
HEALTH_S: Final = 0.5
NOTICE_SLACK_S: Final = 0.5


@check("timing", "error bound", "The board's clock is known to 1 ms, also between two PINGs.", model=None)
async def error_bound(rig: Rig, findings: Findings) -> None:
    async with rig.direct_session() as session:
        await _pings(rig, session, SAMPLES)
        worst_ms = 0.0
        for _ in range(ROUNDS):
            await asyncio.sleep(INTERVAL_S)
            worst_ms = max(worst_ms, _bound_ms(rig, session))
            await _pings(rig, session, PINGS)
        drift_ppm = session.clock_sync.drift * 1e6
        findings.figure("error bound, at its worst", worst_ms, "ms", most=BOUND_LIMIT_MS, note="before each PING")
        findings.figure("drift", drift_ppm, "ppm", note=f"over {ROUNDS * INTERVAL_S:.0f} s")
        findings.figure("exchanges that contradict", session.clock_sync.steps, most=0)


@check(
    "timing",
    "truth",
    f"Where the true offset is known, the estimate is within its bound of it, also from a clock that gains "
    f"{DRIFT_PPM:.0f} ppm.",
    model=None,
)
async def truth(rig: Rig, findings: Findings) -> None:
    clock = rig.driver.clock
    if clock is None:
        raise Skip("only a virtual board's clock can be read from outside")
    async with rig.direct_session() as session:
        try:
            for drift_ppm in (0.0, DRIFT_PPM):
                clock.drift(drift_ppm)
                session.clock_sync.clear()
                await _pings(rig, session, SYNC_PINGS)
                errors_ms, shares = await _against(rig, session, clock)
                what = f"drift of {drift_ppm:.0f} ppm"
                findings.figure(f"{what}: largest error", max(errors_ms), "ms", most=BOUND_LIMIT_MS)
                findings.figure(f"{what}: of its bound", 100 * max(shares), "%", most=100)
                findings.figure(f"{what}: found as", session.clock_sync.drift * 1e6, "ppm")
        finally:
            clock.drift(0.0)


async def _against(rig: Rig, session: Session, clock: BoardClock) -> tuple[list[float], list[float]]:
    """Errors in milliseconds, and as shares of their bounds, half-way between PINGs."""
    errors_ms, shares = [], []
    for _ in range(ROUNDS):
        await asyncio.sleep(INTERVAL_S / 2)
        board_s, ours_s = clock.read()
        found = session.clock_sync.estimate(ours_s)
        assert found is not None
        error_s = abs(found.offset_s - (board_s - ours_s))
        errors_ms.append(error_s * 1e3)
        shares.append(error_s / found.bound_s)
        await asyncio.sleep(INTERVAL_S / 2)
        await _pings(rig, session, 1)
    return errors_ms, shares


async def _pings(rig: Rig, session: Session, count: int) -> None:
    for _ in range(count):
        await session.ping(b"", rig.soon(ANSWER_S))


def _bound_ms(rig: Rig, session: Session) -> float:
    found = session.clock_sync.estimate(rig.clock.monotonic())
    assert found is not None
    return found.bound_s * 1e3


@check(
    "timing",
    "keep-alive",
    "A board that falls silent, its port still there, is missed within two PINGs, and found again when it answers.",
)
async def keep_alive(rig: Rig, findings: Findings) -> None:
    limit_s = HEALTH_S + PING_FAILURES * (HEALTH_S + PING_TIMEOUT_S) + NOTICE_SLACK_S
    with rig.line() as line:
        board = Board(
            str(line.port),
            rig.driver.serial.baud,
            catalog=rig.catalog,
            clock=rig.clock,
            connect=open_serial,
            max_concurrent=4,
            health_check_interval=HEALTH_S,
            random=random.Random(rig.seed).random,
        )
        board.start()
        try:
            await _until(board, BoardState.CONNECTED, 10.0)
            line.call("stall", direction="both")
            took_s = await _until(board, BoardState.WAITING, 2 * limit_s)
            findings.note(board.reason)
            findings.figure("silence noticed after", took_s, "s", most=limit_s)
            line.call("resume", direction="both")
            findings.figure("connected again after", await _until(board, BoardState.CONNECTED, 20.0), "s", most=10.0)
        finally:
            await board.stop()


async def _until(board: Board, state: BoardState, limit_s: float) -> float:
    """Seconds until the board is in this state. Raises `Failed`."""
    loop = asyncio.get_running_loop()
    began = loop.time()
    while board.status()["state"] != state.value:
        require(loop.time() - began < limit_s, f"not {state.value} within {limit_s:g} s: {board.reason}")
        await asyncio.sleep(0.01)
    return loop.time() - began


CHECKS = (error_bound, truth, keep_alive)
