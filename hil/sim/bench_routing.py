"""`edge-agent bench routing`: the daemon's routing beside its rivals and an oracle, and what must hold line by line."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from agent.config import Config
from hil.bench import machine
from hil.sim import crowd, figures, judge, page, plots, setting, tables, validate, workloads
from hil.sim.hindsight import ORACLE
from hil.sim.judge import Verdict
from hil.sim.play import Run, Stage, play
from hil.sim.setting import say
from hil.sim.strategies import ALWAYS_CLOUD, BASELINES, OURS

SCHEMA = 1
STRATEGIES = (*BASELINES, OURS, ORACLE)
SEEDS_APART = 10
"""The workloads of one seed use the ones behind it as well."""


def _main(args: argparse.Namespace) -> int:
    if args.validate:
        args.seconds, args.runs, args.page = validate.SECONDS, validate.RUNS, None
        return validate.main(args)
    setting.within("--seconds", args.seconds, 10, 3600)
    setting.within("--seeds", args.seeds, 1, 100)
    stage = setting.stage(args)
    config = setting.config(args.policy, stage.catalog)
    facts = machine.facts()
    say(machine.text(facts))
    crowds, crowded = _crowds(stage, config)  # first: memory that was used before hides what it takes
    seeds = range(args.seed, args.seed + args.seeds * SEEDS_APART, SEEDS_APART)
    results, verdicts = _workloads(stage, config, args.seconds, seeds)
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
        "seeds": list(seeds),
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
    stage: Stage, config: Config, seconds: float, seeds: Sequence[int]
) -> tuple[dict[str, Any], dict[str, Sequence[Verdict]]]:
    """Every strategy on every workload with the first seed; verdicts on all but the disturbed one, with every seed."""
    results: dict[str, Any] = {}
    verdicts: dict[str, Sequence[Verdict]] = {}
    standard = [workloads.standard(seconds, seed) for seed in seeds]
    played = {name: (stage, [one[name] for one in standard]) for name in standard[0]}
    replayed = [workloads.recorded(stage, config, seed) for seed in seeds]
    played[workloads.RECORDED] = replayed[0][0], [scenario for _, scenario in replayed]
    for name, (on, (first, *more)) in played.items():
        runs = {strategy.name: play(on, first, config, strategy) for strategy in STRATEGIES}
        rows = {row: figures.of_courses(run.courses) for row, run in runs.items()}
        ours = runs[OURS.name]
        say()
        say(name)
        for line in tables.table(rows):
            say(line)
        results[name] = {
            "strategies": {row: found.to_dict() for row, found in rows.items()},
            "classes": {row: found.to_dict() for row, found in figures.by_class(ours).items()},
        }
        if name != workloads.DISTURBED:
            pairs = [(ours, runs[ALWAYS_CLOUD.name])]
            pairs += [(play(on, one, config, OURS), play(on, one, config, ALWAYS_CLOUD)) for one in more]
            verdicts[name] = judge.over_seeds([_judged(*pair) for pair in pairs])
            _print(f"what must hold: {name}", verdicts[name])
    return results, verdicts


def _judged(ours: Run, cloud: Run) -> list[Verdict]:
    every, of_cloud = figures.of_courses(ours.courses), figures.of_courses(cloud.courses)
    *found, accuracy = judge.routing(every, figures.by_class(ours)["near"], of_cloud)
    beside = f"{accuracy.beside}; {judge.wrong(ours.courses, cloud.courses)}"
    return [*found, replace(accuracy, beside=beside)]


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
