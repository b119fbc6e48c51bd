"""The session's rules, against one fake peer over four kinds of line, in virtual time."""

from __future__ import annotations

import asyncio
import hashlib
from dataclasses import replace

import pytest
from fake_mcu import (
    HELLO,
    INPUTS,
    KEY,
    LINES,
    Delayed,
    FakeMcu,
    Line,
    Lossy,
    assert_clean,
    opened,
    pass_time,
    soon,
    virtual_time,
)

from agent.core.errors import LinkError, ProtocolError
from agent.link.calls import RemoteError
from agent.link.session import LINGER_S
from agent.wire.codes import ErrorCode, MessageType
from agent.wire.fragments import Fragment
from agent.wire.frame import FRAGMENT, RETRY, Frame
from agent.wire.messages import Log, Stats, StatsReq


@pytest.mark.parametrize("kind", LINES)
@virtual_time
async def test_every_exchange_over_every_line(kind: type[Line]) -> None:
    session, _ = await opened(FakeMcu(), kind)
    assert session.hello.board == "fake"
    answered = 0
    for number in range(40):
        inputs = bytes([number] * 16)
        try:
            reply = await session.infer(KEY, inputs, soon(2))
        except TimeoutError:
            assert kind is Lossy
            continue
        answered += 1
        assert reply.message.outputs == inputs[:4]
        assert reply.round_trip_s >= 0
    assert answered == 40 or (kind is Lossy and answered > 25)
    await pass_time(LINGER_S * 2)
    assert_clean(session)
    session.close()


@pytest.mark.parametrize("kind", LINES)
@virtual_time
async def test_large_bodies_travel_in_pieces_both_ways(kind: type[Line]) -> None:
    mcu = FakeMcu()
    mcu.model = lambda inputs: inputs * 3
    session, _ = await opened(mcu, kind)
    big = hashlib.shake_128(b"big").digest(5000)
    for _ in range(30):
        try:
            reply = await session.infer(KEY, big, soon(5))
            break
        except (TimeoutError, RemoteError):
            assert kind is Lossy
    assert reply.message.outputs == big * 3
    assert reply.bytes_received > 15_000
    await pass_time(LINGER_S * 2)
    assert_clean(session)


@virtual_time
async def test_window_is_never_exceeded_and_all_are_answered() -> None:
    mcu = FakeMcu(compute_s=0.01)
    session, _ = await opened(mcu, Delayed)
    replies = await asyncio.gather(*(session.infer(KEY, bytes([i] * 16), soon()) for i in range(40)))
    assert [reply.message.outputs for reply in replies] == [bytes([i] * 4) for i in range(40)]
    assert mcu.most_open == HELLO.window
    assert_clean(session)


@virtual_time
async def test_the_gateway_may_lower_the_window() -> None:
    mcu = FakeMcu()
    session, _ = await opened(mcu, Delayed, max_in_flight=2)
    await asyncio.gather(*(session.infer(KEY, INPUTS, soon()) for _ in range(10)))
    assert mcu.most_open == 2


@virtual_time
async def test_cancellation_returns_the_place_in_the_window() -> None:
    mcu = FakeMcu(compute_s=0.2)
    session, _ = await opened(mcu)
    calls = [asyncio.create_task(session.infer(KEY, INPUTS, soon())) for _ in range(7)]
    await pass_time(0.05)
    assert session.pending_calls == 4
    for call in calls[1:]:
        call.cancel()
    outcomes = await asyncio.gather(*calls, return_exceptions=True)
    assert sum(isinstance(outcome, asyncio.CancelledError) for outcome in outcomes) == 6
    assert mcu.runs == 1
    assert session.counters.cancels == 3
    await pass_time(0)
    assert_clean(session)
    await asyncio.gather(*(session.infer(KEY, INPUTS, soon()) for _ in range(8)))


@virtual_time
async def test_an_abandoned_request_keeps_its_place_until_its_late_answer() -> None:
    mcu = FakeMcu(replace(HELLO, window=1), compute_s=0.3)
    session, _ = await opened(mcu)
    with pytest.raises(TimeoutError, match="INFER"):
        await session.infer(KEY, INPUTS, soon(0.1))
    assert session.pending_calls == 0
    assert session.open_requests == 1
    began = asyncio.get_running_loop().time()
    await session.infer(KEY, INPUTS, soon())
    assert asyncio.get_running_loop().time() - began == pytest.approx(0.5, abs=0.01)
    assert session.counters.late == 1
    assert mcu.most_open == 1
    assert_clean(session)


