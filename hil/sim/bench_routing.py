"""`edge-agent bench routing`: the daemon's routing beside its rivals and an oracle, and what must hold line by line."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

from agent.config import Config
from hil.bench import machine
from hil.sim import crowd, figures, judge, page, plots, setting, tables, validate, workloads
from hil.sim.figures import Figures
from hil.sim.hindsight import ORACLE
from hil.sim.judge import Verdict
from hil.sim.play import Stage, play
from hil.sim.setting import say
from hil.sim.strategies import ALWAYS_CLOUD, BASELINES, OURS

SCHEMA = 1
STRATEGIES = (*BASELINES, OURS, ORACLE)


def _main(args: argparse.Namespace) -> int:
    if args.validate:
        args.seconds, args.runs = validate.SECONDS, validate.RUNS
        return validate.main(args)
    setting.within("--seconds", args.seconds, 10, 3600)
    stage = setting.stage(args)
    config = setting.config(args.policy, stage.catalog)
    facts = machine.facts()
    say(machine.text(facts))
    crowds, crowded = _crowds(stage, config)  # first: memory that was used before hides what it takes
    results, verdicts = _workloads(stage, config, args.seconds, args.seed)
    verdicts["10,000 requests at once"] = crowded
    healthy = crowd.disturbed(stage, config, args.seconds, args.seed)
    verdicts["faults elsewhere"] = [one.verdict() for one in healthy]
    _print("faults elsewhere", verdicts["faults elsewhere"])
    say()
    say(f"held: {sum(map(len, verdicts.values())) - judge.missed(verdicts)} of {sum(map(len, verdicts.values()))}")
    document = {
        "schema": SCHEMA,
        "machine": machine.generic(facts),
        "times": {"machine": dict(stage.times.machine), "network": dict(stage.times.network)},
        "seconds": args.seconds,
        "seed": args.seed,
        "workloads": results,
        "crowds": crowds,
        "verdicts": {title: [one.to_dict() for one in found] for title, found in verdicts.items()},
    }
    setting.write_json(args.json, document)
    if args.page:
        page.write(args.page, document)
    if args.plots:
        plots.draw(args.plots, document)
    return setting.EXIT_OK


def _workloads(
    stage: Stage, config: Config, seconds: float, seed: int
) -> tuple[dict[str, Any], dict[str, Sequence[Verdict]]]:
    """Every strategy on every workload; verdicts on the calm ones."""
    results: dict[str, Any] = {}
    verdicts: dict[str, Sequence[Verdict]] = {}
    for name, scenario in workloads.standard(seconds, seed).items():
        rows: dict[str, Figures] = {}
        classes: Mapping[str, Figures] = {}
        for strategy in STRATEGIES:
            run = play(stage, scenario, config, strategy)
            rows[strategy.name] = figures.of_courses(run.courses)
            if strategy is OURS:
                classes = figures.by_class(run)
        say()
        say(name)
        for line in tables.table(rows):
            say(line)
        results[name] = {
            "strategies": {row: found.to_dict() for row, found in rows.items()},
            "classes": {row: found.to_dict() for row, found in classes.items()},
        }
        if name != workloads.DISTURBED:
            verdicts[name] = judge.routing(rows[OURS.name], classes["near"], rows[ALWAYS_CLOUD.name])
            _print(f"what must hold: {name}", verdicts[name])
    return results, verdicts


def _crowds(stage: Stage, config: Config) -> tuple[dict[str, Any], list[Verdict]]:
    told: dict[str, Any] = {}
    verdicts: list[Verdict] = []
    for name, patient in (("room for all", True), ("the daemon's bounds", False)):
        found = crowd.crowd(stage, config, patient=patient)
        told[name] = found.to_dict()
        verdicts += found.verdicts(name)
    _print("10,000 requests at once", verdicts)
    return told, verdicts


def _print(title: str, verdicts: Sequence[Verdict]) -> None:
    say()
    for line in judge.lines(title, verdicts):
        say(line)


main = setting.command("bench routing", _main)
