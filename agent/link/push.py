"""Sending a model to a microcontroller (docs/wire-protocol.md, section 3.6): begin or resume, chunks, commit, trial.

Every step is bounded in time and in tries. A push that failed is resumed by pushing the same image again.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Final

from agent.core.clock import Clock
from agent.core.errors import ProtocolError
from agent.link.calls import RemoteError
from agent.link.session import Session
from agent.link.trial import Samples, prove_and_confirm, step, take_back
from agent.wire.codes import TRIAL_MINOR, ErrorCode, SignatureKind, SlotState
from agent.wire.frame import OVERHEAD
from agent.wire.messages import Slot
from agent.wire.update import (
    ALLOW_LOWER_COUNTER,
    BITMAP_BYTES,
    CHUNK_OVERHEAD,
    CHUNK_UNIT,
    COMMIT_TRIAL,
    MANIFEST_FORMAT,
    MANIFEST_FORMAT_MINOR_0,
    ModelBegin,
    ModelChunk,
    ModelCommit,
    ModelStatus,
)

BEGIN_TIMEOUT_S: Final = 30.0
"""A board may erase a whole slot first: 64 flash sectors of up to 0.4 s each."""
CHUNK_TIMEOUT_S: Final = 5.0
"""A window of 1 KB chunks takes 3.3 s at 9,600 baud; one sector write comes on top."""
COMMIT_TIMEOUT_S: Final = 60.0
"""Digest, signature (seconds on a small core), validation and self-test of a whole model."""
ROUNDS: Final = 3
"""How often chunks that the MCU still lacks are sent again."""


TOLERANCE: Final = 1
"""Of an output byte: kernels of different makers round differently in the last bit."""


@dataclass(frozen=True, slots=True)
class ModelImage:
    """A model and what MODEL_BEGIN says of it.

    `selftest` is input bytes and expected output bytes, or empty. `arena` is bytes. `board` and `operators` as in
    `ModelBegin`. `sign` makes an Ed25519 signature (64 bytes) of the manifest. `samples` are what the gateway proves
    the model with when it is in trial; empty: with the self-test.
    """

    model: bytes
    counter: int
    arena: int = 0
    selftest: bytes = b""
    tolerance: int = TOLERANCE
    allow_lower_counter: bool = False
    board: str = ""
    operators: tuple[int, ...] = ()
    sign: Callable[[bytes], bytes] | None = None
    samples: Samples = ()

    @property
    def data(self) -> bytes:
        return self.model + self.selftest

    @property
    def model_sha256(self) -> bytes:
        return hashlib.sha256(self.model).digest()

    def manifest(self, chunk: int, format_: int = MANIFEST_FORMAT) -> ModelBegin:
        """MODEL_BEGIN for chunks of `chunk` bytes."""
        unsigned = ModelBegin(
            format=format_,
            flags=ALLOW_LOWER_COUNTER if self.allow_lower_counter else 0,
            chunk=chunk,
            model_length=len(self.model),
            selftest_length=len(self.selftest),
            counter=self.counter,
            arena=self.arena,
            selftest_tolerance=self.tolerance,
            model_sha256=self.model_sha256,
            image_sha256=hashlib.sha256(self.data).digest(),
            board=self.board,
            operators=self.operators,
        )
        if self.sign is None:
            return unsigned
        return unsigned.with_signature(SignatureKind.ED25519, self.sign(unsigned.signed()))


async def push_model(
    session: Session,
    image: ModelImage,
    clock: Clock,
    progress: Callable[[int, int], None] = lambda received, total: None,
    tell: Callable[[str], None] = lambda text: None,
) -> ModelStatus:
    """Send, verify, prove by inference and confirm. `progress` is told bytes received by the MCU and bytes in all,
    `tell` each step in words.

    A board that has the image in trial already (somebody died before confirming it) is not sent it again. One of minor
    version 0 knows no trial: there the model is active when it was verified.

    Raises `RemoteError` (refused, the text says why; the model that was active goes on), `TrialFailed` (taken back),
    `TimeoutError`, `LinkError`, `ProtocolError`.
    """
    knows_trial = session.hello.minor >= TRIAL_MINOR
    chunk = min(session.hello.max_frame - OVERHEAD - CHUNK_OVERHEAD, 0xFFFF) // CHUNK_UNIT * CHUNK_UNIT
    manifest = image.manifest(chunk, MANIFEST_FORMAT if knows_trial else MANIFEST_FORMAT_MINOR_0)
    trial = session.hello.trial
    if trial is not None and (trial.sha256, trial.counter) == (manifest.model_sha256, manifest.counter):
        tell(f"slot {trial.index}: in trial since an earlier push, which did not confirm it; nothing is sent")
        status = _whole(trial, manifest)
    else:
        if trial is not None:
            tell(f"slot {trial.index}: another model is in trial and unconfirmed: taken back first")
            await take_back(session, trial, clock)
        status = await _deliver(session, image.data, manifest, clock, progress)
    if status.state != SlotState.TRIAL:
        return status
    trial = next(slot for slot in session.hello.slots if slot.index == status.slot)
    kept = any(slot.state == SlotState.STORED for slot in session.hello.slots)
    former = "the former model is kept" if kept else "there is no former model to go back to"
    tell(f"slot {trial.index}: verified by the board, in trial; {former}")
    samples = image.samples or _of_selftest(image.selftest, trial.input_bytes)
    slot = await prove_and_confirm(session, trial, samples, image.tolerance, clock, tell)
    tell(f"slot {slot.index}: confirmed")
    return replace(status, slot=slot.index, state=slot.state)


def _of_selftest(selftest: bytes, input_bytes: int) -> Samples:
    return [(selftest[:input_bytes], selftest[input_bytes:])] if selftest else []


def _whole(slot: Slot, manifest: ModelBegin) -> ModelStatus:
    """As MODEL_STATUS shows a slot that holds all of its image."""
    size = manifest.model_length + manifest.selftest_length
    return ModelStatus(
        slot.index, slot.state, manifest.chunk, size, size, size, bytes(BITMAP_BYTES), manifest.image_sha256
    )


async def _deliver(
    session: Session, data: bytes, manifest: ModelBegin, clock: Clock, progress: Callable[[int, int], None]
) -> ModelStatus:
    """Until the board has it, has verified it and runs it."""
    for _ in range(ROUNDS):
        status = await step(session, manifest, BEGIN_TIMEOUT_S, clock)
        if status.image_sha256 != manifest.image_sha256 or status.length != len(data):
            raise ProtocolError("MODEL_STATUS shows another image than the one that was begun")
        progress(status.received, len(data))
        await send_chunks(session, data, status, clock, progress)
        try:
            committed = await step(session, ModelCommit(COMMIT_TRIAL), COMMIT_TIMEOUT_S, clock)
        except RemoteError as error:
            # NOT_BEGUN may mean that it is done: every answer to the first MODEL_COMMIT was lost.
            if error.code == ErrorCode.NOT_BEGUN and (done := await _active(session, manifest, clock)) is not None:
                return _whole(done, manifest)
            if error.code != ErrorCode.INCOMPLETE:
                raise
            continue
        await session.refresh(clock.monotonic() + CHUNK_TIMEOUT_S)
        return committed
    raise TimeoutError(f"the MCU still lacked chunks after {ROUNDS} rounds")


async def _active(session: Session, manifest: ModelBegin, clock: Clock) -> Slot | None:
    """The slot that runs the model of this manifest under its counter; the same file may be there under another."""
    active = (await session.refresh(clock.monotonic() + CHUNK_TIMEOUT_S)).active
    if active is None or (active.sha256, active.counter) != (manifest.model_sha256, manifest.counter):
        return None
    return active


async def send_chunks(
    session: Session, data: bytes, status: ModelStatus, clock: Clock, progress: Callable[[int, int], None]
) -> None:
    """All that is missing after MODEL_BEGIN's `status`, a window of them at a time; one place is left to inferences.

    `progress` is told bytes received by the MCU and bytes in all. Raises as `Session.request`.
    """
    missing: Iterator[int] = status.missing()
    under_way: set[asyncio.Task[ModelStatus]] = set()
    done: set[asyncio.Task[ModelStatus]] = set()
    lanes = max(1, session.window - 1)
    received = status.received
    try:
        while True:
            for offset in missing:
                message = ModelChunk(offset, data[offset : offset + status.chunk])
                under_way.add(asyncio.create_task(step(session, message, CHUNK_TIMEOUT_S, clock)))
                if len(under_way) >= lanes:
                    break
            if not under_way:
                return
            done, under_way = await asyncio.wait(under_way, return_when=asyncio.FIRST_COMPLETED)
            received = max(received, *(task.result().received for task in done))
            progress(received, len(data))
    finally:
        for task in under_way:
            task.cancel()
        await asyncio.gather(*under_way, *done, return_exceptions=True)
