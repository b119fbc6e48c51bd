"""`edge-agent simulate`: one run, and what came of it."""

from __future__ import annotations

import argparse
from typing import Any

from hil.sim import faults, figures, setting, tables
from hil.sim.hindsight import ORACLE
from hil.sim.load import Load
from hil.sim.play import Run, Scenario, play
from hil.sim.setting import Misuse, say
from hil.sim.strategies import BASELINES, OURS

STRATEGIES = {strategy.name: strategy for strategy in (OURS, *BASELINES, ORACLE)}
MAX_REQUESTS = 2_000_000


def _main(args: argparse.Namespace) -> int:
    setting.within("--sensors", args.sensors, 1, 10_000)
    setting.within("--rate", args.rate, 1e-4, 1e3)
    setting.within("--seconds", args.seconds, 1, 86_400)
    setting.within("--sensors x --rate x --seconds", args.sensors * args.rate * args.seconds, 1, MAX_REQUESTS)
    if args.strategy not in STRATEGIES:
        raise Misuse(f"--strategy must be one of {', '.join(STRATEGIES)}, found {args.strategy!r}")
    try:
        misfortunes = faults.parse(args.faults, args.seconds)
    except ValueError as error:
        raise Misuse(f"--faults: {error}") from None
    stage = setting.stage(args)
    config = setting.config(args.policy, stage.catalog)
    scenario = Scenario(Load(args.sensors, args.rate, args.seconds, args.arrivals), misfortunes, args.seed)
    run = play(stage, scenario, config, STRATEGIES[args.strategy])
    show(run)
    setting.write_json(args.json, {"scenario": _described(args), **document(run)})
    return setting.EXIT_OK


def show(run: Run) -> None:
    """The run as tables."""
    for line in tables.table({"all": figures.of_courses(run.courses), **figures.by_class(run)}):
        say(line)
    say()
    say(tables.counts("answered by", figures.by_tier(run.courses)))
    say(tables.counts("refused", figures.refusals(run.courses)))
    say(f"  most at once: {run.most_in_flight} requests in the daemon, {run.most_waiting} of them in line")


def document(run: Run) -> dict[str, Any]:
    """The run as plain JSON types."""
    return {
        "all": figures.of_courses(run.courses).to_dict(),
        "classes": {name: found.to_dict() for name, found in figures.by_class(run).items()},
        "answered_by": figures.by_tier(run.courses),
        "refused": figures.refusals(run.courses),
        "most_in_flight": run.most_in_flight,
        "most_waiting": run.most_waiting,
    }


def _described(args: argparse.Namespace) -> dict[str, Any]:
    names = ("sensors", "rate", "arrivals", "faults", "seconds", "seed", "strategy")
    return {name: getattr(args, name) for name in names}


main = setting.command("simulate", _main)
