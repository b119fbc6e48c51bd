"""Model pushes against the fake peer, in virtual time."""

from __future__ import annotations

import asyncio
import hashlib

import pytest
from fake_mcu import (
    HELLO,
    INPUTS,
    KEY,
    LINES,
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

from agent.core.errors import LinkError
from agent.link.calls import RemoteError
from agent.link.push import COMMIT_TIMEOUT_S, ModelImage, push_model
from agent.link.session import LINGER_S
from agent.wire.codes import MessageType, SlotState


@pytest.mark.parametrize("kind", LINES)
@virtual_time
async def test_push_activates_a_model(kind: type[Line]) -> None:
    mcu = FakeMcu()
    session, _ = await opened(mcu, kind)
    image = ModelImage(hashlib.shake_128(b"model").digest(30_000), counter=8, selftest=bytes(74))
    steps: list[tuple[int, int]] = []
    status = await push_model(session, image, LoopClock(), lambda done, total: steps.append((done, total)))
    assert status.complete
    assert mcu.flashed == [image.data]
    assert steps[-1] == (30_074, 30_074)
    active = session.hello.active
    assert active is not None
    assert active.sha256 == hashlib.sha256(image.model).digest()
    await pass_time(LINGER_S * 2)
    assert_clean(session)


@virtual_time
async def test_push_resumes_where_it_was_cut() -> None:
    mcu = FakeMcu()
    image = ModelImage(hashlib.shake_128(b"model").digest(30_000), counter=8)
    session, line = await opened(mcu, Delayed)
    pushing = asyncio.create_task(push_model(session, image, LoopClock()))
    await pass_time(0.7)
    line.unplug()
    with pytest.raises(LinkError):
        await pushing
    before = [frame for frame in mcu.seen if frame.type == MessageType.MODEL_CHUNK]
    assert before
    session, _ = await opened(mcu)
    await push_model(session, image, LoopClock())
    assert mcu.flashed == [image.data]
    chunks = [frame for frame in mcu.seen if frame.type == MessageType.MODEL_CHUNK]
    assert len(chunks) == -(-30_000 // (HELLO.max_frame - 16))


@virtual_time
async def test_push_leaves_a_place_to_inferences_and_tells_refusals() -> None:
    mcu = FakeMcu()
    session, _ = await opened(mcu, Delayed)
    pushing = asyncio.create_task(push_model(session, ModelImage(bytes(60_000), counter=8), LoopClock()))
    await pass_time(0.5)
    assert not pushing.done()
    await session.infer(KEY, INPUTS, soon(0.3))
    await pushing
    with pytest.raises(RemoteError, match="DOWNGRADE"):
        await push_model(session, ModelImage(b"older", counter=1), LoopClock())


@virtual_time
async def test_push_to_a_silent_mcu_ends() -> None:
    mcu = FakeMcu()
    session, _ = await opened(mcu)
    mcu.mute = {MessageType.MODEL_STATUS}
    with pytest.raises(TimeoutError, match="MODEL_BEGIN in 4 tries"):
        await push_model(session, ModelImage(b"model", counter=8), LoopClock())
    await pass_time(LINGER_S * 2)
    assert_clean(session)


@virtual_time
async def test_a_commit_whose_every_answer_was_lost_is_seen_in_hello() -> None:
    mcu = FakeMcu()
    session, _ = await opened(mcu)
    image = ModelImage(bytes(5_000), counter=8)

    def silence_at_the_end(received: int, total: int) -> None:
        if received == total:
            mcu.mute = {MessageType.MODEL_STATUS}

    pushing = asyncio.create_task(push_model(session, image, LoopClock(), silence_at_the_end))
    await pass_time(COMMIT_TIMEOUT_S - 1)
    assert mcu.flashed == [image.data] and not pushing.done()
    await pass_time(2)
    mcu.mute = set()
    status = await pushing
    assert status.state == SlotState.ACTIVE and status.complete
    assert_clean(session)
