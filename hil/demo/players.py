"""Sensors: each publishes held-out samples to the gateway's broker at a rate and takes the answers from its topic."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import paho.mqtt.client as mqtt
from paho.mqtt.enums import CallbackAPIVersion

from agent.registry.catalog import Catalog
from hil.demo.ledger import Asked, Ledger

SUBSCRIBE_LIMIT_S = 5.0


@dataclass(frozen=True)
class Sensor:
    """What one sensor asks. `share` is the part of the whole rate that is its own."""

    name: str
    topic: str
    family: str
    latency_class: str
    share: float
    deadline_ms: float | None = None
    allowed_regions: tuple[str, ...] = ()
    accuracy: str = "acceptable"
    what: str = ""


class Player(threading.Thread):
    """Plays one family's held-out set over and over until stopped."""

    def __init__(
        self, sensor: Sensor, catalog: Catalog, ledger: Ledger, broker_port: int, gateway: str, rate_hz: float
    ) -> None:
        super().__init__(name=f"player-{sensor.name}", daemon=True)
        self._sensor = sensor
        self._ledger = ledger
        self._interval_s = 1.0 / rate_hz
        family = catalog.family(sensor.family)
        self._inputs, labels = heldout(catalog.root / family.data.heldout)
        self._labels: Sequence[str] = [family.labels[int(label)] for label in labels]
        self._tensor = family.inputs[0].name
        self._halt = threading.Event()
        self._listening = threading.Event()
        self._client = mqtt.Client(CallbackAPIVersion.VERSION2, f"sensor-{sensor.name}", protocol=mqtt.MQTTv5)
        self._client.on_connect = lambda client, *_: client.subscribe(f"edge/{gateway}/results/{sensor.name}", qos=1)
        self._client.on_subscribe = lambda *_: self._listening.set()
        self._client.on_message = self._on_message
        self._client.connect("127.0.0.1", broker_port)
        self._client.loop_start()

    def run(self) -> None:
        sensor, count = self._sensor, 0
        self._listening.wait(SUBSCRIBE_LIMIT_S)
        due = time.monotonic()
        while not self._halt.wait(max(0.0, due - time.monotonic())):
            index = count % len(self._labels)
            request_id = f"{sensor.name}-{count}"
            payload = json.dumps({"request_id": request_id, "inputs": {self._tensor: self._inputs[index].tolist()}})
            asked = Asked(
                sensor.name,
                sensor.family,
                sensor.latency_class,
                self._labels[index],
                time.monotonic(),
                adaptive=sensor.accuracy == "adaptive",
            )
            self._ledger.sent(request_id, asked)
            self._client.publish(sensor.topic, payload, qos=1)
            count += 1
            due += self._interval_s

    def halt(self) -> None:
        """Stop publishing; answers are still taken."""
        self._halt.set()
        self.join()

    def close(self) -> None:
        self._client.disconnect()
        self._client.loop_stop()

    def _on_message(self, _client: mqtt.Client, _userdata: object, message: mqtt.MQTTMessage) -> None:
        answer = json.loads(message.payload)
        self._ledger.received(str(answer.get("request_id")), answer, time.monotonic())


def heldout(path: Path) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    """The held-out samples of a family as float32 canonical inputs, and their class indices."""
    with np.load(path, allow_pickle=False) as arrays:
        return arrays["inputs"].astype(np.float32), arrays["labels"].astype(np.int64)
