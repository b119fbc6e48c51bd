"""`POST /infer` of the daemon, beside FastAPI routes that decode the same body and answer a document of the same size.

Both are processes of their own on the same uvicorn settings; the client is the same. `use_cache` is off, so that every
request really runs the model.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Iterator, Mapping, Sequence

from agent.core.types import Tensor
from agent.registry.catalog import Family, load_catalog
from agent.registry.locate import catalog_path
from hil.bench import rig
from hil.bench.answers import compute_us
from hil.bench.bare import canonical_inputs
from hil.bench.http_client import Crowd, OneByOne, post
from hil.bench.report import Aim, Line
from hil.bench.stats import alternate, summarise
from hil.processes import Process, Stage, free_port

AIM = 1.3
CLIENTS = 32
JSON, RAW = "application/json", "application/octet-stream"


def measure(seconds: float) -> list[Line]:
    catalog = load_catalog(catalog_path(None))
    lines: list[Line] = []
    with Stage() as stage:
        settings = rig.config(stage.folder)
        rig.start(stage, settings)
        port = int(settings["http"]["port"])
        for family in catalog.families.values():
            samples = canonical_inputs(catalog, family)
            peer_port = _peer(stage, family, samples, port)
            lines += _one_client(family, samples, port, peer_port, seconds)
            if family.name == next(iter(catalog.families)):
                lines += _crowd(family, samples, port, peer_port, seconds)
    return lines


def start_peer(stage: Stage, name: str, port: int, *options: str) -> Process:
    """A FastAPI process that listens."""
    process = stage.start(name, [sys.executable, "-m", "hil.bench.peer_http", "--port", str(port), *options])
    process.wait_until(lambda: rig.listens(port), f"listener on port {port}")
    return process


def _peer(stage: Stage, family: Family, samples: Sequence[Tensor], port: int) -> int:
    """A FastAPI process that answers what the daemon answers."""
    answer = stage.folder / f"answer-{family.name}.json"
    once = OneByOne(port, itertools.cycle(_json(family, samples[:1], "/infer")))
    once(0.0)
    answer.write_bytes(once.bodies[-1])
    peer_port = free_port()
    start_peer(stage, f"fastapi-{family.name}", peer_port, "--answer", str(answer))
    return peer_port


def _json(family: Family, samples: Sequence[Tensor], path: str) -> list[bytes]:
    return [
        post(
            path,
            json.dumps(
                {"model": family.name, "inputs": {family.inputs[0].name: sample.tolist()}, "use_cache": False}
            ).encode(),
            JSON,
        )
        for sample in samples
    ]


def _raw(family: Family, samples: Sequence[Tensor], path: str) -> list[bytes]:
    return [post(f"{path}?model={family.name}&use_cache=false", sample.tobytes(), RAW) for sample in samples]


def _one_client(family: Family, samples: Sequence[Tensor], port: int, peer_port: int, seconds: float) -> list[Line]:
    lines = []
    size = len(_json(family, samples[:1], "/")[0])
    kinds: Mapping[str, dict[str, Iterator[bytes]]] = {
        f"JSON of {size} bytes": {
            "FastAPI, request.json()": itertools.cycle(_json(family, samples, "/lean")),
            "FastAPI, dict in and out": itertools.cycle(_json(family, samples, "/usual")),
            "": itertools.cycle(_json(family, samples, "/infer")),
        },
        f"{samples[0].nbytes} raw bytes": {
            "FastAPI, request.body()": itertools.cycle(_raw(family, samples, "/raw")),
            "": itertools.cycle(_raw(family, samples, "/infer")),
        },
    }
    for kind, requests in kinds.items():
        clients = {name: OneByOne(peer_port if name else port, cycle) for name, cycle in requests.items()}
        found = {name: side.scaled(1e6) for name, side in alternate(clients, seconds).items()}
        ours = found.pop("")
        note = f"{compute_us(clients[''].bodies):.0f} us of it are the model"
        aim: Aim | None = Aim(AIM)
        for peer_name, peer in found.items():
            lines.append(Line("http", f"{family.name}, {kind}", "us", ours, peer_name, peer, aim, note))
            aim, note = None, ""
    return lines


def _crowd(family: Family, samples: Sequence[Tensor], port: int, peer_port: int, seconds: float) -> list[Line]:
    ours = Crowd(port, itertools.cycle(_json(family, samples, "/infer")), CLIENTS)
    peer = Crowd(peer_port, itertools.cycle(_json(family, samples, "/lean")), CLIENTS)
    found = alternate({"ours": ours, "peer": peer}, seconds)
    name = "FastAPI, request.json()"
    requests = sum(map(len, ours.latencies))
    return [
        Line(
            "http",
            f"{family.name}, JSON, {CLIENTS} clients",
            "req/s",
            found["ours"],
            name,
            found["peer"],
            note=f"{requests} requests; the client runs on the same cores; count is blocks",
            higher_is_better=True,
        ),
        Line(
            "http",
            f"{family.name}, JSON, {CLIENTS} clients",
            "us",
            summarise(ours.latencies).scaled(1e6),
            name,
            summarise(peer.latencies).scaled(1e6),
        ),
    ]
