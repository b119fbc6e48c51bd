"""The life of a model on a board: trial, confirmation, the way back, and signatures."""

from __future__ import annotations

import asyncio
from dataclasses import replace

from agent.core.errors import EdgeAgentError
from agent.link.calls import RemoteError
from agent.link.push import ModelImage, push_model
from agent.link.session import Session
from agent.link.trial import TrialFailed
from agent.registry.signing import PrivateKey
from agent.wire.codes import TRIAL_MINOR, Capability, ErrorCode, Rollback, SlotState, name_of
from agent.wire.messages import Slot
from agent.wire.update import ALLOW_LOWER_COUNTER, ModelBegin
from hil.processes import StartError
from hil.rig.check import Findings, Skip, check, require
from hil.rig.checks.push import needs_engine
from hil.rig.drivers.virtual import VirtualDriver
from hil.rig.images import image_of
from hil.rig.protocols import RigError
from hil.rig.rig import Rig
from hil.rig.traffic import Caller, Outcome

RESET_LIMIT_S = 15.0
PROOF_ROUNDS = 1000
"""Of all samples: so long that a reset falls into the proof, and not behind it."""


def needs_trial(session: Session) -> None:
    needs_engine(session)
    if session.hello.minor < TRIAL_MINOR:
        raise Skip(f"protocol {session.hello.major}.{session.hello.minor} has no trial")


def former_model(session: Session) -> Slot:
    active = session.hello.active
    require(active is not None, "the board has no active model")
    assert active is not None
    return active


async def refused_trial(session: Session, image: ModelImage, rig: Rig, findings: Findings) -> None:
    """The push must fail after the trial, and the former model must be active again."""
    former = former_model(session)
    try:
        await push_model(session, image, rig.clock)
    except TrialFailed as error:
        findings.note(str(error))
    else:
        require(False, "the model was confirmed")
    active = former_model(session)
    require(active.state == SlotState.ACTIVE, f"a slot is {name_of(active.state)}")
    require(active.sha256 == former.sha256, "another model than the former one is active")
    findings.note(f"the board says: {name_of(session.hello.rollback)}")


@check(
    "push", "trial", "A new model is confirmed after it has answered rightly; one that answers wrongly is taken back."
)
async def trial(rig: Rig, findings: Findings) -> None:
    async with rig.direct_session() as session:
        needs_trial(session)
        image = image_of(rig.catalog, rig.samples("motion").variant)
        wrong = tuple((inputs, bytes([outputs[0] ^ 0x40]) + outputs[1:]) for inputs, outputs in image.samples)
        await refused_trial(session, replace(image, samples=wrong), rig, findings)
        require(session.hello.rollback == Rollback.REQUESTED, "the board gives another reason than that it was asked")
        steps: list[str] = []
        status = await push_model(session, image, rig.clock, tell=steps.append)
        require(status.state == SlotState.ACTIVE, f"the slot is {name_of(status.state)}")
        for step in steps:
            findings.note(step)
        require(session.hello.rollback == Rollback.NONE, "an old rollback is still told")


@check("push", "reset in trial", "A board that is reset before a new model is confirmed goes back to the former one.")
async def reset_in_trial(rig: Rig, findings: Findings) -> None:
    async with rig.direct_session() as session:
        needs_trial(session)
        image = image_of(rig.catalog, rig.samples("motion").variant)
        began = asyncio.Event()

        async def reset() -> None:
            await began.wait()
            await session.reset(rig.soon(RESET_LIMIT_S))

        former = former_model(session)
        resetting = asyncio.create_task(reset())
        long = replace(image, samples=tuple(image.samples) * PROOF_ROUNDS)
        try:
            await push_model(session, long, rig.clock, tell=lambda _: began.set())
        except TrialFailed as error:
            findings.note(str(error))
        else:
            require(False, "the model was confirmed")
        finally:
            resetting.cancel()
            await asyncio.gather(resetting, return_exceptions=True)
        active = former_model(session)
        require(active.sha256 == former.sha256, "another model than the former one is active")
        require(session.hello.rollback == Rollback.RESET, f"the board says {name_of(session.hello.rollback)}")
        call = Caller(session, rig.samples(), rig.seed)
        require(await call(5) is Outcome.RIGHT, f"the former model does not answer: {call.wrongs}")


class _Forged(ModelImage):
    """Its flag to allow a downgrade was set after it had been signed."""

    def manifest(self, chunk: int, format_: int = 2) -> ModelBegin:
        signed = ModelImage.manifest(self, chunk, format_)
        return replace(signed, flags=signed.flags ^ ALLOW_LOWER_COUNTER)


@check("push", "signed", "A board that verifies takes what its key signed, and nothing else.")
async def signed(rig: Rig, findings: Findings) -> None:
    if not isinstance(rig.driver, VirtualDriver):
        raise Skip("needs the private key of the board: the virtual board gets one of its own for this")
    key, other = PrivateKey.generate(), PrivateKey.generate()
    port = rig.stage.folder / "ttySigned"
    try:
        board = rig.stage.virtual_mcu(port, "--public-key", key.public.raw.hex(), name="signed")
    except StartError as error:
        raise RigError(str(error)) from None
    try:
        async with rig.session(port) as session:
            require(Capability.ED25519 in session.hello.capabilities, "HELLO does not say that it verifies")
            image = image_of(rig.catalog, rig.samples().variant)
            forged = _Forged(image.model, 1, image.arena, image.selftest, sign=key.sign)
            for name, bad in (
                ("not signed", image),
                ("signed with another key", replace(image, sign=other.sign)),
                ("altered after signing", forged),
            ):
                operations = (await session.stats(rig.soon(5))).by_name()["flash_operations"]
                try:
                    await push_model(session, bad, rig.clock)
                except RemoteError as error:
                    require(error.code == ErrorCode.SIGNATURE, f"{name}: was refused with {name_of(error.code)}")
                except EdgeAgentError as error:
                    require(False, f"{name}: {error}")
                else:
                    require(False, f"{name}: was taken")
                after = (await session.stats(rig.soon(5))).by_name()["flash_operations"]
                require(after == operations, f"{name}: flash was written for it")
                findings.note(f"{name}: SIGNATURE, before anything was written")
            status = await push_model(session, replace(image, sign=key.sign), rig.clock)
            require(status.state == SlotState.ACTIVE, f"the slot is {name_of(status.state)}")
            findings.note("signed with its key: active")
    finally:
        board.terminate()


CHECKS = (trial, reset_in_trial, signed)
