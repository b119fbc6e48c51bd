"""What the router remembers from request to request: what was chosen, what was passed over, what a link takes."""

import pytest
from fakes import (
    AVAILABLE,
    UNPLUGGED,
    FakeTarget,
    answers,
    family_document,
    make_answer,
    make_catalog,
    make_request,
    raises,
    variant_document,
)

from agent.config import RoutingSection
from agent.core.clock import ManualClock
from agent.core.errors import TargetFailed
from agent.core.types import AccuracyMode, InferenceRequest, LatencyClass, TargetAnswer, Tier
from agent.registry.catalog import Family, Variant
from agent.routing.router import NoAnswer, Router
from agent.targets.base import Availability

GPU, MCU, CLOUD = Tier.EDGE_GPU, Tier.EDGE_MCU, Tier.CLOUD_GPU
RIGHT = {"small": 0.9, "medium": 0.95, "large": 0.99}


def pair(clock: ManualClock, gpu: FakeTarget, mcu: FakeTarget) -> Router:
    return Router([gpu, mcu], RoutingSection(), clock, accuracy_of=lambda variant: RIGHT[variant.id])


async def test_a_target_that_failed_is_tried_again_with_a_share_of_the_requests(
    family: Family, clock: ManualClock
) -> None:
    gpu, mcu = FakeTarget(GPU, raises(TargetFailed("broken"))), FakeTarget(MCU)
    router = pair(clock, gpu, mcu)
    asked = [(await router.run(make_request(clock), family)).attempts[0].target for _ in range(4)]
    assert asked == ["edge_gpu", "edge_mcu", "edge_mcu", "edge_mcu"], "success of 0.95 instead of 0.99"
    clock.advance(30)
    for _ in range(47):
        assert (await router.run(make_request(clock), family)).traits.name == "edge_mcu"
    realtime = make_request(clock, latency_class=LatencyClass.REALTIME)
    assert (await router.run(realtime, family)).traits.name == "edge_mcu"
    routed = await router.run(make_request(clock), family)
    assert [attempt.target for attempt in routed.attempts] == ["edge_gpu", "edge_mcu"]
    assert "edge_gpu: medium was not tried yet: a probe, before edge_mcu with small" in routed.reasons[0]
    assert len((await router.run(make_request(clock), family)).attempts) == 1, "one probe, and no more"
    gpu.behaviour = answers
    for _ in range(50):
        last = (await router.run(make_request(clock), family)).traits.name
    assert last == "edge_gpu", "the next probe found it well, and it is asked again"


async def test_what_was_chosen_is_remembered_for_each_class_and_mode(family: Family, clock: ManualClock) -> None:
    lanes = [FakeTarget(CLOUD, name=name, prior_s=0.01) for name in ("a", "b")]
    router = Router(lanes, RoutingSection(), clock)
    lanes[0].state = Availability(False, "not connected")
    assert (await router.run(make_request(clock), family)).traits.name == "b"
    lanes[0].state = Availability(True)
    assert (await router.run(make_request(clock), family)).traits.name == "b", "as before"
    for changes in ({"latency_class": LatencyClass.INTERACTIVE}, {"accuracy": AccuracyMode.HIGH}):
        decision, _ = router.decide(make_request(clock, **changes), family, clock.monotonic())
        assert not any("as before" in reason for reason in decision.reasons), "nothing was chosen for such a request"


@pytest.mark.parametrize("how", ["free", "pinned", "second step"])
async def test_a_choice_that_was_not_free_is_no_precedent(family: Family, clock: ManualClock, how: str) -> None:
    lanes = [FakeTarget(CLOUD, name="a", prior_s=0.01), FakeTarget(CLOUD, name="b", prior_s=0.01, cost_usd=1.5e-5)]
    router = Router(lanes, RoutingSection(), clock)
    lanes[0].state = Availability(False, "not connected")
    if how == "second step":
        await router.run(make_request(clock), family, among=lambda traits, variant: variant.id == "large")
    else:
        await router.run(make_request(clock, variant="large" if how == "pinned" else None), family)
    lanes[0].state = Availability(True)
    decision, _ = router.decide(make_request(clock), family, clock.monotonic())
    assert any("as before" in reason for reason in decision.reasons) == (how == "free")


async def test_the_link_of_a_model_never_asked_is_known_from_others_on_the_same_target(clock: ManualClock) -> None:
    small, large = [1, 4], [1, 4000]
    catalog = make_catalog(
        small=family_document(variants={"v": _of_shape("1", small)}),
        large=family_document(variants={"v": _of_shape("2", large)}),
    )
    lane = FakeTarget(CLOUD, prior_s=0.05, prior_link_s=0.045, bytes_per_s=1e6, overhead_bytes=500)

    async def over_a_slow_link(request: InferenceRequest, variant: Variant, deadline: float) -> TargetAnswer:
        return make_answer(compute_s=0.001, link_s=0.2)._replace(bytes_sent=500, bytes_received=28)

    lane.behaviour = over_a_slow_link
    router = Router([lane], RoutingSection(), clock)
    variant = catalog.family("large").variants["v"]
    state = router._states[lane.traits.name]
    assert state.estimate(variant, clock.monotonic()).link_s == pytest.approx(0.045 + 16_512e-6)
    await router.run(make_request(clock, 5000, model="small"), catalog.family("small"))
    clock.advance(1)
    cold = state.estimate(variant, clock.monotonic())
    assert (cold.measured, cold.bytes) == (False, 16_512)
    assert cold.link_s == pytest.approx(0.2 + (16_512 - 528) * 1e-6)


def _of_shape(digit: str, shape: list[int]) -> dict[str, object]:
    return variant_document(
        "cloud",
        sha256=digit * 64,
        inputs=[{"name": "in", "maps": "window", "shape": shape, "dtype": "float32"}],
    )


async def test_a_target_that_comes_back_starts_with_the_priors_success(family: Family, clock: ManualClock) -> None:
    gpu = FakeTarget(GPU, raises(TargetFailed("it goes away")))
    router = Router([gpu], RoutingSection(), clock)
    state, variant = router._states["edge_gpu"], family.variants["medium"]
    prior = state.estimate(variant, clock.monotonic()).success
    for _ in range(5):
        with pytest.raises(NoAnswer):
            await router.run(make_request(clock), family)
    assert state.estimate(variant, clock.monotonic()).success < 0.9
    gpu.state = UNPLUGGED
    router.decide(make_request(clock), family, clock.monotonic())
    gpu.state = AVAILABLE
    router.decide(make_request(clock), family, clock.monotonic())
    assert state.estimate(variant, clock.monotonic()).success == pytest.approx(prior)


async def test_one_that_was_away_between_two_requests_is_asked_at_once(family: Family, clock: ManualClock) -> None:
    """The daemon looks at its parts every second, whether or not somebody asks."""
    mcu = FakeTarget(MCU, raises(TargetFailed("hangs", permanent=True)))
    router = Router([mcu], RoutingSection(), clock)
    with pytest.raises(NoAnswer):
        await router.run(make_request(clock), family)
    mcu.state = UNPLUGGED
    router.standings()
    mcu.state, mcu.behaviour = AVAILABLE, answers
    assert (await router.run(make_request(clock), family)).traits.name == "edge_mcu"
