"""The standard workloads of the proof: what is asked, and what goes wrong meanwhile."""

from __future__ import annotations

from collections.abc import Mapping

from hil.sim import faults
from hil.sim.load import Arrivals, Load
from hil.sim.play import Scenario

SENSORS, RATE_HZ = 100, 0.5
"""50 requests a second: what two small boards, a gateway and a metered link are about right for."""
CALM: tuple[Arrivals, ...] = ("poisson", "bursts", "diurnal")
"""The standard workloads, by their arrivals; nothing goes wrong in them."""
DISTURBED = "disturbed"
ALL_FAULTS = "cloud-slow,mcu-flap,runtime-dead"


def standard(seconds: float, seed: int) -> dict[str, Scenario]:
    """The calm ones, and bursts while everything goes wrong."""
    calm: Mapping[str, Scenario] = {
        arrivals: Scenario(Load(SENSORS, RATE_HZ, seconds, arrivals), seed=seed + index)
        for index, arrivals in enumerate(CALM)
    }
    disturbed = Scenario(Load(SENSORS, RATE_HZ, seconds, "bursts"), faults.parse(ALL_FAULTS, seconds), seed + len(CALM))
    return {**calm, DISTURBED: disturbed}
