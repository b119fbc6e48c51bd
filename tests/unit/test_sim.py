"""The simulator: virtual time, load, faults, queues, and that equal seeds give equal runs."""

import asyncio
import json
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from sim_fakes import catalog, config, stage, times

from agent.core.errors import TargetTimeout, TargetUnavailable
from agent.core.types import InferenceRequest, InferenceResult, LatencyClass, Tier
from agent.pipeline import Pipeline
from agent.routing.limits import AdaptiveLimit
from hil.bench.report import CannotMeasure
from hil.sim import bench_routing, crowd, faults, figures, tiers
from hil.sim.faults import Weather
from hil.sim.hindsight import ORACLE
from hil.sim.load import ARRIVALS, STANDARD, Arrivals, Load
from hil.sim.loop import Stuck, VirtualClock, VirtualLoop, run_virtual
from hil.sim.play import Run, Scenario, play
from hil.sim.strategies import (
    ALWAYS_CLOUD,
    ALWAYS_GATEWAY,
    ALWAYS_MCU,
    BASELINES,
    OURS,
    PLAIN_CASCADE,
    RULE_TABLE,
    SCORECARD,
)
from hil.sim.tiers import Spread
from hil.sim.world import Place, World, places_of

# --- time ------------------------------------------------------------------------------------------------------------


def test_time_jumps_to_the_next_timer_and_keeps_the_order() -> None:
    async def main() -> list[tuple[str, float]]:
        loop = asyncio.get_running_loop()
        seen: list[tuple[str, float]] = []

        async def one(name: str, after_s: float) -> None:
            await asyncio.sleep(after_s)
            seen.append((name, loop.time()))

        await asyncio.gather(one("day", 86_400.0), one("second", 1.0), one("now", 0.0))
        return seen

    assert run_virtual(main()) == [("now", 0.0), ("second", 1.0), ("day", 86_400.0)]


def test_timeouts_and_the_clock_are_of_that_time() -> None:
    async def main() -> float:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualLoop)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(60):
                await asyncio.Event().wait()
        clock = VirtualClock(loop)
        assert clock.wall() - VirtualClock(loop).wall() == 0
        return clock.monotonic()

    assert run_virtual(main()) == pytest.approx(60.0)


def test_who_waits_for_nothing_is_told() -> None:
    async def main() -> None:
        await asyncio.Event().wait()

    with pytest.raises(Stuck):
        run_virtual(main())


# --- load ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arrivals", ARRIVALS)
def test_arrivals_come_in_order_at_the_mean_rate(arrivals: Arrivals) -> None:
    load = Load(100, 1.0, 400.0, arrivals)
    asks = load.asks({"digits": 450, "motion": 40}, np.random.default_rng(1))
    at = [ask.at_s for ask in asks]
    assert at == sorted(at)
    assert at[-1] < 400.0
    assert len(asks) == pytest.approx(40_000, rel=0.25 if arrivals == "bursts" else 0.02)
    assert [ask.number for ask in asks] == list(range(len(asks)))
    shares = Counter(ask.kind.name for ask in asks)
    for kind in STANDARD:
        assert shares[kind.name] / len(asks) == pytest.approx(kind.share, abs=0.02)
    assert {ask.sensor for ask in asks} == set(range(100))


def _spread_of_counts(arrivals: Arrivals) -> float:
    """Variance over mean of the requests in each second: 1 for a Poisson process."""
    asks = Load(100, 1.0, 400.0, arrivals).asks({"digits": 450, "motion": 40}, np.random.default_rng(2))
    counts, _ = np.histogram([ask.at_s for ask in asks], bins=np.arange(401))
    return float(counts.var() / counts.mean())


def test_bursts_are_bursts_and_poisson_is_not() -> None:
    assert _spread_of_counts("poisson") == pytest.approx(1.0, abs=0.3)
    assert _spread_of_counts("bursts") > 20


