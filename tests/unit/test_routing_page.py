"""`docs/routing.md` says what the code does: its tables and its worked example are read from the page and tried."""

import re
from pathlib import Path
from typing import Any

import pytest
from fakes import FakeTarget, after, make_request, outcomes, raises
from hypothesis import given
from test_policy import QUESTIONS, fleets
from test_scorecard import scores

from agent.config import FallbackSection, LatencyThresholds, RoutingSection
from agent.core.clock import ManualClock
from agent.core.errors import InferenceError, TargetFailed
from agent.core.types import Complexity, LatencyClass, Tier
from agent.pipeline import Pipeline
from agent.registry.catalog import Catalog
from agent.routing.admission import class_of
from agent.routing.decision import Candidate, Constraint, Question
from agent.routing.estimate import WINDOW, Cold, Estimate, TrackRecord
from agent.routing.policy import decide
from agent.routing.router import Router
from agent.routing.scorecard import CLASS_POINTS, COMPLEXITY_POINTS
from agent.routing.utility import late
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
    assert [row[0].strip("`") for row in table("constraint", "rules out a play")] == list(Constraint)


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


def test_the_example_by_points() -> None:
    asked = Question(LatencyClass.NEAR, Complexity.SIMPLE, priority=5, time_left_s=0.1 - MARGIN_S)
    decision = decide(asked, example(), RoutingSection(policy="scorecard"))
    assert scores(decision) == pytest.approx({row[0]: float(row[-1]) for row in POINTS})
    assert all(sum(map(float, row[1:-1])) == float(row[-1]) for row in POINTS)
    ranking = re.search(r"Ranking: (.*?)\. Reason: `(.*)`", section("Scorecard"))
    assert ranking is not None
    assert tuple(play.target for play in decision.ranked) == tuple(re.findall(r"`(.*?)`", ranking[1]))
    assert decision.reasons == (ranking[2],)


def test_the_example_by_points_as_a_batch_request() -> None:
    asked = Question(LatencyClass.BATCH, Complexity.SIMPLE, priority=5, time_left_s=5.0)
    decision = decide(asked, example(), RoutingSection(policy="scorecard"))
    told = re.search(r"scores are (\d+), (\d+),\s+(\d+) and (\d+)\.", section("Scorecard"))
    assert told is not None
    assert [scores(decision)[row[0]] for row in FACTS] == pytest.approx([float(score) for score in told.groups()])
    assert decision.ranked[0].target == "cloud:frankfurt"
    assert decision.reasons == ("cloud:frankfurt: score 106; edge_mcu 64 is below 74",)


# --- the utility -----------------------------------------------------------------------------------------------------

PLAYS = table(
    "target", "variant", "tier", "in flight", "limit", "accuracy", "p50 ms", "p95 ms", "success", "bytes", "USD"
)
TERMS = ("accuracy", "miss", "cost", "bytes", "load")


def number(cell: str) -> float:
    return float(cell.replace("\N{MINUS SIGN}", "-"))


def plays() -> list[Candidate]:
    return [
        Candidate(
            target,
            Tier(tier),
            ORDERS[Tier(tier)],
            variant,
            in_flight=int(in_flight),
            limit=int(limit),
            estimate=Estimate(
                float(p50) / 1e3,
                float(p95) / 1e3,
                measured=True,
                success=float(success),
                cost_usd=float(cost),
                bytes=int(size),
                accuracy=float(accuracy),
                age_s=1.0,
            ),
        )
        for target, variant, tier, in_flight, limit, accuracy, p50, p95, success, size, cost in PLAYS
    ]


def test_the_table_of_weights() -> None:
    rows = table("class", "accuracy (A)", "lateness (L)", "cost (C)", "bytes (B)", "load (H)")
    for name, *weights in rows:
        told = dict(zip(("accuracy", "lateness", "cost", "bytes", "load"), map(float, weights), strict=True))
        assert told == dict(getattr(DEFAULTS.weights, name))
    assert [row[0] for row in rows] == list(LatencyClass)


