"""Who asks meanwhile: callers that want an answer by a deadline, and producers whose items must not be lost."""

from __future__ import annotations

import http.client
import json
import random
import threading
import time
from collections.abc import Sequence
from typing import Any

import paho.mqtt.client as mqtt
from paho.mqtt.enums import CallbackAPIVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.subscribeoptions import SubscribeOptions

from hil.chaos.ledger import Asked, Kept, Ledger

PATIENCE_S = 10.0
"""After its deadline a caller waits so much longer, to know late from never."""
PENDING = 200
"""Items that a producer holds until they are accepted; it makes no new ones beyond that."""
AGAIN_S = 2.0
"""A producer that was not told that its item is there publishes it again under the same key."""
CLASSES = (("near", 100.0), ("interactive", 500.0), ("batch", 2000.0))
RESULTS = "chaos/kept"
SENSOR = "meter"
SENSOR_DEADLINE_S = 0.5

Inputs = Sequence[Any]


class Caller(threading.Thread):
    """Does `step` at a rate until it is halted."""

    def __init__(self, name: str, rate_hz: float, ledger: Ledger, inputs: Inputs, seed: int) -> None:
        super().__init__(name=name, daemon=True)
        self.ledger = ledger
        self.inputs = inputs
        self.chance = random.Random(f"{seed} {name}")
        self._interval_s = 1.0 / rate_hz
        self._halt = threading.Event()

    def run(self) -> None:
        due = time.monotonic()
        while not self._halt.wait(max(0.0, due - time.monotonic())):
            self.step()
            due = max(due + self._interval_s, time.monotonic())
        self.end()

    def halt(self) -> None:
        self._halt.set()

    def step(self) -> None:
        raise NotImplementedError

    def end(self) -> None:
        """After the last step, in the same thread."""


class HttpCaller(Caller):
    """One kept connection; one request after the other."""

    def __init__(self, name: str, port: int, rate_hz: float, ledger: Ledger, inputs: Inputs, seed: int) -> None:
        super().__init__(name, rate_hz, ledger, inputs, seed)
        self._port = port
        self._connection: http.client.HTTPConnection | None = None

    def post(self, document: dict[str, Any], limit_s: float) -> tuple[int, dict[str, Any]]:
        """Status and document; (0, {}) if there is none."""
        try:
            if self._connection is None:
                self._connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=limit_s)
            self._connection.timeout = limit_s
            if self._connection.sock is not None:
                self._connection.sock.settimeout(limit_s)
            self._connection.request("POST", "/infer", json.dumps(document), {"content-type": "application/json"})
            response = self._connection.getresponse()
            return response.status, json.loads(response.read())
        except (OSError, http.client.HTTPException, ValueError):
            if self._connection is not None:
                self._connection.close()
            self._connection = None
            return 0, {}

    def step(self) -> None:
        latency_class, deadline_ms = self.chance.choice(CLASSES)
        sample = self.chance.randrange(len(self.inputs))
        document = {
            "model": "digits",
            "inputs": self.inputs[sample],
            "latency_class": latency_class,
            "deadline_ms": deadline_ms,
            "accuracy": self.chance.choice(("acceptable", "acceptable", "adaptive", "high")),
            "use_cache": self.chance.random() < 0.3,
            "producer": f"caller-{self.chance.randrange(3)}",
        }
        asked = Asked("http", sample, time.monotonic(), deadline_ms / 1e3)
        asked.code, asked.answer = self.post(document, deadline_ms / 1e3 + PATIENCE_S)
        asked.done = time.monotonic()
        self.ledger.asked.append(asked)


class HttpProducer(HttpCaller):
    """Durable items over HTTP: asked again under the same key until they are accepted."""

    count = 0

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._pending: list[str] = []

    def step(self) -> None:
        if len(self._pending) < PENDING:
            name = f"{self.name}-{self.count}"
            self.count += 1
            self.ledger.kept[name] = Kept(self.chance.randrange(len(self.inputs)))
            self._pending.append(name)
        self._offer()

    def end(self) -> None:
        self._offer()

    def _offer(self) -> None:
        while self._pending:
            name = self._pending[0]
            document = {
                "model": "digits",
                "inputs": self.inputs[self.ledger.kept[name].sample],
                "delivery": "durable",
                "request_id": name,
                "idempotency_key": name,
                "producer": self.name,
            }
            code, answer = self.post(document, PATIENCE_S)
            if code != 202:
                return
            self.ledger.told(name, answer["id"])
            self._pending.pop(0)


