"""The policy: hard constraints, groups, utility, hysteresis and probes; and what holds of every decision."""

import json
from dataclasses import replace
from math import inf
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_scorecard import EXCLUSIONS, but, question

from agent.config import RoutingSection, UtilityWeights
from agent.core.types import AccuracyMode, LatencyClass, Tier
from agent.routing.decision import Candidate, Constraint, Decision, Play, Question, objection
from agent.routing.estimate import Estimate
from agent.routing.policy import Policy, decide
from agent.routing.utility import late, utility

DEFAULTS = RoutingSection()
REALTIME, NEAR, INTERACTIVE, BATCH = LatencyClass


def play(
    name: str, tier: Tier, order: int, p50_ms: float, p95_ms: float, accuracy: float, cost_usd: float = 0.0, **more: Any
) -> Candidate:
    target, variant = name.split("/")
    estimate = Estimate(
        p50_ms / 1e3, p95_ms / 1e3, measured=True, accuracy=accuracy, cost_usd=cost_usd, success=0.99, age_s=1.0
    )
    return Candidate(target, tier, order, variant, in_flight=0, limit=4, estimate=estimate, **more)


MCU = play("mcu/int8", Tier.EDGE_MCU, 0, 3, 5, 0.956)
SMALL = play("gpu/small", Tier.EDGE_GPU, 10, 1, 2, 0.960)
GPU = play("gpu/fp16", Tier.EDGE_GPU, 10, 2, 4, 0.978)
CLOUD = play("cloud/fp32", Tier.CLOUD_GPU, 20, 30, 60, 0.996, 0.001, metered=True)
DEAR = play("lambda/fp32", Tier.CLOUD_SERVERLESS, 30, 30, 60, 0.996, 0.02, metered=True)
BACKUP = play("spare/fp32", Tier.CLOUD_GPU, 40, 30, 60, 0.996, 0.0, backup=True)
FLEET = (MCU, SMALL, GPU, CLOUD, DEAR, BACKUP)


def ask(asked: Question, *candidates: Candidate, **changed: Any) -> Decision:
    return decide(asked, candidates or FLEET, RoutingSection.model_validate(changed))


def order(decision: Decision) -> list[str]:
    return [str(play) for play in decision.ranked]


def later(candidate: Candidate, **changes: Any) -> Candidate:
    return replace(candidate, estimate=replace(candidate.estimate, **changes))


# --- who comes first -------------------------------------------------------------------------------------------------


def test_the_most_valuable_first_then_the_other_targets_then_second_variants_then_the_other_groups() -> None:
    assert order(ask(question(NEAR))) == [
        "gpu/fp16",
        "mcu/int8",
        "cloud/fp32",
        "gpu/small",
        "spare/fp32",
        "lambda/fp32",
    ]


def test_what_money_is_worth_depends_on_the_class() -> None:
    """1.8 points of accuracy for a tenth of `max_cloud_cost`: 5 points of utility, or half a point in a batch."""
    assert order(ask(question(NEAR), GPU, CLOUD))[0] == "gpu/fp16"
    assert order(ask(question(BATCH), GPU, CLOUD))[0] == "cloud/fp32"
    assert order(ask(question(NEAR, priority=8), GPU, CLOUD))[0] == "cloud/fp32"
    free = {"weights": {"near": {"cost": 0}}}
    assert order(ask(question(NEAR), GPU, CLOUD, **free))[0] == "cloud/fp32"


def test_a_weight_that_is_not_given_keeps_the_default_of_its_class() -> None:
    weights = RoutingSection.model_validate({"weights": {"batch": {"load": 1}}}).weights.batch
    assert (weights.load, weights.cost, weights.lateness) == (1, 0.05, 0.5)


def test_what_may_be_late_is_worth_less() -> None:
    slow = later(GPU, p50_s=0.030, p95_s=0.090)
    decision = ask(question(NEAR), MCU, slow)
    assert order(decision)[0] == "mcu/int8"
    missed = {one.target: one.terms["miss"] for one in decision.judged}
    assert missed["gpu"] == pytest.approx(-1.5 * (1 - 0.99 * (1 - late(0.030, 0.090, 0.1))))
    assert missed["mcu"] == pytest.approx(-1.5 * 0.01)


def test_a_target_that_failed_lately_is_worth_less() -> None:
    assert order(ask(question(NEAR), MCU, later(GPU, success=0.9)))[0] == "mcu/int8"


