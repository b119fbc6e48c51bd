"""Greeting, reset, refusals, and whether the model's answers are the reference runtime's."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from enum import IntEnum
from typing import Any, ClassVar

from agent.core.errors import EdgeAgentError
from agent.link.calls import RemoteError
from agent.link.session import Session
from agent.wire.body import NoBody
from agent.wire.codes import Capability, ErrorCode, name_of
from agent.wire.messages import Hello, Infer, Result, Stats
from hil.rig.check import Findings, Skip, check, require
from hil.rig.protocols import RigError
from hil.rig.rig import Rig
from hil.rig.traffic import TOLERANCE, Caller, off_by

GREETING_LIMIT_S = 5.0
RESET_LIMIT_S = 15.0
CLOCK_SPAN_S = 2.0


class _Unknown(IntEnum):
    UNKNOWN = 0x2F


class Unheard(NoBody):
    """A request of a type that no version has."""

    TYPE: ClassVar[Any] = _Unknown.UNKNOWN


@check("handshake", "greets", "The board answers HELLO_REQ within 5 s with a HELLO that makes sense.", model=None)
async def greets(rig: Rig, findings: Findings) -> None:
    with rig.direct() as port:
        began = rig.clock.monotonic()
        async with rig.session(port) as session:
            findings.figure("first HELLO after", rig.clock.monotonic() - began, "s", most=GREETING_LIMIT_S)
            hello = session.hello
            again = await session.refresh(rig.soon(GREETING_LIMIT_S))
    findings.note(f"{hello.board}, {hello.build}, protocol {hello.major}.{hello.minor}, engine {hello.engine}")
    findings.note(
        f"window {hello.window}, frames of {hello.max_frame} bytes, messages of {hello.max_message}, "
        f"arena {hello.arena}, last reset: {name_of(hello.reset_cause).lower()}"
    )
    require(again.boot_id == hello.boot_id, "a second HELLO has another boot_id though nobody reset the board")
    require(hello.max_message >= hello.max_frame - 12, "max_message is less than what one frame holds")


@check("handshake", "reset", "After a reset HELLO has a new boot_id, and the same unique id.", model=None)
async def reset(rig: Rig, findings: Findings) -> None:
    async with rig.direct_session() as session:
        before = session.hello
        began = rig.clock.monotonic()
        try:
            after = await session.reset(rig.soon(RESET_LIMIT_S))
        except EdgeAgentError:  # a board whose USB goes with it
            after = await _greeted_again(rig)
        findings.figure("back after", rig.clock.monotonic() - began, "s", most=RESET_LIMIT_S)
    findings.note(f"asked by RESET; cause given: {name_of(after.reset_cause).lower()}")
    require(after.boot_id != before.boot_id, "boot_id is the same as before the reset")
    require(after.uid == before.uid, f"unique id was {before.uid:x}, is {after.uid:x}")


async def _greeted_again(rig: Rig) -> Hello:
    end = rig.soon(RESET_LIMIT_S)
    while True:
        try:
            async with rig.direct_session() as session:
                return session.hello
        except EdgeAgentError:
            require(rig.clock.monotonic() < end, f"the board did not come back within {RESET_LIMIT_S:.0f} s")
            await asyncio.sleep(0.1)


@check(
    "handshake", "refuses", "What makes no sense is refused with the code that the protocol says, and harms nothing."
)
async def refuses(rig: Rig, findings: Findings) -> None:
    async with rig.direct_session() as session:
        hello, deadline = session.hello, rig.soon(5)
        await _refused(session.request(Unheard(), Stats, deadline), ErrorCode.UNKNOWN_TYPE, findings)
        if not hello.capabilities & Capability.ENGINE:
            asked = session.infer(rig.samples().model, rig.samples().inputs[0], deadline)
            await _refused(asked, ErrorCode.NO_ENGINE, findings)
            return
        await _refused(session.infer(bytes(8), rig.samples().inputs[0], deadline), ErrorCode.MODEL_MISMATCH, findings)
        # More than one frame holds: arrives in fragments, and the board's refusal shows that it read them all.
        long = bytes(min(hello.max_message - 12, 3 * hello.max_frame))
        await _refused(_infer(session, rig.samples().model, long, deadline), ErrorCode.BAD_LENGTH, findings)
        call = Caller(session, rig.samples(), rig.seed)
        require(await call(5) == "right", "no right answer after the refusals")


async def _infer(session: Session, model: bytes, inputs: bytes, deadline: float) -> None:
    await session.request(Infer(model, 0, inputs), Result, deadline)


async def _refused(call: Awaitable[object], code: ErrorCode, findings: Findings) -> None:
    try:
        await call
    except RemoteError as error:
        require(error.code == code, f"expected {code.name}, was refused with {name_of(error.code)}")
        findings.note(f"{code.name} as expected")
    else:
        require(False, f"expected {code.name}, was answered")


@check("handshake", "answers", "Every held-out sample is answered as the reference runtime answers it.")
async def answers(rig: Rig, findings: Findings) -> None:
    samples = rig.samples()
    async with rig.direct_session() as session:
        if not session.hello.capabilities & Capability.ENGINE:
            raise Skip(f"the board has no engine ({session.hello.engine})")
        off = [
            off_by((await session.infer(samples.model, inputs, rig.soon(10))).message.outputs, expected)
            for inputs, expected in zip(samples.inputs, samples.expected, strict=True)
        ]
        findings.note(f"board: {session.hello.engine}; reference: {samples.runtime}")
    findings.figure("samples", len(off))
    findings.figure("bit-equal", sum(not difference for difference in off), "samples")
    findings.figure("largest difference", max(off), "LSB", most=TOLERANCE)


@check("handshake", "clock", "The board's clock is known to 1 ms, and runs at the rate of ours.", model=None)
async def clock(rig: Rig, findings: Findings) -> None:
    async with rig.direct_session() as session:
        first = await _offset(rig, session)
        await asyncio.sleep(CLOCK_SPAN_S)
        second = await _offset(rig, session)
    findings.figure("uncertainty of the offset", max(first[1], second[1]) * 1e3, "ms", most=1.0)
    findings.figure("drift", abs(second[0] - first[0]) / CLOCK_SPAN_S * 1e6, "ppm", note="over 2 s")


async def _offset(rig: Rig, session: Session) -> tuple[float, float]:
    """Offset and half of the line's part of the quickest round trip, seconds."""
    pings = [await session.ping(b"", rig.soon(5)) for _ in range(50)]
    best = min(pings, key=lambda ping: ping.round_trip_s)
    return best.offset_s, max(0.0, best.round_trip_s - best.mcu_s) / 2


def hard_reset(rig: Rig) -> bool:
    """Restart the board from outside. False where nothing here can."""
    try:
        if rig.driver.reset is not None:
            rig.driver.reset.reset()
            return True
    except RigError:
        pass  # a port that is held alone cannot have its modem lines moved by another
    return False


CHECKS = (greets, reset, refuses, answers, clock)
