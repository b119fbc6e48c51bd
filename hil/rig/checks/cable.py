"""What a hand does to a board and its cable while it is at work."""

from __future__ import annotations

import asyncio
import hashlib
import os
import random
from collections.abc import Callable
from pathlib import Path

import psutil

from agent.core.errors import LinkError
from agent.link.push import push_model
from agent.link.serial import WRITE_BUFFER_BYTES, open_serial
from agent.link.session import Session
from agent.targets.mcu_board import Board, BoardState
from agent.wire.messages import MODEL_ID_BYTES
from hil.rig.check import Findings, check, require
from hil.rig.checks.handshake import hard_reset
from hil.rig.checks.noise import OVERDUE_MS, settle
from hil.rig.checks.push import large_image, line_bytes_of, needs_engine
from hil.rig.rig import Line, Rig
from hil.rig.traffic import Caller, Outcome, drive

AT_ONCE_S = 1.0
"""How soon open calls fail when the board was reset or its cable pulled: no call waits for its deadline."""
BACK_LIMIT_S = 5.0
"""Until calls are answered again, from the moment at which the board could answer."""
STALL_MEMORY_MB = 16.0
POLL_S = 0.01


async def _open_calls(call: Caller, count: int) -> list[asyncio.Task[Outcome]]:
    calls = [asyncio.ensure_future(call(30.0)) for _ in range(count)]
    await asyncio.sleep(0.05)
    return calls


async def _ended(calls: list[asyncio.Task[Outcome]]) -> list[str]:
    """How each ended. Fails if one is still open after `AT_ONCE_S`."""
    _, left = await asyncio.wait(calls, timeout=AT_ONCE_S)
    for task in left:
        task.cancel()
    await asyncio.gather(*left, return_exceptions=True)
    require(not left, f"{len(left)} of {len(calls)} calls were still open {AT_ONCE_S:g} s later")
    return [task.result().value for task in calls]


@check(
    "faults", "reset mid-call", "Calls that are open when the board is reset fail at once; the next ones are answered."
)
async def reset_mid_call(rig: Rig, findings: Findings) -> None:
    with rig.line() as line:
        async with rig.session(line.port) as session:
            call, boot_id = Caller(session, rig.samples(), rig.seed), session.hello.boot_id
            await settle(rig, session, call)
            line.call("stall", direction="out")  # so that the calls are open for certain
            calls = await _open_calls(call, session.window)
            began = rig.clock.monotonic()
            if hard_reset(rig):
                outcomes = await _ended(calls)
                require(set(outcomes) == {"lost"}, f"calls that were open ended as {outcomes}")
                findings.note(f"{len(calls)} open calls failed at once; reset from outside")
                line.call("resume")
            else:
                line.call("resume")
                await session.reset(rig.soon(15))
                outcomes = await _ended(calls)
                require(set(outcomes) <= {"lost", "right"}, f"calls that were open ended as {outcomes}")
                findings.note(f"open calls ended as {outcomes}; reset by message: nothing here can press the button")
            findings.figure("open calls ended after", rig.clock.monotonic() - began, "s")
            findings.figure("right again after", await settle(rig, session, call), "s", most=BACK_LIMIT_S)
            require(session.hello.boot_id != boot_id, "boot_id is the same as before")
            require(session.counters.resets == 1, f"{session.counters.resets} resets were counted")


@check(
    "faults",
    "replug",
    "When the cable is pulled, calls fail at once and the tier says why; plugged in again the board is found by the "
    "same link to another device, and under another configured name.",
)
async def replug(rig: Rig, findings: Findings) -> None:
    with rig.line() as line:
        other = line.port.with_name(line.port.name + "-other")
        boards = [_supervised(rig, str(port)) for port in (line.port, other)]
        for board in boards:
            board.start()
        try:
            await _until(lambda: _connected(boards[0]), "connected at first")
            await _pulled_and_back(rig, line, boards[0], boards[0], None, findings)
            await _pulled_and_back(rig, line, boards[0], boards[1], other, findings)
        finally:
            for board in boards:
                await board.stop()


def _supervised(rig: Rig, port: str) -> Board:
    """As the daemon does it."""
    return Board(
        port,
        rig.driver.serial.baud,
        catalog=rig.catalog,
        clock=rig.clock,
        connect=open_serial,
        max_concurrent=4,
        health_check_interval=5,
        random=random.Random(rig.seed).random,
    )


def _connected(board: Board) -> bool:
    return board.status()["state"] == BoardState.CONNECTED.value and board._session is not None


async def _until(condition: Callable[[], bool], what: str) -> None:
    end = asyncio.get_running_loop().time() + BACK_LIMIT_S
    while not condition():
        require(asyncio.get_running_loop().time() < end, f"not {what} within {BACK_LIMIT_S:g} s")
        await asyncio.sleep(POLL_S)