@virtual_time
async def test_timeout_leaves_no_waiter_and_cancels() -> None:
    mcu = FakeMcu()
    session, _ = await opened(mcu)
    mcu.mute = {MessageType.RESULT}
    began = asyncio.get_running_loop().time()
    outcomes = await asyncio.gather(*(session.infer(KEY, INPUTS, soon(0.2)) for _ in range(9)), return_exceptions=True)
    assert all(isinstance(outcome, TimeoutError) for outcome in outcomes)
    assert asyncio.get_running_loop().time() - began == pytest.approx(0.2, abs=0.001)
    assert session.pending_calls == 0
    assert session.open_requests == 4
    await pass_time(LINGER_S * 1.01)
    assert_clean(session)


@virtual_time
async def test_no_time_left_sends_nothing() -> None:
    session, line = await opened(FakeMcu())
    sent = len(line.sent)
    with pytest.raises(TimeoutError, match="no time left"):
        await session.infer(KEY, INPUTS, soon(0))
    assert len(line.sent) == sent
    assert_clean(session)


@virtual_time
async def test_a_lost_answer_is_asked_for_again_under_the_same_id_and_runs_once() -> None:
    mcu = FakeMcu()
    session, _ = await opened(mcu)
    mcu.mute = {MessageType.RESULT}
    call = asyncio.create_task(session.infer(KEY, INPUTS, soon(1.0)))
    await pass_time(0.4)
    mcu.mute = set()
    began = asyncio.get_running_loop().time()
    await call
    assert asyncio.get_running_loop().time() - began == pytest.approx(0.1, abs=0.01)
    asked = [frame for frame in mcu.seen if frame.type == MessageType.INFER]
    assert [frame.flags for frame in asked] == [0, RETRY]
    assert asked[0].id == asked[1].id
    assert mcu.runs == 1
    assert session.counters.repeats == 1


@virtual_time
async def test_no_repeat_where_the_deadline_does_not_allow_another_exchange() -> None:
    mcu = FakeMcu(compute_s=0.5)
    session, _ = await opened(mcu)
    await session.infer(KEY, INPUTS, soon(10))
    with pytest.raises(TimeoutError):
        await session.infer(KEY, INPUTS, soon(0.4))
    assert session.counters.repeats == 0


@virtual_time
async def test_late_answers_are_dropped() -> None:
    mcu = FakeMcu(compute_s=0.3)
    session, _ = await opened(mcu)
    with pytest.raises(TimeoutError):
        await session.infer(KEY, INPUTS, soon(0.2))
    await pass_time(0.2)
    assert session.counters.late == 1
    assert_clean(session)
    mcu.say(MessageType.RESULT, 4711, b"nobody asked")
    await pass_time(0)
    assert session.counters.late == 2


@virtual_time
async def test_a_lost_line_fails_every_waiter_at_once_and_the_first_error_wins() -> None:
    session, line = await opened(FakeMcu(compute_s=5))
    calls = [asyncio.create_task(session.infer(KEY, INPUTS, soon(60))) for _ in range(9)]
    await pass_time(0.01)
    line.unplug("unplugged: gone")
    began = asyncio.get_running_loop().time()
    outcomes = await asyncio.gather(*calls, return_exceptions=True)
    assert [str(outcome) for outcome in outcomes] == ["line: unplugged: gone"] * 9
    assert asyncio.get_running_loop().time() == began
    assert_clean(session)
    session.close()
    assert str(await session.wait_lost()) == "line: unplugged: gone"
    with pytest.raises(LinkError, match="unplugged: gone"):
        await session.infer(KEY, INPUTS, soon())


@virtual_time
async def test_refusals_carry_code_and_text() -> None:
    session, _ = await opened(FakeMcu())
    with pytest.raises(RemoteError, match="MODEL_MISMATCH") as caught:
        await session.infer(bytes(8), INPUTS, soon())
    assert caught.value.code == ErrorCode.MODEL_MISMATCH
    assert_clean(session)


@virtual_time
async def test_a_body_beyond_what_the_mcu_takes_is_refused_here() -> None:
    session, line = await opened(FakeMcu())
    sent = len(line.sent)
    with pytest.raises(RemoteError, match="TOO_LARGE"):
        await session.infer(KEY, bytes(40_000), soon())
    assert len(line.sent) == sent
    assert_clean(session)


