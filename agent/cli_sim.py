"""`edge-agent simulate`, `edge-agent replay`, and the benchmarks of routing."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

Later = Callable[[str], object]
"""A command of the rig by its module, imported when it runs."""


def add_parsers(commands: argparse._SubParsersAction[argparse.ArgumentParser], later: Later) -> None:
    simulate = commands.add_parser("simulate", help="simulated sensors and tiers around the daemon's own routing")
    simulate.set_defaults(run=later("hil.sim.simulate"))
    simulate.add_argument("--sensors", type=int, default=100, metavar="N", help="1 to 10000 (default 100)")
    simulate.add_argument("--rate", type=float, default=0.5, metavar="HZ", help="requests of each sensor (default 0.5)")
    simulate.add_argument("--arrivals", choices=("poisson", "bursts", "diurnal"), default="poisson")
    simulate.add_argument(
        "--faults",
        default="",
        metavar="LIST",
        help="cloud-slow, cloud-outage, mcu-flap, runtime-dead; each from 30 to 70 %% of the run, or as NAME@START-END",
    )
    simulate.add_argument("--seconds", type=float, default=120.0, metavar="N", help="of simulated time (default 120)")
    simulate.add_argument("--seed", type=int, default=1, metavar="N", help="equal seeds give equal runs (default 1)")
    simulate.add_argument("--strategy", default="ours", metavar="NAME", help="ours, or what routing is compared with")
    _add_common(simulate)

    replay = commands.add_parser("replay", help="what another configuration would have made of a recorded trace")
    replay.set_defaults(run=later("hil.sim.replay"))
    replay.add_argument("trace", type=Path, metavar="TRACE", help="a file that monitoring.record wrote")
    replay.add_argument(
        "--catalog", type=Path, metavar="FILE", help="of the models in the trace; default: the shipped one"
    )
    replay.add_argument("--seed", type=int, default=1, metavar="N")
    _add_common(replay)


def add_benches(bench: argparse.ArgumentParser, later: Later) -> None:
    """`edge-agent bench routing | simulator | tiers | record`."""
    kinds = bench.add_subparsers(dest="kind", required=False, metavar="KIND")

    routing = kinds.add_parser("routing", help="routing beside its rivals and an oracle, on simulated workloads")
    routing.set_defaults(run=later("hil.sim.bench_routing"))
    routing.add_argument("--seconds", type=float, default=120.0, metavar="N", help="of each workload (default 120)")
    routing.add_argument("--seed", type=int, default=1, metavar="N")
    routing.add_argument(
        "--seeds", type=int, default=1, metavar="N", help="play what must hold with N seeds: mean and range (default 1)"
    )
    routing.add_argument("--plots", type=Path, metavar="FOLDER", help="draw the figures there (needs the extra proof)")
    routing.add_argument("--page", type=Path, metavar="FILE", help="write the figures into this page (docs/)")
    routing.add_argument("--validate", action="store_true", help="the same as `bench simulator`")
    _add_common(routing)

    simulator = kinds.add_parser("simulator", help="the simulator beside the real daemon on the same requests")
    simulator.set_defaults(run=later("hil.sim.validate"))
    simulator.add_argument("--seconds", type=float, default=40.0, metavar="N", help="of each run (default 40)")
    simulator.add_argument("--runs", type=int, default=3, metavar="N", help="the median of so many counts (default 3)")
    simulator.add_argument("--seed", type=int, default=1, metavar="N")
    simulator.add_argument("--json", type=Path, metavar="FILE", help="write the figures here as well")
    simulator.add_argument("--page", type=Path, metavar="FILE", help="write the figures into this page (docs/)")

    tiers = kinds.add_parser("tiers", help="measure every tier and variant on the real daemon, for the simulator")
    tiers.set_defaults(run=later("hil.sim.bench_tiers"))
    tiers.add_argument("--samples", type=int, default=400, metavar="N", help="of each variant (default 400)")
    tiers.add_argument("--json", type=Path, metavar="FILE", help="write them here: what --times takes")

    record = kinds.add_parser("record", help="record a trace of the standard mix by the real daemon")
    record.set_defaults(run=later("hil.sim.bench_record"))
    record.add_argument("--seconds", type=float, default=40.0, metavar="N", help="how long (default 40)")
    record.add_argument("--seed", type=int, default=1, metavar="N")
    record.add_argument("--out", type=Path, required=True, metavar="FILE", help="where to write it, compressed: *.gz")


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--policy", type=Path, metavar="FILE", help="a configuration file; default: the defaults")
    parser.add_argument("--times", type=Path, metavar="FILE", help="measured tiers; default: those that ship")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here as well")
