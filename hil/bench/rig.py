"""The daemon as a process, ready to be measured."""

from __future__ import annotations

import json
import socket
import time
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hil.processes import Process, Stage, StartError, free_port

GATEWAY = "bench"
LOAD_LIMIT_S = 30.0
POLL_S = 0.01


def config(folder: Path, **sections: Any) -> dict[str, Any]:
    """A gateway with its own runtimes and no other tier, whose rate limits count and do not bind; `sections` replace
    whole sections."""
    unbound = {"per_s": 1_000_000, "burst": 1_000_000}
    return {
        "gateway": {"id": GATEWAY, "state_dir": str(folder / "state")},
        "http": {"port": free_port()},
        "mqtt": {"enabled": False},
        "security": {"limits": {"identity": unbound, "producer": dict(unbound)}},
        **sections,
    }


def start(stage: Stage, settings: Mapping[str, Any], name: str = "daemon") -> Process:
    """The daemon, with its models loaded and its doors open."""
    process = stage.daemon(settings, name)
    wait_loaded(process, int(settings["http"]["port"]))
    return process


def wait_loaded(process: Process, http_port: int, providers: frozenset[str] = frozenset()) -> dict[str, Any]:
    """Until the gateway's target is available and runs each of `providers` (`litert`, `onnxruntime`), and the MQTT
    door, if there is one, is connected. Returns the status. Raises `StartError`."""
    end = time.monotonic() + LOAD_LIMIT_S
    while True:
        status = ask(http_port, "/status")
        if status["ready"] and providers <= loaded_runtimes(status) and _door_open(status):
            return status
        if time.monotonic() > end or not process.alive():
            raise StartError(f"{process.name}: models were not loaded within {LOAD_LIMIT_S:.0f} s:\n{process.tail()}")
        time.sleep(POLL_S)


def loaded_runtimes(status: Mapping[str, Any]) -> set[str]:
    """Names of the libraries that run the gateway's models."""
    detail = next(target["detail"] for target in status["targets"] if target["name"] == "edge_gpu")
    return {model["provider"].split()[0] for model in detail["pool"]["models"].values()}


def ask(http_port: int, path: str) -> dict[str, Any]:
    """A JSON document of the daemon's."""
    with urllib.request.urlopen(f"http://127.0.0.1:{http_port}{path}", timeout=5) as response:
        document: dict[str, Any] = json.load(response)
    return document


def listens(port: int) -> bool:
    """Whether somebody accepts connections on a port of loopback."""
    with socket.socket() as probe:
        probe.settimeout(1.0)
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _door_open(status: Mapping[str, Any]) -> bool:
    door = status["doors"]["mqtt"]
    return door is None or bool(door["connected"])