@virtual_time
async def test_wrong_and_broken_answers_are_protocol_errors() -> None:
    mcu = FakeMcu()
    session, _ = await opened(mcu)
    mcu.mute = {MessageType.STATS}
    for type_, body in ((MessageType.PONG, bytes(16)), (MessageType.ERROR, b"\x01")):
        call = asyncio.create_task(session.stats(soon()))
        await pass_time(0.01)
        mcu.say(type_, mcu.seen[-1].id, body)
        with pytest.raises(ProtocolError):
            await call
    assert_clean(session)


@virtual_time
async def test_a_stalled_line_refuses_instead_of_growing() -> None:
    session, line = await opened(FakeMcu())
    line.full = True
    with pytest.raises(LinkError, match="stalled"):
        await session.infer(KEY, INPUTS, soon())
    assert_clean(session)
    line.full = False
    await session.infer(KEY, INPUTS, soon())


@virtual_time
async def test_whatever_a_peer_sends_little_of_it_is_kept() -> None:
    mcu = FakeMcu()
    session, line = await opened(mcu)
    heard_at = session.last_received
    await pass_time(1)
    for _ in range(300):
        line._deliver(b"\x55" * 10_000)
    assert session.status()["oversize"] == 1
    assert session._inbox.buffered == 0
    line._deliver(b"\0")
    # Pieces of an answer that never ends, and is too large from the start.
    for total in (10_000, 1 << 30):
        for number in range(200):
            piece = Fragment(total, number * 4000, bytes(4000)).to_bytes()
            line._deliver(Frame(MessageType.RESULT, FRAGMENT, number, 7, piece).encode())
            assert session._inbox.buffered <= 10_000
    assert session.counters.malformed > 0
    assert session.last_received == heard_at  # noise is no sign of life
    await session.infer(KEY, INPUTS, soon())
    assert session.last_received > heard_at


@virtual_time
async def test_ping_measures_the_offset_of_the_clocks() -> None:
    mcu = FakeMcu()
    session, _ = await opened(mcu, Delayed)
    await session.ping(b"", soon())
    await pass_time(100)
    pinged = await session.ping(b"12345678", soon())
    now = asyncio.get_running_loop().time()
    assert pinged.round_trip_s == pytest.approx(0.16)
    assert pinged.offset_s == pytest.approx(mcu._us / 1e6 - now, abs=1e-5)


@virtual_time
async def test_pings_pass_a_full_window() -> None:
    session, _ = await opened(FakeMcu(compute_s=50))
    calls = [asyncio.create_task(session.infer(KEY, INPUTS, soon(1))) for _ in range(9)]
    await pass_time(0)
    await session.ping(bytes(1000), soon(0.01))
    outcomes = await asyncio.gather(*calls, return_exceptions=True)
    assert all(isinstance(outcome, TimeoutError) for outcome in outcomes)
    assert sum("window" in str(outcome) for outcome in outcomes) == 5


@virtual_time
async def test_stats_logs_gaps_and_unknown_types() -> None:
    lines: list[Log] = []
    mcu = FakeMcu()
    session, _ = await opened(mcu, Line, on_log=lines.append)
    await session.infer(KEY, INPUTS, soon())
    assert (await session.stats(soon())).by_name()["inferences"] == 1
    mcu.log("slot 1 is bad")
    mcu._seq += 3
    mcu.say(0xB0, 0, b"a stream of a later version")
    await pass_time(0)
    assert [line.text for line in lines] == ["slot 1 is bad"]
    assert session.counters.lost_frames == 3
    assert session.counters.unknown == 1


@virtual_time
async def test_ids_skip_zero_and_those_that_are_open() -> None:
    mcu = FakeMcu(compute_s=1)
    session, _ = await opened(mcu)
    session._last_id = 0xFFFFFFFE
    calls = [asyncio.create_task(session.infer(KEY, INPUTS, soon())) for _ in range(2)]
    await pass_time(0)
    session._last_id = 0xFFFFFFFE
    await session.request(StatsReq(), Stats, soon())
    assert [frame.id for frame in mcu.seen[1:]] == [0xFFFFFFFF, 1, 2]
    await asyncio.gather(*calls)
