"""A line that damages, loses and adds bytes: no call may be answered wrongly, and none may outlive its deadline."""

from __future__ import annotations

import os

import psutil

from agent.link.push import push_model
from agent.link.session import Session
from hil.rig.check import Findings, check, require
from hil.rig.checks.push import needs_engine
from hil.rig.damage import Faults
from hil.rig.images import image_of
from hil.rig.rig import Line, Rig
from hil.rig.traffic import Caller, Outcome, Tally, drive

BIT_ERRORS = 1e-4
GOODPUT_LEAST = 60.0
CLEAN_S, NOISY_S = 3.0, 5.0
BLOCKS = 5
DEADLINE_S = 0.25
"""Of a call under noise, or twenty round trips where that is more."""
OVERDUE_MS = 100.0
"""How much later than its deadline a call may end: the event loop of a busy machine."""
GARBAGE_BYTES = 1_000_000
GARBAGE_MEMORY_MB = 8.0
SETTLE_S = 60.0
"""Until all is well again, besides the time that what waits for the board takes at the line's rate."""


async def settle(rig: Rig, session: Session, call: Caller, waiting: int = 0) -> float:
    """Until a call is answered rightly again; returns how long that took. `waiting`: bytes that the board reads first.

    Fails after `SETTLE_S` and twice the time of those bytes: an emulated UART may be slower than its line.
    """
    began = rig.clock.monotonic()
    limit_s = SETTLE_S + 2 * waiting * 10 / rig.driver.serial.baud
    outcome = None
    while rig.clock.monotonic() < began + limit_s:
        outcome = await call(1.0)
        if outcome is Outcome.RIGHT:
            return rig.clock.monotonic() - began
        require(outcome is not Outcome.WRONG, f"wrong answer: {call.wrongs}")
        require(session.error is None, f"the session ended: {session.error}")
    require(False, f"no right answer within {limit_s:.0f} s after the fault was over; the last was {outcome}")
    return limit_s


async def afterwards(rig: Rig, session: Session, line: Line, call: Caller, findings: Findings) -> None:
    """The line is good again: so are all calls."""
    line.set()
    findings.figure("right again after", await settle(rig, session, call), "s")
    tally = await drive(call, lanes=call.lanes, deadline_s=5, count=100)
    require(tally.right == 100, f"on the clean line afterwards: {tally.text()}")


def judge(findings: Findings, tally: Tally, call: Caller, least: float | None = None) -> None:
    """What every check here demands. `least`: per cent of the calls that must be answered rightly."""
    findings.figure("calls", tally.total, note=tally.text())
    findings.figure("answered rightly", 100 * tally.right / max(1, tally.total), "%", least=least)
    findings.figure("answered wrongly", tally.wrong, most=0, note="; ".join(call.wrongs[:2]))
    findings.figure("longest overrun of a deadline", max(0.0, tally.overdue_s) * 1e3, "ms", most=OVERDUE_MS)


