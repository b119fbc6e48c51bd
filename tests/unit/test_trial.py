"""The trial of a pushed model against the fake peer, in virtual time: proved and confirmed, or taken back."""

from __future__ import annotations

import asyncio
import hashlib
import re
from dataclasses import replace

import pytest
from fake_mcu import (
    EMPTY_SLOT,
    HELLO,
    HELLO_1_1,
    LINES,
    MODEL_SHA256,
    Delayed,
    FakeMcu,
    Line,
    LoopClock,
    assert_clean,
    opened,
    pass_time,
    virtual_time,
)
from fake_update import MODEL

from agent.core.errors import LinkError
from agent.link.push import ModelImage, push_model
from agent.link.session import LINGER_S, Session
from agent.link.trial import DECIDE_TIMEOUT_S, TRIES, TrialFailed
from agent.wire.codes import MessageType, ResetCause, Rollback, SlotState
from agent.wire.update import MANIFEST_FORMAT, MANIFEST_FORMAT_MINOR_0, ModelBegin

INPUTS = [bytes(range(i, i + 16)) for i in range(3)]
SAMPLES = tuple((inputs, inputs[:4]) for inputs in INPUTS)
"""As the fake's model answers."""
IMAGE = ModelImage(hashlib.shake_128(b"model").digest(5_000), counter=8, selftest=b"".join(SAMPLES[0]), samples=SAMPLES)
FORMER = MODEL_SHA256.hex()[:12]


class Told(list[str]):
    def __call__(self, text: str) -> None:
        self.append(text)


def asked(mcu: FakeMcu, type_: MessageType) -> int:
    return sum(frame.type == type_ for frame in mcu.seen)


def runs(session: Session) -> tuple[bytes, int] | None:
    active = session.hello.active
    return (active.sha256, active.state) if active is not None else None


@pytest.mark.parametrize("kind", LINES)
@virtual_time
async def test_a_push_proves_the_model_by_inference_and_confirms_it(kind: type[Line]) -> None:
    mcu, told = FakeMcu(HELLO_1_1), Told()
    session, _ = await opened(mcu, kind)
    status = await push_model(session, IMAGE, LoopClock(), tell=told)
    assert (status.slot, status.state, status.complete) == (1, SlotState.ACTIVE, True)
    assert told == [
        "slot 1: verified by the board, in trial; the former model is kept",
        "proved: 3 of 3 answers right",
        "slot 1: confirmed",
    ]
    assert mcu.runs == 3
    assert runs(session) == (IMAGE.model_sha256, SlotState.ACTIVE)
    await pass_time(LINGER_S * 2)
    assert_clean(session)


@virtual_time
async def test_without_samples_the_images_own_self_test_is_asked() -> None:
    mcu, told = FakeMcu(HELLO_1_1), Told()
    session, _ = await opened(mcu)
    await push_model(session, replace(IMAGE, samples=()), LoopClock(), tell=told)
    assert "proved: 1 of 1 answers right" in told
    await push_model(session, ModelImage(b"no self-test at all", counter=9), LoopClock(), tell=told)
    assert "it answers; not compared" in told
    assert mcu.runs == 2


@pytest.mark.parametrize(("off", "kept"), [(1, True), (-1, True), (2, False), (-128, False)])
@virtual_time
async def test_answers_are_compared_within_the_tolerance(off: int, kept: bool) -> None:
    mcu = FakeMcu(HELLO_1_1)
    mcu.model = lambda inputs: inputs[:2] + bytes([inputs[2] + off & 0xFF, inputs[3]])
    session, _ = await opened(mcu)
    if kept:
        await push_model(session, IMAGE, LoopClock())
        assert runs(session) == (IMAGE.model_sha256, SlotState.ACTIVE)
        return
    text = f"taken back: sample 0: output byte 2 is off by {abs(off)}, allowed is 1; the former model {FORMER}"
    with pytest.raises(TrialFailed, match=re.escape(text)):
        await push_model(session, IMAGE, LoopClock())
    assert runs(session) == (MODEL_SHA256, SlotState.ACTIVE)
    assert session.hello.rollback == Rollback.REQUESTED
    assert asked(mcu, MessageType.MODEL_CONFIRM) == 0


