"""What a fake microcontroller does with a new model: takes it, tries it, keeps it or goes back."""

from __future__ import annotations

import hashlib
from dataclasses import replace

from agent.wire.codes import ErrorCode, MessageType, Rollback, SlotState
from agent.wire.messages import Hello, Slot
from agent.wire.update import (
    BITMAP_BYTES,
    COMMIT_TRIAL,
    ModelBegin,
    ModelChunk,
    ModelCommit,
    ModelConfirm,
    ModelRollback,
    ModelStatus,
)

MODEL = b"the model that is active " * 40
MODEL_SHA256 = hashlib.sha256(MODEL).digest()
KEY = MODEL_SHA256[:8]
INPUTS = bytes(range(16))


def active_slot(sha256: bytes = MODEL_SHA256, inputs: int = 16, outputs: int = 4) -> Slot:
    return Slot(0, SlotState.ACTIVE, len(MODEL), sha256, 7, inputs, outputs, 2048)


EMPTY_SLOT = Slot(1, SlotState.EMPTY, 0, bytes(32), 0, 0, 0, 0)


class ModelUpdates:
    """Section 3.6 of the protocol page. `refuse` and `complete` answer a request."""

    hello: Hello
    image: bytearray
    flashed: list[bytes]
    _begin: ModelBegin | None
    _received: set[int]

    def refuse(self, id_: int, code: ErrorCode, text: str = "") -> None:
        raise NotImplementedError

    def complete(self, id_: int, type_: int, body: bytes) -> None:
        raise NotImplementedError

    def _on_model_begin(self, id_: int, body: bytes) -> None:
        begin = ModelBegin.from_bytes(body)
        active = self.hello.active
        if active is not None and begin.counter < active.counter and not begin.flags & 1:
            self.refuse(id_, ErrorCode.DOWNGRADE, f"{begin.counter} < {active.counter}")
            return
        if self._begin is None or self._begin.image_sha256 != begin.image_sha256:
            self._begin = begin
            self.image = bytearray(begin.model_length + begin.selftest_length)
            self._received = set()
        self.complete(id_, MessageType.MODEL_STATUS, self._status().to_bytes())

    def _on_model_chunk(self, id_: int, body: bytes) -> None:
        chunk = ModelChunk.from_bytes(body)
        if self._begin is None:
            self.refuse(id_, ErrorCode.NOT_BEGUN)
            return
        self.image[chunk.offset : chunk.offset + len(chunk.data)] = chunk.data
        self._received.add(chunk.offset)
        self.complete(id_, MessageType.MODEL_STATUS, self._status().to_bytes())

    def _on_model_query(self, id_: int, body: bytes) -> None:
        self.complete(id_, MessageType.MODEL_STATUS, self._status().to_bytes())

    def _on_model_commit(self, id_: int, body: bytes) -> None:
        begin = self._begin
        if begin is None:
            self.refuse(id_, ErrorCode.NOT_BEGUN)
        elif self._status().next < len(self.image):
            self.refuse(id_, ErrorCode.INCOMPLETE)
        elif hashlib.sha256(self.image).digest() != begin.image_sha256:
            self.refuse(id_, ErrorCode.DIGEST)
        else:
            self.flashed.append(bytes(self.image))
            trial = self.hello.minor >= 1 and ModelCommit.from_bytes(body).flags & COMMIT_TRIAL
            if trial:
                former = self.hello.slots[0]
                former = replace(former, state=SlotState.STORED) if former.runs else former
                new = replace(active_slot(begin.model_sha256), index=1, state=SlotState.TRIAL, counter=begin.counter)
                self.hello = replace(self.hello, slots=(former, new), rollback=0)
            else:
                slot = active_slot(begin.model_sha256)
                self.hello = replace(self.hello, slots=(replace(slot, counter=begin.counter), EMPTY_SLOT))
            active = self.hello.active
            assert active is not None
            status = replace(self._status(), slot=active.index, state=active.state)
            self._begin = None
            self.complete(id_, MessageType.MODEL_STATUS, status.to_bytes())

    def _on_model_confirm(self, id_: int, body: bytes) -> None:
        active = self.hello.active
        if active is None or active.sha256[:8] != ModelConfirm.from_bytes(body).model:
            self.refuse(id_, ErrorCode.MODEL_MISMATCH, "not in trial")
            return
        slots = (self.hello.slots[0], replace(active, state=SlotState.ACTIVE))
        self.hello = replace(self.hello, slots=slots)
        self._say_active(id_)

    def _on_model_rollback(self, id_: int, body: bytes) -> None:
        trial = self.hello.trial
        if trial is None or trial.sha256[:8] != ModelRollback.from_bytes(body).model:
            self.refuse(id_, ErrorCode.MODEL_MISMATCH, "not in trial")
            return
        self.roll_back(Rollback.REQUESTED)
        self._say_active(id_)

    def roll_back(self, why: Rollback) -> None:
        trial = self.hello.trial
        assert trial is not None
        former = self.hello.slots[0]
        former = replace(former, state=SlotState.ACTIVE) if former.state == SlotState.STORED else former
        self.hello = replace(self.hello, slots=(former, replace(trial, state=SlotState.BAD)), rollback=why)

    def _say_active(self, id_: int) -> None:
        active = self.hello.active
        assert active is not None
        status = ModelStatus(active.index, active.state, 16, 9, 9, 9, bytes(BITMAP_BYTES), active.sha256)
        self.complete(id_, MessageType.MODEL_STATUS, status.to_bytes())

    def _status(self) -> ModelStatus:
        assert self._begin is not None
        size, step = len(self.image), self._begin.chunk
        missing = [offset for offset in range(0, size, step) if offset not in self._received]
        following = missing[0] if missing else size
        bits = sum(1 << (o - following) // step for o in self._received if 0 <= o - following < 256 * step)
        received = sum(min(step, size - offset) for offset in self._received)
        return ModelStatus(
            1,
            SlotState.RECEIVING,
            step,
            size,
            received,
            following,
            bits.to_bytes(32, "little"),
            self._begin.image_sha256,
        )
