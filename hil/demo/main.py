"""`edge-agent demo`: real brokers, workers, a virtual microcontroller and the daemon; real data; three outages."""

from __future__ import annotations

import argparse
import asyncio
import json
import socket
import time
import urllib.request
from pathlib import Path
from typing import Any

from agent.registry.catalog import Catalog, load_catalog
from agent.registry.locate import catalog_path
from hil.demo.ledger import Ledger
from hil.demo.players import Player, Sensor
from hil.demo.report import summarise, text
from hil.demo.screen import Screen
from hil.demo.script import Outage, Script
from hil.linkcut import LinkCut
from hil.processes import START_LIMIT_S, Stage, StartError, free_port, interruptible
from hil.virtual.control import Control

GATEWAY = "demo"
LANE = "edge-agent/lanes"
RATE_HZ = 40.0
"""All sensors together: a lively table, and a small part of what two cores can do."""
REFRESH_S = 0.25
LATE_S = 8.0
"""How long the last answers are waited for: longer than the longest deadline."""
STATUS_LIMIT_S = 5.0
MIN_SECONDS, MAX_SECONDS = 20.0, 3600.0
CLOUD_LATENCY_MS = 30
"""Added by each worker to its answers: on one machine a cloud would be nearer than any is."""

SENSORS = (
    Sensor("meter", "sensors/meter", "digits", "realtime", 0.35, what="digits of a meter, wanted in 10 ms"),
    Sensor("watch", "sensors/watch", "motion", "near", 0.2, what="motion of a wrist, wanted in 100 ms"),
    Sensor(
        "panel",
        "sensors/panel",
        "digits",
        "interactive",
        0.15,
        accuracy="adaptive",
        what="digits of a panel; where the small model is not sure, the cloud's is asked",
    ),
    Sensor("archive", "sensors/archive", "digits", "batch", 0.2, 2000, (), "high", "digits, best accuracy"),
    Sensor(
        "clinic", "sensors/clinic", "digits", "batch", 0.1, 2000, ("eu-central",), "high", "the same, in the EU only"
    ),
)


def main(args: argparse.Namespace) -> int:
    """Exit code 0 if nothing was lost and everything stale was labelled."""
    if not MIN_SECONDS <= args.seconds <= MAX_SECONDS:
        print(f"edge-agent demo: --seconds must be {MIN_SECONDS:.0f} to {MAX_SECONDS:.0f}, found {args.seconds:g}")
        return 2
    if args.json and not args.json.resolve().parent.is_dir():
        print(f"edge-agent demo: --json: no such folder: {args.json.resolve().parent}")
        return 2
    try:
        with interruptible():
            summary = asyncio.run(_demo(args.seconds, args.http_port, args.keep))
    except KeyboardInterrupt:
        print("edge-agent demo: interrupted")
        return 130
    except StartError as error:
        print(f"edge-agent demo: {error}")
        return 1
    if args.json:
        args.json.write_text(json.dumps(summary, indent=2) + "\n")
    return 0 if summary["lost"] == 0 and summary["unlabelled_stale"] == 0 else 1


async def _demo(seconds: float, http_port: int, keep: Path | None) -> dict[str, Any]:
    catalog = load_catalog(catalog_path(None))
    ledger = Ledger()
    screen = Screen(SENSORS, ledger)
    with Stage(keep) as stage:
        screen.console.print("starting two brokers, two cloud workers, a virtual microcontroller and the daemon")
        ports = {"local": free_port(), "cloud": free_port(), "link": free_port(), "http": _http_port(http_port)}
        link = LinkCut(ports["link"], ports["cloud"])
        await link.start()
        mcu_port = stage.folder / "ttyMCU"
        control_path = stage.folder / "mcu.sock"
        await asyncio.to_thread(_start, stage, catalog, ports, mcu_port, control_path)
        daemon = Daemon(ports["http"])
        await asyncio.to_thread(daemon.wait_until_complete)
        screen.console.print(f"ready; the status page is at http://127.0.0.1:{ports['http']}/\n")
        for sensor in SENSORS:
            screen.console.print(f"  {sensor.name:8} {sensor.latency_class:9} {sensor.what}")
        screen.console.print("")
        try:
            started = time.monotonic()
            script = Script(link, Control(control_path), daemon.runtime_pid)
            players = [
                Player(sensor, catalog, ledger, ports["local"], GATEWAY, RATE_HZ * sensor.share) for sensor in SENSORS
            ]
            outages = await _play(seconds, screen, players, ledger, script)
        finally:
            await link.stop()
        summary = summarise(ledger.rows(), outages, catalog, started)
        if keep:
            _write_answers(stage.folder / "answers.jsonl", ledger, started)
        text(summary, lambda line: screen.console.print(line))
        return summary


