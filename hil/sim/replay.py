"""`edge-agent replay`: a recorded trace as it was, and as it would have been under another configuration."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from agent.config import Config
from agent.core.errors import InferenceError
from agent.core.types import InferenceRequest, InferenceResult
from agent.registry.catalog import Family, Variant
from agent.routing.decision import Decision, Play
from agent.routing.router import Among, Router
from agent.routing.walk import Variants
from agent.targets.base import Target
from hil.sim import setting, trace
from hil.sim.play import Course, Run, Scenario, Stage, play
from hil.sim.rebuild import Rebuilt, allowed, rebuild
from hil.sim.setting import say
from hil.sim.strategies import OURS, Strategy
from hil.sim.trace import Record, Trace
from hil.sim.world import World


@dataclass(frozen=True, slots=True)
class Row:
    """One telling of the trace. `accuracy` is of the answers whose right label is known, None where none is."""

    accuracy: float | None
    mean_ms: float
    p50_ms: float
    p95_ms: float
    p99_ms: float
    in_time: float
    refused: float
    stale: float
    cost_usd: float
    bytes: int
    tiers: Mapping[str, int]

    def to_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__slots__}


@dataclass(frozen=True, slots=True)
class _Told:
    """One request in one telling."""

    took_ms: float
    in_time: bool
    right: bool | None
    status: str
    tier: str
    cost_usd: float
    bytes: int


def _main(args: argparse.Namespace) -> int:
    recorded = trace.read(args.trace)
    stage = setting.stage(args)
    trace.check_models(recorded, stage.catalog)
    config = setting.config(args.policy, stage.catalog)
    rows, rebuilt = tell(recorded, stage, config, args.seed)
    say(f"{len(recorded.records)} requests over {recorded.records[-1].at_s:.0f} s; {recorded.skipped} lines skipped")
    for line in rebuilt.filled:
        say(f"  {line}")
    say()
    for line in table(rows):
        say(line)
    setting.write_json(args.json, {name: row.to_dict() for name, row in rows.items()})
    return setting.EXIT_OK


def tell(recorded: Trace, stage: Stage, config: Config, seed: int) -> tuple[dict[str, Row], Rebuilt]:
    """The trace as recorded; the same decisions, simulated; and the configuration's own."""
    rebuilt = rebuild(recorded, stage.catalog, stage.samples, stage.times, config)
    played = Stage(stage.catalog, rebuilt.samples, rebuilt.times)
    scenario = Scenario(
        rebuilt.asks,
        seed=seed,
        places=rebuilt.places,
        weather=rebuilt.weather,
        known=rebuilt.known,
        fresh_only=False,
        one_by_one=False,
    )
    again = play(played, scenario, config, _as_recorded(recorded))
    other = play(played, replace(scenario, places=allowed(rebuilt.places, config)), config, OURS)
    return {
        "as recorded": _row(map(_of_record, recorded.records)),
        "the same decisions, simulated": _row(_of_run(again, recorded)),
        "under this configuration": _row(_of_run(other, recorded)),
    }, rebuilt


def _as_recorded(recorded: Trace) -> Strategy:
    """Asks whoever was asked, in that order, in each stage."""
    plays = {
        str(record.number): [
            [Play(one["target"], one["variant"]) for one in stage["attempts"]] for stage in record.stages
        ]
        for record in recorded.records
    }

    class Recorded(Router):
        def decide(
            self,
            request: InferenceRequest,
            family: Family,
            now: float,
            *,
            among: Among | None = None,
            deadline: float | None = None,
        ) -> tuple[Decision, Variants]:
            stages = plays[request.id] or [[]]
            stage = stages[-1] if among is not None else stages[0]
            wanted: Mapping[Play, Variant] = {
                one: family.variants[one.variant] for one in stage if one.variant in family.variants
            }
            return Decision("recorded", tuple(wanted), ("as recorded",)), wanted

    def router(targets: Sequence[Target], config: Config, world: World) -> Router:
        return Recorded(targets, config.routing, world.clock)

    return Strategy("as recorded", router, cascades=True)


def _of_record(record: Record) -> _Told:
    outcome = record.outcome
    refused = outcome["status"] == "refused"
    sizes = {(one["target"], one["variant"]): one["estimate"]["bytes"] for one in record.candidates()}
    sent = sum(sizes.get((one["target"], one["variant"]), 0) for one in record.attempts() if _is_cloud(one["tier"]))
    return _Told(
        float(outcome["total_ms"]),
        bool(outcome["deadline_met"]) and not refused,
        outcome.get("correct"),
        outcome["status"],
        "" if refused else "fallback" if outcome["status"] == "stale" else outcome["tier"],
        float(outcome["cost_usd"]),
        int(sent),
    )


def _of_run(run: Run, recorded: Trace) -> list[_Told]:
    return [_of_course(course, recorded.records[course.ask.number]) for course in run.courses]


def _of_course(course: Course, record: Record) -> _Told:
    outcome = course.outcome
    right = course.right if record.truth is not None else None
    if isinstance(outcome, InferenceError):
        return _Told(course.took_s * 1e3, False, None, "refused", "", outcome.cost_usd, course.bytes)
    assert isinstance(outcome, InferenceResult)
    status = "stale" if outcome.stale else "cached" if outcome.cached else "computed"
    return _Told(course.took_s * 1e3, course.in_time, right, status, outcome.tier.value, outcome.cost_usd, course.bytes)


def _row(told: Iterable[_Told]) -> Row:
    told = list(told)
    took = np.array([one.took_ms for one in told if one.status != "refused"] or [0.0])
    known = [one.right for one in told if one.right is not None]
    p50, p95, p99 = (float(np.quantile(took, share, method="higher")) for share in (0.5, 0.95, 0.99))
    count = len(told)
    return Row(
        sum(known) / len(known) if known else None,
        float(took.mean()),
        p50,
        p95,
        p99,
        sum(one.in_time for one in told) / count,
        sum(one.status == "refused" for one in told) / count,
        sum(one.status == "stale" for one in told) / count,
        sum(one.cost_usd for one in told),
        sum(one.bytes for one in told),
        dict(sorted(Counter(one.tier for one in told if one.tier).items())),
    )


def table(rows: Mapping[str, Row]) -> list[str]:
    """For people: a line for each telling, then who answered."""
    head = ("accuracy", "in time", "refused", "stale", "mean ms", "p50", "p95", "p99", "USD", "MB")
    lines = [f"  {'':30}" + "".join(f"{title:>10}" for title in head)]
    for name, row in rows.items():
        cells = (
            "unknown" if row.accuracy is None else f"{row.accuracy:.2%}",
            f"{row.in_time:.2%}",
            f"{row.refused:.2%}",
            f"{row.stale:.2%}",
            *(f"{value:.2f}" for value in (row.mean_ms, row.p50_ms, row.p95_ms, row.p99_ms)),
            f"{row.cost_usd:.4f}",
            f"{row.bytes / 1e6:.2f}",
        )
        lines.append(f"  {name:30}" + "".join(f"{cell:>10}" for cell in cells))
    lines.append("")
    for name, row in rows.items():
        lines.append(f"  {name:30}  " + ", ".join(f"{tier} {count}" for tier, count in row.tiers.items()))
    return lines


def _is_cloud(tier: str) -> bool:
    return tier.startswith("cloud")


main = setting.command("replay", _main)
