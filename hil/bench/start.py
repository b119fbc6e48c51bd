"""From exec to READY, and resident memory, of the daemon with both runtimes loaded; beside the least FastAPI process.

The shipped catalogue gives the gateway LiteRT models only, so the daemon is started on a copy in which the cloud's
ONNX models are the gateway's too.
"""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import psutil
import yaml

from agent.registry.locate import catalog_path
from agent.registry.signing import PrivateKey
from agent.registry.trust import CatalogSignature, signature_path
from hil.bench import rig
from hil.bench.http import start_peer
from hil.bench.report import Aim, Line
from hil.bench.stats import summarise
from hil.processes import Process, Stage, free_port

READY_AIM_S = 2.0
RSS_AIM_MB = 120.0
MIN_ROUNDS, MAX_ROUNDS = 3, 15
ROUND_S = 1.0
"""What one round takes, roughly: more seconds, more rounds."""
SETTLE_S = 1.0
"""After everything is loaded, before memory is read."""
RUNTIMES = frozenset({"litert", "onnxruntime"})
MB = 1e6

Samples = Mapping[str, list[list[float]]]


def measure(seconds: float) -> list[Line]:
    rounds = min(MAX_ROUNDS, max(MIN_ROUNDS, round(seconds / ROUND_S)))
    found: dict[str, list[list[float]]] = {}
    with Stage() as stage:
        catalog = both_formats(catalog_path(None).parent, stage.folder / "models")
        owner = PrivateKey.generate()
        CatalogSignature.make(catalog, 1, owner).save(signature_path(catalog))
        broker = free_port()
        stage.broker("broker", broker)
        for number in range(rounds):
            for key, value in {
                **_daemon(stage, catalog, owner.public.raw.hex(), broker, f"daemon-{number}"),
                **_fastapi(stage, f"fastapi-{number}"),
                **_python(stage, f"python-{number}"),
            }.items():
                found.setdefault(key, []).append([value])
    return _lines(found)


def both_formats(models: Path, copy: Path) -> Path:
    """A copy of the shipped models in which the gateway takes the ONNX variants as well. Returns its catalogue."""
    shutil.copytree(models, copy, ignore=shutil.ignore_patterns("training", "__pycache__"))
    path = copy / "catalog.yaml"
    document = yaml.safe_load(path.read_text())
    for family in document["families"].values():
        for variant in family["variants"].values():
            if variant["format"] == "onnx":
                variant["targets"] = [*variant["targets"], "edge_gpu"]
    path.write_text(yaml.safe_dump(document, sort_keys=False))
    return path


def _daemon(stage: Stage, catalog: Path, key: str, broker: int, name: str) -> dict[str, float]:
    folder = stage.folder / name
    models = {"catalog": str(catalog), "trusted_keys": [key]}
    settings = rig.config(folder, models=models, mqtt={"broker": f"mqtt://127.0.0.1:{broker}"})
    began = time.perf_counter()
    process = stage.daemon(settings, name)
    ready = time.perf_counter()
    rig.wait_loaded(process, int(settings["http"]["port"]), RUNTIMES)
    loaded = time.perf_counter()
    time.sleep(SETTLE_S)
    memory = rss_mb(process)
    process.terminate()
    return {"ready": ready - began, "loaded": loaded - began, "rss": memory}


def _fastapi(stage: Stage, name: str) -> dict[str, float]:
    began = time.perf_counter()
    process = start_peer(stage, name, free_port())
    up = time.perf_counter()
    time.sleep(SETTLE_S / 2)
    memory = rss_mb(process)
    process.terminate()
    return {"fastapi ready": up - began, "fastapi rss": memory}


def _python(stage: Stage, name: str) -> dict[str, float]:
    """The interpreter alone; READY is its first line."""
    began = time.perf_counter()
    process = stage.start(name, [sys.executable, "-uc", "import time; print('up'); time.sleep(60)"])
    process.wait_for_log("up")
    up = time.perf_counter()
    memory = rss_mb(process)
    process.terminate()
    return {"python ready": up - began, "python rss": memory}


def rss_mb(process: Process) -> float:
    """Resident memory in megabytes (10^6 bytes), children included."""
    root = psutil.Process(process.pid)
    return float(sum(each.memory_info().rss for each in [root, *root.children(recursive=True)])) / MB


def _lines(found: Samples) -> list[Line]:
    side = {key: summarise(blocks) for key, blocks in found.items()}
    fastapi, python = "FastAPI + uvicorn, one route", "python, nothing imported"
    loaded = "both runtimes, 4 models"
    return [
        Line("start", "exec to READY", "s", side["ready"], fastapi, side["fastapi ready"]),
        Line(
            "start",
            f"exec to {loaded} loaded",
            "s",
            side["loaded"],
            fastapi,
            side["fastapi ready"],
            Aim(READY_AIM_S, "figure"),
            "READY is said when the doors are open; models load behind it, each tried in a child process first",
        ),
        Line("start", f"RSS, {loaded}", "MB", side["rss"], fastapi, side["fastapi rss"], Aim(RSS_AIM_MB, "figure")),
        Line("start", f"RSS, {loaded}", "MB", side["rss"], python, side["python rss"]),
    ]
