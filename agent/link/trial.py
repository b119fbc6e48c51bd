"""The trial of a new model on a board (docs/wire-protocol.md, section 3.6): proved by inference, then confirmed or
taken back. For who pushed it, and for a daemon that finds a board in trial.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Final

import numpy as np

from agent.core.clock import Clock
from agent.core.errors import EdgeAgentError, LinkError
from agent.link.calls import RemoteError
from agent.link.session import Session
from agent.wire.body import Message
from agent.wire.codes import ErrorCode, Rollback, SlotState
from agent.wire.messages import Hello, Slot
from agent.wire.update import MODEL_TAG_BYTES, ModelConfirm, ModelRollback, ModelStatus

TRIES: Final = 4
"""Of each step, each sent up to twice: at one frame in five lost, 1 step in 300 million fails."""
BUSY_PAUSE_S: Final = 0.05
"""Before a refused request is sent again: about one inference."""
INFER_TIMEOUT_S: Final = 5.0
"""Of each try. All of them together outlast a watchdog, so that a hang is seen as what it is: a reset."""
DECIDE_TIMEOUT_S: Final = 5.0
"""One directory write, and for a rollback the loading of a model."""
BACK_TIMEOUT_S: Final = 15.0
"""For the HELLO of a board that was reset."""

Samples = Sequence[tuple[bytes, bytes]]
"""Input tensors and the outputs that are right, each concatenated as in INFER and RESULT."""


class TrialFailed(EdgeAgentError):
    """The model was taken back, or could not be shown to be right; the message says why, and what runs now."""


async def step(session: Session, message: Message, timeout_s: float, clock: Clock) -> ModelStatus:
    """One exchange of an update, tried again when it stays unanswered. Raises as `Session.request`."""
    for _ in range(TRIES):
        try:
            return (await session.request(message, ModelStatus, clock.monotonic() + timeout_s)).message
        except TimeoutError:
            continue
        except RemoteError as error:
            if error.code != ErrorCode.BUSY:
                raise
            await asyncio.sleep(BUSY_PAUSE_S)
    raise TimeoutError(f"no answer to {message.TYPE.name} in {TRIES} tries of {timeout_s:g} s")


async def prove_and_confirm(
    session: Session,
    trial: Slot,
    samples: Samples,
    tolerance: int,
    clock: Clock,
    tell: Callable[[str], None] = lambda text: None,
) -> Slot:
    """Ask the model in trial for all samples, and confirm it if every output byte (as i8) is within `tolerance`.

    Without samples it is asked once with zeros: that shows that it runs, not that it is right. Returns the slot, now
    active. Raises `TrialFailed` (the board went back, or was asked to) and `LinkError`: then nobody knows whether it
    was confirmed, and if not the board goes back by itself.
    """
    proof: Samples = samples or [(bytes(trial.input_bytes), b"")]
    for _ in range(TRIES):
        boot_id = session.hello.boot_id
        try:
            wrong = await _wrong(session, trial, proof, tolerance, clock)
            if not wrong:
                tell(
                    f"proved: {len(samples)} of {len(samples)} answers right" if samples else "it answers; not compared"
                )
                await step(session, ModelConfirm(trial.sha256[:MODEL_TAG_BYTES]), DECIDE_TIMEOUT_S, clock)
        except (RemoteError, LinkError, TimeoutError) as error:
            if session.error is not None:
                raise LinkError(f"{error}; {_unconfirmed(session.hello)}") from None
            wrong = str(error)
            if await _kept_over_reset(session, trial, boot_id, clock):
                continue
        break
    return await _conclude(session, trial, wrong, clock)


async def take_back(session: Session, trial: Slot, clock: Clock) -> Hello:
    """End the trial; the former model comes back. Raises as `Session.request`; not if the trial is over already."""
    try:
        await step(session, ModelRollback(trial.sha256[:MODEL_TAG_BYTES]), DECIDE_TIMEOUT_S, clock)
    except RemoteError as error:
        if error.code != ErrorCode.MODEL_MISMATCH:
            raise
    return await session.refresh(clock.monotonic() + BACK_TIMEOUT_S)


async def _wrong(session: Session, trial: Slot, samples: Samples, tolerance: int, clock: Clock) -> str:
    """What is wrong with its answers; empty if nothing is."""
    for index, (inputs, expected) in enumerate(samples):
        outputs = await _outputs(session, trial.sha256[:MODEL_TAG_BYTES], inputs, clock)
        if not expected:
            continue
        if len(outputs) != len(expected):
            return f"sample {index}: {len(outputs)} bytes of outputs, expected {len(expected)}"
        apart = np.frombuffer(outputs, np.int8).astype(int) - np.frombuffer(expected, np.int8)
        worst = int(np.abs(apart).argmax())
        if abs(apart[worst]) > tolerance:
            return f"sample {index}: output byte {worst} is off by {abs(apart[worst])}, allowed is {tolerance}"
    return ""


async def _outputs(session: Session, model: bytes, inputs: bytes, clock: Clock) -> bytes:
    for _ in range(TRIES):
        try:
            return (await session.infer(model, inputs, clock.monotonic() + INFER_TIMEOUT_S)).message.outputs
        except TimeoutError:
            continue
        except RemoteError as error:
            if error.code not in (ErrorCode.BUSY, ErrorCode.DEADLINE):
                raise
            await asyncio.sleep(BUSY_PAUSE_S)
    raise TimeoutError(f"the new model did not answer in {TRIES} tries of {INFER_TIMEOUT_S:g} s")


async def _kept_over_reset(session: Session, trial: Slot, boot_id: int, clock: Clock) -> bool:
    """Whether the board was reset and is in trial still: its first model, and a reset that says nothing against it."""
    hello = await session.refresh(clock.monotonic() + BACK_TIMEOUT_S)
    slot = _same(hello, trial)
    return hello.boot_id != boot_id and slot is not None and slot.state == SlotState.TRIAL


async def _conclude(session: Session, trial: Slot, wrong: str, clock: Clock) -> Slot:
    """What the board itself says has become of the trial."""
    hello = await session.refresh(clock.monotonic() + BACK_TIMEOUT_S)
    slot = _same(hello, trial)
    if slot is not None and slot.state == SlotState.ACTIVE:
        return slot  # also if it is the answer to MODEL_CONFIRM that was lost
    if slot is not None and slot.state == SlotState.TRIAL:
        try:
            hello = await take_back(session, slot, clock)
        except (RemoteError, TimeoutError) as error:
            raise TrialFailed(f"{wrong}; it could not be taken back ({error}): {_unconfirmed(hello)}") from None
    elif isinstance(hello.rollback, Rollback) and hello.rollback is not Rollback.NONE:
        wrong = f"{hello.rollback.words} ({wrong})" if wrong else hello.rollback.words
    raise TrialFailed(f"the new model was taken back: {wrong}; {_runs(hello)}")


def _same(hello: Hello, trial: Slot) -> Slot | None:
    """Its slot, if it still runs. The former model may be the same file under another counter."""
    slot = hello.active
    return slot if slot is not None and (slot.index, slot.sha256) == (trial.index, trial.sha256) else None


def _runs(hello: Hello) -> str:
    active = hello.active
    if active is None:
        return "there was no model before it, so the board has none now"
    return f"the former model {active.sha256.hex()[:12]} (counter {active.counter}) runs again"


def _unconfirmed(hello: Hello) -> str:
    return (
        "the model may be in trial still: the board goes back to the former one by itself at its next reset, or after "
        f"{hello.trial_s} s; pushing the same model again goes on with the trial"
    )
