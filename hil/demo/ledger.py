"""Who asked what, and what came back: every published sample is accounted for."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import Any


@dataclass(slots=True)
class Asked:
    """One published sample. Times are monotonic seconds."""

    sensor: str
    family: str
    latency_class: str
    truth: str
    sent_s: float
    answer: dict[str, Any] | None = None
    answered_s: float = 0.0
    answers: int = 0
    adaptive: bool = False
    """Asked of a cascade: which tier answers depends on how hard the input is."""

    @property
    def refused(self) -> bool:
        return self.answer is not None and "error" in self.answer

    @property
    def right(self) -> bool:
        return self.answer is not None and self.answer.get("label") == self.truth


@dataclass(slots=True)
class Ledger:
    """All samples by request id. Written by the players' MQTT threads, read by the screen."""

    asked: dict[str, Asked] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)
    unexpected: int = 0

    def sent(self, request_id: str, asked: Asked) -> None:
        with self.lock:
            self.asked[request_id] = asked

    def received(self, request_id: str, answer: dict[str, Any], now: float) -> None:
        with self.lock:
            asked = self.asked.get(request_id)
            if asked is None:
                self.unexpected += 1
                return
            asked.answers += 1
            if asked.answer is None:
                asked.answer, asked.answered_s = answer, now

    def rows(self) -> list[Asked]:
        with self.lock:
            return list(self.asked.values())

    def open(self) -> int:
        with self.lock:
            return sum(asked.answer is None for asked in self.asked.values())
