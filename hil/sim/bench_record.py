"""`edge-agent bench record`: records the trace that `bench routing` replays, by the real daemon.

The daemon runs with virtual boards, the gateway's runtime, a broker and a worker behind a delay, and with
`monitoring.record`; the standard mix of sensors asks it about the held-out samples. No payload is recorded.
"""

from __future__ import annotations

import argparse
import asyncio
import gzip
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from agent.registry.catalog import load_catalog
from agent.registry.locate import catalog_path
from hil.processes import Stage
from hil.sim import setting, stack, trace, workloads
from hil.sim.answers import run_models
from hil.sim.load import Load
from hil.sim.setting import say
from hil.sim.validate import ask_daemon


def _main(args: argparse.Namespace) -> int:
    setting.within("--seconds", args.seconds, 1, 600)
    if not args.out.name.endswith(".gz"):
        raise setting.Misuse(f"--out: must end in .gz, found {args.out.name}")
    catalog = load_catalog(catalog_path(None))
    samples = run_models(catalog)
    load = Load(workloads.SENSORS, workloads.RATE_HZ, args.seconds)
    asks = load.asks({name: len(found) for name, found in samples.items()}, np.random.default_rng([args.seed, 0]))
    with TemporaryDirectory(prefix="edge-agent-") as folder:
        path = Path(folder) / "requests.jsonl"
        with Stage(Path(folder)) as processes:
            asyncio.run(ask_daemon(stack.start(processes, catalog, path), catalog, samples, asks))
        args.out.write_bytes(gzip.compress(path.read_bytes(), mtime=0))  # a daemon that ended has written everything
    recorded = trace.read(args.out)
    say(f"{len(recorded.records)} requests, {args.out.stat().st_size / 1e3:.0f} kB: {args.out}")
    return setting.EXIT_OK


main = setting.command("bench record", _main)