def _write_answers(path: Path, ledger: Ledger, started: float) -> None:
    """One line for each sample: what was asked when, and the whole answer."""
    with path.open("w") as lines:
        for row in ledger.rows():
            asked = {"sensor": row.sensor, "truth": row.truth, "at_s": round(row.sent_s - started, 3)}
            took = round((row.answered_s - row.sent_s) * 1e3, 3) if row.answer else None
            lines.write(json.dumps({**asked, "took_ms": took, "answer": row.answer}) + "\n")


def _start(stage: Stage, catalog: Catalog, ports: dict[str, int], mcu_port: Path, control: Path) -> None:
    """Every process but the players, in the order in which they need each other."""
    stage.broker("broker", ports["local"])
    stage.broker("cloud-broker", ports["cloud"])
    model = catalog.root / catalog.family("digits").variants["mcu-int8"].path
    stage.virtual_mcu(mcu_port, "--control", str(control), "--model", str(model), "--baud", "921600")
    cloud = f"mqtt://127.0.0.1:{ports['cloud']}"
    for lane in ("gpu", "serverless"):
        stage.worker(f"worker-{lane}", cloud, f"{LANE}/{lane}", "--delay-ms", str(CLOUD_LATENCY_MS))
    stage.daemon(_config(stage.folder, ports, mcu_port))


def _config(folder: Path, ports: dict[str, int], mcu_port: Path) -> dict[str, object]:
    """The daemon's configuration file. Sensors never take a fresh cached answer: the samples repeat, and the accuracy
    of each tier is to be measured."""
    cloud = f"mqtt://127.0.0.1:{ports['link']}"
    return {
        "gateway": {"id": GATEWAY, "state_dir": str(folder / "state")},
        "routing": {"breaker": {"backoff_max_s": 2.0}},
        "edge_mcu": {"port": str(mcu_port), "baud": 921600},
        "edge_gpu": {"isolation": "process"},
        "cloud": {
            "lanes": [
                {
                    "name": "gpu",
                    "kind": "gpu",
                    "broker": cloud,
                    "topic": f"{LANE}/gpu",
                    "cost_per_request": 0.0004,
                    "region": "us-east",
                },
                {
                    "name": "serverless",
                    "kind": "serverless",
                    "broker": cloud,
                    "topic": f"{LANE}/serverless",
                    "cost_per_request": 0.001,
                    "region": "eu-central",
                },
            ]
        },
        "mqtt": {"broker": f"mqtt://127.0.0.1:{ports['local']}"},
        "http": {"port": ports["http"]},
        "sensors": {
            sensor.topic: {
                "model": sensor.family,
                "name": sensor.name,
                "latency_class": sensor.latency_class,
                "accuracy": sensor.accuracy,
                "use_cache": False,
                "allowed_regions": list(sensor.allowed_regions),
                **({"deadline_ms": sensor.deadline_ms} if sensor.deadline_ms else {}),
            }
            for sensor in SENSORS
        },
    }


async def _play(seconds: float, screen: Screen, players: list[Player], ledger: Ledger, script: Script) -> list[Outage]:
    """Traffic for `seconds`, with the outages in it. Returns when the last answer is in."""
    started = time.monotonic()
    with screen as say:
        for player in players:
            player.start()
        while (now := time.monotonic()) < started + seconds:
            await asyncio.to_thread(script.advance, (now - started) / seconds, say)
            screen.refresh()
            await asyncio.sleep(REFRESH_S)
        for player in players:
            await asyncio.to_thread(player.halt)
        for _ in range(int(LATE_S / REFRESH_S)):
            if not ledger.open():
                break
            await asyncio.sleep(REFRESH_S)
    for player in players:
        player.close()
    return script.outages()


class Daemon:
    """The running daemon, as its `/status` shows it."""

    def __init__(self, http_port: int) -> None:
        self._url = f"http://127.0.0.1:{http_port}/status"

    def targets(self) -> dict[str, dict[str, Any]]:
        with urllib.request.urlopen(self._url, timeout=STATUS_LIMIT_S) as response:
            return {target["name"]: target for target in json.load(response)["targets"]}

    def runtime_pid(self) -> int | None:
        """Of the child process that runs the gateway's models now."""
        pid: int | None = self.targets()["edge_gpu"]["detail"]["pool"]["pid"]
        return pid

    def wait_until_complete(self) -> None:
        """Until every tier can be asked. Raises `StartError`."""
        end = time.monotonic() + START_LIMIT_S
        while missing := [name for name, target in self.targets().items() if not target["available"]]:
            if time.monotonic() > end:
                raise StartError(f"not available after {START_LIMIT_S:.0f} s: {', '.join(missing)}")
            time.sleep(REFRESH_S)


def _http_port(wanted: int) -> int:
    """The wanted port, or a free one if somebody has it, or for 0."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", wanted))
        except OSError:
            return free_port()
        port: int = probe.getsockname()[1]
    return port