def test_the_worked_example() -> None:
    left_s = 0.1 - MARGIN_S
    decision = decide(Question(LatencyClass.NEAR, Complexity.SIMPLE, priority=5, time_left_s=left_s), plays(), DEFAULTS)
    judged = {(one.target, one.variant): one for one in decision.judged}
    rows = table("target", "variant", "late", *TERMS, "utility")
    assert len(rows) == len(judged) == len(PLAYS)
    for target, variant, chance, *parts, worth in rows:
        one = judged[target, variant]
        assert number(chance) == pytest.approx(late(one.estimate.p50_s, one.estimate.p95_s, left_s), abs=5e-5)
        assert [number(part) for part in parts] == pytest.approx([one.terms[term] for term in TERMS], abs=5.1e-5)
        assert number(worth) == pytest.approx(one.utility, abs=5.1e-5)
    ranking = re.search(r"Ranking: (.*?)\. Reason: `(.*?)`", section("Worked example"), re.DOTALL)
    assert ranking is not None
    assert [str(play) for play in decision.ranked] == re.findall(r"`(.*?)`", ranking[1])
    assert decision.reasons == (ranking[2],)


def test_the_worked_example_as_a_batch_request() -> None:
    decision = decide(Question(LatencyClass.BATCH, Complexity.SIMPLE, priority=5, time_left_s=5.0), plays(), DEFAULTS)
    told = re.search(r"`(\S+)` is worth\s+([\d.]+), `(\S+)` ([\d.]+): the cloud", section("Worked example"))
    assert told is not None
    worth = {one.target: one.utility for one in decision.judged if one.variant != "gateway-int8"}
    first, first_worth, second, second_worth = told.groups()
    assert decision.ranked[0].target == first
    assert str(decision.ranked[1]) == second
    assert (worth[first], worth["edge_gpu"]) == pytest.approx((float(first_worth), float(second_worth)), abs=5e-4)


def test_the_worked_estimate() -> None:
    told = section("Estimates").split("**Worked.**")[1].replace("\n", " ")
    record = TrackRecord(lambda now: Cold(0.005))
    for turn in range(WINDOW):
        slow = turn % 10 == 9
        record.observe(0.0, service_s=0.0035 if slow else 0.002, link_s=0.0003 if slow else 0.0002)
    fresh, aged = record.estimate(0.0, 3, 2), record.estimate(40.0, 3, 2)
    assert "p50 = 0.2 + 2 + 2 = 4.2 ms" in told
    assert fresh.p50_s * 1e3 == pytest.approx(4.2)
    for name, estimate in (("6.04", fresh.p95_s), ("6.48", aged.p50_s), ("10.99", aged.p95_s)):
        assert f"= {name} ms" in told
        assert estimate * 1e3 == pytest.approx(float(name), abs=0.005)


# --- reasons ---------------------------------------------------------------------------------------------------------

LINES = [row[0].strip("`") for row in table("line", "meaning")]
PATTERNS = {line: re.compile(re.sub(r"\\?\b(?!USD)[A-Z]+\b", ".+?", re.escape(line))) for line in LINES}


def explained(reason: str) -> bool:
    return any(pattern.fullmatch(reason) for pattern in PATTERNS.values())


def test_a_line_that_is_not_on_the_page_would_be_noticed() -> None:
    assert not explained("edge_gpu: felt like it")
    assert not explained("edge_gpu: score 12; because")


@pytest.mark.parametrize("settings", [DEFAULTS, RoutingSection(policy="scorecard")])
@given(asked=QUESTIONS, fleet=fleets())
def test_every_reason_of_a_decision_is_on_the_page(
    settings: RoutingSection, asked: Question, fleet: list[Candidate]
) -> None:
    assert [reason for reason in decide(asked, fleet, settings).reasons if not explained(reason)] == []


@pytest.mark.parametrize("settings", [DEFAULTS, RoutingSection(policy="scorecard")])
async def test_every_reason_of_a_request_is_on_the_page(
    catalog: Catalog, clock: ManualClock, settings: RoutingSection
) -> None:
    gpu, cloud = FakeTarget(Tier.EDGE_GPU), FakeTarget(Tier.CLOUD_GPU)
    router = Router([gpu, cloud], settings, clock)
    pipeline = Pipeline(
        catalog, router, ResultCache(FallbackSection(), None, catalog, clock), Metrics(), clock, settings
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
    gpu.behaviour = cloud.behaviour = raises(TargetFailed("broken", permanent=True))
    await ask(**other)
    cloud.state = Availability(False, "not connected")
    for changes in ({}, {"producer": "p"}, {"producer": "q"}):
        await ask(inputs={"window": next(iter(make_request(clock).inputs.values())) + 1}, **changes)
        await ask(**{**other, **changes})
    assert [reason for reason in heard if not explained(reason)] == []
    said = {line for line, pattern in PATTERNS.items() if any(pattern.fullmatch(reason) for reason in heard)}
    assert {line for line in LINES if line.startswith("cache:") or "chain" in line or "skipped" in line} <= said
