"""What every command of the simulator needs: the models' answers, the measured tiers, the configuration."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from agent.config import CloudSection, Config, LaneSection
from agent.config_load import load_config
from agent.core.errors import is_misuse, plain_words
from agent.registry.catalog import Catalog, load_catalog
from agent.registry.locate import catalog_path
from hil.bench.report import CannotMeasure
from hil.processes import StartError, interruptible
from hil.sim import stack, tiers
from hil.sim.answers import run_models
from hil.sim.play import Stage

_NUMBERS = re.compile(r"\[[-\d.,e+\s]+\]")
EXIT_OK, EXIT_FAILED, EXIT_USAGE = 0, 1, 2


class Misuse(Exception):
    """An argument that makes no sense; the text names it and its limits."""


def command(name: str, run: Callable[[argparse.Namespace], int]) -> Callable[[argparse.Namespace], int]:
    """`run` with its errors told in one line each; a SIGTERM stops what it started, as Ctrl-C does."""

    def main(args: argparse.Namespace) -> int:
        folder = getattr(args, "json", None)
        if folder is not None and not folder.resolve().parent.is_dir():
            print(f"edge-agent {name}: --json: no such folder: {folder.resolve().parent}", file=sys.stderr)
            return EXIT_USAGE
        try:
            with interruptible():
                return run(args)
        except Misuse as error:
            print(f"edge-agent {name}: {error}", file=sys.stderr)
            return EXIT_USAGE
        except OSError as error:
            where = f"{error.filename}: " if error.filename is not None else ""
            print(f"edge-agent {name}: {where}{plain_words(error)}", file=sys.stderr)
            return EXIT_USAGE if is_misuse(error) else EXIT_FAILED
        except (CannotMeasure, StartError) as error:
            print(f"edge-agent {name}: {error}", file=sys.stderr)
            return EXIT_FAILED

    return main


def stage(args: argparse.Namespace) -> Stage:
    """Raises `CannotMeasure`, `OSError`, and `ConfigError` for a catalogue that cannot be used."""
    catalog = load_catalog(catalog_path(getattr(args, "catalog", None)))
    return Stage(catalog, run_models(catalog), tiers.load(args.times or tiers.MEASURED))


def config(path: Path | None, catalog: Catalog) -> Config:
    """Of `--policy`: the daemon's defaults, if there is none. Where it has neither boards nor lanes, those of the
    standard gateway: a board for each family and one cloud lane. Raises `ConfigError`."""
    given = Config() if path is None else load_config(path, unseen=[])
    if given.edge_mcu.ports or given.cloud.lanes:
        return given
    boards = tuple(f"/dev/edge-mcu{number}" for number in range(len(catalog.families)))
    lane = LaneSection(name="gpu", broker="mqtt://cloud.invalid:1883", cost_per_request=stack.COST_USD)
    return given.model_copy(
        update={
            "edge_mcu": given.edge_mcu.model_copy(update={"ports": boards}),
            "cloud": CloudSection(lanes=(lane,)),
        }
    )


def within(name: str, value: float, low: float, high: float) -> None:
    """Raises `Misuse`."""
    if not low <= value <= high:
        raise Misuse(f"{name} must be {low:g} to {high:g}, found {value:g}")


def write_json(path: Path | None, document: Mapping[str, Any]) -> None:
    """Indented, with lists of numbers on one line each."""
    if path is not None:
        text = json.dumps(document, indent=2)
        path.write_text(_NUMBERS.sub(lambda found: " ".join(found[0].split()), text) + "\n")


def say(line: str = "") -> None:
    print(line, flush=True)
