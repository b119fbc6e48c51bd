"""`script/hil`: the suite on one board."""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import random
import sys
import time
from pathlib import Path
from typing import Final

import uvloop

from agent.core.errors import ConfigError
from agent.registry.catalog import load_catalog
from agent.registry.locate import catalog_path
from hil.processes import Stage, interruptible
from hil.rig.boards import DEFAULT_FILE, AnyBoard, find, load_boards
from hil.rig.check import Check
from hil.rig.drivers import open_driver
from hil.rig.report import Printer, Report, head, summary
from hil.rig.rig import Rig
from hil.rig.runner import chosen, run, skipped
from hil.rig.suite import SUITE

EXIT_OK, EXIT_FAILED, EXIT_USAGE, EXIT_MISSING = 0, 1, 2, 3
EXIT_INTERRUPTED: Final = 130
DEFAULT_MINUTES: Final = 0.5


def parser() -> argparse.ArgumentParser:
    words = argparse.ArgumentParser(
        prog="script/hil",
        description="Shows whether a board, its cable and its firmware hold up. The board keeps digits/mcu-int8.",
        epilog="Exit code: 0 all checks passed or were skipped, 1 a check failed, 2 usage, 3 the board is not there.",
    )
    words.add_argument("--board", required=True, metavar="NAME|PORT", help="a board of rig.yaml, or /dev/ttyACM0")
    words.add_argument("--seed", type=int, metavar="S", help="of all faults and choices (default: another each time)")
    words.add_argument("--minutes", type=_minutes, default=DEFAULT_MINUTES, metavar="N", help="of soak (default 0.5)")
    words.add_argument("--only", action="append", default=[], metavar="CHECK", help="group, group/name or a pattern")
    words.add_argument("--json", type=Path, metavar="FILE", help="write the report here as JSON")
    words.add_argument("--junit", type=Path, metavar="FILE", help="write the report here as JUnit XML")
    words.add_argument("--config", type=Path, default=DEFAULT_FILE, metavar="FILE", help="default: hil/rig.yaml")
    words.add_argument("--list", action="store_true", help="only say what there is to check")
    return words


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    logging.getLogger().addHandler(logging.NullHandler())  # what the gateway would log is expected here
    checks = chosen(SUITE, args.only)
    try:
        board = find(args.board, load_boards(args.config))
        if not checks:
            raise ConfigError([f"--only: no check matches {' '.join(args.only)}; --list names them"])
        for path in (args.json, args.junit):
            if path is not None and not path.absolute().parent.is_dir():
                raise ConfigError([f"{path}: its folder does not exist"])
    except ConfigError as error:
        print(error, file=sys.stderr)
        return EXIT_USAGE
    if args.list:
        print("\n".join(f"{check.key:32} {check.expects}" for check in checks))
        return EXIT_OK
    seed = args.seed if args.seed is not None else random.SystemRandom().randrange(1 << 31)
    report = Report(args.board, board.about, seed, time.time())
    try:
        with interruptible():
            code = _conduct(report, board, checks, args.minutes * 60)
    except KeyboardInterrupt:
        print("script/hil: interrupted")
        return EXIT_INTERRUPTED
    if args.json is not None:
        args.json.write_text(json.dumps(report.to_dict(), indent=2) + "\n", encoding="utf-8")
    if args.junit is not None:
        args.junit.write_text(report.to_junit(), encoding="utf-8")
    return code


def _conduct(report: Report, board: AnyBoard, checks: list[Check], soak_s: float) -> int:
    """Run, print and complete the report. Returns the exit code."""
    head(report, len(checks), _say)
    printer = Printer(report, _say)
    with Stage() as stage:
        driver = open_driver(report.board.strip("/").replace("/", "-"), board, stage)
        missing = driver.missing()
        if missing:
            report.outcomes = skipped(checks, missing)
        else:
            rig = Rig(driver, stage, load_catalog(catalog_path(None), verify=False), seed=report.seed, soak_s=soak_s)
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:  # as the daemon
                report.outcomes = runner.run(run(rig, checks, printer.show))
    report.seconds = time.time() - report.began
    summary(report, len(SUITE), _say)
    if missing:
        return EXIT_MISSING
    return EXIT_OK if report.ok else EXIT_FAILED


def _minutes(text: str) -> float:
    value = float(text)
    if not 0.01 <= value <= 10_000:
        raise argparse.ArgumentTypeError(f"must be 0.01 to 10,000, found {text}")
    return value


def _say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