def test_a_loaded_target_is_worth_less_and_bytes_count() -> None:
    twins = [replace(GPU, target="a"), replace(GPU, target="b")]
    assert order(ask(question(NEAR), *twins))[0] == "a/fp16"
    assert order(ask(question(NEAR), replace(twins[0], in_flight=1), twins[1]))[0] == "b/fp16"
    assert order(ask(question(NEAR), later(twins[0], bytes=1), twins[1]))[0] == "b/fp16"


# --- groups ----------------------------------------------------------------------------------------------------------

LATE = later(GPU, p95_s=0.101)

GROUPS = {
    "at risk: after everything that is safe": (question(NEAR), (LATE, MCU, DEAR), "mcu/int8 lambda/fp32 gpu/fp16"),
    "all at risk: by what they are worth": (
        question(NEAR),
        (LATE, later(MCU, p95_s=0.101)),
        "gpu/fp16 mcu/int8",
    ),
    "too dear: after everything else that is safe": (
        question(BATCH),
        (DEAR, BACKUP, MCU),
        "mcu/int8 spare/fp32 lambda/fp32",
    ),
    "too dear, but all there is": (question(BATCH), (DEAR,), "lambda/fp32"),
    "priority makes money no argument": (question(BATCH, priority=8), (DEAR, GPU), "lambda/fp32 gpu/fp16"),
    "a backup: after the others": (question(BATCH), (BACKUP, MCU), "mcu/int8 spare/fp32"),
    "a backup, but all there is": (question(BATCH), (BACKUP,), "spare/fp32"),
    "high: the most accurate that is safe": (
        question(NEAR, accuracy=AccuracyMode.HIGH),
        (MCU, GPU, CLOUD),
        "cloud/fp32 gpu/fp16 mcu/int8",
    ),
    "high: what may be late is no answer": (
        question(NEAR, accuracy=AccuracyMode.HIGH),
        (MCU, GPU, later(CLOUD, p95_s=0.2)),
        "gpu/fp16 mcu/int8 cloud/fp32",
    ),
    "high: within the tolerance the rest decides": (
        question(NEAR, accuracy=AccuracyMode.HIGH),
        (later(GPU, accuracy=0.991), CLOUD),
        "gpu/fp16 cloud/fp32",
    ),
    "high: a lane that is too dear sets no mark": (
        question(NEAR, accuracy=AccuracyMode.HIGH),
        (GPU, DEAR),
        "gpu/fp16 lambda/fp32",
    ),
    "acceptable: at or above the floor": (
        question(NEAR, accuracy=AccuracyMode.ACCEPTABLE, accuracy_floor=0.978),
        (MCU, later(GPU, success=0.5), CLOUD),
        "cloud/fp32 gpu/fp16 mcu/int8",
    ),
    "acceptable, but nothing is: the best there is": (
        question(NEAR, accuracy=AccuracyMode.ACCEPTABLE, accuracy_floor=0.999),
        (MCU, GPU),
        "gpu/fp16 mcu/int8",
    ),
}


@pytest.mark.parametrize(("asked", "candidates", "ranked"), GROUPS.values(), ids=GROUPS.keys())
def test_groups(asked: Question, candidates: tuple[Candidate, ...], ranked: str) -> None:
    assert order(ask(asked, *candidates)) == ranked.split()


@pytest.mark.parametrize("constraint", Constraint)
def test_every_hard_constraint_and_its_reason(constraint: Constraint) -> None:
    excluded, reason = EXCLUSIONS[constraint]
    decision = ask(question(allowed_regions=frozenset({"eu"})), excluded)
    assert decision.ranked == ()
    assert decision.reasons == (reason, "no target can be asked")
    assert [(one.target, one.excluded, one.utility) for one in decision.judged] == [("cloud", constraint, None)]


def test_a_reason_that_all_variants_of_a_target_share_is_given_once() -> None:
    decision = ask(question(), *(replace(one, unavailable="unplugged") for one in (SMALL, GPU)), MCU)
    assert decision.reasons[0] == "gpu: not asked: unplugged"
    assert len(decision.reasons) == 2


# --- hysteresis ------------------------------------------------------------------------------------------------------