@virtual_time
async def test_an_answer_of_another_size_is_wrong() -> None:
    mcu = FakeMcu(HELLO_1_1)
    mcu.model = lambda inputs: inputs[:3]
    session, _ = await opened(mcu)
    with pytest.raises(TrialFailed, match="sample 0: 3 bytes of outputs, expected 4"):
        await push_model(session, IMAGE, LoopClock())
    assert runs(session) == (MODEL_SHA256, SlotState.ACTIVE)


@pytest.mark.parametrize(
    ("cause", "words"),
    [(ResetCause.WATCHDOG, "the board crashed or hung with the model"), (ResetCause.POWER_ON, "was reset before")],
)
@virtual_time
async def test_a_board_that_resets_in_trial_has_gone_back_and_says_why(cause: ResetCause, words: str) -> None:
    mcu, told = FakeMcu(HELLO_1_1, compute_s=2.0), Told()
    session, _ = await opened(mcu)
    pushing = asyncio.create_task(push_model(session, IMAGE, LoopClock(), tell=told))
    await pass_time(1)
    assert len(told) == 1 and not pushing.done()
    mcu.boot(cause)
    with pytest.raises(TrialFailed, match=f"{words}.*the former model {FORMER} .* runs again"):
        await pushing
    assert runs(session) == (MODEL_SHA256, SlotState.ACTIVE)
    await pass_time(LINGER_S * 2)
    assert_clean(session)


@pytest.mark.parametrize(("cause", "kept"), [(ResetCause.POWER_ON, True), (ResetCause.WATCHDOG, False)])
@virtual_time
async def test_a_boards_first_model_is_proved_again_after_a_reset_that_says_nothing_against_it(
    cause: ResetCause, kept: bool
) -> None:
    mcu = FakeMcu(replace(HELLO_1_1, slots=(replace(EMPTY_SLOT, index=0), EMPTY_SLOT)), compute_s=2.0)
    session, _ = await opened(mcu)
    pushing = asyncio.create_task(push_model(session, IMAGE, LoopClock()))
    await pass_time(1)
    mcu.boot(cause)
    if kept:
        assert (await pushing).state == SlotState.ACTIVE
        assert asked(mcu, MessageType.MODEL_ROLLBACK) == 0
        assert runs(session) == (IMAGE.model_sha256, SlotState.ACTIVE)
    else:
        with pytest.raises(TrialFailed, match=r"crashed or hung.*the board has none now"):
            await pushing
    await pass_time(LINGER_S * 2)
    assert_clean(session)


@virtual_time
async def test_a_failed_inference_ends_the_trial() -> None:
    mcu = FakeMcu(HELLO_1_1)
    session, _ = await opened(mcu)
    mcu.fails = True
    with pytest.raises(TrialFailed, match=r"an inference with the model failed .*an operator gave up"):
        await push_model(session, IMAGE, LoopClock())
    assert asked(mcu, MessageType.MODEL_ROLLBACK) == 0, "the board went back by itself"


@virtual_time
async def test_a_model_that_never_answers_is_taken_back() -> None:
    mcu = FakeMcu(HELLO_1_1)
    session, _ = await opened(mcu)
    mcu.mute = {MessageType.RESULT}
    with pytest.raises(TrialFailed, match=f"did not answer in {TRIES} tries.*the former model"):
        await push_model(session, IMAGE, LoopClock())
    assert runs(session) == (MODEL_SHA256, SlotState.ACTIVE)


@virtual_time
async def test_a_confirmation_whose_answers_were_lost_counts() -> None:
    mcu = FakeMcu(HELLO_1_1)
    session, _ = await opened(mcu)

    def silence(text: str) -> None:
        if text.startswith("proved"):
            mcu.mute = {MessageType.MODEL_STATUS}

    status = await push_model(session, IMAGE, LoopClock(), tell=silence)
    assert asked(mcu, MessageType.MODEL_CONFIRM) >= TRIES
    assert status.state == SlotState.ACTIVE
    assert runs(session) == (IMAGE.model_sha256, SlotState.ACTIVE)


@virtual_time
async def test_a_confirmation_that_never_arrives_is_taken_back() -> None:
    mcu = FakeMcu(HELLO_1_1)
    session, _ = await opened(mcu)
    mcu._on_model_confirm = lambda id_, body: None  # type: ignore[method-assign]
    with pytest.raises(TrialFailed, match="no answer to MODEL_CONFIRM"):
        await push_model(session, IMAGE, LoopClock())
    assert runs(session) == (MODEL_SHA256, SlotState.ACTIVE)


