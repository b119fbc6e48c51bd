"""What the simulator's tests share: the shipped models' answers, and times that were not measured but are plain."""

from __future__ import annotations

from functools import cache

from agent.config import Config
from agent.registry.catalog import Catalog, load_catalog
from agent.registry.locate import catalog_path
from hil.sim import setting
from hil.sim.answers import run_models
from hil.sim.play import Stage
from hil.sim.tiers import Spread, Times, VariantTimes

LINK_MS = {"mcu-int8": (3.0, 6.0), "gateway-fp16": (0.1, 0.3), "cloud-fp32": (30.0, 60.0)}
"""The shortest and the longest; every one between is equally likely."""
SERVICE_MS = {"mcu-int8": 1.0, "gateway-fp16": 0.5, "cloud-fp32": 1.0}


@cache
def catalog() -> Catalog:
    return load_catalog(catalog_path(None))


@cache
def config() -> Config:
    return setting.config(None, catalog())


@cache
def stage() -> Stage:
    return Stage(catalog(), run_models(catalog()), times())


def times() -> Times:
    variants = {
        variant.name: VariantTimes(
            Spread([SERVICE_MS[variant.id] / 1e3] * 2), Spread([value / 1e3 for value in LINK_MS[variant.id]])
        )
        for family in catalog().families.values()
        for variant in family.variants.values()
    }
    return Times({}, {}, Spread([0.0005, 0.0005]), variants)
