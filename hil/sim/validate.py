"""`edge-agent bench simulator`: the simulator beside the real daemon, on the same requests.

Two real daemons run, each with virtual boards, the gateway's runtime, a broker and a worker behind a delay. In turns of
a few seconds one of them is measured, tier by tier, and the other one answers requests that arrive at the simulated
times, so that whatever else this machine does falls on both. Then the simulator answers the same requests with what was
measured. Nothing that the second daemon took is known to it: how long requests wait for each other, which tier is
chosen and what is tried again are its predictions.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np
import psutil

from agent.config import Config
from agent.core.types import LatencyClass
from agent.registry.catalog import Catalog, load_catalog
from agent.registry.locate import catalog_path
from hil.bench import machine
from hil.processes import Stage as Processes
from hil.sim import page, setting, stack, tiers
from hil.sim.answers import Samples, run_models
from hil.sim.judge import Verdict, at_most
from hil.sim.load import Ask, Load
from hil.sim.play import Run, Scenario, Stage, class_budgets, play
from hil.sim.setting import say

SECONDS, RUNS = 40.0, 3
"""Where nothing else is said."""
SENSORS, RATE_HZ = 60, 0.5
TURN_S = 4.0
"""How long one daemon is asked before it is the other one's turn."""
REST_S = 0.1
"""Before a turn ends nothing is begun that may reach into the next one."""
LIMIT = 0.10
BEGIN = "<!-- figures: edge-agent bench simulator -->"
WARM_UP_S = 2.0
"""At the start of a run the daemon's estimates settle; these requests do not count, on either side."""


@dataclass(frozen=True, slots=True)
class Pair:
    """One figure, predicted and measured, in milliseconds or as a share."""

    what: str
    predicted: float
    measured: float

    @property
    def error(self) -> float:
        return abs(self.predicted - self.measured) / self.measured


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of one run. `others`: processors that were kept busy by whatever is no part of it."""

    pairs: list[Pair]
    others: float


@dataclass(frozen=True, slots=True)
class _Cpu:
    """Seconds since the start: of the clock, of all processors' work, and of our own and that of our children that
    have ended."""

    at_s: float
    all_s: float
    ours_s: float

    @classmethod
    def now(cls) -> _Cpu:
        ours, every = os.times(), psutil.cpu_times()
        busy_s = every.user + every.system + every.nice + every.irq + every.softirq + every.steal
        return cls(time.monotonic(), busy_s, sum(ours[:4]))

    def others(self) -> float:
        """Processors' worth of work since then that was not ours."""
        now = _Cpu.now()
        return max(0.0, (now.all_s - self.all_s) - (now.ours_s - self.ours_s)) / (now.at_s - self.at_s)


def _main(args: argparse.Namespace) -> int:
    setting.within("--seconds", args.seconds, 20, 600)
    setting.within("--runs", args.runs, 1, 50)
    catalog = load_catalog(catalog_path(None))
    samples = run_models(catalog)
    facts = machine.facts()
    say(machine.text(facts))
    runs = []
    for number in range(args.runs):
        run = one_run(catalog, samples, args.seconds, args.seed + number)
        say(f"run {number + 1} of {args.runs}; other work kept {run.others:.2f} of {os.cpu_count()} processors busy")
        for pair in run.pairs:
            say(f"  {pair.what:28} predicted {pair.predicted:8.2f}  measured {pair.measured:8.2f}  {pair.error:6.1%}")
        runs.append(run)
    verdicts = judged([run.pairs for run in runs])
    for one in verdicts:
        say(f"{'pass' if one.met else 'MISS'}  {one.what}: {one.text}")
    document = _document(facts, runs, verdicts)
    setting.write_json(args.json, document)
    if args.page:
        page.put(args.page, BEGIN, render(document))
    return setting.EXIT_OK


def one_run(catalog: Catalog, samples: Mapping[str, Samples], seconds: float, seed: int) -> Outcome:
    """Measure and play in turns, then predict. Raises `CannotMeasure` and `StartError`."""
    load = Load(SENSORS, RATE_HZ, seconds + WARM_UP_S)
    drawn = load.asks({name: len(found) for name, found in samples.items()}, np.random.default_rng([seed, 0]))
    asks = [ask._replace(at_s=in_turns(ask.at_s)) for ask in drawn]
    before = _Cpu.now()
    with Processes() as one, Processes() as other:
        ports = stack.start(one, catalog), stack.start(other, catalog)
        times, measured = asyncio.run(_both(ports, catalog, samples, asks, seed))
    others = before.others()
    run = play(Stage(catalog, samples, times), Scenario(asks, seed=seed), setting.config(None, catalog))
    return Outcome(compared(_predicted(run), measured), others)


