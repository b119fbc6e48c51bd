"""The fixed points: which target is asked first, which next, and why."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.config import RoutingSection
from agent.core.types import Complexity, LatencyClass, Tier
from agent.routing.decision import Candidate, Constraint, Decision, Question
from agent.routing.estimate import Estimate
from agent.routing.scorecard import decide

DEFAULTS = RoutingSection(policy="scorecard")
REALTIME, NEAR, INTERACTIVE, BATCH = LatencyClass
SIMPLE, MEDIUM, COMPLEX = Complexity
BUDGETS_S = {REALTIME: 0.01, NEAR: 0.1, INTERACTIVE: 0.5, BATCH: 5.0}


def takes(p50_ms: float, p95_ms: float | None = None, *, accuracy: float = 0.95, cost_usd: float = 0.0) -> Estimate:
    p95_s = (p50_ms if p95_ms is None else p95_ms) / 1e3
    return Estimate(p50_ms / 1e3, p95_s, measured=True, accuracy=accuracy, cost_usd=cost_usd)


def candidate(name: str, tier: Tier, order: int, p50_ms: float, cost_usd: float = 0.0, **changes: Any) -> Candidate:
    estimate = takes(p50_ms, cost_usd=cost_usd)
    return Candidate(name, tier, order, "v", in_flight=0, limit=4, estimate=estimate, **changes)


def but(found: Candidate, *, cost_usd: float | None = None, accuracy: float | None = None, **changes: Any) -> Candidate:
    """The same candidate, with something changed of it or of its estimate."""
    estimate = changes.pop("estimate", found.estimate)
    for key, value in (("cost_usd", cost_usd), ("accuracy", accuracy)):
        if value is not None:
            estimate = replace(estimate, **{key: value})
    return replace(found, estimate=estimate, **changes)


def targets(decision: Decision) -> tuple[str, ...]:
    return tuple(play.target for play in decision.ranked)


def scores(decision: Decision) -> dict[str, float]:
    return {one.target: one.utility for one in decision.judged if one.utility is not None}


MCU = candidate("mcu", Tier.EDGE_MCU, 0, 3, model_bytes=4_000, max_bytes=1e6)
GPU = candidate("gpu", Tier.EDGE_GPU, 10, 1, model_bytes=40_000, max_bytes=1e7)
CLOUD = candidate("cloud", Tier.CLOUD_GPU, 20, 8, model_bytes=400_000, max_bytes=1e9, cost_usd=0.001)
SERVERLESS = candidate("lambda", Tier.CLOUD_SERVERLESS, 30, 9, cost_usd=0.002)
BACKUP = candidate("backup", Tier.CLOUD_GPU, 40, 9, cost_usd=0.0015, backup=True)
FLEET = (MCU, GPU, CLOUD, SERVERLESS, BACKUP)
NO_MCU = but(MCU, variant="")
BIG = tuple(but(c, model_bytes=20_000_000) for c in FLEET)


def question(latency_class: LatencyClass = NEAR, complexity: Complexity = SIMPLE, **changes: Any) -> Question:
    fields: dict[str, Any] = {"priority": 5, "time_left_s": BUDGETS_S[latency_class]}
    return Question(latency_class, complexity, **(fields | changes))


def ask(asked: Question, *candidates: Candidate, **changed: Any) -> Decision:
    return decide(asked, candidates or FLEET, RoutingSection.model_validate(changed))


def names(text: str) -> tuple[str, ...]:
    return tuple(text.split())


CHAIN = "mcu gpu cloud lambda backup"
GONE = {"unavailable": "unplugged"}
BUSY = {"in_flight": 4}

TABLE = {
    "realtime and simple: microcontroller": (question(REALTIME), FLEET, CHAIN),
    "near and medium: gateway": (question(NEAR, MEDIUM), FLEET, "gpu mcu cloud lambda backup"),
    "near and simple: gateway": (question(NEAR, SIMPLE), FLEET, "gpu mcu cloud lambda backup"),
    "interactive and simple: gateway": (question(INTERACTIVE), FLEET, "gpu mcu cloud lambda backup"),
    "batch: cloud": (question(BATCH), FLEET, "cloud mcu gpu lambda backup"),
    "batch and medium: cloud": (question(BATCH, MEDIUM), FLEET, "cloud mcu gpu lambda backup"),
    "complex: cloud": (question(NEAR, COMPLEX), BIG, "cloud lambda backup"),
    "complex and batch: cloud": (question(BATCH, COMPLEX), BIG, "cloud lambda backup"),
    "complex, though it fits the gateway: cloud": (question(NEAR, COMPLEX), (GPU, CLOUD), "cloud gpu"),
    "complex and realtime: cloud": (question(REALTIME, COMPLEX), (GPU, CLOUD), "cloud gpu"),
    "microcontroller busy: gateway": (
        question(REALTIME),
        (but(MCU, **BUSY), GPU, CLOUD),
        "gpu cloud",
    ),
    "edge busy: cloud": (question(NEAR), (but(MCU, **BUSY), but(GPU, **BUSY), CLOUD), "cloud"),
    "edge away: cloud": (question(NEAR), (but(MCU, **GONE), but(GPU, **GONE), CLOUD), "cloud"),
    "cloud away: edge": (question(BATCH), (MCU, GPU, but(CLOUD, **GONE)), "mcu gpu"),
    "cloud and microcontroller away: gateway": (
        question(BATCH, COMPLEX),
        (but(MCU, **GONE), GPU, but(CLOUD, **GONE)),
        "gpu",
    ),
    "all away: nobody": (question(), tuple(but(c, **GONE) for c in FLEET), ""),
    "one lane too dear: asked last": (
        question(BATCH),
        (MCU, GPU, but(CLOUD, cost_usd=0.02), SERVERLESS),
        "lambda mcu gpu cloud",
    ),
    "one lane too dear: asked after the rest of the chain": (
        question(NEAR),
        (MCU, GPU, but(CLOUD, cost_usd=0.02), SERVERLESS),
        "gpu mcu lambda cloud",
    ),
    "every lane too dear: edge first": (question(BATCH, COMPLEX), (GPU, but(CLOUD, cost_usd=0.02)), "gpu cloud"),
    "too dear, and no edge can: used": (
        question(BATCH),
        (but(GPU, **GONE), but(CLOUD, cost_usd=0.02)),
        "cloud",
    ),
    "too dear and affordable, and no edge can: affordable": (
        question(NEAR),
        (but(CLOUD, cost_usd=0.02), but(SERVERLESS, accuracy=0.85)),
        "lambda cloud",
    ),
    "too dear, priority 7: edge": (question(BATCH, priority=7), (GPU, but(CLOUD, cost_usd=0.02)), "gpu cloud"),
    "too dear, priority 8: best score": (
        question(BATCH, priority=8),
        (GPU, but(CLOUD, cost_usd=0.02)),
        "cloud gpu",
    ),
    "priority 10 takes the best score at the edge too": (question(REALTIME, priority=10), FLEET, CHAIN),
    "infeasible: excluded": (question(NEAR), (but(GPU, estimate=takes(101)), CLOUD), "cloud"),
    "exactly feasible: kept": (question(NEAR), (but(GPU, estimate=takes(100)), CLOUD), "gpu cloud"),
    "at risk: after the safe ones": (
        question(NEAR),
        (MCU, but(GPU, estimate=takes(5, 101)), CLOUD),
        "mcu cloud gpu",
    ),
    "all at risk: as usual": (
        question(NEAR),
        tuple(but(c, estimate=takes(5, 101)) for c in (MCU, GPU, CLOUD)),
        "gpu mcu cloud",
    ),
    "edge at risk, cloud too dear but safe: in time counts more": (
        question(NEAR),
        (but(GPU, estimate=takes(5, 101)), but(CLOUD, cost_usd=0.02)),
        "cloud gpu",
    ),
    "no variant: excluded": (question(REALTIME), (NO_MCU, GPU), "gpu"),
    "model over the tier's size: excluded": (question(REALTIME), (but(MCU, model_bytes=1_000_001), GPU), "gpu"),
    "model of exactly the tier's size: kept": (
        question(REALTIME),
        (but(MCU, model_bytes=1_000_000), GPU),
        "mcu gpu",
    ),
    "breaker open: excluded": (question(REALTIME), (but(MCU, breaker="breaker is open"), GPU), "gpu"),
    "region not allowed: excluded": (
        question(BATCH, allowed_regions=frozenset({"eu"})),
        (GPU, but(CLOUD, region="us"), but(SERVERLESS, region="eu")),
        "lambda gpu",
    ),
    "region unknown: excluded where regions are asked for": (
        question(BATCH, allowed_regions=frozenset({"eu"})),
        (GPU, CLOUD),
        "gpu",
    ),
    "region unknown: allowed where none is asked for": (question(BATCH), (GPU, CLOUD), "cloud gpu"),
    "regions do not concern the edge": (question(REALTIME, allowed_regions=frozenset({"eu"})), (MCU, GPU), "mcu gpu"),
    "backup only after the others": (
        question(BATCH, COMPLEX),
        (BACKUP, but(CLOUD, **BUSY), SERVERLESS),
        "lambda backup",
    ),
    "backup when it is all there is": (question(BATCH), (BACKUP, but(CLOUD, **GONE)), "backup"),
    "backup is no rival of the edge": (question(BATCH), (GPU, BACKUP), "gpu backup"),
    "a loaded target loses its headroom": (
        question(INTERACTIVE),
        (but(MCU, in_flight=0), but(GPU, in_flight=15, limit=16)),
        "mcu gpu",
    ),
    "two lanes: the better score": (
        question(BATCH),
        (CLOUD, but(CLOUD, target="near", order=25, accuracy=0.99)),
        "near cloud",
    ),
    "two lanes of one score and place: by name": (
        question(BATCH),
        (but(CLOUD, target="b"), but(CLOUD, target="a")),
        "a b",
    ),
    "no candidates": (question(), (), ""),
}


@pytest.mark.parametrize(("asked", "candidates", "ranked"), TABLE.values(), ids=TABLE.keys())
def test_decision_table(asked: Question, candidates: tuple[Candidate, ...], ranked: str) -> None:
    assert targets(decide(asked, candidates, DEFAULTS)) == names(ranked)


EXCLUSIONS = {
    Constraint.UNAVAILABLE: (but(CLOUD, unavailable="not connected"), "cloud: not asked: not connected"),
    Constraint.NO_VARIANT: (but(CLOUD, variant=""), "cloud: not asked: has no variant of this model"),
    Constraint.SIZE: (
        but(CLOUD, max_bytes=399_999),
        "cloud: not asked: model of 400000 bytes is over its limit of 399999",
    ),
    Constraint.REGION: (but(CLOUD, region="us"), "cloud: not asked: region us is not allowed"),
    Constraint.BREAKER: (but(CLOUD, region="eu", breaker="breaker is open"), "cloud: not asked: breaker is open"),
    Constraint.BUSY: (but(CLOUD, region="eu", in_flight=4), "cloud: not asked: busy: 4 of 4 in flight"),
    Constraint.BUDGET: (
        but(CLOUD, region="eu", budget="1 USD a day is spent"),
        "cloud: not asked: 1 USD a day is spent",
    ),
    Constraint.DEADLINE: (
        but(CLOUD, region="eu", estimate=takes(120)),
        "cloud: not asked: would take 120.0 ms, 100.0 ms of the deadline left",
    ),
}


@pytest.mark.parametrize("constraint", Constraint)
def test_every_hard_constraint_and_its_reason(constraint: Constraint) -> None:
    excluded, reason = EXCLUSIONS[constraint]
    decision = ask(question(allowed_regions=frozenset({"eu"})), excluded)
    assert decision.ranked == ()
    assert decision.reasons == (reason, "no target can be asked")
    assert [(one.target, one.excluded) for one in decision.judged] == [("cloud", constraint)]


def test_the_first_constraint_in_their_order_is_the_one_given() -> None:
    worst = but(
        CLOUD,
        unavailable="gone",
        variant="",
        max_bytes=0,
        breaker="open",
        in_flight=9,
        budget="spent",
        estimate=takes(1e6),
    )
    better = (
        {"unavailable": ""},
        {"variant": "v"},
        {"max_bytes": 1e9},
        {"region": "eu"},
        {"breaker": ""},
        {"in_flight": 0},
        {"budget": ""},
    )
    found = []
    for change in (*better, {"estimate": takes(1)}):
        found += ask(question(allowed_regions=frozenset({"eu"})), worst).excluded.values()
        worst = but(worst, **change)  # type: ignore[arg-type]
    assert found == list(Constraint)


@pytest.mark.parametrize(
    ("asked", "candidates", "changed", "reason"),
    [
        (question(REALTIME), (MCU, GPU), {}, "mcu: score 130; no cloud lane can answer in time"),
        (question(NEAR), (GPU, CLOUD), {}, "gpu: score 115 >= 0.7 x cloud 64"),
        (question(BATCH), (GPU, CLOUD), {}, "cloud: score 109; gpu 65 is below 76"),
        (question(BATCH), (GPU, CLOUD), {"max_cloud_cost": 0.0001}, "gpu: score 65; cloud costs more than 0.0001 USD"),
        (
            question(BATCH),
            (GPU, BACKUP),
            {},
            "gpu: score 65; the only cloud lanes are backups or not sure to be in time",
        ),
        (question(NEAR), (CLOUD,), {}, "cloud: score 64; no edge tier can answer"),
        (
            question(NEAR),
            (CLOUD, but(GPU, estimate=takes(1, 200))),
            {},
            "cloud: score 64; no edge tier is sure to be in time",
        ),
        (question(BATCH, priority=9), (GPU, CLOUD), {}, "cloud: best score 100, whatever the cost (priority 9)"),
    ],
)
def test_the_rule_that_chose_is_the_last_reason(
    asked: Question, candidates: tuple[Candidate, ...], changed: Any, reason: str
) -> None:
    assert ask(asked, *candidates, **changed).reasons[-1] == reason


@pytest.mark.parametrize(("preference", "first"), [(0.5, "gpu"), (0.59, "gpu"), (0.60, "cloud"), (1.0, "cloud")])
def test_edge_preference_is_the_share_that_keeps_the_edge(preference: float, first: str) -> None:
    assert targets(ask(question(BATCH), GPU, CLOUD, edge_preference=preference))[0] == first  # 65 / 109 = 0.596


@pytest.mark.parametrize(("limit", "first"), [(0.001, "cloud"), (0.0009, "gpu"), (0, "gpu")])
def test_a_lane_is_affordable_up_to_its_limit(limit: float, first: str) -> None:
    assert targets(ask(question(BATCH, COMPLEX), GPU, CLOUD, max_cloud_cost=limit))[0] == first


def test_accuracy_counts_within_a_tenth_of_the_best() -> None:
    asked = question(REALTIME)
    best = but(GPU, accuracy=0.99)
    found = [scores(ask(asked, best, but(MCU, accuracy=a)))["mcu"] for a in (0.99, 0.94, 0.89, 0.5)]
    assert found == pytest.approx([130, 125, 120, 120])


def test_cost_points_vanish_at_the_limit_and_count_for_nobody_of_high_priority() -> None:
    def score(cost: float, **changes: Any) -> float:
        return scores(ask(question(BATCH, **changes), but(CLOUD, cost_usd=cost)))["cloud"]

    assert [score(cost) for cost in (0, 0.005, 0.01, 1)] == pytest.approx([110, 105, 100, 100])
    assert score(0, priority=8) == score(1, priority=8) == pytest.approx(100)


# --- properties ------------------------------------------------------------------------------------------------------

TIERS = {Tier.EDGE_MCU: 0, Tier.EDGE_GPU: 10, Tier.CLOUD_GPU: 20, Tier.CLOUD_SERVERLESS: 30}


@st.composite
def candidates(draw: st.DrawFn) -> list[Candidate]:
    found = []
    for number in range(draw(st.integers(0, 6))):
        tier = draw(st.sampled_from(list(TIERS)))
        backup = tier.is_cloud and draw(st.booleans())
        p50 = draw(st.sampled_from([1, 9, 50, 90, 150]))
        found.append(
            Candidate(
                target=f"t{number}",
                tier=tier,
                order=TIERS[tier] + 20 * backup,
                variant=draw(st.sampled_from(["", "v", "v", "v"])),
                in_flight=draw(st.integers(0, 3)),
                limit=draw(st.integers(1, 3)),
                estimate=takes(
                    p50,
                    p50 * draw(st.sampled_from([1, 3])),
                    accuracy=draw(st.sampled_from([0.8, 0.9, 0.95, 1.0])),
                    cost_usd=draw(st.sampled_from([0.0, 0.001, 0.02])) if tier.is_cloud else 0.0,
                ),
                model_bytes=draw(st.sampled_from([1, 100])),
                max_bytes=draw(st.sampled_from([10, 1000])),
                region=draw(st.sampled_from([None, "eu", "us"])) if tier.is_cloud else None,
                backup=backup,
                unavailable=draw(st.sampled_from(["", "", "gone"])),
                breaker=draw(st.sampled_from(["", "", "open"])),
                budget=draw(st.sampled_from(["", "", "spent"])),
            )
        )
    return found


QUESTIONS = st.builds(
    Question,
    st.sampled_from(LatencyClass),
    st.sampled_from(Complexity),
    st.integers(1, 10),
    st.sampled_from([-0.01, 0.01, 0.1, 1.0]),
    st.sampled_from([frozenset(), frozenset({"eu"})]),
)


@settings(max_examples=400)
@given(asked=QUESTIONS, fleet=candidates(), data=st.data())
def test_what_holds_of_every_decision(asked: Question, fleet: list[Candidate], data: st.DataObject) -> None:
    decision = decide(asked, fleet, DEFAULTS)
    assert decide(asked, data.draw(st.permutations(fleet)), DEFAULTS).to_dict() == decision.to_dict()

    named = {candidate.play: candidate for candidate in fleet}
    assert sorted([*decision.ranked, *decision.excluded]) == sorted(named)
    assert set(scores(decision)) == set(targets(decision))
    assert all(0 <= score <= 200 for score in scores(decision).values())
    assert len(decision.reasons) == len(decision.excluded) + 1
    ranked = [named[play] for play in decision.ranked]
    for found in ranked:
        assert not found.unavailable
        assert not found.breaker
        assert found.in_flight < found.limit
        assert found.estimate.p50_s <= asked.time_left_s
        assert not (asked.allowed_regions and found.tier.is_cloud and found.region not in asked.allowed_regions)

    if not ranked:
        return
    first, rest = ranked[0], ranked[1:]
    safe = [found for found in ranked if found.estimate.p95_s <= asked.time_left_s]
    assert not safe or first in safe
    assert not first.backup or all(found.backup for found in safe or ranked)
    dear = [asked.priority < 8 and found.estimate.cost_usd > DEFAULTS.max_cloud_cost for found in rest]
    risky = [found not in safe for found in rest]
    keys = list(zip(risky, dear, [found.order for found in rest], strict=True))
    assert keys == sorted(keys)
    if asked.priority >= 8:
        rivals = [found for found in safe or ranked if found.backup == first.backup]
        assert scores(decision)[first.target] == max(scores(decision)[found.target] for found in rivals)
