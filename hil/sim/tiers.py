"""Times of every tier and variant: measured on the real daemon, kept as quantiles, drawn from by the simulator.

`edge-agent bench tiers --json FILE` measures them; the file that ships beside this module is what `edge-agent
simulate` and `edge-agent bench routing` use. Each variant is asked alone, one request after the other, so that nothing
waits: what waiting adds is the simulator's part.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from agent.core.types import Tier
from agent.registry.catalog import Catalog, Family, Variant, load_catalog
from agent.registry.locate import catalog_path
from hil.bench import machine
from hil.bench.report import CannotMeasure
from hil.demo.players import heldout
from hil.processes import Stage
from hil.sim import stack

SCHEMA = 1
MEASURED = Path(__file__).with_name("tiers.json")
QUANTILES = 201
"""Points of each distribution: every half per cent, and both ends."""
ROUNDS = 10
"""The variants take turns, so that a noisy neighbour hits all of them; one more round before them warms up."""
PAUSE_S = 0.005
TIERS: Mapping[str, Tier] = {"edge_mcu": Tier.EDGE_MCU, "edge_gpu": Tier.EDGE_GPU, "cloud": Tier.CLOUD_GPU}

Floats = npt.NDArray[np.float64]


class Spread:
    """A distribution as its quantiles at 0, 0.5, ... 100 per cent, drawn from by inversion."""

    __slots__ = ("points", "shares")

    def __init__(self, points: Sequence[float]) -> None:
        self.points = np.asarray(points, np.float64)
        self.shares = np.linspace(0.0, 1.0, len(self.points))

    @classmethod
    def of(cls, samples: Sequence[float]) -> Spread:
        """Raises `ValueError` if there is no sample."""
        if not len(samples):
            raise ValueError("no samples")
        return cls(np.quantile(np.asarray(samples, np.float64), np.linspace(0.0, 1.0, QUANTILES)).tolist())

    def at(self, share: float) -> float:
        return float(np.interp(share, self.shares, self.points))

    def draw(self, uniform: Floats) -> Floats:
        """One value for each number in 0 .. 1."""
        return np.interp(uniform, self.shares, self.points)

    @property
    def mean(self) -> float:
        return float(self.points.mean())


@dataclass(frozen=True, slots=True)
class VariantTimes:
    """Seconds: computing, and whatever else an attempt takes."""

    service: Spread
    link: Spread


@dataclass(frozen=True, slots=True)
class Times:
    """What was measured, where. `daemon` is what a request takes besides its attempts."""

    machine: Mapping[str, Any]
    network: Mapping[str, Any]
    daemon: Spread
    variants: Mapping[str, VariantTimes]

    def to_dict(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "machine": dict(self.machine),
            "network": dict(self.network),
            "unit": "ms at 0 %, 0.5 %, ... 100 %",
            "daemon": _milliseconds(self.daemon),
            "variants": {
                name: {"service": _milliseconds(times.service), "link": _milliseconds(times.link)}
                for name, times in self.variants.items()
            },
        }


def load(path: Path = MEASURED) -> Times:
    """Raises `CannotMeasure` if the file is missing or not one of ours."""
    try:
        document = json.loads(path.read_text())
        if document["schema"] != SCHEMA:
            raise ValueError(f"schema {document['schema']}, expected {SCHEMA}")
        return Times(
            document["machine"],
            document["network"],
            _seconds(document["daemon"]),
            {
                name: VariantTimes(_seconds(times["service"]), _seconds(times["link"]))
                for name, times in document["variants"].items()
            },
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CannotMeasure(f"{path}: no measured times: {error}") from None


def measure(samples: int) -> Times:
    """Ask every variant of the catalogue on its own tier `samples` times. Raises `CannotMeasure` and `StartError`."""
    catalog = load_catalog(catalog_path(None))
    with Stage() as stage:
        port = stack.start(stage, catalog)
        return asyncio.run(ask_all(port, catalog, samples))


async def ask_all(port: int, catalog: Catalog, samples: int) -> Times:
    """Of a daemon that runs. Raises `CannotMeasure`."""
    client = stack.Client(port)
    plays = [(family, variant) for family in catalog.families.values() for variant in family.variants.values()]
    replies: dict[str, list[Mapping[str, Any]]] = {variant.name: [] for _, variant in plays}
    for turn in range(-1, ROUNDS):
        for family, variant in plays:
            found = await _ask(client, catalog, family, variant, turn, max(1, samples // ROUNDS))
            if turn >= 0:
                replies[variant.name] += found
    client.close()
    variants: dict[str, VariantTimes] = {}
    rest: list[float] = []
    for name, found in replies.items():
        timing = [reply["timing_ms"] for reply in found]
        elapsed = [reply["attempts"][-1]["elapsed_ms"] / 1e3 for reply in found]
        service = [one["compute"] / 1e3 for one in timing]
        link = [max(0.0, took - busy) for took, busy in zip(elapsed, service, strict=True)]
        variants[name] = VariantTimes(Spread.of(service), Spread.of(link))
        rest += [max(0.0, one["total"] / 1e3 - took) for one, took in zip(timing, elapsed, strict=True)]
    network = {"delay_ms": stack.CLOUD_DELAY_MS, "jitter_ms": stack.CLOUD_JITTER_MS, "baud": stack.BAUD}
    return Times(_described(machine.facts()), network, Spread.of(rest), variants)


async def _ask(
    client: stack.Client, catalog: Catalog, family: Family, variant: Variant, turn: int, samples: int
) -> list[Mapping[str, Any]]:
    """One after the other; held-out samples in turn. Raises `CannotMeasure` if another tier answered."""
    inputs, _ = heldout(catalog.root / family.data.heldout)
    name = family.inputs[0].name
    about = {"model": family.name, "variant": variant.id, "latency_class": "batch"}
    wanted = TIERS[variant.targets[0]].value
    replies = []
    for number in range(samples):
        payload = stack.body(about, name, inputs[(turn * samples + number) % len(inputs)])
        reply = (await client.infer(payload)).document
        if reply.get("tier") != wanted:
            raise CannotMeasure(f"{variant.name}: answered by {reply.get('tier')}: {reply.get('error')}")
        replies.append(reply)
        await asyncio.sleep(PAUSE_S)
    return replies


def _described(facts: Mapping[str, Any]) -> dict[str, Any]:
    return {**machine.generic(facts), "versions": facts["versions"]}


def _milliseconds(spread: Spread) -> list[float]:
    return [float(f"{value * 1e3:.4g}") for value in spread.points]


def _seconds(points: Sequence[float]) -> Spread:
    if len(points) < 2:
        raise ValueError("a distribution needs two points at least")
    return Spread([value / 1e3 for value in points])
