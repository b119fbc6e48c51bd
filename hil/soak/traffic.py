"""What the daemon is asked for hours: sensors over MQTT, one caller over HTTP, and somebody who scrapes the metrics."""

from __future__ import annotations

import http.client
import json
import math
import threading
import time
from collections import deque
from dataclasses import replace
from typing import Any

import numpy as np

from agent.registry.catalog import Catalog
from hil.demo.ledger import Asked, Ledger
from hil.demo.players import Sensor, heldout
from hil.soak.watch import Sample
from hil.stalls import Stalls

PATIENCE_S = 30.0
"""An answer that has not come after this is lost: well beyond every deadline and every delivery."""
HTTP_LIMIT_S = 10.0
POLL_S = 0.05

SENSORS = (
    Sensor("meter", "sensors/meter", "digits", "realtime", 0.4),
    Sensor("watch", "sensors/watch", "motion", "near", 0.3),
    Sensor("panel", "sensors/panel", "digits", "interactive", 0.15, accuracy="adaptive"),
    Sensor("archive", "sensors/archive", "digits", "batch", 0.05, 2000, (), "high"),
    Sensor("parts", "sensors/parts", "digits", "batch", 0.1),
)
"""`parts` is durable: kept in the outbox until its answer is delivered."""
DURABLE = "parts"


class Recent(Ledger):
    """A ledger that does not grow: what is answered leaves its times behind, and is forgotten. Of the times, what the
    machine took meanwhile is left out."""

    def __init__(self, stalls: Stalls) -> None:
        super().__init__()
        self._stalls = stalls
        self.took_ms: dict[str, list[float]] = {}
        self.answered = self.refused = self.lost = 0
        self._order: deque[str] = deque()

    def received(self, request_id: str, answer: dict[str, Any], now: float) -> None:
        with self.lock:
            asked = self.asked.pop(request_id, None)
            if asked is not None:
                self._count(asked.sensor, "error" in answer, asked.sent_s, now)

    def sent(self, request_id: str, asked: Asked) -> None:
        with self.lock:
            self.asked[request_id] = asked
            self._order.append(request_id)
            self._give_up(asked.sent_s - PATIENCE_S)

    def took(self, sensor: str, refused: bool, sent: float, now: float) -> None:
        """Of a caller that waits for its own answer."""
        with self.lock:
            self._count(sensor, refused, sent, now)

    def failed(self) -> None:
        with self.lock:
            self.lost += 1

    def take(self, now: float | None = None) -> tuple[dict[str, list[float]], int, int, int]:
        """Times in ms by sensor, and how many were answered, refused and lost, since the last call."""
        with self.lock:
            self._give_up((time.monotonic() if now is None else now) - PATIENCE_S)
            taken = (self.took_ms, self.answered, self.refused, self.lost)
            self.took_ms, self.answered, self.refused, self.lost = {}, 0, 0, 0
            return taken

    def _count(self, sensor: str, refused: bool, sent: float, now: float) -> None:
        self.answered += 1
        self.refused += refused
        seconds = max(0.0, now - sent - self._stalls.between(sent, now))
        self.took_ms.setdefault(sensor, []).append(seconds * 1e3)

    def _give_up(self, before: float) -> None:
        while self._order:
            asked = self.asked.get(self._order[0])
            if asked is not None:
                if asked.sent_s > before:
                    return
                del self.asked[self._order[0]]
                self.lost += 1
            self._order.popleft()


def settled(last: Sample, ledger: Recent) -> Sample:
    """The last sample with what was still open when it was taken: nobody asks any more, and what is not answered
    in `PATIENCE_S` is lost too."""
    end = time.monotonic() + PATIENCE_S
    while ledger.open() and time.monotonic() < end:
        time.sleep(POLL_S)
    _, answered, refused, lost = ledger.take(now=math.inf)
    return replace(last, answered=last.answered + answered, refused=last.refused + refused, lost=last.lost + lost)


class HttpCaller(threading.Thread):
    """Asks over one kept connection, and never the same twice, so that the cache is as full as it may be."""

    def __init__(self, port: int, catalog: Catalog, ledger: Recent, rate_hz: float) -> None:
        super().__init__(name="http-caller", daemon=True)
        self._port = port
        self._ledger = ledger
        self._interval_s = 1.0 / rate_hz
        self._inputs, _ = heldout(catalog.root / catalog.family("digits").data.heldout)
        self._halt = threading.Event()

    def run(self) -> None:
        random = np.random.default_rng(1)
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=HTTP_LIMIT_S)
        due = time.monotonic()
        while not self._halt.wait(max(0.0, due - time.monotonic())):
            sample = self._inputs[random.integers(len(self._inputs))]
            noisy = np.clip(sample + random.uniform(-0.5, 0.5, sample.shape), 0, 16)
            body = json.dumps({"model": "digits", "inputs": noisy.round(4).tolist(), "deadline_ms": 500})
            started = time.monotonic()
            try:
                connection.request("POST", "/infer", body, {"content-type": "application/json"})
                response = connection.getresponse()
                response.read()
                self._ledger.took("http", response.status != 200, started, time.monotonic())
            except (OSError, http.client.HTTPException):
                self._ledger.failed()
                connection.close()
            due = max(due + self._interval_s, time.monotonic() - 1.0)

    def halt(self) -> None:
        self._halt.set()
        self.join()
