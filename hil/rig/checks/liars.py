"""Boards that say what is not so, played by a script: what the gateway makes of them."""

from __future__ import annotations

import asyncio
import os
from dataclasses import replace

import psutil

from agent.config import McuSection
from agent.core.errors import EdgeAgentError, LinkError, ProtocolError, TargetError, TargetFailed
from agent.core.types import InferenceRequest, LatencyClass
from agent.link.serial import open_serial
from agent.link.session import Session
from agent.targets.mcu import McuTarget
from agent.wire.codes import ErrorCode, MessageType
from agent.wire.frame import Frame
from agent.wire.messages import Error, Hello, Result
from hil.demo.players import heldout
from hil.rig.check import Findings, check, require
from hil.rig.fake import Answer, FakeBoard, hello_with
from hil.rig.rig import Rig

MEMORY_MB = 8.0
DEADLINE_S = 0.4
OVERRUN_S = 0.3


@check(
    "faults",
    "unknown protocol major",
    "A board of another protocol major is refused at once and for good: the error names both versions, and the daemon "
    "does not try again and again.",
    needs_board=False,
)
async def unknown_major(rig: Rig, findings: Findings) -> None:
    hello = hello_with(bytes.fromhex(rig.samples().variant.sha256))

    def version(board: FakeBoard, frame: Frame) -> None:
        board.say(MessageType.ERROR, frame.id, Error(ErrorCode.VERSION, "2.0").to_bytes())

    scripts: tuple[tuple[str, bytes, dict[int, Answer]], ...] = (
        ("HELLO 2.0", replace(hello, major=2).to_bytes(), {}),
        ("HELLO 2.0 of another layout", b"\x02\x00" + bytes(3), {}),
        ("ERROR VERSION", hello.to_bytes(), {MessageType.HELLO_REQ: version}),
    )
    for number, (name, body, answers) in enumerate(scripts):
        with FakeBoard(rig.stage.folder / f"ttyMajor{number}", body, answers) as board:
            began = rig.clock.monotonic()
            try:
                async with rig.session(rig.stage.folder / f"ttyMajor{number}"):
                    require(False, f"{name}: was accepted")
            except LinkError as error:
                require(error.permanent, f"{name}: is taken for something that passes: {error}")
                findings.note(f"{name}: {str(error).split(': ', 1)[-1]}")
            findings.figure(f"{name}: refused after", rig.clock.monotonic() - began, "s", most=1.0)
            asked = board.count(MessageType.HELLO_REQ)
            target = _target(rig, f"ttyMajor{number}")
            await target.start()
            await asyncio.sleep(1.0)
            require(not target.availability().available, f"{name}: the tier is available")
            await target.stop()
            tries = board.count(MessageType.HELLO_REQ) - asked
            findings.figure(f"{name}: greetings by the daemon in 1 s", tries, most=1)


def _target(rig: Rig, name: str) -> McuTarget:
    section = McuSection(ports=(str(rig.stage.folder / name),), timeout_ms=DEADLINE_S * 1e3)
    return McuTarget(section, rig.catalog, rig.clock)


def _lies(honest: Hello) -> dict[str, bytes]:
    """HELLO bodies that are not true, or no HELLO at all."""
    active, empty = honest.slots
    huge = 0xFFFFFFFF
    return {
        "frames of 64 KiB and messages of 4 GiB": replace(honest, max_frame=0xFFFF, max_message=huge).to_bytes(),
        "a window of 255": replace(honest, window=255).to_bytes(),
        "a window of 0": replace(honest, window=0).to_bytes(),
        "frames of 1 byte": replace(honest, max_frame=1).to_bytes(),
        "messages of 0 bytes": replace(honest, max_message=0).to_bytes(),
        "tensors of 4 GiB": replace(
            honest, slots=(replace(active, input_bytes=huge, output_bytes=huge, arena_used=huge), empty)
        ).to_bytes(),
        "a slot of 4 GiB": replace(honest, slot_size=huge, arena=huge).to_bytes(),
        "two active models": replace(honest, slots=(active, replace(active, index=1))).to_bytes(),
        "255 slots that are not there": honest.to_bytes()[: -2 * 54 - 1] + b"\xff",
        "texts longer than the message": honest.to_bytes()[:42] + b"\xff",
        "nothing": b"",
    }