def test_a_day_has_its_noon_in_the_middle() -> None:
    asks = Load(100, 1.0, 400.0, "diurnal").asks({"digits": 450, "motion": 40}, np.random.default_rng(3))
    noon = sum(150 <= ask.at_s < 250 for ask in asks)
    night = sum(ask.at_s < 50 or ask.at_s >= 350 for ask in asks)
    assert noon > 4 * night


# --- faults ----------------------------------------------------------------------------------------------------------


def test_faults_are_read_as_written() -> None:
    found = faults.parse("cloud-slow, mcu-flap@10-20.5", 100)
    assert [(fault.name, fault.start_s, fault.end_s) for fault in found] == [
        ("cloud-slow", 30.0, 70.0),
        ("mcu-flap", 10.0, 20.5),
    ]
    assert faults.parse("", 100) == ()


@pytest.mark.parametrize("text", ["cloud", "cloud-slow@20", "mcu-flap@20-10", "cloud-slow@a-b", "mcu-flap@-1-2"])
def test_faults_that_make_no_sense_are_refused(text: str) -> None:
    with pytest.raises(ValueError):
        faults.parse(text, 100)


def test_what_faults_do_to_a_tier() -> None:
    found = faults.parse("cloud-outage@10-20,cloud-slow@30-40,mcu-flap@10-20", 100)
    cloud, mcu, gpu = (Weather.of(tier, found) for tier in (Tier.CLOUD_GPU, Tier.EDGE_MCU, Tier.EDGE_GPU))
    assert [cloud.silent(now) for now in (9.9, 10.0, 10.9, 11.0)] == [False, True, True, False]
    assert [cloud.gone(now) for now in (10.9, 11.0, 19.9, 20.0)] == [False, True, True, False]
    assert cloud.lost_at(9.0) == 10.0
    assert [cloud.factor(now) for now in (29.9, 30.0, 39.9, 40.0)] == [1.0, 10.0, 10.0, 1.0]
    assert [mcu.gone(now) for now in (9.9, 10.0, 10.4, 10.5, 12.0, 12.5, 20.0)] == [
        False,
        True,
        True,
        False,
        True,
        False,
        False,
    ]
    assert not any(gpu.gone(now) or gpu.silent(now) or gpu.factor(now) != 1 for now in range(100))


# --- the world -------------------------------------------------------------------------------------------------------


def test_a_distribution_gives_back_what_it_was_made_of() -> None:
    samples = np.random.default_rng(1).lognormal(size=20_000)
    drawn = Spread.of(samples.tolist()).draw(np.random.default_rng(2).random(20_000))
    for share in (0.5, 0.95, 0.99):
        assert np.quantile(drawn, share) == pytest.approx(np.quantile(samples, share), rel=0.05)
    with pytest.raises(ValueError, match="no samples"):
        Spread.of([])


def test_measured_times_survive_their_file(tmp_path: Path) -> None:
    path = tmp_path / "tiers.json"
    path.write_text(json.dumps(times().to_dict()))
    found = tiers.load(path)
    assert found.variants.keys() == times().variants.keys()
    assert found.variants["digits/cloud-fp32"].link.at(0.5) == pytest.approx(0.045)
    path.write_text('{"schema": 99}')
    with pytest.raises(CannotMeasure, match="schema 99"):
        tiers.load(path)


def test_the_times_that_ship_are_of_every_variant() -> None:
    shipped = tiers.load()
    for family in catalog().families.values():
        for variant in family.variants.values():
            assert shipped.variants[variant.name].link.mean > 0
            assert shipped.variants[variant.name].service.mean > 0


def _world(requests: int = 10, plan: str = "") -> World:
    loop = asyncio.get_running_loop()
    assert isinstance(loop, VirtualLoop)
    clock = VirtualClock(loop)
    found = stage()
    return World(
        found.catalog,
        found.samples,
        found.times,
        clock,
        requests,
        seed=1,
        places=places_of(config(), found.catalog, clock),
        faults=faults.parse(plan, 100),
    )


def _request(world: World, number: int, family: str = "digits", sample: int = 0) -> InferenceRequest:
    now = world.clock.monotonic()
    name = world.catalog.family(family).inputs[0].name
    inputs = {name: world.samples[family].inputs[sample]}
    return InferenceRequest(str(number), family, inputs, LatencyClass.BATCH, now, now + 10)


