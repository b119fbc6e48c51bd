"""Configuration and catalogue, read and held against each other: what a start, a check and a reload have in common."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from agent.config import Config
from agent.config_load import load_config
from agent.core.clock import Clock
from agent.core.component import Reading, shown
from agent.core.errors import ConfigError
from agent.registry.catalog import Catalog, load_catalog
from agent.registry.locate import catalog_path
from agent.registry.trust import Trust, require, trust_of

MAX_CHANGES = 50
"""Keys that are named of one reload; more are counted."""
MAX_PROBLEM = 1000


class Reloads:
    """How often the settings were read again, and what came of the last time."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._since = clock.monotonic()
        self.generation = 1
        self.applied = self.refused = 0
        self.problem = ""
        self.digest = ""

    def took(self, settings: Settings) -> None:
        """They are in force."""
        self.applied += 1
        self.generation += 1
        self._now("", settings)

    def refuse(self, faults: Sequence[str]) -> None:
        """Nothing of them is in force."""
        self.refused += 1
        self.problem = f"reload refused, the former configuration goes on: {'; '.join(faults)}"[:MAX_PROBLEM]
        self._since = self._clock.monotonic()

    def begin(self, settings: Settings) -> None:
        """With these it was started."""
        self._now("", settings)

    def status(self) -> dict[str, Any]:
        """For `settings` of `/status`."""
        return {
            "generation": self.generation,
            "applied": self.applied,
            "refused": self.refused,
            "sha256": self.digest,
            "problem": self.problem,
        }

    def component(self) -> dict[str, Any]:
        """Outlives the supervisors of the daemons that it is about."""
        state, reason = Reading.working(self.problem)
        return shown("settings", state, reason, self._since, self._clock)

    def _now(self, problem: str, settings: Settings) -> None:
        self.problem, self.digest = problem, settings.digest()
        self._since = self._clock.monotonic()


class Settings(NamedTuple):
    """What a daemon is run with."""

    config: Config
    catalog: Catalog
    trust: Trust

    def digest(self) -> str:
        """SHA-256 of all of it, hex. Secrets count as whether they are there."""
        catalog = repr(sorted((name, repr(family)) for name, family in self.catalog.families.items()))
        return hashlib.sha256((self.config.model_dump_json() + catalog).encode()).hexdigest()


def load_settings(path: Path | None, *, any_file: bool = False, unseen: list[str] | None = None) -> Settings:
    """Read and check everything that can be checked without starting. `any_file`: one whole model file is enough, as
    targets refuse the others. `unseen`: as of `load_config`. Raises `ConfigError` with each fault."""
    config = load_config(path, unseen=unseen)
    catalog = load_catalog(catalog_path(config.models.catalog), any_file=any_file)
    named = {f"sensors.{topic}": sensor.model for topic, sensor in config.sensors.items()}
    named |= {f"edge_mcu.streams.{index}": stream.model for index, stream in enumerate(config.edge_mcu.streams)}
    unknown = [
        f"{path}: {at}.model: must be one of {sorted(catalog.families)}, found {model!r}"
        for at, model in named.items()
        if model not in catalog.families
    ]
    if unknown:
        raise ConfigError(unknown)
    trust = trust_of(config.models.catalog, config.models.trusted_keys, config.gateway.state_dir, catalog.sha256)
    if config.models.require_signed:
        require(trust, config.models.catalog)
    return Settings(config, catalog, trust)


def changes(before: Settings, after: Settings) -> list[str]:
    """Dotted keys that differ, without their values, which may be secret."""
    found = list(_differ(before.config.model_dump(), after.config.model_dump(), ""))
    old, new = before.catalog.families, after.catalog.families
    if before.trust != after.trust:
        found.append("models: who vouches for the catalogue")
    found += [f"catalogue: {name}" for name in sorted({*old, *new}) if old.get(name) != new.get(name)]
    if len(found) > MAX_CHANGES:
        return [*found[:MAX_CHANGES], f"and {len(found) - MAX_CHANGES} more"]
    return found


def _differ(before: Any, after: Any, at: str) -> Iterator[str]:
    if isinstance(before, dict) and isinstance(after, dict):
        for key in sorted({*before, *after}, key=str):
            yield from _differ(before.get(key), after.get(key), f"{at}.{key}" if at else str(key))
    elif before != after:
        yield at
