"""The microcontroller tier: one or more boards on serial ports, each asked for the model that it runs."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from agent.config import McuSection
from agent.core.clock import Clock
from agent.core.component import Reading
from agent.core.errors import (
    LinkError,
    ProtocolError,
    TargetBusy,
    TargetError,
    TargetFailed,
    TargetTimeout,
    TargetUnavailable,
)
from agent.core.types import InferenceRequest, TargetAnswer, Tier
from agent.link.calls import RemoteError
from agent.link.serial import open_serial
from agent.registry.catalog import Catalog, Family, Variant
from agent.registry.tensors import from_variant, pack, to_variant, unpack
from agent.targets.base import AVAILABLE, Availability, TargetTraits
from agent.targets.mcu_board import Board, Connect
from agent.targets.mcu_stream import Deliver, StreamKeeper
from agent.wire.codes import ErrorCode
from agent.wire.messages import MODEL_ID_BYTES

BITS_PER_BYTE = 10
"""On the line: eight, a start bit and a stop bit."""
OVERHEAD_BYTES = 56
"""Of frames and messages of one INFER and its RESULT, besides the tensors."""
PRIOR_LINK_S = 0.001
"""Taken for the way there and back until it was measured: a USB bridge's latency."""

_NOT_THERE: Final = (ErrorCode.MODEL_MISMATCH, ErrorCode.NO_MODEL, ErrorCode.NO_ENGINE, ErrorCode.VERSION)
"""Refusals that mean the board is not what we thought."""
_TOO_LATE: Final = (ErrorCode.DEADLINE, ErrorCode.CANCELLED)


class McuTarget:
    """All boards of `section.ports`. A request goes to the least loaded one that runs its variant, in turn if equal.

    `max_bytes` is the largest model file the tier takes; `connect` opens a port, `random` gives floats in 0 .. 1;
    `deliver` gets what the boards sample themselves. Raises `UnknownModel` for a stream of a family that is not there.
    """

    def __init__(
        self,
        section: McuSection,
        catalog: Catalog,
        clock: Clock,
        *,
        max_bytes: float = 1e6,
        connect: Connect = open_serial,
        random: Callable[[], float] = random.random,
        deliver: Deliver = lambda streamed: None,
    ) -> None:
        self._traits = TargetTraits(
            name="edge_mcu",
            tier=Tier.EDGE_MCU,
            order=0,
            max_concurrent=section.max_concurrent * max(1, len(section.ports)),
            timeout_s=section.timeout_ms / 1e3,
            parallel=max(1, len(section.ports)),
            max_bytes=max_bytes,
            prior_link_s=PRIOR_LINK_S,
            bytes_per_s=section.baud / BITS_PER_BYTE,
            overhead_bytes=OVERHEAD_BYTES,
        )
        self._clock = clock
        self._max_concurrent = section.max_concurrent
        self._turn = 0
        self._streams = [
            StreamKeeper(stream, catalog.family(stream.model), clock, deliver) for stream in section.streams
        ]
        self._boards = tuple(
            Board(
                port,
                section.baud,
                catalog=catalog,
                clock=clock,
                connect=connect,
                max_concurrent=section.max_concurrent,
                health_check_interval=section.health_check_interval,
                signed_only=section.require_signed_updates,
                random=random,
                streams=self._streams,
            )
            for port in section.ports
        )

    @property
    def traits(self) -> TargetTraits:
        return self._traits

    def alive(self) -> bool:
        return all(board.alive for board in self._boards)

    def availability(self) -> Availability:
        if any(board.variant is not None for board in self._boards):
            return AVAILABLE
        return Availability(False, "; ".join(board.reason for board in self._boards) or "no ports are configured")

    def parts(self) -> Mapping[str, Reading]:
        boards = {
            f"board {board.port}": Reading.there(board.variant is not None, board.reason) for board in self._boards
        }
        return boards | {f"stream {keeper.section.name}": keeper.reading() for keeper in self._streams}

    def variant_for(self, family: Family, pinned: str | None) -> Variant | None:
        best: Variant | None = None
        for board in self._boards:
            variant = board.variant
            if variant is None or variant.model != family.name or pinned not in (None, variant.id):
                continue
            if best is None or variant.accuracy.value > best.accuracy.value:
                best = variant
        return best

    def variants_for(self, family: Family, pinned: str | None) -> Sequence[Variant]:
        """What is on the boards, each once."""
        return tuple(
            {
                variant.sha256: variant
                for board in self._boards
                if (variant := board.variant) is not None
                and variant.model == family.name
                and pinned in (None, variant.id)
            }.values()
        )

    async def infer(self, request: InferenceRequest, family: Family, variant: Variant, deadline: float) -> TargetAnswer:
        began = self._clock.monotonic()
        deadline = min(deadline, began + self._traits.timeout_s)
        board = self._choose(variant)
        model = bytes.fromhex(variant.sha256)[:MODEL_ID_BYTES]
        inputs = pack(to_variant(request.inputs, variant), variant.inputs)
        board.in_flight += 1
        try:
            reply = await board.session.infer(model, inputs, deadline)
        except TimeoutError as error:
            raise TargetTimeout(str(error)) from None
        except LinkError as error:
            raise TargetUnavailable(str(error), permanent=error.permanent) from None
        except ProtocolError as error:
            raise TargetFailed(str(error)) from None
        except RemoteError as error:
            raise _translated(error, board) from None
        finally:
            board.in_flight -= 1
        result = reply.message
        if result.model != model:
            board.refresh()
            raise TargetFailed(f"{board.port}: the answer is of another model ({result.model.hex()})")
        outputs = from_variant(unpack(result.outputs, variant.outputs), variant, family)
        queue_s, compute_s = result.queue_us / 1e6, result.compute_us / 1e6
        return TargetAnswer(
            outputs=outputs,
            provider=board.provider,
            queue_s=queue_s,
            link_s=max(0.0, self._clock.monotonic() - began - queue_s - compute_s),
            compute_s=compute_s,
            bytes_sent=reply.bytes_sent,
            bytes_received=reply.bytes_received,
        )

    async def start(self) -> None:
        for board in self._boards:
            board.start()

    async def stop(self) -> None:
        for board in self._boards:
            await board.stop()

    def status(self) -> Mapping[str, Any]:
        return {"ports": [board.status() for board in self._boards]}

    def _choose(self, variant: Variant) -> Board:
        count = len(self._boards)
        in_turn = [self._boards[(self._turn + i) % count] for i in range(count)]
        able = [board for board in in_turn if board.variant is not None and board.variant.sha256 == variant.sha256]
        if not able:
            raise TargetUnavailable(
                f"no microcontroller runs {variant.name}: {self.availability().reason}".rstrip(": ")
            )
        board = min(able, key=lambda board: board.in_flight)
        if board.in_flight >= self._max_concurrent:
            raise TargetBusy(f"all microcontrollers that run {variant.name} have {self._max_concurrent} requests open")
        self._turn = self._boards.index(board) + 1
        return board


def _translated(error: RemoteError, board: Board) -> TargetError:
    text = str(error)
    if error.code == ErrorCode.BUSY:
        return TargetBusy(text)
    if error.code in _TOO_LATE:
        return TargetTimeout(text)
    if error.code in _NOT_THERE:
        board.refresh()
        return TargetUnavailable(text)
    return TargetFailed(text)
