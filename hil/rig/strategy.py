"""The state that the board should be in, and how it gets there: off -> booted -> model loaded -> streaming."""

from __future__ import annotations

import asyncio
from enum import IntEnum
from typing import Final

from agent.core.errors import EdgeAgentError
from agent.link.push import push_model
from agent.link.session import Session
from agent.wire.body import Message
from agent.wire.codes import Capability, SendInputs
from agent.wire.messages import Hello
from agent.wire.stream import StreamCredit, StreamStart, StreamStatus, StreamStop
from hil.rig.images import image_of
from hil.rig.protocols import RigError
from hil.rig.rig import Rig

INTERVAL_MS: Final = 100
ANSWER_LIMIT_S: Final = 5.0


class State(IntEnum):
    OFF = 0
    BOOTED = 1
    MODEL_LOADED = 2
    STREAMING = 3


class Strategy:
    """Looks before it acts: a check may have left the board in any state, and a person may have moved it."""

    def __init__(self, rig: Rig) -> None:
        self._rig = rig

    async def to(self, state: State, family: str = "digits") -> Hello | None:
        """Bring the board there; its HELLO, unless it is off. Raises `RigError`.

        A board without an engine takes no model, and one without a sensor does not stream: it comes as far as it can,
        and that is no error.
        """
        power = self._rig.driver.power
        if state is State.OFF:
            await asyncio.to_thread(power.off)
            return None
        try:
            return await self._boot(state, family)
        except (EdgeAgentError, TimeoutError):
            # Whatever state it is in, it is not one to go on from.
            await asyncio.to_thread(power.off)
        try:
            return await self._boot(state, family)
        except (EdgeAgentError, TimeoutError) as error:
            raise RigError(f"the board does not come to {state.name.lower().replace('_', ' ')}: {error}") from None

    async def _boot(self, state: State, family: str) -> Hello:
        await asyncio.to_thread(self._rig.driver.power.on)
        async with self._rig.direct_session() as session:
            if state >= State.MODEL_LOADED and session.hello.capabilities & Capability.ENGINE:
                variant = self._rig.samples(family).variant
                active = session.hello.active
                if active is None or active.sha256.hex() != variant.sha256:
                    await push_model(session, image_of(self._rig.catalog, variant), self._rig.clock)
            if session.hello.capabilities & Capability.STREAMS:
                await self._stream(session, state, family)
            return session.hello

    async def _stream(self, session: Session, state: State, family: str) -> None:
        """A board that streams, and is to, is left alone: nobody listens, so it keeps its newest sample."""
        streams = (await self._ask(session, StreamCredit(0))).streams
        active = session.hello.active
        if streams and state is not State.STREAMING:
            await self._ask(session, StreamStop())
        elif not streams and state is State.STREAMING and active is not None:
            model = self._rig.samples(family).model
            await self._ask(session, StreamStart(0, SendInputs.NEVER, -128, INTERVAL_MS, 1, model))

    async def _ask(self, session: Session, message: Message) -> StreamStatus:
        deadline = self._rig.soon(ANSWER_LIMIT_S)
        return (await session.request(message, StreamStatus, deadline, windowed=False)).message