class Subscriber:
    """A client whose session outlives the broker's restarts and its own absences."""

    def __init__(self, name: str, port: int, topics: Sequence[str]) -> None:
        self.client = mqtt.Client(CallbackAPIVersion.VERSION2, name, protocol=mqtt.MQTTv5)
        self.client.max_queued_messages_set(PENDING)
        self.client.reconnect_delay_set(1, 1)
        wanted = [(topic, SubscribeOptions(1)) for topic in topics]
        self.client.on_connect = lambda client, *_: client.subscribe(wanted)
        self.client.on_message = lambda _client, _userdata, message: self.take(message)
        properties = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]
        properties.SessionExpiryInterval = 3600
        self.client.connect("127.0.0.1", port, keepalive=5, clean_start=False, properties=properties)
        self.client.loop_start()

    def take(self, message: mqtt.MQTTMessage) -> None:
        raise NotImplementedError

    def close(self) -> None:
        self.client.disconnect()
        self.client.loop_stop()


class Receiver(Subscriber):
    """The application that the durable results are for."""

    def __init__(self, port: int, gateway: str, ledger: Ledger) -> None:
        self._ledger = ledger
        super().__init__("receiver", port, [f"edge/{gateway}/results/durable/#", RESULTS])

    def take(self, message: mqtt.MQTTMessage) -> None:
        user = dict(getattr(message.properties, "UserProperty", []))
        document = json.loads(message.payload)
        status = user.get("status", "")
        if status == "accepted":
            self._ledger.told(str(document.get("request_id")), str(document.get("id")))
        elif "idempotency-key" in user:
            self._ledger.delivered(user["idempotency-key"], status, document)


class MqttProducer(Caller):
    """Durable items over MQTT: published again under the same key until the daemon says that it has them."""

    count = 0

    def __init__(self, name: str, receiver: Receiver, gateway: str, rate_hz: float, *args: Any) -> None:
        super().__init__(name, rate_hz, *args)
        self._client = receiver.client
        self._topic = f"edge/{gateway}/durable/digits/{name}"
        self._pending: dict[str, float] = {}

    def step(self) -> None:
        if len(self._pending) < PENDING:
            name = f"{self.name}-{self.count}"
            self.count += 1
            self.ledger.kept[name] = Kept(self.chance.randrange(len(self.inputs)))
            self._pending[name] = 0.0
        now = time.monotonic()
        for name, published in list(self._pending.items()):
            if self.ledger.kept[name].acknowledged is not None:
                del self._pending[name]
            elif now - published > AGAIN_S:
                self._pending[name] = now
                self._publish(name)

    def _publish(self, name: str) -> None:
        properties = Properties(PacketTypes.PUBLISH)  # type: ignore[no-untyped-call]
        properties.ResponseTopic = RESULTS
        document = {
            "inputs": self.inputs[self.ledger.kept[name].sample],
            "request_id": name,
            "idempotency_key": name,
        }
        self._client.publish(self._topic, json.dumps(document), qos=1, properties=properties)


class Reader(Subscriber):
    """Where a sensor's answers arrive."""

    def __init__(self, port: int, gateway: str) -> None:
        self.open: dict[str, Asked] = {}
        super().__init__("sensor", port, [f"edge/{gateway}/results/{SENSOR}"])

    def take(self, message: mqtt.MQTTMessage) -> None:
        document = json.loads(message.payload)
        asked = self.open.pop(str(document.get("request_id")), None)
        if asked is not None:
            asked.done, asked.answer, asked.code = time.monotonic(), document, 200


class Sensor(Caller):
    """Readings over MQTT, which are to be answered at once. It has none while it has no broker."""

    def __init__(self, port: int, gateway: str, rate_hz: float, *args: Any) -> None:
        super().__init__("sensor", rate_hz, *args)
        self._count = 0
        self._reader = Reader(port, gateway)

    def step(self) -> None:
        if not self._reader.client.is_connected():
            return
        sample = self.chance.randrange(len(self.inputs))
        name = f"reading-{self._count}"
        self._count += 1
        asked = self._reader.open[name] = Asked("mqtt", sample, time.monotonic(), SENSOR_DEADLINE_S)
        self.ledger.asked.append(asked)
        payload = json.dumps({"request_id": name, "inputs": self.inputs[sample]})
        self._reader.client.publish(f"sensors/{SENSOR}", payload, qos=1)

    def end(self) -> None:
        end = time.monotonic() + SENSOR_DEADLINE_S + PATIENCE_S
        while self._reader.open and time.monotonic() < end:
            threading.Event().wait(0.05)
        self._reader.close()
