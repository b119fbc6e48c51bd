"""The board samples its own sensor: rate, credit, what comes with unsure answers, and what may happen meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Final

import numpy as np

from agent.config import StreamSection
from agent.core.errors import EdgeAgentError, LinkError
from agent.core.streamed import Streamed
from agent.link.serial import open_serial
from agent.link.session import Session
from agent.link.stream import BoardStream, Sampled, StreamSpec
from agent.targets.mcu_board import Board
from agent.targets.mcu_stream import StreamKeeper
from agent.wire.codes import Capability, SendInputs
from agent.wire.stream import StreamCredit, StreamStatus
from hil.rig.check import Findings, Skip, check, require
from hil.rig.checks.cable import BACK_LIMIT_S
from hil.rig.checks.handshake import hard_reset
from hil.rig.rig import Line, Rig
from hil.rig.traffic import ARENA_BYTES, TOLERANCE, Caller, drive, off_by

INTERVAL_MS: Final = 20
SECONDS: Final = 4.0
RATE_LEAST: Final = 95.0
"""Per cent of the rate that was asked for: a busy machine makes an emulated board late now and then."""
CREDITS: Final = 4
PAUSE_S: Final = 0.6
BIT_ERRORS: Final = 1e-4
NOISY_SECONDS: Final = 4.0
ANSWER_S: Final = 5.0
LEAST_AFTERWARDS: Final = 10
"""Results that must come once a stream has begun again."""


def needs_stream(session: Session) -> None:
    if not session.hello.capabilities & Capability.STREAMS:
        raise Skip("the board has no sensor of its own")
    if not session.hello.capabilities & Capability.ENGINE:
        raise Skip(f"the board has no engine ({session.hello.engine})")


@asynccontextmanager
async def streaming(rig: Rig, session: Session, **options: object) -> AsyncIterator[BoardStream]:
    """A stream of the digits model for as long as the block."""
    spec = StreamSpec(rig.samples().model, **({"interval_ms": INTERVAL_MS} | options))  # type: ignore[arg-type]
    stream = BoardStream(session, spec, rig.clock)
    await stream.start(rig.soon(ANSWER_S))
    try:
        yield stream
    finally:
        with contextlib.suppress(EdgeAgentError, TimeoutError):
            await stream.stop(rig.soon(ANSWER_S))


async def collect(stream: BoardStream, seconds: float) -> list[Sampled]:
    found: list[Sampled] = []
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            while True:
                found.append(await stream.next())
    return found


def wrong(rig: Rig, found: Sequence[Sampled]) -> int:
    """How many are not what the reference runtime makes of the inputs that came with them."""
    from hil.virtual.engine import open_engine

    engine = open_engine(ARENA_BYTES, b"")
    engine.load(rig.catalog.path(rig.samples().variant).read_bytes())
    count = 0
    for sampled in found:
        expected = bytearray(len(sampled.result.outputs))
        engine.invoke(sampled.result.inputs, memoryview(expected))
        count += off_by(sampled.result.outputs, bytes(expected)) > TOLERANCE
    return count


@check(
    "streaming",
    "rate",
    "Samples come at the rate asked for, none is lost with credit to spare, and each answer is the reference runtime's "
    "to the input that came with it.",
    streams=True,
)
async def rate(rig: Rig, findings: Findings) -> None:
    async with rig.direct_session() as session:
        needs_stream(session)
        async with streaming(rig, session, send_inputs=SendInputs.ALWAYS, credits=64) as stream:
            first = await stream.next()
            found = await collect(stream, SECONDS)
    span_s = (found[-1].result.time_us - first.result.time_us) / 1e6
    asked = 1e3 / INTERVAL_MS
    findings.figure(
        "results", len(found), note=f"in {span_s:.2f} s of the board's clock, {asked:.0f} a second asked for"
    )
    findings.figure("rate", 100 * len(found) / span_s / asked, "%", least=RATE_LEAST, most=100.5)
    findings.figure("lost on the line", stream.counters.lost, most=0)
    findings.figure("skipped by the board", stream.counters.skipped, most=(1 - RATE_LEAST / 100) * len(found))
    findings.figure("answered wrongly", wrong(rig, found), most=0)
    ages = sorted((s.received_at - s.taken_at) * 1e3 for s in found if s.taken_at is not None)
    if ages:
        findings.figure("from sample to gateway: median", ages[len(ages) // 2], "ms", note="by the synced clock")


@check(
    "streaming",
    "credits",
    "Without credit the board sends nothing, goes on sampling and keeps the newest, which comes first with new credit.",
    streams=True,
)
async def credits(rig: Rig, findings: Findings) -> None:
    async with rig.direct_session() as session:
        needs_stream(session)
        await session.ping(b"", rig.soon(ANSWER_S))
        async with streaming(rig, session, credits=CREDITS) as stream:
            await asyncio.sleep(PAUSE_S)
            before = (await session.request(StreamCredit(0), StreamStatus, rig.soon(ANSWER_S), windowed=False)).message
            granted_at = rig.clock.monotonic()
            found = [await stream.next() for _ in range(CREDITS + 1)]
        newest = found[-1]
        sent = before.seq - found[0].result.seq
        findings.figure("sent without further credit", sent, "results", least=CREDITS, most=CREDITS)
        findings.figure("skipped meanwhile", before.skipped, "samples", least=1, note="since the board's reset")
        findings.figure("sent beyond the credit", stream.counters.over_credit, most=0)
        require(newest.taken_at is not None, "the board's clock is not known")
        age_ms = (granted_at - (newest.taken_at or 0.0)) * 1e3
        limit_ms = 3 * INTERVAL_MS + newest.bound_s * 1e3
        findings.figure("age of the first after it", max(0.0, age_ms), "ms", most=limit_ms, note="when credit came")


@check(
    "streaming",
    "unsure answers",
    "Inputs come with those answers whose highest output is below the threshold, and with no other.",
    streams=True,
)
async def unsure(rig: Rig, findings: Findings) -> None:
    async with rig.direct_session() as session:
        needs_stream(session)
        async with streaming(rig, session, credits=64) as stream:
            highest = sorted(_highest(s) for s in await collect(stream, SECONDS / 2))
        threshold = highest[len(highest) // 2]
        if threshold == highest[0]:
            raise Skip("the board's sensor gives answers of one confidence only")
        async with streaming(rig, session, credits=64, send_inputs=SendInputs.BELOW, threshold=threshold) as stream:
            found = await collect(stream, SECONDS / 2)
    without = [s for s in found if _highest(s) < threshold and not s.result.inputs]
    needless = [s for s in found if _highest(s) >= threshold and s.result.inputs]
    whole = [s for s in found if s.result.inputs]
    findings.figure("results", len(found), note=f"{len(whole)} below the threshold of {threshold}")
    findings.figure("unsure without inputs", len(without), most=0)
    findings.figure("sure with inputs", len(needless), most=0)
    findings.figure("answered wrongly", wrong(rig, whole), "of those with inputs", most=0)
    require(whole and len(whole) < len(found), "all answers were of one kind")


def _highest(sampled: Sampled) -> int:
    return int(np.frombuffer(sampled.result.outputs, np.int8).max())


@check(
    "streaming",
    "requests meanwhile",
    "While the sensor is due all the time, requests and samples take turns: both are served, every answer right.",
    streams=True,
)
async def meanwhile(rig: Rig, findings: Findings) -> None:
    async with rig.direct_session() as session:
        needs_stream(session)
        call = Caller(session, rig.samples(), rig.seed)
        async with streaming(rig, session, interval_ms=1, credits=64) as stream:
            taking = asyncio.create_task(collect(stream, SECONDS))
            tally = await drive(call, lanes=call.lanes, deadline_s=ANSWER_S, seconds=SECONDS)
            found = await taking
    findings.figure("calls", tally.total, note=f"{tally.text()}; {call.lanes} at once")
    findings.figure("rate of calls", tally.rate, "per second", least=1)
    findings.figure("rate of results", len(found) / SECONDS, "per second", least=1)
    findings.figure("longest call", max(tally.took_s) * 1e3, "ms")
    require(tally.right == tally.total, f"{tally.text()}: {'; '.join(call.wrongs[:3])}")


@check(
    "streaming",
    "bit errors",
    "At one bit error in 10,000 no result is wrong, every loss is counted, and the stream does not stop.",
    streams=True,
)
async def bit_errors(rig: Rig, findings: Findings) -> None:
    async with rig.direct_session() as session:
        needs_stream(session)
    with rig.line(findings) as line:
        options = {"send_inputs": SendInputs.ALWAYS, "credits": 8}
        async with rig.session(line.port) as session, streaming(rig, session, **options) as stream:
            line.set(bit_errors=BIT_ERRORS, seed=rig.seed)
            findings.lines.append(f"bit_errors={BIT_ERRORS} direction=both seed={rig.seed}")
            found = await collect(stream, NOISY_SECONDS)
            line.set(bit_errors=0)
            afterwards = await collect(stream, NOISY_SECONDS)
    seqs = [s.result.seq for s in found + afterwards]
    require(seqs == sorted(set(seqs)), "results came twice, or out of order")
    missing = seqs[-1] - seqs[0] + 1 - len(seqs)
    findings.figure("results", len(found), note=f"{stream.counters.lost} lost, {stream.counters.skipped} skipped")
    findings.figure("answered wrongly", wrong(rig, found), most=0)
    findings.figure("lost without being counted", missing - stream.counters.lost, most=0)
    findings.figure("results afterwards", len(afterwards), least=LEAST_AFTERWARDS)


@check(
    "streaming",
    "reset and replug",
    "After a reset, and after the cable was pulled and put back, the gateway begins the stream again by itself.",
    streams=True,
)
async def survives(rig: Rig, findings: Findings) -> None:
    async with rig.direct_session() as session:
        needs_stream(session)
    taken: list[Streamed] = []
    section = StreamSection(name="rig", model="digits", interval_ms=INTERVAL_MS)
    keeper = StreamKeeper(section, rig.catalog.family("digits"), rig.clock, taken.append)
    with rig.line() as line:
        board = _supervised(rig, line, keeper)
        board.start()
        try:
            await _flows(rig, findings, "begun", taken, keeper, 0)
            starts = keeper.status()["starts"]
            if not hard_reset(rig):
                await _by_message(rig, board)
                findings.note("reset by message: nothing here can press the button")
            await _flows(rig, findings, "after the reset", taken, keeper, starts)
            starts = keeper.status()["starts"]
            line.call("unplug")
            await asyncio.sleep(0.2)
            line.call("plug")
            await _flows(rig, findings, "after the replug", taken, keeper, starts)
        finally:
            await board.stop()


def _supervised(rig: Rig, line: Line, keeper: StreamKeeper) -> Board:
    """As the daemon does it."""
    return Board(
        str(line.port),
        rig.driver.serial.baud,
        catalog=rig.catalog,
        clock=rig.clock,
        connect=open_serial,
        max_concurrent=4,
        health_check_interval=1,
        random=random.Random(rig.seed).random,
        streams=[keeper],
    )


async def _by_message(rig: Rig, board: Board) -> None:
    with contextlib.suppress(LinkError):  # a board whose USB goes with it
        await board.session.reset(rig.soon(15))


async def _flows(
    rig: Rig, findings: Findings, what: str, taken: list[Streamed], keeper: StreamKeeper, starts: int
) -> None:
    """Begun once more than `starts` times, and results come."""
    began = rig.clock.monotonic()
    count: int | None = None
    while count is None or len(taken) < count + LEAST_AFTERWARDS:
        if count is None and keeper.status()["starts"] > starts:
            count = len(taken)
        waited_s = rig.clock.monotonic() - began
        require(waited_s < 3 * BACK_LIMIT_S, f"{what}: no results: {keeper.status()['reason']}")
        await asyncio.sleep(0.01)
    needed_s = LEAST_AFTERWARDS * INTERVAL_MS / 1e3
    figure = rig.clock.monotonic() - began - needed_s
    findings.figure(f"{what}: streaming after", max(0.0, figure), "s", most=BACK_LIMIT_S)


CHECKS = (rate, credits, unsure, meanwhile, bit_errors, survives)