async def _pulled_and_back(
    rig: Rig, line: Line, before: Board, after: Board, link: Path | None, findings: Findings
) -> None:
    """`link`: the name under which it comes back; None: the same one, which then leads to another device."""
    device, uid = line.port.readlink(), before.session.hello.uid
    call = Caller(before.session, rig.samples(), rig.seed)
    require(await call(5) is Outcome.RIGHT, "no right answer before the cable was pulled")
    line.call("stall", direction="out")
    calls = await _open_calls(call, before.session.window)
    line.call("unplug")
    outcomes = await _ended(calls)
    require(set(outcomes) == {"lost"}, f"calls that were open ended as {outcomes}")
    await _until(lambda: not _connected(before), "seen as unplugged")
    findings.note(f"pulled: {before.reason}")
    line.call("resume")
    began = rig.clock.monotonic()
    line.call("plug", **({"link": str(link)} if link is not None else {}))
    await _until(lambda: _connected(after), "connected again")
    what = "same link, other device" if link is None else "other name"
    found = (link or line.port).readlink()
    require(found != device or link is not None, "the rig gave the same device again")
    call = Caller(after.session, rig.samples(), rig.seed)
    require(await call(5) is Outcome.RIGHT, f"{what}: no right answer after the board came back")
    findings.figure(f"{what}: right again after", rig.clock.monotonic() - began, "s", most=BACK_LIMIT_S)
    require(after.session.hello.uid == uid, "it is another board by its unique id")


@check(
    "faults",
    "push cut at 99 %",
    "A push whose link is lost at 99 % goes on where it was: only what is missing is sent.",
)
async def push_cut(rig: Rig, findings: Findings) -> None:
    with rig.line() as line:
        async with rig.session(line.port) as session:
            needs_engine(session)
            image = large_image(rig, session, rig.seed + 99)
            size, (on_line, chunks) = len(image.data), line_bytes_of(image, session)
            line.call("cut", direction="out", after=int(0.99 * on_line))
            try:
                await push_model(session, image, rig.clock)
            except LinkError as error:
                findings.note(f"cut after {int(0.99 * on_line)} bytes: {error}")
            else:
                require(False, "the push ended well though its cable was cut")
        line.call("plug")
        seen: list[int] = []
        async with rig.session(line.port) as session:
            sent = session.counters.bytes_sent
            await push_model(session, image, rig.clock, lambda received, _: seen.append(received))
            again = session.counters.bytes_sent - sent
            active = session.hello.active
            require(active is not None and active.length == len(image.model), "the pushed model is not the active one")
            findings.figure("image", size / 1024, "KiB", note=f"{chunks} chunks")
            findings.figure("there already", 100 * seen[0] / size, "%", least=100 * (1 - 5 / chunks) - 1)
            findings.figure("sent the second time", 100 * again / on_line, "%", most=100 * 6 / chunks + 1)
            model = hashlib.sha256(image.model).digest()[:MODEL_ID_BYTES]
            reply = await session.infer(model, rig.samples().inputs[0], rig.soon(5))
            require(reply.message.outputs == rig.samples().expected[0], f"wrong answer {reply.message.outputs.hex()}")


@check(
    "faults",
    "board stops reading",
    "Calls to a board that does not read end by their deadline, what waits for it is bounded, and all is well when it "
    "reads again.",
)
async def stops_reading(rig: Rig, findings: Findings) -> None:
    process = psutil.Process(os.getpid())
    with rig.line() as line:
        async with rig.session(line.port) as session:
            call = Caller(session, rig.samples(), rig.seed)
            await settle(rig, session, call)
            rss = process.memory_info().rss
            line.call("stall", direction="out")
            tally = await drive(call, lanes=session.window, deadline_s=0.3, seconds=1.5)
            flood = await _flood(rig, session)
            require(tally.right == 0 and tally.wrong == 0, f"without a board that reads: {tally.text()}")
            findings.figure("calls", tally.total, note=tally.text())
            overrun = max(0.0, tally.overdue_s) * 1e3
            findings.figure("longest overrun of a deadline", overrun, "ms", most=OVERDUE_MS)
            findings.note(f"then 4 MB at once: {flood} calls refused as stalled, the others ended by their deadline")
            growth = (process.memory_info().rss - rss) / 1e6
            findings.figure("the gateway's memory grew by", growth, "MB", most=STALL_MEMORY_MB)
            line.call("resume")
            # The board reads what was kept for it first.
            limit_s = BACK_LIMIT_S + 2 * WRITE_BUFFER_BYTES * 10 / rig.driver.serial.baud
            again_s = await settle(rig, session, call, WRITE_BUFFER_BYTES)
            findings.figure("right again after", again_s, "s", most=limit_s)


async def _flood(rig: Rig, session: Session) -> int:
    """4 MB of PINGs, a thousandth of a second apart; returns how many were refused because the buffer is full."""
    data = bytes(session.hello.max_frame - 28)
    refused = 0

    async def one() -> None:
        nonlocal refused
        try:
            await session.ping(data, rig.soon(0.3))
        except TimeoutError:
            pass
        except LinkError:
            refused += 1

    await asyncio.gather(*(one() for _ in range(4_000_000 // len(data))))
    require(refused > 0, "4 MB were taken for a line that carries nothing")
    return refused


CHECKS = (reset_mid_call, replug, push_cut, stops_reading)
