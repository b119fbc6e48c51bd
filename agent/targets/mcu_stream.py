"""Keeps one configured stream running on the board that it is for."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from agent.config import StreamSection
from agent.core.clock import Clock
from agent.core.component import Reading
from agent.core.errors import EdgeAgentError
from agent.core.streamed import Streamed
from agent.link.stream import BoardStream, Sampled, StreamCounters, StreamSpec
from agent.registry.catalog import Family, Variant
from agent.registry.tensors import dequantise, from_variant, unpack
from agent.wire.codes import Capability, SendInputs
from agent.wire.messages import MODEL_ID_BYTES, Hello

if TYPE_CHECKING:
    from agent.link.session import Session

log = logging.getLogger(__name__)

START_S: Final = 1.0
RETRY_S: Final = 0.5
"""Before a stream is begun again: a board that was reset is greeted in the meantime."""

Deliver = Callable[[Streamed], None]
"""Called on the loop with each sample; must not raise."""


def spec_of(section: StreamSection, variant: Variant) -> StreamSpec:
    """The configured threshold in the output's own unit: the least byte that is not below it.

    A variant whose output is not one int8 tensor cannot be judged by the board: then it sends inputs always, if any.
    """
    send, threshold = SendInputs[section.send_inputs.upper()], -128
    if send is SendInputs.BELOW:
        output = variant.outputs[0]
        judged = len(variant.outputs) == 1 and output.dtype == "int8" and output.scale and output.zero_point is not None
        if judged:
            assert output.scale is not None and output.zero_point is not None
            # In the same precision as the confidence that the threshold is about.
            scaled = float(np.float32(section.threshold) / np.float32(output.scale))
            threshold = math.ceil(scaled - 1e-4) + output.zero_point
        if not judged or threshold > 127:
            send, threshold = SendInputs.ALWAYS, -128
    return StreamSpec(
        bytes.fromhex(variant.sha256)[:MODEL_ID_BYTES],
        section.interval_ms,
        section.source,
        send,
        max(-128, threshold),
        section.credits,
    )


class StreamKeeper:
    """Begins the stream whenever the board can have it, and again when it ended."""

    def __init__(self, section: StreamSection, family: Family, clock: Clock, deliver: Deliver) -> None:
        self.section = section
        self._family = family
        self._clock = clock
        self._deliver = deliver
        self._state = "waiting"
        self._reason = "no board yet"
        self._starts = 0
        self._past = StreamCounters()
        self._stream: BoardStream | None = None
        self._bound_s: float | None = None

    def wants(self, port: str, hello: Hello) -> bool:
        """Whether this is its board."""
        if self.section.uid is not None:
            return f"{hello.uid:016x}" == self.section.uid
        return self.section.port in (None, port)

    async def run(self, session: Session, variant: Callable[[], Variant | None], provider: Callable[[], str]) -> None:
        """As long as the session is of use. `variant`: what the board runs now."""
        try:
            while session.error is None:
                self._note("waiting", await self._once(session, variant(), provider))
                await asyncio.sleep(RETRY_S)
        finally:
            self._note("waiting", str(session.error or "the line was closed"))

    def reading(self) -> Reading:
        """As a component."""
        return Reading.there(self._state == "streaming", self._reason)

    def status(self) -> dict[str, Any]:
        """Plain JSON types."""
        counters = self._counters()
        return {
            "name": self.section.name,
            "state": self._state,
            "reason": self._reason,
            "starts": self._starts,
            "results": counters.results,
            "lost": counters.lost,
            "skipped": counters.skipped,
            "over_credit": counters.over_credit,
            "time_bound_ms": None if self._bound_s is None else round(self._bound_s * 1e3, 3),
        }

    async def _once(self, session: Session, variant: Variant | None, provider: Callable[[], str]) -> str:
        """One stream until it ends; why it did."""
        if not session.hello.capabilities & Capability.STREAMS:
            return "the board has no sensor"
        if variant is None or variant.model != self.section.model:
            return f"the board does not run {self.section.model}"
        stream = BoardStream(session, spec_of(self.section, variant), self._clock)
        try:
            await stream.start(self._clock.monotonic() + START_S)
            self._stream = stream
            self._starts += 1
            self._note("streaming", "")
            while True:
                self._pass_on(await stream.next(), variant, provider())
        except (EdgeAgentError, TimeoutError) as error:
            return str(error)
        except Exception as defect:  # the stream is begun again, whatever it was
            log.exception("task failed", extra={"component": f"stream {self.section.name}"})
            return f"{type(defect).__name__}: {defect}"
        finally:
            stream.close()
            self._past, self._stream = self._counters(), None

    def _pass_on(self, sampled: Sampled, variant: Variant, provider: str) -> None:
        """Raises `TargetFailed` if the tensors do not fit the model."""
        result = sampled.result
        inputs = None
        if result.inputs:
            stored = unpack(result.inputs, variant.inputs)
            shapes = {tensor.name: tensor.shape for tensor in self._family.inputs}
            inputs = {s.maps: dequantise(stored[s.name], s).reshape(shapes[s.maps]) for s in variant.inputs}
        self._bound_s = sampled.bound_s if sampled.taken_at is not None else None
        self._deliver(
            Streamed(
                stream=self.section.name,
                variant=variant.id,
                model_sha256=variant.sha256,
                provider=provider,
                outputs=from_variant(unpack(result.outputs, variant.outputs), variant, self._family),
                inputs=inputs,
                taken_at=sampled.taken_at,
                bound_s=sampled.bound_s,
                received_at=sampled.received_at,
                compute_s=result.compute_us / 1e6,
                seq=result.seq,
                skipped=result.skipped,
                lost=self._counters().lost,
            )
        )

    def _counters(self) -> StreamCounters:
        """Of all streams so far."""
        past, now = self._past, self._stream.counters if self._stream is not None else StreamCounters()
        return StreamCounters(
            past.results + now.results,
            past.lost + now.lost,
            past.skipped + now.skipped,
            past.over_credit + now.over_credit,
        )

    def _note(self, state: str, reason: str) -> None:
        if (state, reason) != (self._state, self._reason):
            level = logging.INFO if state == "streaming" else logging.WARNING
            log.log(level, f"stream {state}", extra={"stream": self.section.name, "reason": reason})
        self._state, self._reason = state, reason
