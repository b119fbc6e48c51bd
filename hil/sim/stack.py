"""The real daemon with all of its tiers on this machine, to be measured: a virtual board for each family, the gateway's
runtime, a broker and one cloud worker behind a network delay."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from agent.registry.catalog import Catalog
from hil.bench.report import CannotMeasure
from hil.processes import START_LIMIT_S, Stage, StartError, free_port

GATEWAY = "bench"
LANE = "edge-agent/lanes/bench"
LANE_NAME = "cloud:gpu"
BAUD = 921_600
CLOUD_DELAY_MS, CLOUD_JITTER_MS = 30.0, 10.0
"""What the worker adds: 30 ms and an exponentially distributed remainder of 10 ms on average, about what a data centre
on the same continent is away."""
COST_USD = 0.0004
CONNECTIONS = 64
POLL_S = 0.1


@dataclass(frozen=True, slots=True)
class Reply:
    """One answer or refusal as JSON, and the seconds from sending to having it."""

    document: Mapping[str, Any]
    took_s: float


def start(stage: Stage, catalog: Catalog, record: Path | None = None) -> int:
    """Start everything; returns the HTTP port once every tier can be asked. `record`: where the daemon writes a trace.
    Raises `StartError`."""
    broker, http = free_port(), free_port()
    stage.broker("broker", broker)
    ports = []
    for family in catalog.families.values():
        small = family.variant_for("edge_mcu")
        if small is not None:
            port = stage.folder / f"tty-{family.name}"
            model = str(catalog.path(small))
            stage.virtual_mcu(port, "--model", model, "--baud", str(BAUD), name=f"mcu-{family.name}")
            ports.append(port)
    url = f"mqtt://127.0.0.1:{broker}"
    delay = ("--delay-ms", str(CLOUD_DELAY_MS), "--jitter-ms", str(CLOUD_JITTER_MS))
    stage.worker("worker", url, LANE, *delay)
    stage.daemon(config(stage.folder, ports, url, http, record))
    _wait(http)
    return http


def config(folder: Path, ports: list[Path], broker: str, http_port: int, record: Path | None) -> dict[str, object]:
    """The daemon's configuration file."""
    return {
        "gateway": {"id": GATEWAY, "state_dir": str(folder / "state")},
        "edge_mcu": {"ports": [str(port) for port in ports], "baud": BAUD},
        "cloud": {"lanes": [{"name": "gpu", "broker": broker, "topic": LANE, "cost_per_request": COST_USD}]},
        "mqtt": {"enabled": False},
        "http": {"port": http_port},
        "monitoring": {} if record is None else {"record": str(record)},
    }


def _wait(http_port: int) -> None:
    end = time.monotonic() + START_LIMIT_S
    while True:
        targets = asyncio.run(_status(http_port))["targets"]
        missing = [target["name"] for target in targets if not target["available"]]
        if not missing and len(targets) == 3:
            return
        if time.monotonic() > end:
            raise StartError(f"not available after {START_LIMIT_S:.0f} s: {', '.join(missing)}")
        time.sleep(POLL_S)


async def _status(http_port: int) -> dict[str, Any]:
    client = Client(http_port)
    try:
        return dict(await client.exchange("GET", "/status", b""))
    finally:
        client.close()


def body(document: Mapping[str, Any], name: str, inputs: Any) -> bytes:
    """A request for `/infer`, encoded beforehand so that it costs nothing while time is taken. A fresh cached answer is
    never taken."""
    values = {name: np.asarray(inputs).tolist()}
    return json.dumps({"use_cache": False, **document, "inputs": values}).encode()


class Client:
    """HTTP/1.1 over at most `CONNECTIONS` kept connections; a request waits for a free one."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._free: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []
        self._places = asyncio.Semaphore(CONNECTIONS)

    async def infer(self, payload: bytes) -> Reply:
        began = time.perf_counter()
        document = await self.exchange("POST", "/infer", payload)
        return Reply(document, time.perf_counter() - began)

    async def exchange(self, method: str, path: str, payload: bytes) -> Mapping[str, Any]:
        """Raises `CannotMeasure` if the daemon closes the connection."""
        async with self._places:
            reader, writer = self._free.pop() if self._free else await asyncio.open_connection("127.0.0.1", self._port)
            head = (
                f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
                f"Content-Length: {len(payload)}\r\n\r\n"
            )
            try:
                writer.write(head.encode() + payload)
                answer = (await reader.readuntil(b"\r\n\r\n")).lower()
                at = answer.index(b"content-length:") + 15
                document: Mapping[str, Any] = json.loads(
                    await reader.readexactly(int(answer[at : answer.index(b"\r\n", at)]))
                )
            except (OSError, ValueError, asyncio.IncompleteReadError) as error:
                writer.close()
                raise CannotMeasure(f"the daemon gave no answer: {error}") from None
            self._free.append((reader, writer))
            return document

    def close(self) -> None:
        for _, writer in self._free:
            writer.close()
        self._free.clear()