@virtual_time
async def test_a_confirmation_that_comes_too_late_is_told() -> None:
    mcu = FakeMcu(HELLO_1_1)
    session, _ = await opened(mcu)

    def time_runs_out(text: str) -> None:
        if text.startswith("proved"):
            mcu.roll_back(Rollback.TIMEOUT)

    with pytest.raises(TrialFailed, match=r"not confirmed in time .*MODEL_MISMATCH.*the former model"):
        await push_model(session, IMAGE, LoopClock(), tell=time_runs_out)


@virtual_time
async def test_a_push_goes_on_with_a_trial_that_nobody_confirmed() -> None:
    mcu = FakeMcu(HELLO_1_1)
    session, line = await opened(mcu, Delayed)

    def cut(text: str) -> None:
        if "in trial" in text:
            line.unplug()

    with pytest.raises(LinkError, match=r"may be in trial still.*after 300 s.*pushing the same model again"):
        await push_model(session, IMAGE, LoopClock(), tell=cut)
    chunks = asked(mcu, MessageType.MODEL_CHUNK)
    told = Told()
    session, _ = await opened(mcu)
    assert session.hello.trial is not None
    status = await push_model(session, IMAGE, LoopClock(), tell=told)
    assert status.state == SlotState.ACTIVE and status.complete
    assert "in trial since an earlier push" in told[0]
    assert asked(mcu, MessageType.MODEL_CHUNK) == chunks, "nothing is sent twice"


@virtual_time
async def test_another_model_in_trial_is_taken_back_first() -> None:
    mcu, told = FakeMcu(HELLO_1_1), Told()
    session, line = await opened(mcu)
    with pytest.raises(LinkError):
        await push_model(session, IMAGE, LoopClock(), tell=lambda _: line.unplug())
    session, _ = await opened(mcu)
    other = replace(IMAGE, model=b"another model", counter=9)
    await push_model(session, other, LoopClock(), tell=told)
    assert "another model is in trial" in told[0]
    assert runs(session) == (other.model_sha256, SlotState.ACTIVE)


@virtual_time
async def test_a_board_of_minor_0_has_no_trial_and_gets_the_manifest_it_knows() -> None:
    for hello, format_ in ((HELLO, MANIFEST_FORMAT_MINOR_0), (HELLO_1_1, MANIFEST_FORMAT)):
        mcu = FakeMcu(hello)
        session, _ = await opened(mcu)
        status = await push_model(session, replace(IMAGE, board="fake", operators=(9,)), LoopClock())
        assert status.state == SlotState.ACTIVE
        begin = next(ModelBegin.from_bytes(f.payload) for f in mcu.seen if f.type == MessageType.MODEL_BEGIN)
        assert begin.format == format_
        assert (begin.board, begin.operators) == (("fake", (9,)) if format_ == MANIFEST_FORMAT else ("", ()))
        assert asked(mcu, MessageType.MODEL_CONFIRM) == (0 if hello is HELLO else 1)


@virtual_time
async def test_a_rollback_that_cannot_be_asked_for_is_told() -> None:
    mcu = FakeMcu(HELLO_1_1)
    mcu.model = lambda inputs: bytes(4)
    session, _ = await opened(mcu)
    mcu._on_model_rollback = lambda id_, body: None  # type: ignore[method-assign]
    with pytest.raises(TrialFailed, match=r"could not be taken back .*goes back to the former one by itself"):
        await push_model(session, IMAGE, LoopClock())
    await pass_time(DECIDE_TIMEOUT_S)
    assert_clean(session)


@virtual_time
async def test_the_same_model_under_another_counter_is_not_mistaken_for_a_confirmed_one() -> None:
    mcu = FakeMcu(HELLO_1_1, compute_s=2.0)
    session, _ = await opened(mcu)
    pushing = asyncio.create_task(push_model(session, replace(IMAGE, model=MODEL), LoopClock()))
    await pass_time(1)
    assert session.hello.trial is not None and session.hello.trial.sha256 == MODEL_SHA256
    mcu.boot(ResetCause.POWER_ON)
    with pytest.raises(TrialFailed, match=r"was reset before the model was confirmed.*\(counter 7\) runs again"):
        await pushing
