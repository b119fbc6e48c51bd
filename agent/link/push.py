"""Sending a model to a microcontroller (docs/wire-protocol.md, section 3.6): begin or resume, chunks, commit.

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
from agent.wire.body import Message
from agent.wire.codes import ErrorCode, SignatureKind
from agent.wire.frame import OVERHEAD
from agent.wire.messages import Slot
from agent.wire.update import (
    ALLOW_LOWER_COUNTER,
    CHUNK_OVERHEAD,
    CHUNK_UNIT,
    MANIFEST_FORMAT,
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
TRIES: Final = 4
"""Of each step, each sent up to twice: at one frame in five lost, 1 step in 300 million fails."""
ROUNDS: Final = 3
"""How often chunks that the MCU still lacks are sent again."""
BUSY_PAUSE_S: Final = 0.05
"""Before a refused chunk is sent again: about one inference."""


@dataclass(frozen=True, slots=True)
class ModelImage:
    """A model and what MODEL_BEGIN says of it.

    `selftest` is input bytes and expected output bytes, or empty. `arena` is bytes. `sign` makes an Ed25519 signature
    (64 bytes) of the manifest.
    """

    model: bytes
    counter: int
    arena: int = 0
    selftest: bytes = b""
    tolerance: int = 1
    allow_lower_counter: bool = False
    sign: Callable[[bytes], bytes] | None = None

    @property
    def data(self) -> bytes:
        return self.model + self.selftest

    def manifest(self, chunk: int) -> ModelBegin:
        """MODEL_BEGIN for chunks of `chunk` bytes."""
        unsigned = ModelBegin(
            format=MANIFEST_FORMAT,
            flags=ALLOW_LOWER_COUNTER if self.allow_lower_counter else 0,
            chunk=chunk,
            model_length=len(self.model),
            selftest_length=len(self.selftest),
            counter=self.counter,
            arena=self.arena,
            selftest_tolerance=self.tolerance,
            model_sha256=hashlib.sha256(self.model).digest(),
            image_sha256=hashlib.sha256(self.data).digest(),
        )
        if self.sign is None:
            return unsigned
        return unsigned.with_signature(SignatureKind.ED25519, self.sign(unsigned.signed()))


async def push_model(
    session: Session,
    image: ModelImage,
    clock: Clock,
    progress: Callable[[int, int], None] = lambda received, total: None,
) -> ModelStatus:
    """Send, verify and activate. `progress` is told bytes received by the MCU and bytes in all.

    Raises `RemoteError` (refused, the text says why; the model that was active goes on), `TimeoutError`, `LinkError`,
    `ProtocolError`.
    """
    chunk = min(session.hello.max_frame - OVERHEAD - CHUNK_OVERHEAD, 0xFFFF) // CHUNK_UNIT * CHUNK_UNIT
    manifest = image.manifest(chunk)
    data = image.data
    for _ in range(ROUNDS):
        status = await _step(session, manifest, BEGIN_TIMEOUT_S, clock)
        if status.image_sha256 != manifest.image_sha256 or status.length != len(data):
            raise ProtocolError("MODEL_STATUS shows another image than the one that was begun")
        progress(status.received, len(data))
        await _send_chunks(session, data, status, clock, progress)
        try:
            committed = await _step(session, ModelCommit(), COMMIT_TIMEOUT_S, clock)
        except RemoteError as error:
            # NOT_BEGUN may mean that it is done: every answer to the first MODEL_COMMIT was lost.
            if error.code == ErrorCode.NOT_BEGUN and (done := await _active(session, manifest, clock)) is not None:
                return replace(status, slot=done.index, state=done.state, received=len(data), next=len(data))
            if error.code != ErrorCode.INCOMPLETE:
                raise
            continue
        await session.refresh(clock.monotonic() + CHUNK_TIMEOUT_S)
        return committed
    raise TimeoutError(f"the MCU still lacked chunks after {ROUNDS} rounds")


async def _active(session: Session, manifest: ModelBegin, clock: Clock) -> Slot | None:
    """The slot that runs the model of this manifest."""
    active = (await session.refresh(clock.monotonic() + CHUNK_TIMEOUT_S)).active
    return active if active is not None and active.sha256 == manifest.model_sha256 else None


async def _send_chunks(
    session: Session, data: bytes, status: ModelStatus, clock: Clock, progress: Callable[[int, int], None]
) -> None:
    """All that is missing, a window of them at a time. One place is left to inferences."""
    missing: Iterator[int] = status.missing()
    under_way: set[asyncio.Task[ModelStatus]] = set()
    done: set[asyncio.Task[ModelStatus]] = set()
    lanes = max(1, session.window - 1)
    received = status.received
    try:
        while True:
            for offset in missing:
                message = ModelChunk(offset, data[offset : offset + status.chunk])
                under_way.add(asyncio.create_task(_step(session, message, CHUNK_TIMEOUT_S, clock)))
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


async def _step(session: Session, message: Message, timeout_s: float, clock: Clock) -> ModelStatus:
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
