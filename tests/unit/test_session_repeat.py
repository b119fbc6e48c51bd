"""Requests that the line lost are sent again as soon as a later one is answered, not when their time runs out."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from fake_mcu import INPUTS, KEY, FakeMcu, Line, assert_clean, opened, soon, virtual_time

from agent.link.session import Session
from agent.wire.codes import MessageType
from agent.wire.frame import RETRY, Frame, FrameDecoder


class Losing(Line):
    """Loses the frames for which `loses` is true."""

    loses: Callable[[Frame], bool] = staticmethod(lambda frame: False)

    def carry(self, data: bytes, deliver: Callable[[bytes], None]) -> None:
        for piece in data.split(b"\0")[:-1]:
            found = FrameDecoder(4096).feed(piece + b"\0")
            if not (found and isinstance(found[0], Frame) and self.loses(found[0])):
                super().carry(piece + b"\0", deliver)


async def four(session: Session, seconds: float = 10.0) -> float:
    """A window of INFERs; returns how long the last one took."""
    loop = asyncio.get_running_loop()
    began = loop.time()
    await asyncio.gather(*(session.infer(KEY, INPUTS, soon(seconds)) for _ in range(4)))
    return loop.time() - began


def once(type_: MessageType) -> Callable[[Frame], bool]:
    """The first frame of a type."""
    seen: list[Frame] = []

    def loses(frame: Frame) -> bool:
        if frame.type == type_:
            seen.append(frame)
        return frame.type == type_ and len(seen) == 1

    return loses


@virtual_time
async def test_a_lost_request_is_sent_again_when_the_next_is_answered() -> None:
    mcu = FakeMcu(compute_s=0.01)
    session, line = await opened(mcu, Losing)
    line.loses = once(MessageType.INFER)  # type: ignore[attr-defined]
    assert await four(session) < 0.06  # five runs at most; half of the deadline is 5 s
    assert mcu.runs == 4 and session.counters.repeats == 1
    assert_clean(session)


@virtual_time
async def test_a_lost_answer_is_given_again_and_nothing_runs_twice() -> None:
    mcu = FakeMcu(compute_s=0.01)
    session, line = await opened(mcu, Losing)
    line.loses = once(MessageType.RESULT)  # type: ignore[attr-defined]
    assert await four(session) < 0.06
    assert mcu.runs == 4
    # The answer from the store came before those that were still queued, which are not taken for lost.
    assert session.counters.repeats == 1 and session.counters.late == 0


@virtual_time
async def test_a_repeat_that_is_lost_is_repeated() -> None:
    mcu = FakeMcu(compute_s=0.01)
    session, line = await opened(mcu, Losing)
    first: list[int] = []

    def loses(frame: Frame) -> bool:
        """The first request of all, three times."""
        if frame.type == MessageType.INFER and (not first or frame.id == first[0]):
            first.append(frame.id)
            return len(first) <= 3
        return False

    line.loses = loses  # type: ignore[attr-defined]
    calls = [asyncio.create_task(four(session)) for _ in range(4)]
    assert max(await asyncio.gather(*calls)) < 0.4
    assert session.counters.repeats == 3 and session.counters.timeouts == 0 and mcu.runs == 16
    assert [bool(frame.flags & RETRY) for frame in mcu.seen if frame.id == first[0]] == [True]


@virtual_time
async def test_the_last_of_all_is_sent_again_at_half_of_its_time() -> None:
    mcu = FakeMcu(compute_s=0.01)
    session, line = await opened(mcu, Losing)
    line.loses = once(MessageType.INFER)  # type: ignore[attr-defined]
    loop = asyncio.get_running_loop()
    began = loop.time()
    await session.infer(KEY, INPUTS, soon(1.0))
    assert 0.5 <= loop.time() - began < 0.6 and session.counters.repeats == 1


@virtual_time
async def test_a_long_deadline_is_not_half_waited_for() -> None:
    mcu = FakeMcu(compute_s=0.01)
    session, line = await opened(mcu, Losing)
    lost: list[Frame] = []

    def loses(frame: Frame) -> bool:
        lost.append(frame)
        return frame.type == MessageType.INFER and len(lost) <= 2

    line.loses = loses  # type: ignore[attr-defined]
    loop = asyncio.get_running_loop()
    began = loop.time()
    await session.infer(KEY, INPUTS, soon(60))
    # After 1 s and after 2 s more.
    assert 3.0 <= loop.time() - began < 3.1 and session.counters.repeats == 2
