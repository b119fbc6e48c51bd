"""Where the catalogue is."""

from __future__ import annotations

import sys
from pathlib import Path

from agent.core.errors import ConfigError


def catalog_path(configured: Path | None) -> Path:
    """The configured catalogue, else the one that ships: in a checkout, or installed below `sys.prefix`."""
    if configured is not None:
        return configured
    places = (
        Path(__file__).resolve().parents[2] / "models" / "catalog.yaml",
        Path(sys.prefix) / "share" / "edge-agent" / "models" / "catalog.yaml",
    )
    for place in places:
        if place.is_file():
            return place
    raise ConfigError([f"models.catalog: not set, and no catalogue at {' or '.join(map(str, places))}"])
