"""All kinds of requests for a while, on a clean line: nothing may go wrong, and nothing may grow."""

from __future__ import annotations

import asyncio

import psutil

from agent.link.session import Session
from hil.rig.check import Findings, check, require
from hil.rig.rig import Rig
from hil.rig.traffic import Caller, drive

STATS_EVERY_S = 1.0
GROWTH_LIMIT_MB = 8.0
FAULTS = ("frames_bad_crc", "frames_undecodable", "frames_oversize", "inferences_failed", "refused_busy", "frames_lost")
"""Counters of the board that must stay where they are."""


@check(
    "soak",
    "steady",
    "Every call is answered rightly; the board is not reset, loses no byte, and neither side's memory grows.",
)
async def steady(rig: Rig, findings: Findings) -> None:
    process = psutil.Process()
    async with rig.direct_session() as session:
        boot_id = session.hello.boot_id
        call = Caller(session, rig.samples(), rig.seed)
        warm = await drive(call, lanes=call.lanes, deadline_s=5, count=200)
        rss, before = process.memory_info().rss, (await session.stats(rig.soon(5))).by_name()
        watch = asyncio.create_task(_look(rig, session))
        tally = await drive(call, lanes=call.lanes, deadline_s=5, seconds=rig.soak_s)
        watch.cancel()
        after = (await session.stats(rig.soon(5))).by_name()
        findings.figure("calls", tally.total, note=f"{call.what}, {call.lanes} at once for {tally.seconds:.0f} s")
        findings.figure("rate", tally.rate, "per second", note=f"{warm.rate:.0f} at first")
        growth = (process.memory_info().rss - rss) / 1e6
        findings.figure("the gateway's memory grew by", growth, "MB", most=GROWTH_LIMIT_MB)
        for name in FAULTS:
            if name in after:
                findings.figure(f"board: {name.replace('_', ' ')}", after[name] - before.get(name, 0), most=0)
        if after.get("uart_overruns"):
            findings.figure("board: uart overruns", after["uart_overruns"] - before.get("uart_overruns", 0), most=0)
        for name in ("stack_high_water", "arena_used"):
            if after.get(name):
                findings.figure(f"board: {name.replace('_', ' ')}", after[name], "B")
        damaged = {name: session.status()[name] for name in ("bad_crc", "undecodable", "oversize", "lost_frames")}
        require(not any(damaged.values()), f"the gateway received damaged frames on a clean line: {damaged}")
        require(tally.right == tally.total, f"{tally.text()}: {'; '.join(call.wrongs[:3])}")
        hello = await session.refresh(rig.soon(5))
        require(hello.boot_id == boot_id, "the board was reset meanwhile")


async def _look(rig: Rig, session: Session) -> None:
    """What a gateway does besides: pings and statistics."""
    while True:
        await asyncio.sleep(STATS_EVERY_S)
        await session.ping(b"soak", rig.soon(5))
        await session.stats(rig.soon(5))


CHECKS = (steady,)
