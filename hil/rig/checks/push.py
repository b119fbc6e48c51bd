"""Model push: speed, exchange of models, and images that must be refused."""

from __future__ import annotations

import hashlib
from dataclasses import replace

from agent.link.calls import RemoteError
from agent.link.push import ModelImage, push_model
from agent.link.session import Session
from agent.wire.codes import Capability, ErrorCode, name_of
from agent.wire.frame import Frame
from agent.wire.update import MANIFEST_FORMAT, ModelBegin, ModelChunk
from hil.rig.check import Findings, Skip, check, require
from hil.rig.images import image_of
from hil.rig.rig import Rig
from hil.rig.traffic import Caller, Outcome, drive

LEAST = 95.0
TRIES = 6
"""The best counts: a busy machine makes a line slower than it is, never faster."""
BITS = 10
LARGE_S, LEAST_BYTES, MOST_BYTES = 1.5, 32 * 1024, 128 * 1024
"""A large image takes so long at the line's rate, within these limits: many chunks, and no long wait."""


def needs_engine(session: Session) -> None:
    """A board without an engine takes no model: it could not test it."""
    if not session.hello.capabilities & Capability.ENGINE:
        raise Skip(f"the board has no engine ({session.hello.engine})")


def large_image(rig: Rig, session: Session, seed: int) -> ModelImage:
    """Digits with filling."""
    size = min(max(int(LARGE_S * rig.driver.serial.baud / BITS), LEAST_BYTES), MOST_BYTES)
    return image_of(rig.catalog, rig.samples().variant, size=min(size, session.hello.slot_size - 1024), seed=seed)


def line_bytes_of(image: ModelImage, session: Session) -> tuple[int, int]:
    """Bytes on the line of all chunks of an image, and how many they are."""
    chunk = (session.hello.max_frame - 16) // 16 * 16
    offsets = range(0, len(image.data), chunk)
    bodies = (ModelChunk(offset, image.data[offset : offset + chunk]).to_bytes() for offset in offsets)
    return sum(len(Frame(ModelChunk.TYPE, 0, 1, 1, body).encode()) for body in bodies), len(offsets)


@check("push", "speed", "The chunks of a large model travel at 95 % of the line's rate or more.")
async def speed(rig: Rig, findings: Findings) -> None:
    baud, best = rig.driver.serial.baud, 0.0
    with rig.full_speed(findings) as port:
        async with rig.session(port) as session:
            needs_engine(session)
            for attempt in range(TRIES):
                image = large_image(rig, session, rig.seed + attempt)
                size, (on_line, chunks) = len(image.data), line_bytes_of(image, session)
                marks: list[float] = []
                began = rig.clock.monotonic()
                await push_model(session, image, rig.clock, lambda *_, marks=marks: marks.append(rig.clock.monotonic()))
                took_s, transfer_s = rig.clock.monotonic() - began, marks[-1] - marks[0]
                goodput = 100 * size * BITS / baud / transfer_s
                if goodput > best:
                    best = goodput
                    findings.figures.clear()
                    findings.figure("image", size / 1024, "KiB", note=f"{chunks} chunks")
                    findings.figure("floor", size * BITS / baud, "s", note=f"{size} bytes x {BITS} / {baud}")
                    findings.figure(
                        "transfer took", transfer_s, "s", note="first chunk sent to last chunk acknowledged"
                    )
                    findings.figure("goodput", goodput, "%", least=LEAST, note="image only, of the line's rate")
                    share = 100 * on_line * BITS / baud / transfer_s
                    findings.figure("with the frames' overhead", share, "%")
                    findings.figure(
                        "overhead of a chunk's frame", (on_line - size) / chunks, "B", note="4 B of them offset"
                    )
                    findings.figure("begin, verify and make active", took_s - transfer_s, "s")
                if best >= LEAST:
                    break


@check("push", "exchange", "Another model is made active, answers rightly, and is replaced by the first one again.")
async def exchange(rig: Rig, findings: Findings) -> None:
    async with rig.direct_session() as session:
        needs_engine(session)
        for family in ("motion", "digits"):
            samples = rig.samples(family)
            began = rig.clock.monotonic()
            await push_model(session, image_of(rig.catalog, samples.variant), rig.clock)
            findings.figure(f"{samples.variant.name} active after", rig.clock.monotonic() - began, "s")
            call = Caller(session, samples, rig.seed)
            tally = await drive(call, lanes=call.lanes, deadline_s=5, count=32)
            require(tally.right == 32, f"{family}: {tally.text()}: {'; '.join(call.wrongs[:3])}")


class _OtherDigest(ModelImage):
    """Its manifest is of other bytes than those that are sent."""

    def manifest(self, chunk: int, format_: int = MANIFEST_FORMAT) -> ModelBegin:
        other = hashlib.sha256(self.data + b"damaged").digest()
        return replace(ModelImage.manifest(self, chunk, format_), image_sha256=other)


@check("push", "refused", "Images that are damaged, truncated or wrong are refused; the model that was active goes on.")
async def refused(rig: Rig, findings: Findings) -> None:
    async with rig.direct_session() as session:
        needs_engine(session)
        good = image_of(rig.catalog, rig.samples().variant)
        digest = _OtherDigest(good.model, good.counter, good.arena, good.selftest, allow_lower_counter=True)
        truncated = replace(good, model=good.model[: len(good.model) // 2])
        wrong_answer = bytes([good.selftest[-1] ^ 0x40])
        selftest = replace(good, selftest=good.selftest[:-1] + wrong_answer)
        too_large = replace(good, model=good.model + bytes(session.hello.slot_size))
        downgrade = replace(good, model=good.model + b"\0", counter=0, allow_lower_counter=False)
        for name, image, codes in (
            ("other bytes than its digest", digest, {ErrorCode.DIGEST}),
            ("half a model", truncated, {ErrorCode.INVALID_MODEL}),
            ("a self-test that it fails", selftest, {ErrorCode.SELFTEST}),
            ("more than a slot holds", too_large, {ErrorCode.TOO_LARGE, ErrorCode.BAD_LENGTH}),
            ("an older version", downgrade, {ErrorCode.DOWNGRADE}),
        ):
            await _pushed(rig, session, name, image, codes, findings)
        call = Caller(session, rig.samples(), rig.seed)
        require(await call(5) is Outcome.RIGHT, f"the active model does not answer any more: {call.wrongs}")


async def _pushed(
    rig: Rig, session: Session, name: str, image: ModelImage, codes: set[ErrorCode], findings: Findings
) -> None:
    try:
        await push_model(session, image, rig.clock)
    except RemoteError as error:
        require(error.code in codes, f"{name}: was refused with {name_of(error.code)}")
        findings.note(f"{name}: {name_of(error.code)}")
    else:
        require(False, f"{name}: was taken")


CHECKS = (speed, exchange, refused)