async def _ask(world: World, target: str, number: int, variant: str, *, deadline: float = 1e9) -> float:
    """Seconds until the answer."""
    request, family = _request(world, number), world.catalog.family("digits")
    began = world.clock.monotonic()
    answer = await world.targets[target].infer(request, family, family.variants[variant], deadline)
    took = world.clock.monotonic() - began
    assert took == pytest.approx(answer.queue_s + answer.link_s + answer.compute_s)
    return took


def test_a_board_serves_one_after_the_other_and_a_gateway_as_many_as_it_has_workers() -> None:
    async def main() -> None:
        world = _world()
        family = world.catalog.family("digits")
        for target, variant, together in (("edge_mcu", "mcu-int8", 1), ("edge_gpu", "gateway-fp16", 2)):
            alone = [world.targets[target].plan(n, family.variants[variant], 0.0).took_s for n in range(4)]
            took = await asyncio.gather(*(_ask(world, target, n, variant) for n in range(4)))
            assert took[:together] == pytest.approx(alone[:together])
            assert all(waited > own for waited, own in zip(took[together:], alone[together:], strict=True))
            if together == 1:
                assert took[-1] == pytest.approx(sum(alone))

    run_virtual(main())


def test_a_request_takes_the_same_on_a_place_whoever_asks() -> None:
    async def main() -> list[float]:
        world = _world()
        await asyncio.sleep(5)
        return [await _ask(world, "cloud:gpu", number, "cloud-fp32") for number in (3, 7)]

    assert run_virtual(main()) == pytest.approx(run_virtual(main()))


def test_what_is_in_flight_when_a_board_resets_is_lost() -> None:
    async def main() -> None:
        world = _world(plan="mcu-flap@10-20")
        await asyncio.sleep(9.999)
        with pytest.raises(TargetUnavailable, match="was lost"):
            await _ask(world, "edge_mcu", 1, "mcu-int8")
        assert world.clock.monotonic() == pytest.approx(10.0)
        assert not world.targets["edge_mcu"].availability().available

    run_virtual(main())


def test_a_silent_lane_answers_nobody_until_it_is_noticed() -> None:
    async def main() -> None:
        world = _world(plan="cloud-outage@10-20")
        await asyncio.sleep(10.5)
        assert world.targets["cloud:gpu"].availability().available
        with pytest.raises(TargetTimeout):
            await _ask(world, "cloud:gpu", 1, "cloud-fp32", deadline=10.7)
        assert world.clock.monotonic() == pytest.approx(10.7)
        await asyncio.sleep(0.4)
        assert not world.targets["cloud:gpu"].availability().available

    run_virtual(main())


def test_answers_are_those_of_the_shipped_models() -> None:
    for samples in stage().samples.values():
        for variant in samples.family.variants.values():
            measured = float(samples.right[variant.id].mean())
            assert measured == pytest.approx(variant.accuracy.value, abs=variant.accuracy.tolerance)


# --- runs ------------------------------------------------------------------------------------------------------------

SCENARIO = Scenario(Load(60, 0.5, 20.0, "bursts"), faults.parse("cloud-slow,mcu-flap", 20.0), seed=3)


def _outcomes(run: Run) -> list[tuple[int, float, str]]:
    return [
        (course.ask.number, course.took_s, getattr(course.outcome, "target", type(course.outcome).__name__))
        for course in run.courses
    ]


def test_equal_seeds_give_equal_runs() -> None:
    first, second = (play(stage(), SCENARIO, config()) for _ in range(2))
    assert _outcomes(first) == _outcomes(second)
    assert len(first.courses) > 300


def test_every_request_is_answered_once_or_refused_with_a_reason() -> None:
    run = play(stage(), SCENARIO, config())
    asks = SCENARIO.asks(stage().samples)
    assert sorted(course.ask.number for course in run.courses) == [ask.number for ask in asks]
    for course in run.courses:
        if not isinstance(course.outcome, InferenceResult):
            assert course.outcome.message
            assert course.outcome.reasons


