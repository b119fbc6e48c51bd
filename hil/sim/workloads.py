"""The standard workloads of the proof: what is asked, and what goes wrong meanwhile; and one that was recorded."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from agent.config import Config
from hil.sim import faults, trace
from hil.sim.load import Arrivals, Load
from hil.sim.play import Scenario, Stage
from hil.sim.rebuild import allowed, rebuild

SENSORS, RATE_HZ = 100, 0.5
"""50 requests a second: what two small boards, a gateway and a metered link are about right for."""
CALM: tuple[Arrivals, ...] = ("poisson", "bursts", "diurnal")
"""The standard workloads, by their arrivals; nothing goes wrong in them."""
DISTURBED = "disturbed"
RECORDED = "recorded"
"""A trace that the real daemon wrote (`edge-agent bench record`), replayed."""
TRACE = Path(__file__).with_name("recorded.jsonl.gz")
ALL_FAULTS = "cloud-slow,mcu-flap,runtime-dead"


def standard(seconds: float, seed: int) -> dict[str, Scenario]:
    """The calm ones, and bursts while everything goes wrong."""
    calm: Mapping[str, Scenario] = {
        arrivals: Scenario(Load(SENSORS, RATE_HZ, seconds, arrivals), seed=seed + index)
        for index, arrivals in enumerate(CALM)
    }
    disturbed = Scenario(Load(SENSORS, RATE_HZ, seconds, "bursts"), faults.parse(ALL_FAULTS, seconds), seed + len(CALM))
    return {**calm, DISTURBED: disturbed}


def recorded(stage: Stage, config: Config, seed: int, path: Path = TRACE) -> tuple[Stage, Scenario]:
    """The requests of a trace at their times. A play that was recorded takes the time that was recorded; others draw
    from what the trace saw of them, or from `stage`. Raises `Misuse` if the trace is of other models."""
    found = trace.read(path)
    trace.check_models(found, stage.catalog)
    world = rebuild(found, stage.catalog, stage.samples, stage.times, config)
    places = allowed(world.places, config)
    scenario = Scenario(
        world.asks, seed=seed, places=places, weather=world.weather, known=world.known, one_by_one=False
    )
    return Stage(stage.catalog, world.samples, world.times), scenario