@check(
    "faults",
    "bit errors",
    "At one bit error in 10,000 no call is answered wrongly, none outlives its deadline, and the rate of right answers "
    "is at least 60 % of the clean line's.",
)
async def bit_errors(rig: Rig, findings: Findings) -> None:
    with rig.line(findings, Faults(baud=rig.driver.serial.baud)) as line:
        async with rig.session(line.port) as session:
            call = Caller(session, rig.samples(), rig.seed)
            probe = await drive(call, lanes=call.lanes, deadline_s=5, count=100)
            deadline_s = max(DEADLINE_S, 20 * sorted(probe.took_s)[len(probe.took_s) // 2])
            clean, noisy, flipped = Tally(), Tally(), 0
            for block in range(BLOCKS):  # in turns, so that a busy moment of this machine falls on both
                line.set()
                clean.add(await drive(call, lanes=call.lanes, deadline_s=deadline_s, seconds=CLEAN_S / BLOCKS))
                seed = rig.seed + 2 * block  # each direction has one of its own
                line.set(bit_errors=BIT_ERRORS, seed=seed)
                findings.lines.append(f"bit_errors={BIT_ERRORS:g} direction=both seed={seed}")
                noisy.add(await drive(call, lanes=call.lanes, deadline_s=deadline_s, seconds=NOISY_S / BLOCKS))
                flipped += line.injected()
            judge(findings, noisy, call)
            findings.figure("right answers on the clean line", clean.rate, "per second")
            findings.figure("right answers under noise", noisy.rate, "per second")
            findings.figure(
                "goodput", 100 * noisy.rate / clean.rate, "%", least=GOODPUT_LEAST, note="of the clean line's"
            )
            findings.figure("bits that were flipped", flipped, least=1)
            findings.figure("frames repeated", session.counters.repeats, note=f"deadline {deadline_s * 1e3:.0f} ms")
            await afterwards(rig, session, line, call, findings)


async def _under(rig: Rig, findings: Findings, least: float, direction: str = "both", **faults: float) -> None:
    """Traffic over a line with faults, unpaced."""
    with rig.line(findings, Faults(**faults), direction=direction) as line:  # type: ignore[arg-type]
        async with rig.session(line.port) as session:
            call = Caller(session, rig.samples(), rig.seed)
            tally = await drive(call, lanes=call.lanes, deadline_s=0.5, seconds=3.0)
            judge(findings, tally, call, least)
            findings.figure("faults on the line", line.injected(), least=1)
            await afterwards(rig, session, line, call, findings)


@check(
    "faults", "lost bytes", "With one byte in 1,000 lost and as many doubled, no wrong answer, and most calls succeed."
)
async def lost_bytes(rig: Rig, findings: Findings) -> None:
    await _under(rig, findings, 60, drop=1e-3, duplicate=1e-3)


@check("faults", "missing delimiters", "With one delimiter in ten lost, two frames become one; most calls succeed.")
async def missing_delimiters(rig: Rig, findings: Findings) -> None:
    await _under(rig, findings, 60, drop_delimiters=0.1)


@check("faults", "garbage bursts", "Bursts of 200 random bytes every 2,000 damage what they hit and nothing else.")
async def garbage_bursts(rig: Rig, findings: Findings) -> None:
    await _under(rig, findings, 60, garbage_every=2000, garbage_bytes=200)


@check("faults", "slow line", "With 40 ms of delay each way every call is still answered, by the same deadlines.")
async def slow_line(rig: Rig, findings: Findings) -> None:
    with rig.line(findings, Faults(delay_s=0.04)) as line:
        async with rig.session(line.port) as session:
            call = Caller(session, rig.samples(), rig.seed)
            tally = await drive(call, lanes=call.lanes, deadline_s=1.0, seconds=2.0)
            judge(findings, tally, call, least=100)
            findings.figure("shortest round trip", min(tally.took_s) * 1e3, "ms", least=80)


@check(
    "faults",
    "garbage",
    "1 MB of random bytes, to the board and then from it, is taken for no message; calls during it end by their "
    "deadline, and all is well afterwards.",
)
async def garbage(rig: Rig, findings: Findings) -> None:
    process = psutil.Process(os.getpid())
    with rig.line(findings) as line:
        async with rig.session(line.port) as session:
            call = Caller(session, rig.samples(), rig.seed)
            await drive(call, lanes=call.lanes, deadline_s=5, count=100)
            rss = process.memory_info().rss
            for direction, what in (("out", "to the board"), ("in", "to the gateway")):
                findings.lines.append(f"garbage={GARBAGE_BYTES} direction={direction} seed={rig.seed}")
                line.call("garbage", direction=direction, count=GARBAGE_BYTES, seed=rig.seed)
                tally = await drive(call, lanes=call.lanes, deadline_s=0.5, seconds=2.0)
                findings.figure(f"{what}: answered wrongly", tally.wrong, most=0, note=tally.text())
                overrun = max(0.0, tally.overdue_s) * 1e3
                findings.figure(f"{what}: longest overrun of a deadline", overrun, "ms", most=OVERDUE_MS)
                again_s = await settle(rig, session, call, GARBAGE_BYTES)
                findings.figure(f"{what}: right again after", again_s, "s")
            growth = (process.memory_info().rss - rss) / 1e6
            findings.figure("the gateway's memory grew by", growth, "MB", most=GARBAGE_MEMORY_MB)
            status = session.status()
            dropped = status["bad_crc"] + status["undecodable"] + status["oversize"]
            findings.figure("frames that the gateway dropped", dropped, least=1)
            stats = (await session.stats(rig.soon(5))).by_name()
            counted = sum(stats.get(name, 0) for name in ("frames_bad_crc", "frames_undecodable", "frames_oversize"))
            findings.figure("frames that the board dropped", counted, least=1)
            tally = await drive(call, lanes=call.lanes, deadline_s=5, count=100)
            require(tally.right == 100, f"afterwards: {tally.text()}")


@check(
    "faults",
    "lost acknowledgements",
    "With a quarter of the board's frames lost, answers are repeated from its store instead of run again, and a push "
    "still completes.",
)
async def lost_acknowledgements(rig: Rig, findings: Findings) -> None:
    with rig.line(findings, Faults(), direction="in") as line:
        async with rig.session(line.port) as session:
            needs_engine(session)  # it is INFER whose answers are kept
            call = Caller(session, rig.samples(), rig.seed)
            before = (await session.stats(rig.soon(5))).by_name()
            line.set(direction="in", drop_frames=0.25, seed=rig.seed)
            findings.lines.append(f"drop_frames=0.25 direction=in seed={rig.seed}")
            tally = await drive(call, lanes=call.lanes, deadline_s=0.5, seconds=4.0)
            judge(findings, tally, call, least=60)
            line.set()
            after = (await session.stats(rig.soon(5))).by_name()
            runs = after.get("inferences", 0) - before.get("inferences", 0)
            note = "a second loss in a row may outlast the board's memory of its answers"
            findings.figure("runs for each call", runs / tally.total, most=1.15, note=note)
            repeated = after.get("answers_repeated", 0) - before.get("answers_repeated", 0)
            findings.figure("answers repeated from the store", repeated, least=1)

            line.set(direction="in", drop_frames=0.25, seed=rig.seed)
            image = image_of(rig.catalog, rig.samples().variant, size=24 * 1024, seed=rig.seed)
            began = rig.clock.monotonic()
            await push_model(session, image, rig.clock)
            findings.figure("push of 24 KiB took", rig.clock.monotonic() - began, "s")
            await push_model(session, image_of(rig.catalog, rig.samples().variant), rig.clock)
            line.set()
            await settle(rig, session, call)


CHECKS = (
    bit_errors,
    lost_bytes,
    missing_delimiters,
    garbage_bursts,
    slow_line,
    garbage,
    lost_acknowledgements,
)
