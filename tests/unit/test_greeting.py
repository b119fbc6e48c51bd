"""Greeting a microcontroller, and its resets, in virtual time."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest
from fake_mcu import (
    HELLO,
    INPUTS,
    KEY,
    ByteByByte,
    Delayed,
    FakeMcu,
    Line,
    LoopClock,
    assert_clean,
    opened,
    pass_time,
    soon,
    virtual_time,
)

from agent.core.errors import LinkError, ProtocolError
from agent.link.session import Session
from agent.wire.codes import MessageType, ResetCause
from agent.wire.messages import Hello


@pytest.mark.parametrize("kind", [Line, ByteByByte, Delayed])
@virtual_time
async def test_a_new_boot_fails_all_and_is_adopted(kind: type[Line]) -> None:
    heard: list[Hello] = []
    mcu = FakeMcu(compute_s=5)
    session, _ = await opened(mcu, kind, on_hello=heard.append)
    calls = [asyncio.create_task(session.infer(KEY, INPUTS, soon(60))) for _ in range(9)]
    await pass_time(0.9)
    mcu.boot(ResetCause.WATCHDOG)
    outcomes = await asyncio.gather(*calls, return_exceptions=True)
    assert all("reset (WATCHDOG)" in str(outcome) for outcome in outcomes)
    assert session.open_requests == 0
    await pass_time(1)
    assert_clean(session)
    assert [hello.boot_id for hello in heard] == [1, 2]
    assert session.counters.resets == 1
    assert session.counters.lost_frames == 0
    # It was greeted again, so frames of full size travel.
    mcu.compute_s = 0
    assert (await session.infer(KEY, bytes(1000), soon())).message.outputs == bytes(4)
    assert sum(frame.type == MessageType.HELLO_REQ for frame in mcu.seen) == 2


@virtual_time
async def test_a_reset_whose_hello_was_lost_is_noticed_by_the_clock() -> None:
    mcu = FakeMcu()
    session, _ = await opened(mcu)
    await session.ping(b"", soon())
    await pass_time(5)
    await session.ping(b"", soon())
    mcu.boot(ResetCause.BROWN_OUT, say=False)
    await session.ping(b"", soon())
    await pass_time(0.1)
    assert session.hello.boot_id == 2
    assert session.counters.resets == 1


@virtual_time
async def test_an_mcu_that_does_not_come_back_ends_the_session() -> None:
    mcu = FakeMcu()
    session, line = await opened(mcu)
    mcu.boot()
    mcu.mute = set(MessageType)
    assert "no HELLO" in str(await session.wait_lost())
    assert line.closed


@virtual_time
async def test_another_major_version_is_permanent() -> None:
    for mcu in (FakeMcu(replace(HELLO, major=2)), FakeMcu()):
        session = Session(Line(mcu), LoopClock())
        if mcu.hello.major == 1:
            await session.open(soon())
            mcu.hello = replace(mcu.hello, major=3)
            mcu.boot()
            error = await session.wait_lost()
        else:
            with pytest.raises(LinkError) as caught:
                await session.open(soon())
            error = caught.value
        assert error.permanent
        session.close()


@virtual_time
async def test_silence_and_a_wrong_baud_rate_are_told_apart() -> None:
    mcu = FakeMcu()
    mcu.mute = set(MessageType)
    session = Session(Line(mcu), LoopClock())
    with pytest.raises(LinkError, match="is there a microcontroller"):
        await session.open(soon(3))
    line = Line(mcu)
    session = Session(line, LoopClock())
    opening = asyncio.create_task(session.open(soon(3)))
    await pass_time(0.1)
    line._deliver(b"\x8f\x17\x91\0" * 5)
    with pytest.raises(LinkError, match="baud"):
        await opening


@virtual_time
async def test_a_broken_hello_is_a_protocol_error() -> None:
    mcu = FakeMcu()
    mcu.mute = {MessageType.HELLO}
    session = Session(Line(mcu), LoopClock())
    opening = asyncio.create_task(session.open(soon()))
    await pass_time(0.01)
    mcu.mute = set()
    mcu.say(MessageType.HELLO, session._last_id, b"\x01\x00short")
    with pytest.raises(ProtocolError, match="HELLO of 7 bytes"):
        await opening
    assert session.counters.malformed == 1


@virtual_time
async def test_reset_waits_until_the_mcu_is_back() -> None:
    mcu = FakeMcu()
    session, _ = await opened(mcu, Delayed)
    hello = await session.reset(soon())
    assert (hello.boot_id, hello.reset_cause) == (2, ResetCause.SOFTWARE)


@virtual_time
async def test_reset_whose_hello_was_lost() -> None:
    mcu = FakeMcu()
    session, _ = await opened(mcu)
    mcu.boot = lambda cause=ResetCause.SOFTWARE, say=False: FakeMcu.boot(mcu, cause, say=False)  # type: ignore[method-assign]
    assert (await session.reset(soon())).boot_id == 2