def test_each_strategy_asks_whom_it_says() -> None:
    calm = Scenario(Load(40, 0.5, 20.0), seed=4)
    of = {
        strategy.name: play(stage(), calm, config(), strategy)
        for strategy in (ALWAYS_CLOUD, ALWAYS_GATEWAY, ALWAYS_MCU, RULE_TABLE, SCORECARD, PLAIN_CASCADE, OURS, ORACLE)
    }
    tiers_of = {name: set(figures.by_tier(run.courses)) for name, run in of.items()}
    assert tiers_of["always cloud"] == {"cloud_gpu"}
    assert tiers_of["always gateway"] == {"edge_gpu"}
    assert tiers_of["always mcu"] == {"edge_mcu"}
    by_class = {
        course.ask.kind.latency_class: course.outcome.tier
        for course in of["rule table"].courses
        if isinstance(course.outcome, InferenceResult) and len(course.outcome.attempts) == 1
    }
    assert by_class == {
        LatencyClass.REALTIME: Tier.EDGE_MCU,
        LatencyClass.NEAR: Tier.EDGE_GPU,
        LatencyClass.INTERACTIVE: Tier.EDGE_GPU,
        LatencyClass.BATCH: Tier.CLOUD_GPU,
    }


def test_nobody_is_better_than_the_oracle_where_nothing_waits() -> None:
    quiet = Scenario(Load(10, 0.2, 120.0), seed=5)
    found = {
        strategy.name: figures.of_courses(play(stage(), quiet, config(), strategy).courses)
        for strategy in (ORACLE, OURS, ALWAYS_GATEWAY, SCORECARD)
    }
    assert found["oracle"].close == 1.0
    assert found["oracle"].regret == pytest.approx(0.0, abs=1e-9)
    assert all(figure.regret >= -1e-9 for figure in found.values())
    assert all(figure.useful <= found["oracle"].useful for figure in found.values())


def test_the_oracle_asks_nobody_where_nothing_comes_in_time() -> None:
    async def lanes() -> list[Place]:
        return [target.place for target in _world().targets.values() if target.traits.tier.is_cloud]

    hopeless = Scenario(Load(10, 0.5, 20.0, kinds=STANDARD[:1]), places=run_virtual(lanes()))
    found = figures.of_courses(play(stage(), hopeless, config(), ORACLE).courses)
    assert found.requests > 50
    assert (found.cost_usd, found.in_time, found.close, found.regret) == (0.0, 0.0, 1.0, 0.0)


def test_rivals_have_the_daemons_limits() -> None:
    async def limits() -> dict[str, set[type]]:
        world = _world()
        targets = list(world.targets.values())
        routers = {one.name: one.router(targets, config(), world) for one in (*BASELINES, OURS)}
        return {name: {type(state.limit) for state in router._states.values()} for name, router in routers.items()}

    assert {name: kinds for name, kinds in run_virtual(limits()).items() if kinds != {AdaptiveLimit}} == {}


def test_a_request_that_is_neither_answered_nor_refused_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    infer = Pipeline.infer

    async def sometimes(self: Pipeline, request: InferenceRequest) -> InferenceResult:
        if request.id == "3":
            raise asyncio.CancelledError
        return await infer(self, request)

    monkeypatch.setattr(Pipeline, "infer", sometimes)
    with pytest.raises(RuntimeError, match=r"1 of .* neither answered nor refused"):
        play(stage(), Scenario(Load(10, 0.5, 5.0)), config())


def test_each_crowd_has_a_process_that_no_other_was_in(monkeypatch: pytest.MonkeyPatch) -> None:
    def empty(*_: object, patient: bool) -> crowd.Crowd:
        return crowd.Crowd(0, {}, {}, 0, os.getpid(), 0.0, {})

    monkeypatch.setattr(crowd, "crowd", empty)
    told, _ = bench_routing._crowds(stage(), config())
    assert len({found["most_waiting"] for found in told.values()} | {os.getpid()}) == 3