def test_what_was_chosen_last_stays_until_something_is_better_by_enough() -> None:
    a, b = replace(GPU, target="a"), replace(GPU, target="b")
    before = Play("b", "fp16")
    assert order(ask(question(NEAR, previous=before), a, b)) == ["b/fp16", "a/fp16"]
    slightly, clearly = later(b, success=0.984), later(b, success=0.983)  # 1.5 x 0.006 and 0.007
    assert order(ask(question(NEAR, previous=before), a, slightly))[0] == "b/fp16"
    assert order(ask(question(NEAR, previous=before), a, clearly))[0] == "a/fp16"
    assert order(ask(question(NEAR, previous=before), a, slightly, hysteresis=0))[0] == "a/fp16"


def test_nobody_pays_or_takes_worse_answers_for_not_changing() -> None:
    a, b = replace(GPU, target="a"), replace(GPU, target="b")
    before = Play("b", "fp16")
    assert order(ask(question(NEAR, previous=before), later(a, accuracy=0.980), b))[0] == "a/fp16"
    assert order(ask(question(NEAR, previous=before), a, later(b, cost_usd=0.0001)))[0] == "a/fp16"
    assert order(ask(question(NEAR, previous=before), later(a, accuracy=0.9785), b))[0] == "b/fp16"


def test_what_was_chosen_last_gives_way_to_one_that_is_far_sooner() -> None:
    """In time is all that utility asks; a board that takes 10 ms is not kept where the gateway takes 1."""
    fast = later(replace(GPU, target="a"), p50_s=0.001, p95_s=0.002)
    before = Play("b", "fp16")
    slow = later(replace(GPU, target="b"), p50_s=0.0021, p95_s=0.003)
    assert order(ask(question(NEAR, previous=before), fast, slow))[0] == "a/fp16"
    twice = later(replace(GPU, target="b"), p50_s=0.002, p95_s=0.003)
    assert order(ask(question(NEAR, previous=before), fast, twice))[0] == "b/fp16"


def test_what_was_chosen_last_gives_way_to_a_better_group() -> None:
    before = Play("gpu", "fp16")
    assert order(ask(question(NEAR, previous=before), LATE, MCU))[0] == "mcu/int8"
    gone = replace(GPU, unavailable="unplugged")
    assert order(ask(question(NEAR, previous=before), gone, MCU)) == ["mcu/int8"]


def test_two_equal_targets_do_not_flap() -> None:
    """Their loads and times take turns in being the better ones; the choice does not."""
    previous, chosen = None, []
    for turn in range(20):
        loaded = later(replace(GPU, target="a", in_flight=turn % 2), p95_s=0.004 + 0.001 * (turn % 3))
        other = later(replace(GPU, target="b", in_flight=(turn + 1) % 2), p95_s=0.004 + 0.001 * ((turn + 1) % 3))
        previous = ask(question(NEAR, previous=previous), loaded, other).ranked[0]
        chosen.append(previous.target)
    assert len(set(chosen)) == 1


# --- probes ----------------------------------------------------------------------------------------------------------

FORGOTTEN = replace(later(GPU, age_s=75.0, success=0.8), passed_over=50)
"""It failed, and nobody asked it since; at its best it would be the better one."""


def test_a_target_that_could_be_better_is_tried_again() -> None:
    decision = ask(question(NEAR), MCU, FORGOTTEN)
    assert order(decision) == ["gpu/fp16", "mcu/int8"]
    assert decision.reasons[-1] == (
        "gpu: fp16 was not tried for 75 s: a probe, before mcu with int8 0.941 (95.6 % right, 3.0 to 5.0 ms, 0 USD)"
    )
    never = later(FORGOTTEN, age_s=inf)
    assert "was not tried yet" in ask(question(NEAR), MCU, never).reasons[-1]


NO_PROBE = {
    "realtime": (question(REALTIME), FORGOTTEN, {}),
    "asked lately": (question(NEAR), later(FORGOTTEN, age_s=59.0), {}),
    "its share is used up": (question(NEAR), replace(FORGOTTEN, passed_over=49), {}),
    "no share at all": (question(NEAR), replace(FORGOTTEN, passed_over=10**9), {"probe_share": 0}),
    "no time left for the other": (question(NEAR, time_left_s=0.013), FORGOTTEN, {}),
    "worse even at its best": (question(NEAR), later(FORGOTTEN, accuracy=0.94), {}),
    "metered": (question(NEAR), replace(FORGOTTEN, metered=True), {}),
    "less accurate than asked for": (
        question(NEAR, accuracy=AccuracyMode.ACCEPTABLE, accuracy_floor=0.95),
        later(FORGOTTEN, accuracy=0.949),
        {},
    ),
    "at risk": (question(NEAR), later(FORGOTTEN, p95_s=0.2), {}),
}


