"""`edge-agent models`: what a catalogue has, and `calibrate`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

EXIT_OK = 0


def add_parser(commands: Any) -> None:
    """`models`, and what is below it."""
    models = commands.add_parser("models", help="list the models of a catalogue, or calibrate them")
    models.add_argument("--catalog", type=Path, metavar="FILE")
    models.set_defaults(run=_list)
    below = models.add_subparsers(dest="models_command", metavar="COMMAND")
    calibrate = below.add_parser(
        "calibrate",
        help="fit confidence and thresholds of a family to its held-out data and write them into the catalogue",
    )
    calibrate.add_argument("family", metavar="FAMILY")
    calibrate.add_argument("--catalog", type=Path, metavar="FILE", default=argparse.SUPPRESS)
    calibrate.add_argument(
        "--max-loss",
        type=float,
        default=0.005,
        metavar="SHARE",
        help="answers that may become wrong by not asking the most accurate variant (default 0.005)",
    )
    calibrate.add_argument("--check", action="store_true", help="write nothing; exit code 1 if the catalogue differs")
    calibrate.add_argument("--json", type=Path, metavar="FILE", help="write the figures and the curves here")
    calibrate.add_argument("--plot", type=Path, metavar="FILE", help="draw accuracy against offload (extra `proof`)")
    calibrate.set_defaults(run=_calibrate)


def _list(args: argparse.Namespace) -> int:
    from agent.registry.catalog import load_catalog
    from agent.registry.locate import catalog_path

    catalog = load_catalog(catalog_path(args.catalog))
    print(
        f"{'model':24} {'targets':20} {'format':7} {'bytes':>9} {'parameters':>10} {'accuracy':>9} {'sure from':>9}  "
        "sha256"
    )
    for family in catalog.families.values():
        for variant in family.variants.values():
            cascade = None if variant.calibration is None else variant.calibration.cascade
            print(
                f"{variant.name:24} {','.join(variant.targets):20} {variant.format:7} {variant.bytes:9} "
                f"{variant.parameters:10} {variant.accuracy.value:9.4f} "
                f"{'-' if cascade is None else f'{cascade.threshold:.4f}':>9}  {variant.sha256[:16]}"
            )
    return EXIT_OK


def _calibrate(args: argparse.Namespace) -> int:
    from agent.cli_calibrate import run

    return run(args)
