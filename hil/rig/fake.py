"""A scripted board for faults that no real firmware of ours has: it says what it is told to."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

from agent.wire.codes import Capability, MessageType, ResetCause, SlotState
from agent.wire.fragments import split
from agent.wire.frame import Frame, FrameDecoder
from agent.wire.messages import Hello, Pong, Slot
from hil.virtual.port import Port

DECODER_BYTES = 65535
Answer = Callable[["FakeBoard", Frame], None]


def hello_with(sha256: bytes, inputs: int = 64, outputs: int = 10) -> Hello:
    """An honest HELLO of a board that runs this model."""
    slot = Slot(0, SlotState.ACTIVE, 2824, sha256, 1, inputs, outputs, 2064)
    empty = Slot(1, SlotState.EMPTY, 0, bytes(32), 0, 0, 0, 0)
    return Hello(
        *(1, 0, 1088, 32768, 4, ResetCause.POWER_ON, 1, Capability.ENGINE, 131072, 524288, 1),
        *("scripted", "0", "scripted", (), (slot, empty)),
    )


class FakeBoard:
    """`hello` is the body that answers HELLO_REQ; `answers` is what else it does, by message type. PING works."""

    def __init__(self, link: Path, hello: bytes, answers: dict[int, Answer] | None = None) -> None:
        self._hello = hello
        self._answers = answers or {}
        self._port = Port(link)
        self._decoder = FrameDecoder(DECODER_BYTES)
        self._seq = 0
        self.seen: list[Frame] = []

    def __enter__(self) -> Self:
        asyncio.get_running_loop().add_reader(self._port.master, self._readable)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        asyncio.get_running_loop().remove_reader(self._port.master)
        self._port.close()

    def count(self, type_: int) -> int:
        """Frames of a type that it was sent."""
        return sum(frame.type == type_ for frame in self.seen)

    def say(self, type_: int, id_: int, body: bytes) -> None:
        for more, payload in split(body, 256 if type_ == MessageType.HELLO else 4096):
            os.write(self._port.master, Frame(type_, more, self._seq & 0xFFFF, id_, payload).encode())
            self._seq += 1

    def _readable(self) -> None:
        try:
            data = os.read(self._port.master, 65536)
        except OSError:
            return
        for frame in self._decoder.feed(data):
            if isinstance(frame, Frame):
                self.seen.append(frame)
                self._on_frame(frame)

    def _on_frame(self, frame: Frame) -> None:
        if frame.type in self._answers:
            self._answers[frame.type](self, frame)
        elif frame.type == MessageType.HELLO_REQ:
            self.say(MessageType.HELLO, frame.id, self._hello)
        elif frame.type == MessageType.PING:
            self.say(MessageType.PONG, frame.id, Pong(1, 1, frame.payload).to_bytes())