@pytest.mark.parametrize(("asked", "probed", "changed"), NO_PROBE.values(), ids=NO_PROBE.keys())
def test_no_probe(asked: Question, probed: Candidate, changed: dict[str, Any]) -> None:
    assert order(ask(asked, MCU, probed, **changed))[0] == "mcu/int8"


def test_a_metered_lane_is_tried_again_where_that_is_allowed() -> None:
    assert order(ask(question(NEAR), MCU, replace(FORGOTTEN, metered=True), probe_metered=True))[0] == "gpu/fp16"


# --- reasons ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "candidates", "reason"),
    [
        (
            question(NEAR),
            (GPU, CLOUD),
            "gpu: fp16 is worth 0.963 (97.8 % right, 2.0 to 4.0 ms, 0 USD);"
            " cloud with fp32 0.928 (99.6 % right, 30.0 to 60.0 ms, 0.001 USD)",
        ),
        (
            question(NEAR),
            (GPU,),
            "gpu: fp16 is worth 0.963 (97.8 % right, 2.0 to 4.0 ms, 0 USD); nothing else can be asked",
        ),
        (
            question(NEAR),
            (LATE, later(MCU, accuracy=0.8)),
            "mcu: int8 is worth 0.785 (80.0 % right, 3.0 to 5.0 ms, 0 USD);"
            " gpu with fp16 0.888 (97.8 % right, 2.0 to 101.0 ms, 0 USD) is not sure to be in time",
        ),
        (
            question(NEAR, previous=Play("b", "fp16")),
            (replace(GPU, target="a"), replace(GPU, target="b")),
            "b: fp16 is worth 0.963 (97.8 % right, 2.0 to 4.0 ms, 0 USD), as before;"
            " a with fp16 0.963 (97.8 % right, 2.0 to 4.0 ms, 0 USD) is not better by 0.01",
        ),
        (
            question(BATCH),
            (MCU, BACKUP),
            "mcu: int8 is worth 0.951 (95.6 % right, 3.0 to 5.0 ms, 0 USD);"
            " spare with fp32 0.991 (99.6 % right, 30.0 to 60.0 ms, 0 USD) is a backup",
        ),
        (
            question(NEAR, accuracy=AccuracyMode.HIGH),
            (GPU, CLOUD),
            "cloud: fp32 is worth 0.928 (99.6 % right, 30.0 to 60.0 ms, 0.001 USD);"
            " gpu with fp16 0.963 (97.8 % right, 2.0 to 4.0 ms, 0 USD) is less accurate than asked for",
        ),
    ],
)
def test_the_reason_has_the_numbers_that_decided(
    asked: Question, candidates: tuple[Candidate, ...], reason: str
) -> None:
    assert ask(asked, *candidates).reasons == (reason,)


# --- properties ------------------------------------------------------------------------------------------------------

TIERS = {Tier.EDGE_MCU: 0, Tier.EDGE_GPU: 10, Tier.CLOUD_GPU: 20, Tier.CLOUD_SERVERLESS: 30}


@st.composite
def fleets(draw: st.DrawFn) -> list[Candidate]:
    found = []
    for number in range(draw(st.integers(0, 4))):
        tier = draw(st.sampled_from(list(TIERS)))
        backup = tier.is_cloud and draw(st.booleans())
        cost_usd = draw(st.sampled_from([0.0, 0.001, 0.02])) if tier.is_cloud else 0.0
        unavailable = draw(st.sampled_from(["", "", "", "gone"]))
        for variant in range(draw(st.integers(1, 3))):
            p50_s = draw(st.sampled_from([0.001, 0.009, 0.050, 0.090, 0.150]))
            found.append(
                Candidate(
                    target=f"t{number}",
                    tier=tier,
                    order=TIERS[tier] + 20 * backup,
                    variant=f"v{variant}",
                    in_flight=draw(st.integers(0, 3)),
                    limit=draw(st.integers(1, 3)),
                    estimate=Estimate(
                        p50_s,
                        p50_s * draw(st.sampled_from([1, 1.5, 3])),
                        measured=True,
                        success=draw(st.sampled_from([0.5, 0.9, 0.99])),
                        cost_usd=cost_usd,
                        bytes=draw(st.sampled_from([0, 500, 100_000])),
                        accuracy=draw(st.sampled_from([0.8, 0.9, 0.95, 1.0])),
                        age_s=draw(st.sampled_from([1.0, 100.0, inf])),
                    ),
                    model_bytes=draw(st.sampled_from([1, 100])),
                    max_bytes=draw(st.sampled_from([10, 1000, 1000])),
                    region=draw(st.sampled_from([None, "eu", "us"])) if tier.is_cloud else None,
                    backup=backup,
                    metered=cost_usd > 0,
                    unavailable=unavailable,
                    breaker=draw(st.sampled_from(["", "", "", "open"])),
                    budget=draw(st.sampled_from(["", "", "", "spent"])),
                    passed_over=draw(st.sampled_from([0, 100])),
                )
            )
    return found


