"""The adaptive limit of a target, and what each class may use of it."""

import pytest
from fakes import FakeTarget, make_request

from agent.config import ClassShares, LimitSection, OverloadSection, RoutingSection
from agent.core.clock import ManualClock
from agent.core.errors import TargetError, TargetFailed, TargetTimeout
from agent.core.types import InferenceRequest, LatencyClass, TargetAnswer, Tier
from agent.registry.catalog import Family, Variant
from agent.routing.attempt import Asking
from agent.routing.limits import AdaptiveLimit, Shares, limits_of
from agent.routing.router import Router
from agent.targets.base import TargetTraits

SHARES = Shares(ClassShares())
USUAL_S = 0.010
REALTIME, BATCH = LatencyClass.REALTIME, LatencyClass.BATCH


def limit(ceiling: int = 32, **settings: float) -> AdaptiveLimit:
    return AdaptiveLimit(LimitSection.model_validate(settings), SHARES, ceiling)


def attempts(of: AdaptiveLimit, count: int, took_s: float, *, in_flight: int = 32) -> None:
    for _ in range(count):
        of.observe(0.0, latency_s=took_s, usual_s=USUAL_S, in_flight=min(in_flight, of.places), ok=True)


def test_it_starts_at_what_the_target_takes() -> None:
    assert limit(32).limit(0.0, REALTIME) == 32


def test_a_target_that_becomes_slow_is_given_less_and_more_again_when_it_is_not() -> None:
    found = limit()
    attempts(found, 100, 10 * USUAL_S)
    slow = found.places
    assert slow < 8
    attempts(found, 100, USUAL_S)
    assert found.places == 32


def test_what_is_usual_does_not_lower_it() -> None:
    found = limit()
    attempts(found, 1000, 1.9 * USUAL_S)
    assert found.places == 32


def test_where_it_is_not_used_nothing_is_learnt() -> None:
    found = limit()
    attempts(found, 1000, 100 * USUAL_S, in_flight=2)
    assert found.places == 32


def test_one_very_slow_attempt_does_not_close_a_target() -> None:
    found = limit()
    attempts(found, 1, 1e6 * USUAL_S)
    assert found.places >= 28


def test_a_timeout_lowers_it_once_for_each_usual_time() -> None:
    found = limit(100)
    for now in (0.0, 0.001, 0.002):
        found.observe(now, latency_s=1.0, usual_s=USUAL_S, in_flight=1, ok=False)
    assert found.places == 90
    found.observe(USUAL_S, latency_s=1.0, usual_s=USUAL_S, in_flight=1, ok=False)
    assert found.places == 81


@pytest.mark.parametrize(("ceiling", "floor"), [(32, 2), (1, 1), (2, 2)])
def test_it_stays_between_its_floor_and_the_ceiling(ceiling: int, floor: int) -> None:
    found = limit(ceiling)
    for number in range(1000):
        found.observe(float(number), latency_s=1.0, usual_s=USUAL_S, in_flight=ceiling, ok=False)
    assert found.places == floor
    attempts(found, 1000, USUAL_S / 10)
    assert found.places == ceiling


def test_it_can_be_switched_off() -> None:
    found = limit(adaptive=False)
    attempts(found, 100, 100 * USUAL_S)
    found.observe(0.0, latency_s=1.0, usual_s=USUAL_S, in_flight=1, ok=False)
    assert found.places == 32


@pytest.mark.parametrize("places", range(1, 50))
def test_a_looser_class_never_gets_more_nor_the_last_place(places: int) -> None:
    found = [SHARES.places(kind, places) for kind in LatencyClass]
    assert found == sorted(found, reverse=True)
    assert found[0] == places
    assert min(found) >= 1
    if places > 1:
        assert SHARES.places(BATCH, places) < places


def test_each_target_has_its_own() -> None:
    make = limits_of(OverloadSection())
    traits = [TargetTraits(name, Tier.EDGE_GPU, 0, 8, 1.0, 1e9) for name in ("a", "b")]
    first, second = map(make, traits)
    first.observe(0.0, latency_s=1.0, usual_s=USUAL_S, in_flight=8, ok=False)
    assert (first.limit(0.0, REALTIME), second.limit(0.0, REALTIME)) == (7, 8)


@pytest.mark.parametrize("error", [TargetFailed("broken"), TargetTimeout("no answer in 1 ms")])
async def test_what_fails_soon_is_no_sign_of_room(family: Family, clock: ManualClock, error: TargetError) -> None:
    """A deadline shorter than what the target takes, a worker that answers with an error at once."""

    async def soon(request: InferenceRequest, variant: Variant, deadline: float) -> TargetAnswer:
        clock.advance(0.001)
        raise error

    gpu = FakeTarget(Tier.EDGE_GPU, soon, prior_s=0.05, max_concurrent=32)
    router = Router([gpu], RoutingSection(), clock, limit_for=limits_of(OverloadSection()))
    state = router._states["edge_gpu"]
    for step in range(30):
        state.limit.observe(float(step), latency_s=1.0, usual_s=0.01, in_flight=32, ok=False)
    before = state.limit.limit(100.0, REALTIME)
    state.in_flight = before  # as many others are under way
    asking = Asking(make_request(clock), family, clock.monotonic() + 1.0, clock)
    for _ in range(10):
        await asking.attempt(state, family.variants["medium"], clock.monotonic() + 0.001)
    assert state.limit.limit(100.0, REALTIME) == before < 16