def in_turns(at_s: float) -> float:
    """The same moment of a load that pauses for `TURN_S` after each `TURN_S`."""
    return at_s + TURN_S * (at_s // TURN_S)


async def _both(
    ports: tuple[int, int], catalog: Catalog, samples: Mapping[str, Samples], asks: Sequence[Ask], seed: int
) -> tuple[tiers.Times, list[tuple[Ask, float, str]]]:
    survey = tiers.Survey(ports[0], catalog, seed)
    asking = asyncio.create_task(ask_daemon(ports[1], catalog, samples, asks))
    loop = asyncio.get_running_loop()
    began = loop.time()
    try:
        while not asking.done():
            into_s = (loop.time() - began) % (2 * TURN_S)
            if TURN_S <= into_s < 2 * TURN_S - REST_S:
                await survey.ask_next()
            else:
                await asyncio.sleep((TURN_S - into_s) % (2 * TURN_S))
        return survey.times(), await asking
    finally:
        asking.cancel()
        survey.close()


def compared(predicted: Sequence[tuple[Ask, float, str]], measured: Sequence[tuple[Ask, float, str]]) -> list[Pair]:
    """Mean and 95th percentile of all requests and of each class, and the share that the edge answered."""
    pairs = []
    classes: list[LatencyClass | None] = [None, *LatencyClass]
    for latency_class in classes:
        sides = [
            np.array([ms for ask, ms, _ in side if latency_class in (None, ask.kind.latency_class)])
            for side in (predicted, measured)
        ]
        name = "all" if latency_class is None else latency_class.value
        if not all(map(len, sides)):
            continue
        pairs.append(Pair(f"{name}, mean ms", float(sides[0].mean()), float(sides[1].mean())))
        p95 = [float(np.quantile(side, 0.95, method="higher")) for side in sides]
        pairs.append(Pair(f"{name}, p95 ms", *p95))
    edges = [sum(tier.startswith("edge") for _, _, tier in side) / len(side) for side in (predicted, measured)]
    pairs.append(Pair("answered by the edge, %", edges[0] * 100, edges[1] * 100))
    return pairs


def judged(runs: Sequence[Sequence[Pair]]) -> list[Verdict]:
    """The median over the runs of each run's error: of the mean, of the 95th percentile, and both together. Errors of
    different runs do not make up for each other."""
    found = []
    for what in ("all, mean ms", "all, p95 ms"):
        sides = [pair for run in runs for pair in run if pair.what == what]
        error = median(pair.error for pair in sides)
        found.append(at_most(f"simulator's error, {what}, median of {len(sides)}", error * 100, LIMIT * 100, "%"))
    mean = sum(one.figure for one in found) / len(found)
    return [*found, at_most("simulator's mean error over both", mean, LIMIT * 100, "%")]


def _predicted(run: Run) -> list[tuple[Ask, float, str]]:
    return [
        (course.ask, course.took_s * 1e3, getattr(course.outcome, "tier", "none"))
        for course in run.courses
        if course.ask.at_s >= WARM_UP_S
    ]


async def ask_daemon(
    port: int, catalog: Catalog, samples: Mapping[str, Samples], asks: Sequence[Ask]
) -> list[tuple[Ask, float, str]]:
    """Each request at its time, whether or not those before it are answered; from receipt to answer by the daemon's own
    clock."""
    client = stack.Client(port)
    budgets = class_budgets(Config().routing.latency_thresholds)
    payloads = [_payload(catalog, samples, ask, budgets[ask.kind.latency_class]) for ask in asks]
    loop = asyncio.get_running_loop()
    began = loop.time()
    replies = []
    for ask, payload in zip(asks, payloads, strict=True):
        await asyncio.sleep(max(0.0, began + ask.at_s - loop.time()))
        replies.append(asyncio.create_task(client.infer(payload)))
    found = []
    for ask, task in zip(asks, replies, strict=True):
        reply = await task
        document = reply.document
        if ask.at_s < WARM_UP_S:
            continue
        took_ms = document["timing_ms"]["total"] if "timing_ms" in document else reply.took_s * 1e3
        found.append((ask, float(took_ms), str(document.get("tier", "none"))))
    client.close()
    return found


def _payload(catalog: Catalog, samples: Mapping[str, Samples], ask: Ask, budget_s: float) -> bytes:
    kind = ask.kind
    about = {
        "model": kind.family,
        "latency_class": kind.latency_class.value,
        "deadline_ms": kind.deadline_ms or budget_s * 1e3,
        "priority": kind.priority,
        "accuracy": kind.accuracy.value,
        "producer": f"{kind.name}-{ask.sensor}",
        "request_id": str(ask.number),
        "metadata": {"truth": samples[kind.family].truth[ask.sample]},
    }
    name = catalog.family(kind.family).inputs[0].name
    return stack.body(about, name, samples[kind.family].inputs[ask.sample])


def _document(facts: Mapping[str, Any], runs: Sequence[Outcome], verdicts: Sequence[Verdict]) -> dict[str, Any]:
    return {
        "machine": machine.generic(facts),
        "runs": [
            {
                "others": round(run.others, 2),
                "figures": [
                    {"what": p.what, "predicted": round(p.predicted, 3), "measured": round(p.measured, 3)}
                    for p in run.pairs
                ],
            }
            for run in runs
        ],
        "verdicts": [one.to_dict() for one in verdicts],
    }


def render(document: Mapping[str, Any]) -> str:
    """The figures for a page, with their marks: a column for each run, predicted / measured."""
    runs = document["runs"]
    cells = [{one["what"]: one for one in run["figures"]} for run in runs]
    head = ["predicted / measured", *(f"run {number}" for number in range(1, len(runs) + 1))]
    rows = [head, ["---", *["---:"] * len(runs)]]
    for what in cells[0]:
        pairs = [run.get(what) for run in cells]
        rows.append([what, *("" if p is None else f"{p['predicted']:.2f} / {p['measured']:.2f}" for p in pairs)])
    rows.append(["processors that other work kept busy", *(f"{run['others']:.2f}" for run in runs)])
    about = document["machine"]
    where = f"On {about['cpu']} with {about['cores']} cores, at a load of {about['load_before']} before the runs."
    lines = [BEGIN, "", where, ""]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    lines.append("")
    for one in document["verdicts"]:
        lines.append(f"- {'pass' if one['met'] else '**MISS**'}: {one['what']}: {one['text']}")
    return "\n".join([*lines, "", page.END])


main = setting.command("bench simulator", _main)
