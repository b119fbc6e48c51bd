"""`script/soak`: a whole gateway under traffic for hours; a table of what its daemon holds, and a verdict."""

from __future__ import annotations

import argparse
import json
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import psutil

from agent.registry.catalog import load_catalog
from agent.registry.locate import catalog_path
from hil.demo.main import Daemon
from hil.demo.players import Player
from hil.processes import Process, Stage, StartError, free_port, interruptible
from hil.soak.traffic import DURABLE, SENSORS, HttpCaller, Recent, settled
from hil.soak.watch import WARM_UP, Sample, Ticker, held, quantile, verdict
from hil.stalls import Stalls

GATEWAY = "soak"
LANES = ("gpu", "serverless")
HTTP_SHARE = 0.3
ROWS = 12
"""Rows of the table, however long the run is."""
CACHE_ENTRIES = 2000
"""Full long before the end of the warm-up, so that a cache that fills is not taken for a leak."""
SCRAPE_LIMIT_S = 10.0
HEAD = "   min   memory  children   fds  threads  answered  refused  lost    p50    p99  realtime p99  on disk"


def main() -> int:
    """Exit code 0 if every line is flat and nothing was lost."""
    parser = argparse.ArgumentParser(prog="script/soak", description=__doc__)
    parser.add_argument("--hours", type=float, default=1.0, help="how long (default: %(default)s)")
    parser.add_argument("--rate", type=float, default=60.0, help="requests per second, all together")
    parser.add_argument("--interval", type=float, default=0.0, help="seconds between samples (default: 120 in a run)")
    parser.add_argument("--json", type=Path, help="write every sample there")
    args = parser.parse_args()
    if not 0.005 <= args.hours <= 1000 or not 1 <= args.rate <= 1000:
        parser.error("--hours must be 0.005 to 1000 and --rate 1 to 1000")
    seconds = args.hours * 3600
    try:
        with interruptible():
            samples = _soak(seconds, args.rate, args.interval or seconds / 120)
    except KeyboardInterrupt:
        print("script/soak: interrupted")
        return 130
    except StartError as error:
        print(f"script/soak: {error}", file=sys.stderr)
        return 1
    lines = verdict(samples)
    if args.json:
        document = {
            "hours": args.hours,
            "rate_hz": args.rate,
            "samples": [sample.to_dict() for sample in samples],
            "verdict": [dict(zip(("what", "before", "after", "flat"), line, strict=True)) for line in lines],
        }
        args.json.write_text(json.dumps(document, indent=1) + "\n")
    print(f"\nfirst and last third after the first {WARM_UP:.0%}:")
    for what, before, after, flat in lines:
        print(f"  {what:14} {before:9.2f} {after:9.2f}   {'flat' if flat else 'NOT FLAT'}")
    return 0 if all(flat for *_, flat in lines) else 1


def _soak(seconds: float, rate_hz: float, interval_s: float) -> list[Sample]:
    catalog = load_catalog(catalog_path(None))
    with Stage() as stage:
        ports = {name: free_port() for name in ("local", "cloud", "http")}
        process = _start(stage, ports)
        Daemon(ports["http"]).wait_until_complete()
        stalls = Stalls(lambda: process.pid)
        stalls.start()
        ledger = Recent(stalls)
        players = [
            Player(sensor, catalog, ledger, ports["local"], GATEWAY, rate_hz * (1 - HTTP_SHARE) * sensor.share)
            for sensor in SENSORS
        ]
        caller = HttpCaller(ports["http"], catalog, ledger, rate_hz * HTTP_SHARE)
        print(f"{seconds / 60:.0f} minutes at {rate_hz:.0f} requests a second; memory in MB, times in ms\n\n{HEAD}")
        for thread in (*players, caller):
            thread.start()
        samples = _watch(process, stage, ports["http"], ledger, seconds, interval_s)
        for player in players:
            player.halt()
        caller.halt()
        samples[-1] = settled(samples[-1], ledger)
        for player in players:
            player.close()
        stalls.stop()
    return samples


def _watch(
    process: Process, stage: Stage, http_port: int, ledger: Recent, seconds: float, interval_s: float
) -> list[Sample]:
    daemon = psutil.Process(process.pid)
    ticker = Ticker(interval_s, time.monotonic)
    started = time.monotonic()
    samples: list[Sample] = []
    per_row = max(1, round(seconds / interval_s / ROWS))
    while time.monotonic() - started < seconds - interval_s / 2:
        ticker.next()
        if not process.alive():
            raise StartError(f"the daemon ended:\n{process.tail()}")
        _scrape(http_port)
        samples.append(_sample(daemon, stage.folder / "state", ledger, time.monotonic() - started))
        if len(samples) % per_row == 0:
            print(_row(samples[-per_row:]), flush=True)
    return samples


