"""`docs/routing.md` says what the code does: its tables and its worked example are read from the page and tried."""

import re
from pathlib import Path
from typing import Any

import pytest
from fakes import FakeTarget, after, make_request, outcomes, raises
from hypothesis import given
from test_scorecard import QUESTIONS, candidates, scores

from agent.config import FallbackSection, LatencyThresholds, RoutingSection
from agent.core.clock import ManualClock
from agent.core.errors import InferenceError, TargetFailed
from agent.core.types import Complexity, LatencyClass, Tier
from agent.pipeline import Pipeline
from agent.registry.catalog import Catalog
from agent.routing.admission import class_of
from agent.routing.decision import Candidate, Constraint, Question
from agent.routing.estimate import Estimate
from agent.routing.router import Router
from agent.routing.scorecard import CLASS_POINTS, COMPLEXITY_POINTS, decide
from agent.routing.walk import MARGIN_S
from agent.store.cache import ResultCache
from agent.targets.base import Availability
from agent.telemetry.metrics import Metrics

PAGE = (Path(__file__).parents[2] / "docs" / "routing.md").read_text("utf-8")
DEFAULTS = RoutingSection()
ORDERS = {Tier.EDGE_MCU: 0, Tier.EDGE_GPU: 10, Tier.CLOUD_GPU: 20, Tier.CLOUD_SERVERLESS: 30}


def table(*header: str) -> list[list[str]]:
    """Rows of the table with this header."""
    lines = PAGE.splitlines()
    at = lines.index(f"| {' | '.join(header)} |") + 2
    rows = []
    while at < len(lines) and lines[at].startswith("|"):
        rows.append([cell.strip() for cell in lines[at].strip("|").split(" | ")])
        at += 1
    assert rows
    return rows


def test_the_tables_of_points() -> None:
    tiers = ("edge_mcu", "edge_gpu", "cloud")
    assert {row[0]: tuple(map(float, row[1:])) for row in table("latency class", *tiers)} == CLASS_POINTS
    assert {row[0]: tuple(map(float, row[1:])) for row in table("complexity", *tiers)} == COMPLEXITY_POINTS


def test_the_table_of_classes() -> None:
    limits = LatencyThresholds()
    rows = table("class", "deadline up to", "deadline if none is given")
    assert [row[0] for row in rows] == list(LatencyClass)
    for name, up_to, _ in rows[:3]:
        bound = float(up_to.removesuffix(" ms"))
        assert class_of(bound, limits) == name
        assert class_of(bound + 0.001, limits) != name
    given = [row[2] for row in rows[:3]]
    assert given == [f"{limit:.0f} ms" for limit in (limits.realtime, limits.near_realtime, limits.interactive)]


def test_the_table_of_constraints() -> None:
    assert [row[0].strip("`") for row in table("constraint", "rules out a target")] == list(Constraint)


# --- the worked example ----------------------------------------------------------------------------------------------

FACTS = table("target", "tier", "in flight", "limit", "accuracy", "p50 ms", "p95 ms", "USD")
POINTS = table("target", "class", "complexity", "headroom", "accuracy", "cost", "score")


def example() -> list[Candidate]:
    return [
        Candidate(
            name,
            Tier(tier),
            ORDERS[Tier(tier)],
            "v",
            in_flight=int(in_flight),
            limit=int(limit),
            estimate=Estimate(
                float(p50) / 1e3, float(p95) / 1e3, measured=True, accuracy=float(accuracy), cost_usd=float(cost)
            ),
        )
        for name, tier, in_flight, limit, accuracy, p50, p95, cost in FACTS
    ]


def section(title: str) -> str:
    return PAGE.split(f"## {title}\n")[1].split("\n## ")[0]


def test_the_worked_example() -> None:
    asked = Question(LatencyClass.NEAR, Complexity.SIMPLE, priority=5, time_left_s=0.1 - MARGIN_S)
    decision = decide(asked, example(), DEFAULTS)
    assert scores(decision) == pytest.approx({row[0]: float(row[-1]) for row in POINTS})
    assert all(sum(map(float, row[1:-1])) == float(row[-1]) for row in POINTS)
    ranking = re.search(r"Ranking: (.*?)\. Reason: `(.*)`", section("Worked example"))
    assert ranking is not None
    assert tuple(play.target for play in decision.ranked) == tuple(re.findall(r"`(.*?)`", ranking[1]))
    assert decision.reasons == (ranking[2],)


def test_the_example_as_a_batch_request() -> None:
    asked = Question(LatencyClass.BATCH, Complexity.SIMPLE, priority=5, time_left_s=5.0)
    decision = decide(asked, example(), DEFAULTS)
    told = re.search(r"scores are (\d+), (\d+),\s+(\d+) and (\d+)\.", section("Worked example"))
    assert told is not None
    assert [scores(decision)[row[0]] for row in FACTS] == pytest.approx([float(score) for score in told.groups()])
    assert decision.ranked[0].target == "cloud:frankfurt"
    assert decision.reasons == ("cloud:frankfurt: score 106; edge_mcu 64 is below 74",)


# --- reasons ---------------------------------------------------------------------------------------------------------

LINES = [row[0].strip("`") for row in table("line", "meaning")]
PATTERNS = {line: re.compile(re.sub(r"\\?\b(?!USD)[A-Z]+\b", ".+?", re.escape(line))) for line in LINES}


def explained(reason: str) -> bool:
    return any(pattern.fullmatch(reason) for pattern in PATTERNS.values())


def test_a_line_that_is_not_on_the_page_would_be_noticed() -> None:
    assert not explained("edge_gpu: felt like it")
    assert not explained("edge_gpu: score 12; because")


@given(asked=QUESTIONS, fleet=candidates())
def test_every_reason_of_a_decision_is_on_the_page(asked: Question, fleet: list[Candidate]) -> None:
    assert [reason for reason in decide(asked, fleet, DEFAULTS).reasons if not explained(reason)] == []


async def test_every_reason_of_a_request_is_on_the_page(catalog: Catalog, clock: ManualClock) -> None:
    gpu, cloud = FakeTarget(Tier.EDGE_GPU), FakeTarget(Tier.CLOUD_GPU)
    router = Router([gpu, cloud], DEFAULTS, clock)
    pipeline = Pipeline(
        catalog, router, ResultCache(FallbackSection(), None, catalog, clock), Metrics(), clock, DEFAULTS
    )
    heard: list[str] = []

    async def ask(**changes: Any) -> Any:
        try:
            outcome: Any = await pipeline.infer(make_request(clock, **changes))
        except InferenceError as error:
            outcome = error
        heard.extend(outcome.reasons)
        return outcome

    other = {"use_cache": False, "producer": "p"}
    for changes in ({}, {}, {"idempotency_key": "k", **other}, {"idempotency_key": "k", **other}):
        await ask(**changes)
    gpu.behaviour = after(clock, 0.097, raises(TargetFailed("broken")))
    assert outcomes((await ask(**other)).attempts) == [("edge_gpu", "failed")]
    gpu.behaviour = raises(TargetFailed("broken", permanent=True))
    await ask(**other)
    cloud.state = Availability(False, "not connected")
    for changes in ({}, {"producer": "p"}, {"producer": "q"}):
        await ask(inputs={"window": next(iter(make_request(clock).inputs.values())) + 1}, **changes)
        await ask(**{**other, **changes})
    assert [reason for reason in heard if not explained(reason)] == []
    said = {line for line, pattern in PATTERNS.items() if any(pattern.fullmatch(reason) for reason in heard)}
    assert {line for line in LINES if line.startswith("cache:") or "chain" in line or "skipped" in line} <= said
