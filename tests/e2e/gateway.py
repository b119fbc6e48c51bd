"""A whole gateway of real processes for end-to-end tests: brokers, workers, virtual microcontroller, daemon."""

from __future__ import annotations

import json
import threading
import time
import urllib.request
from collections.abc import Callable
from typing import Any

import numpy as np
import paho.mqtt.client as mqtt
from paho.mqtt.enums import CallbackAPIVersion

from agent.registry.catalog import Catalog, load_catalog
from agent.registry.locate import catalog_path
from hil.demo.players import heldout
from hil.processes import Process, Stage, free_port
from hil.virtual.control import Control

LIMIT_S = 75.0
"""Longer than the minute at most that a link waits whose broker was killed so often that it suspects another client."""
GATEWAY = "test"


def wait_until(condition: Callable[[], Any], what: str, limit_s: float = LIMIT_S) -> Any:
    """Its first true value. Fails with `what` when the limit is over."""
    end = time.monotonic() + limit_s
    while not (value := condition()):
        assert time.monotonic() < end, f"not within {limit_s:.0f} s: {what}"
        time.sleep(0.02)
    return value


class Gateway:
    """Started by `start`; each process is an attribute, so that a test can kill it."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self._heldout: dict[str, tuple[Any, Any]] = {}
        self.catalog: Catalog = load_catalog(catalog_path(None))
        self.local_port, self.cloud_port, self.http_port = free_port(), free_port(), free_port()
        self.mcu_port = stage.folder / "ttyMCU"
        self.control_path = stage.folder / "mcu.sock"
        self.url = f"http://127.0.0.1:{self.http_port}"

    def start(self, **overrides: Any) -> None:
        """`overrides` replace whole sections of the configuration."""
        self.start_broker()
        self.start_cloud_broker()
        self.start_mcu()
        self.start_worker("worker-1")
        self.start_worker("worker-2")
        self.daemon: Process = self.stage.daemon(self.config() | overrides)
        wait_until(self.complete, "every tier available")

    def config(self) -> dict[str, Any]:
        return {
            "gateway": {"id": GATEWAY, "state_dir": str(self.stage.folder / "state")},
            "edge_mcu": {"port": str(self.mcu_port)},
            "cloud": {
                "lanes": [{"name": "gpu", "broker": f"mqtt://127.0.0.1:{self.cloud_port}", "topic": "lanes/gpu"}]
            },
            "mqtt": {"broker": f"mqtt://127.0.0.1:{self.local_port}"},
            "http": {"port": self.http_port},
            "sensors": {"sensors/meter": {"model": "digits", "latency_class": "interactive", "use_cache": False}},
        }

    def start_broker(self) -> None:
        self.broker = self.stage.broker("broker", self.local_port)

    def start_cloud_broker(self) -> None:
        self.cloud_broker = self.stage.broker("cloud-broker", self.cloud_port)

    def start_mcu(self) -> None:
        model = self.catalog.path(self.catalog.family("digits").variants["mcu-int8"])
        self.mcu = self.stage.virtual_mcu(self.mcu_port, "--control", str(self.control_path), "--model", str(model))

    def start_worker(self, name: str) -> Process:
        process = self.stage.worker(name, f"mqtt://127.0.0.1:{self.cloud_port}", "lanes/gpu")
        setattr(self, name.replace("-", "_"), process)
        return process

    @property
    def control(self) -> Control:
        return Control(self.control_path)

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(f"{self.url}{path}", timeout=LIMIT_S) as response:
            return json.load(response)

    def targets(self) -> dict[str, Any]:
        return {target["name"]: target for target in self.get("/status")["targets"]}

    def available(self, name: str) -> bool:
        return bool(self.targets()[name]["available"])

    def complete(self) -> bool:
        return all(target["available"] for target in self.targets().values())

    def infer(self, **document: Any) -> tuple[int, dict[str, Any]]:
        """One POST /infer."""
        request = urllib.request.Request(
            f"{self.url}/infer", json.dumps(document).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=LIMIT_S) as response:
                return response.status, json.load(response)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)

    def sample(self, family: str, index: int = 0) -> tuple[list[Any], str]:
        """A held-out sample and its true label."""
        entry = self.catalog.family(family)
        if family not in self._heldout:
            self._heldout[family] = heldout(self.catalog.root / entry.data.heldout)
        inputs, labels = self._heldout[family]
        return inputs[index].tolist(), entry.labels[int(labels[index])]


class Traffic(threading.Thread):
    """Asks over HTTP at a steady rate until stopped, and keeps what came of every request."""

    def __init__(self, gateway: Gateway, rate_hz: float = 40.0, deadline_ms: float = 500.0) -> None:
        super().__init__(daemon=True)
        self._gateway = gateway
        self._interval_s = 1.0 / rate_hz
        self.deadline_ms = deadline_ms
        self._halt = threading.Event()
        self._rng = np.random.default_rng(7)
        self.outcomes: list[tuple[int, dict[str, Any], float]] = []

    def run(self) -> None:
        count = 0
        while not self._halt.wait(self._interval_s):
            values, _ = self._gateway.sample("digits", count % 400)
            latency_class = ("near", "interactive", "batch")[count % 3]
            began = time.monotonic()
            code, answer = self._gateway.infer(
                model="digits",
                inputs=values,
                latency_class=latency_class,
                deadline_ms=self.deadline_ms,
                use_cache=False,
                producer="traffic",
            )
            self.outcomes.append((code, answer, time.monotonic() - began))
            count += 1

    def seen(self, condition: Callable[[dict[str, Any]], bool]) -> bool:
        return any(code == 200 and condition(answer) for code, answer, _ in self.outcomes[:])

    def stop(self) -> list[tuple[int, dict[str, Any], float]]:
        self._halt.set()
        self.join()
        return self.outcomes


class Client:
    """An MQTT 5 client that collects what it subscribed to."""

    def __init__(self, port: int, topic: str) -> None:
        self.messages: list[mqtt.MQTTMessage] = []
        self._listening = threading.Event()
        self._client = mqtt.Client(CallbackAPIVersion.VERSION2, protocol=mqtt.MQTTv5)
        self._client.on_connect = lambda client, *_: client.subscribe(topic, qos=1)
        self._client.on_subscribe = lambda *_: self._listening.set()
        self._client.on_message = lambda _client, _userdata, message: self.messages.append(message)
        self._client.connect("127.0.0.1", port)
        self._client.loop_start()
        assert self._listening.wait(LIMIT_S)

    def publish(self, topic: str, payload: str | bytes, properties: Any = None) -> None:
        self._client.publish(topic, payload, qos=1, properties=properties)

    def next(self) -> Any:
        """The next message, decoded."""
        wait_until(lambda: self.messages, "a message")
        return json.loads(self.messages.pop(0).payload)

    def close(self) -> None:
        self._client.disconnect()
        self._client.loop_stop()
