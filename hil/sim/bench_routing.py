"""`edge-agent bench routing`: the daemon's routing beside its rivals and an oracle, and what must hold line by line."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

from agent.config import Config
from hil.bench import machine
from hil.sim import crowd, figures, judge, page, plots, setting, tables, validate, workloads
from hil.sim.figures import Figures
from hil.sim.hindsight import ORACLE
from hil.sim.judge import Verdict
from hil.sim.play import Scenario, Stage, play
from hil.sim.setting import say
from hil.sim.side_by_side import side_by_side
from hil.sim.strategies import ALWAYS_CLOUD, BASELINES, OURS, Strategy

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
    crowds, crowded = _crowds(stage, config)  # first: memory that was used before hides what they take
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
        wanted = [(strategy, first) for strategy in STRATEGIES]
        if name != workloads.DISTURBED:
            wanted += [(strategy, scenario) for scenario in more for strategy in (OURS, ALWAYS_CLOUD)]
        tellings = side_by_side([partial(_told, on, scenario, config, strategy) for strategy, scenario in wanted])
        rows = {one.strategy: one for one in tellings[: len(STRATEGIES)]}
        say()
        say(name)
        for line in tables.table({row: one.every for row, one in rows.items()}):
            say(line)
        results[name] = {
            "strategies": {row: one.every.to_dict() for row, one in rows.items()},
            "classes": {row: found.to_dict() for row, found in rows[OURS.name].classes.items()},
        }
        if name != workloads.DISTURBED:
            ours, cloud = ([one for one in tellings if one.strategy == of.name] for of in (OURS, ALWAYS_CLOUD))
            verdicts[name] = judge.over_seeds([_judged(*pair) for pair in zip(ours, cloud, strict=True)])
            _print(f"what must hold: {name}", verdicts[name])
    return results, verdicts


class _Told(NamedTuple):
    """One run in figures."""

    strategy: str
    every: Figures
    classes: Mapping[str, Figures]
    wrong: judge.Wrong


def _told(stage: Stage, scenario: Scenario, config: Config, strategy: Strategy) -> _Told:
    run = play(stage, scenario, config, strategy)
    return _Told(strategy.name, figures.of_courses(run.courses), figures.by_class(run), judge.wrong(run.courses))


def _judged(ours: _Told, cloud: _Told) -> list[Verdict]:
    *found, accuracy = judge.routing(ours.every, ours.classes["near"], cloud.every)
    wrong = f"{accuracy.beside}; wrong answers: {ours.wrong.text}; always cloud: {sum(cloud.wrong)}"
    return [*found, replace(accuracy, beside=wrong)]


def _crowds(stage: Stage, config: Config) -> tuple[dict[str, Any], list[Verdict]]:
    told: dict[str, Any] = {}
    verdicts: list[Verdict] = []
    sizes = {"room for all": True, "the daemon's bounds": False}
    # Each in a process of its own: where one has been, the next finds memory that the process has already.
    jobs = [partial(crowd.crowd, stage, config, patient=patient) for patient in sizes.values()]
    for name, (found,) in zip(sizes, (side_by_side([job]) for job in jobs), strict=True):
        told[name] = found.to_dict()
        verdicts += found.verdicts(name)
    _print("10,000 requests at once", verdicts)
    return told, verdicts


def _print(title: str, verdicts: Sequence[Verdict]) -> None:
    say()
    for line in judge.lines(title, verdicts):
        say(line)


main = setting.command("bench routing", _main)
