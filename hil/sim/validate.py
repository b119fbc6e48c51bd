"""`edge-agent bench simulator`: the simulator beside the real daemon, on the same requests.

Each run measures the tiers first, then lets the real daemon (virtual boards, the gateway's runtime, a broker and a
worker behind a delay) answer requests that arrive at the simulated times, then has the simulator answer the same
requests with what was just measured. Nothing that the daemon took in that second part is known to the simulator: how
long requests wait for each other, which tier is chosen and what is tried again are its predictions.
"""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import numpy as np

from agent.config import Config
from agent.core.types import AccuracyMode, LatencyClass
from agent.registry.catalog import Catalog, load_catalog
from agent.registry.locate import catalog_path
from hil.bench import machine
from hil.processes import Stage as Processes
from hil.sim import setting, stack, tiers
from hil.sim.answers import Samples, run_models
from hil.sim.judge import Verdict, at_most
from hil.sim.load import STANDARD, Ask, Load
from hil.sim.play import Run, Scenario, Stage, class_budgets, play
from hil.sim.setting import say

SECONDS, RUNS = 20.0, 3
"""Where nothing else is said."""
SENSORS, RATE_HZ = 60, 0.5
KINDS = tuple(
    replace(kind, accuracy=AccuracyMode.HIGH) if kind.latency_class is LatencyClass.BATCH else kind for kind in STANDARD
)
"""The standard mix, but for one thing: to adaptive batch requests gateway and cloud are worth the same within the
policy's hysteresis, so that chance decides at the start which of the two is kept. No simulator can know that."""
TIER_SAMPLES = 150
"""Of each variant, in each run."""
LIMIT = 0.10
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


def _main(args: argparse.Namespace) -> int:
    setting.within("--seconds", args.seconds, 5, 600)
    setting.within("--runs", args.runs, 1, 50)
    catalog = load_catalog(catalog_path(None))
    samples = run_models(catalog)
    facts = machine.facts()
    say(machine.text(facts))
    runs = []
    for number in range(args.runs):
        pairs = one_run(catalog, samples, args.seconds, args.seed + number)
        say(f"run {number + 1} of {args.runs}")
        for pair in pairs:
            say(f"  {pair.what:28} predicted {pair.predicted:8.2f}  measured {pair.measured:8.2f}  {pair.error:6.1%}")
        runs.append(pairs)
    verdicts = judged(runs)
    for one in verdicts:
        say(f"{'pass' if one.met else 'MISS'}  {one.what}: {one.text}")
    setting.write_json(args.json, _document(facts, runs, verdicts))
    return setting.EXIT_OK


def one_run(catalog: Catalog, samples: Mapping[str, Samples], seconds: float, seed: int) -> list[Pair]:
    """Measure, play, predict. Raises `CannotMeasure` and `StartError`."""
    load = Load(SENSORS, RATE_HZ, seconds + WARM_UP_S, kinds=KINDS)
    asks = load.asks({name: len(found) for name, found in samples.items()}, np.random.default_rng([seed, 0]))
    with Processes() as processes:
        times = asyncio.run(tiers.ask_all(stack.start(processes, catalog), catalog, TIER_SAMPLES))
    with Processes() as processes:  # another daemon: as the simulated one, it has learnt nothing yet
        measured = asyncio.run(ask_daemon(stack.start(processes, catalog), catalog, samples, asks))
    run = play(Stage(catalog, samples, times), Scenario(load, seed=seed), setting.config(None, catalog))
    return compared(_predicted(run), measured)


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
    """Of the median over the runs of what was predicted, against the median of what was measured: the error of the
    mean, of the 95th percentile, and both together."""
    found = []
    for what in ("all, mean ms", "all, p95 ms"):
        sides = [pair for run in runs for pair in run if pair.what == what]
        pair = Pair(what, median(p.predicted for p in sides), median(p.measured for p in sides))
        beside = f"predicted {pair.predicted:.2f}, measured {pair.measured:.2f}"
        found.append(at_most(f"simulator's error, {what} ({beside})", pair.error * 100, LIMIT * 100, "%"))
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


def _document(facts: Mapping[str, Any], runs: Sequence[Sequence[Pair]], verdicts: Sequence[Verdict]) -> dict[str, Any]:
    return {
        "machine": machine.generic(facts),
        "runs": [
            [{"what": p.what, "predicted": round(p.predicted, 3), "measured": round(p.measured, 3)} for p in run]
            for run in runs
        ],
        "verdicts": [one.to_dict() for one in verdicts],
    }


main = setting.command("bench simulator", _main)