@check(
    "faults",
    "lying HELLO",
    "Whatever sizes a HELLO claims, the gateway refuses it or goes on: every call ends by its deadline, with an error "
    "of the gateway's own kind, and no memory is spent on what was claimed.",
    needs_board=False,
)
async def lying_hello(rig: Rig, findings: Findings) -> None:
    process = psutil.Process(os.getpid())
    rss = process.memory_info().rss
    for number, (name, body) in enumerate(_lies(hello_with(bytes.fromhex(rig.samples().variant.sha256))).items()):
        port = rig.stage.folder / f"ttyLiar{number}"
        # It takes INFER and never answers: what is claimed cannot be told from what is true but slow.
        with FakeBoard(port, body, {MessageType.INFER: lambda board, frame: None}) as board:
            findings.note(f"{name}: {await _converse(rig, str(port), board)}")
    growth = (process.memory_info().rss - rss) / 1e6
    findings.figure("lies told", number + 1)
    findings.figure("the gateway's memory grew by", growth, "MB", most=MEMORY_MB)


async def _converse(rig: Rig, port: str, board: FakeBoard) -> str:
    """What came of a greeting and ten calls, in words."""
    session = Session(await open_serial(port, 921_600), rig.clock)
    began = rig.clock.monotonic()
    try:
        await session.open(rig.soon(DEADLINE_S))
    except (LinkError, ProtocolError) as error:
        session.close()
        took = rig.clock.monotonic() - began
        require(took < DEADLINE_S + OVERRUN_S, f"the refusal took {took:.1f} s")
        return f"refused: {str(error).removeprefix(port + ': ')}"
    try:
        inputs = rig.samples().inputs[0]
        began = rig.clock.monotonic()
        asked = (session.infer(rig.samples().model, inputs, rig.soon(DEADLINE_S)) for _ in range(10))
        ends = await asyncio.gather(*asked, return_exceptions=True)
        took = rig.clock.monotonic() - began
        require(took < DEADLINE_S + OVERRUN_S, f"the calls took {took:.1f} s")
        strange = [end for end in ends if not isinstance(end, TimeoutError | EdgeAgentError)]
        require(not strange, f"a call ended with {strange[:1]!r}")
        most = max((len(frame.payload) for frame in board.seen), default=0)
        require(most <= len(inputs) + 12, f"a frame of {most} bytes was sent for a call of {len(inputs)}")
        return f"accepted; ten calls ended as {', '.join(sorted({type(end).__name__ for end in ends}))}"
    finally:
        session.close()


def _result(board: FakeBoard, frame: Frame) -> None:
    """An answer of three bytes, where ten were announced."""
    board.say(MessageType.RESULT, frame.id, Result(frame.payload[:8], 0, 0, b"abc").to_bytes())


def _busy(board: FakeBoard, frame: Frame) -> None:
    board.say(MessageType.ERROR, frame.id, Error(ErrorCode.BUSY, "").to_bytes())


@check(
    "faults",
    "answers of another size",
    "A RESULT whose tensors have another length than the model's is an error of that one attempt, never an answer.",
    needs_board=False,
)
async def other_size(rig: Rig, findings: Findings) -> None:
    family = rig.catalog.family("digits")
    variant = rig.samples().variant
    values, _ = heldout(rig.catalog.root / family.data.heldout)
    inputs = {family.inputs[0].name: values[0].reshape(family.inputs[0].shape)}
    for number, answer in enumerate((_result, _busy)):
        port = rig.stage.folder / f"ttySize{number}"
        with FakeBoard(port, hello_with(bytes.fromhex(variant.sha256)).to_bytes(), {MessageType.INFER: answer}):
            target = _target(rig, port.name)
            await target.start()
            try:
                end = rig.soon(5)
                while not target.availability().available:
                    require(rig.clock.monotonic() < end, f"the tier is not available: {target.availability().reason}")
                    await asyncio.sleep(0.02)
                now = rig.clock.monotonic()
                request = InferenceRequest("1", "digits", inputs, LatencyClass.REALTIME, now, now + 1)
                try:
                    await target.infer(request, family, variant, now + 1)
                except TargetError as error:
                    findings.note(f"{type(error).__name__}: {str(error).removeprefix(f'{port}: ')}")
                    require(isinstance(error, TargetFailed) is (answer is _result), f"ended as {error!r}")
                else:
                    require(False, "was taken for an answer")
            finally:
                await target.stop()


CHECKS = (unknown_major, lying_hello, other_size)