QUESTIONS = st.builds(
    question,
    st.sampled_from(LatencyClass),
    priority=st.integers(1, 10),
    time_left_s=st.sampled_from([-0.01, 0.01, 0.1, 1.0]),
    allowed_regions=st.sampled_from([frozenset(), frozenset({"eu"})]),
    accuracy=st.sampled_from(AccuracyMode),
    accuracy_floor=st.sampled_from([0.0, 0.9]),
    previous=st.sampled_from([None, Play("t0", "v0"), Play("t1", "v1")]),
)
SETTINGS = st.sampled_from([DEFAULTS, RoutingSection(max_cloud_cost=0), RoutingSection(hysteresis=0, probe_share=0)])


@settings(max_examples=400)
@given(asked=QUESTIONS, fleet=fleets(), chosen=SETTINGS, data=st.data())
def test_what_holds_of_every_decision(
    asked: Question, fleet: list[Candidate], chosen: RoutingSection, data: st.DataObject
) -> None:
    decision = decide(asked, fleet, chosen)
    again = Policy(chosen).decide(asked, data.draw(st.permutations(fleet)))
    assert (again.ranked, again.reasons) == (decision.ranked, decision.reasons)

    named = {candidate.play: candidate for candidate in fleet}
    assert sorted([*decision.ranked, *decision.excluded]) == sorted(named)
    for ranked in decision.ranked:
        assert objection(asked, named[ranked]) is None
    for play_out, constraint in decision.excluded.items():
        found = objection(asked, named[play_out])
        assert found is not None and found[0] is constraint
    json.dumps(decision.to_dict(), allow_nan=False)
    if not decision.ranked:
        return
    safe = [one for one in decision.ranked if named[one].estimate.p95_s <= asked.time_left_s]
    assert not safe or decision.ranked[0] in safe
    weights: UtilityWeights = getattr(chosen.weights, asked.latency_class.value)
    for one in decision.judged:
        if one.utility is not None:
            candidate = named[Play(one.target, one.variant)]
            estimate = candidate.estimate
            expected = utility(
                weights,
                accuracy=estimate.accuracy,
                late=late(estimate.p50_s, estimate.p95_s, asked.time_left_s),
                success=estimate.success,
                cost_usd=0.0 if asked.priority >= 8 else estimate.cost_usd,
                max_cost_usd=chosen.max_cloud_cost,
                bytes=estimate.bytes,
                load=candidate.in_flight / candidate.limit,
            )
            assert one.utility == pytest.approx(expected), "what is written out is what utility.py says"
            assert sum(one.terms.values()) == pytest.approx(one.utility)


@given(asked=QUESTIONS, fleet=fleets(), data=st.data())
def test_more_accuracy_never_ranks_lower(asked: Question, fleet: list[Candidate], data: st.DataObject) -> None:
    """Of plays on different targets: the second variant of a target comes after all first ones."""
    fleet = list({candidate.target: candidate for candidate in fleet}.values())
    steady = replace(asked, previous=None)
    decision = ask(steady, *fleet, probe_share=0) if fleet else None
    if decision is None or not decision.ranked:
        return
    chosen = data.draw(st.sampled_from(decision.ranked))
    better = [
        later(one, accuracy=min(1.0, one.estimate.accuracy + 0.05)) if one.play == chosen else one for one in fleet
    ]
    after = ask(steady, *better, probe_share=0)
    assert after.ranked.index(chosen) <= decision.ranked.index(chosen)


def test_scorecard_is_a_setting() -> None:
    decision = decide(question(NEAR), [GPU, CLOUD], RoutingSection(policy="scorecard"))
    assert decision.policy == "scorecard"
    assert decision.reasons == ("gpu: score 113 >= 0.7 x cloud 64",)
    assert but(GPU, accuracy=0.5).estimate.accuracy == 0.5