def _scrape(http_port: int) -> None:
    """As Prometheus and somebody who looks at the page do."""
    for path in ("/metrics", "/status", "/recent"):
        with urllib.request.urlopen(f"http://127.0.0.1:{http_port}{path}", timeout=SCRAPE_LIMIT_S) as response:
            response.read()


def _sample(daemon: psutil.Process, state: Path, ledger: Recent, at_s: float) -> Sample:
    by_sensor, answered, refused, lost = ledger.take()
    asked_at_once = [took for sensor, each in by_sensor.items() if sensor != DURABLE for took in each]
    return Sample(
        round(at_s, 1),
        *held(daemon),
        answered,
        refused,
        lost,
        quantile(asked_at_once, 0.5),
        quantile(asked_at_once, 0.99),
        quantile(by_sensor.get("meter", []), 0.99),
        sum(path.stat().st_size for path in state.rglob("*") if path.is_file()) / 1e6,
    )


def _row(samples: list[Sample]) -> str:
    """Of several intervals: the most that was held, the sum of what was answered, the median of the quantiles."""
    worst = {key: max(sample.to_dict()[key] for sample in samples) for key in samples[0].to_dict()}
    total = {key: sum(sample.to_dict()[key] for sample in samples) for key in ("answered", "refused", "lost")}
    middle = {
        key: quantile([sample.to_dict()[key] for sample in samples], 0.5)
        for key in ("p50_ms", "p99_ms", "realtime_p99_ms")
    }
    return (
        f"{samples[-1].at_s / 60:6.1f} {worst['memory_mb']:8.1f} {worst['children_mb']:9.1f} {worst['descriptors']:5d} "
        f"{worst['threads']:8d} {total['answered']:9d} {total['refused']:8d} {total['lost']:5d} "
        f"{middle['p50_ms']:6.2f} {middle['p99_ms']:6.1f} {middle['realtime_p99_ms']:13.1f} {worst['state_mb']:8.1f}"
    )


def _start(stage: Stage, ports: dict[str, int]) -> Process:
    """Every process; returns the daemon's."""
    catalog = load_catalog(catalog_path(None))
    stage.broker("broker", ports["local"])
    stage.broker("cloud-broker", ports["cloud"])
    mcu = stage.folder / "ttyMCU"
    stage.virtual_mcu(mcu, "--model", str(catalog.path(catalog.family("digits").variants["mcu-int8"])))
    cloud = f"mqtt://127.0.0.1:{ports['cloud']}"
    for lane in LANES:
        stage.worker(f"worker-{lane}", cloud, f"lanes/{lane}")
    return stage.daemon(_config(stage.folder, ports, mcu, cloud))


def _config(folder: Path, ports: dict[str, int], mcu: Path, cloud: str) -> dict[str, Any]:
    """Everything that keeps something is on: cache, outbox, trace, audit trail, shadowing."""
    return {
        "gateway": {"id": GATEWAY, "state_dir": str(folder / "state")},
        "edge_mcu": {"port": str(mcu)},
        "edge_gpu": {"isolation": "process"},
        "cloud": {"lanes": [{"name": name, "broker": cloud, "topic": f"lanes/{name}"} for name in LANES]},
        "mqtt": {"broker": f"mqtt://127.0.0.1:{ports['local']}"},
        "http": {"port": ports["http"]},
        "fallback": {"max_cache_size": CACHE_ENTRIES},
        "outbox": {"enabled": True},
        "shadow": {"rate": 0.05, "per_hour": 2000},
        "monitoring": {"record": str(folder / "state" / "trace.jsonl"), "record_max_bytes": 5_000_000},
        "security": {"audit": {"enabled": True, "max_file_bytes": 5_000_000, "keep_files": 2}},
        "sensors": {
            sensor.topic: {
                "model": sensor.family,
                "name": sensor.name,
                "latency_class": sensor.latency_class,
                "accuracy": sensor.accuracy,
                **({"deadline_ms": sensor.deadline_ms} if sensor.deadline_ms else {}),
                **({"durable": True} if sensor.name == DURABLE else {}),
            }
            for sensor in SENSORS
        },
    }


if __name__ == "__main__":
    sys.exit(main())
