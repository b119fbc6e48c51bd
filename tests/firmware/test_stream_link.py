"""The gateway's half of a stream against the firmware's, over good lines and bad ones, in virtual time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from board import FakeEngine, Image, MemoryFlash, model
from fake_mcu import Line, LoopClock, Lossy, soon, virtual_time
from test_session_repeat import Losing, once

from agent.core.errors import LinkError
from agent.link.calls import RemoteError
from agent.link.session import Session
from agent.link.stream import BoardStream, StreamSpec
from agent.wire.codes import ErrorCode, MessageType, SendInputs
from agent.wire.frame import Frame
from agent.wire.stream import StreamCredit, StreamStatus
from agent.wire.update import ModelBegin, ModelChunk, ModelCommit, ModelStatus
from hil.virtual.library import Hardware, Mcu

IMAGE = Image(model())
TAG = IMAGE.sha256[:8]
BOOT_LATE_S = 700.0
"""The board's clock is behind ours by the loop's start and this."""


class Firmware:
    """The real firmware as `fake_mcu.Line` wants a microcontroller; its clock is the loop's, its runs take time."""

    def __init__(self, compute_s: float = 0.002) -> None:
        self._loop = asyncio.get_running_loop()
        self._send: Callable[[bytes], None] = lambda data: None
        self._timer: asyncio.TimerHandle | None = None
        self._booted_at = self._loop.time() - BOOT_LATE_S
        self._busy_s = 0.0
        self._compute_s = compute_s
        self._received = bytearray()
        self.samples = 0
        self.broken_sensor = False
        self.engine = FakeEngine()
        self.engine.on_invoke = self._spend
        self.hardware = Hardware(
            flash=MemoryFlash(),
            engine=self.engine,
            uart_write=lambda data: self._send(data),
            clock_us=lambda: int((self._loop.time() + self._busy_s - self._booted_at) * 1e6),
            sample=self._sample,
            unique_id=7,
        )
        self.mcu = Mcu(self.hardware)

    def _sample(self, source: int, size: int) -> bytes | None:
        self.samples += 1
        if self.broken_sensor:
            return None
        return bytes([self.samples & 0x7F]) * size

    def _spend(self) -> None:
        self._busy_s += self._compute_s

    def attach(self, send: Callable[[bytes], None]) -> None:
        self._send = send

    def receive(self, data: bytes) -> None:
        self._received += data
        if not self._busy_s:  # else it computes, and what comes waits
            self._work()

    def _work(self) -> None:
        """One turn; the loop's time then catches up with what it took."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._busy_s = 0.0
        self.mcu.feed(bytes(self._received))
        self._received.clear()
        idle_s = self.mcu.idle_s()
        if idle_s == 0:
            self.mcu.poll()
            idle_s = self._busy_s
        if idle_s is not None:
            self._timer = self._loop.call_later(max(idle_s, 1e-6), self._work)

    def reset(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer, self._busy_s, self._booted_at = None, 0.0, self._loop.time()
        self.mcu.close()
        self.mcu = Mcu(self.hardware, 2)
        self._work()


async def connected(kind: type[Line] = Line, **options: float) -> tuple[Firmware, Session]:
    firmware = Firmware(**options)
    session = await opened(kind(firmware))
    await _push(session)
    return firmware, session


async def opened(line: Line) -> Session:
    session = Session(line, LoopClock())
    await session.open(soon(60))
    return session


async def _push(session: Session) -> None:
    await session.request(ModelBegin.from_bytes(IMAGE.begin(256)), ModelStatus, soon(60))
    for at in range(0, len(IMAGE.data), 256):
        await session.request(ModelChunk(at, IMAGE.data[at : at + 256]), ModelStatus, soon(60))
    await session.request(ModelCommit(), ModelStatus, soon(60))
    await session.refresh(soon(60))


async def streaming(session: Session, **options: Any) -> BoardStream:
    stream = BoardStream(session, StreamSpec(TAG, **({"interval_ms": 10} | options)), LoopClock())
    await stream.start(soon(60))
    return stream


@virtual_time
async def test_results_come_in_order_at_the_rate_asked_for() -> None:
    _, session = await connected()
    stream = await streaming(session, credits=8)
    began = asyncio.get_running_loop().time()
    found = [await stream.next() for _ in range(200)]
    assert [s.result.seq for s in found] == list(range(found[0].result.seq, found[0].result.seq + 200))
    assert asyncio.get_running_loop().time() - began == pytest.approx(2.0, abs=0.02)
    assert (stream.counters.lost, stream.counters.skipped, stream.counters.over_credit) == (0, 0, 0)
    session.close()


@virtual_time
async def test_who_does_not_take_results_off_gets_no_more_than_was_granted() -> None:
    firmware, session = await connected()
    stream = await streaming(session, credits=4)
    for _ in range(4):
        await stream.next()
    await asyncio.sleep(1.0)
    assert firmware.samples > 90
    kept = [await stream.next() for _ in range(6)]
    assert stream.counters.over_credit == 0
    seqs = [s.result.seq for s in kept]
    assert seqs == list(range(seqs[0], seqs[0] + 6))
    assert stream.counters.skipped > 80
    session.close()


@virtual_time
async def test_stamps_become_our_time() -> None:
    _, session = await connected()
    for _ in range(4):
        await session.ping(b"", soon(1))
    stream = await streaming(session)
    sampled = await stream.next()
    assert sampled.taken_at is not None
    assert sampled.bound_s < 1e-3
    assert sampled.taken_at == pytest.approx(sampled.received_at - 0.002, abs=0.003)
    session.close()


@virtual_time
async def test_without_a_ping_the_time_is_not_known() -> None:
    _, session = await connected()
    stream = await streaming(session)
    assert (await stream.next()).taken_at is None
    session.close()


@virtual_time
async def test_lost_frames_are_counted_and_never_stop_the_stream() -> None:
    _, session = await connected(Lossy)
    while True:
        try:
            stream = await streaming(session, credits=4)
            break
        except TimeoutError:
            continue
    found = [await stream.next() for _ in range(500)]
    seqs = [s.result.seq for s in found]
    assert seqs == sorted(set(seqs))
    assert stream.counters.lost > 50
    assert stream.counters.results == 500 + len(stream._waiting)
    session.close()


@virtual_time
async def test_a_reset_ends_the_stream_at_once_and_it_can_be_begun_again() -> None:
    firmware, session = await connected()
    stream = await streaming(session)
    await stream.next()
    firmware.reset()
    with pytest.raises(LinkError, match="reset"):
        while True:
            await stream.next()
    await session.refresh(soon(5))
    again = await streaming(session)
    assert (await again.next()).result.seq == 0
    session.close()


@virtual_time
async def test_requests_are_answered_while_the_sensor_takes_all_the_time() -> None:
    """A sample a millisecond, 2 ms each: the board could do nothing else."""
    _, session = await connected(compute_s=0.002)
    stream = await streaming(session, interval_ms=1, credits=32)
    taking = asyncio.create_task(_drain(stream))
    began = asyncio.get_running_loop().time()
    replies = await asyncio.gather(*(session.infer(TAG, bytes([i] * 64), soon(2)) for i in range(50)))
    took_s = asyncio.get_running_loop().time() - began
    assert [r.message.outputs for r in replies] == [FakeEngine.answer(bytes([i] * 64), 10) for i in range(50)]
    assert took_s < 50 * 2 * 0.002 * 1.3
    assert stream.counters.results > 40
    taking.cancel()
    session.close()


async def _drain(stream: BoardStream) -> None:
    while True:
        await stream.next()


@virtual_time
async def test_a_board_that_forgot_the_stream_is_noticed() -> None:
    _, session = await connected()
    stream = await streaming(session)
    await stream.next()
    await stream.stop(soon(1))
    session.tell(StreamCredit(1000))
    with pytest.raises(LinkError, match="ended"):
        while True:
            await stream.next()
    session.close()


@virtual_time
async def test_a_refused_start_leaves_nothing_behind() -> None:
    _, session = await connected()
    with pytest.raises(RemoteError) as refused:
        await streaming(session, source=9)
    assert refused.value.code == ErrorCode.SENSOR
    assert session._listeners == {}
    status = (await session.request(StreamCredit(0), StreamStatus, soon(1))).message
    assert not status.streams
    session.close()


@virtual_time
async def test_inputs_come_with_unsure_results() -> None:
    _, session = await connected()
    stream = await streaming(session, send_inputs=SendInputs.BELOW, threshold=127)
    result = (await stream.next()).result
    assert FakeEngine.answer(result.inputs, 10) == result.outputs
    session.close()


class Batch(Line):
    """Can hold what the board says, and give it to the gateway in one read."""

    held: bytes | None = None

    def _deliver(self, data: bytes) -> None:
        if self.held is None:
            super()._deliver(data)
        else:
            self.held += data

    def release(self) -> None:
        held, self.held = self.held or b"", None
        super()._deliver(held)


@virtual_time
async def test_no_session_is_given_an_answer_to_the_one_before_it() -> None:
    """The board was not reset: it knows the answers that it gave, and computes what it was asked, whoever asks now."""
    firmware, session = await connected(compute_s=0.2)
    for inputs in (1, 2, 3):
        await session.infer(TAG, bytes([inputs] * 64), soon(10))
    left = [asyncio.create_task(session.infer(TAG, bytes([inputs] * 64), soon(10))) for inputs in (4, 5, 6)]
    await asyncio.sleep(0.02)
    session.close()
    await asyncio.gather(*left, return_exceptions=True)
    line = Losing(firmware)
    again = await opened(line)
    line.loses = once(MessageType.INFER)  # what is asked first is asked again, marked as such
    replies = await asyncio.gather(*(again.infer(TAG, bytes([inputs] * 64), soon(10)) for inputs in (7, 8, 9)))
    assert [one.message.outputs for one in replies] == [FakeEngine.answer(bytes([i] * 64), 10) for i in (7, 8, 9)]
    again.close()


@virtual_time
async def test_a_sensor_without_a_reading_ends_its_stream_at_once_and_leaves_nothing() -> None:
    firmware, session = await connected()
    firmware.broken_sensor = True
    for _ in range(20):
        began = asyncio.get_running_loop().time()
        stream = await streaming(session, interval_ms=3_600_000)
        with pytest.raises(RemoteError) as ended:
            await stream.next()
        assert ended.value.code == ErrorCode.SENSOR
        assert asyncio.get_running_loop().time() - began < 1.0
        stream.close()
    assert session._listeners == {}
    session.close()


@virtual_time
async def test_after_a_reset_whose_greeting_was_lost_no_time_of_the_former_life_is_used() -> None:
    firmware = Firmware()
    line = Losing(firmware)
    session = await opened(line)
    await _push(session)
    await session.ping(b"", soon(1))
    stream = await streaming(session, interval_ms=100)
    await stream.next()
    line.loses = lambda frame: frame.type == MessageType.HELLO
    firmware.reset()
    line.loses = lambda frame: False
    with pytest.raises(LinkError):
        while True:
            await stream.next()
    assert (await (await streaming(session, interval_ms=100)).next()).taken_at is None
    assert session.counters.resets == 1
    session.close()


@virtual_time
async def test_a_pong_of_the_former_life_sets_no_clock() -> None:
    """It and the greeting of the board that was reset come in one read."""
    firmware = Firmware()
    line = Batch(firmware)
    session = await opened(line)
    await _push(session)
    line.held = b""
    asking = asyncio.create_task(session.ping(b"", soon(1)))
    await asyncio.sleep(0.01)
    firmware.reset()
    await asyncio.sleep(0.05)
    line.release()
    with pytest.raises(LinkError, match="reset"):
        await asking
    assert session.clock_sync.estimate(asyncio.get_running_loop().time()) is None
    await session.ping(b"", soon(1))
    assert (await (await streaming(session)).next()).taken_at is not None
    session.close()


@virtual_time
async def test_a_frame_of_a_type_that_is_not_known_answers_nothing() -> None:
    firmware = Firmware(compute_s=0.2)
    line = Line(firmware)
    session = await opened(line)
    await _push(session)
    asking = asyncio.create_task(session.infer(TAG, bytes(64), soon(10)))
    await asyncio.sleep(0)
    line._deliver(Frame(0x92, 0, 0, session._last_id, b"progress").encode())
    assert (await asking).message.outputs == FakeEngine.answer(bytes(64), 10)
    assert session.counters.unknown == 1
    session.close()
