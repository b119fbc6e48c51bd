"""`edge-agent bench`: runs the measurements one after the other and prints each table when it is there."""

from __future__ import annotations

import argparse
import importlib
import json
import signal
import sys
from collections.abc import Sequence
from types import FrameType

from hil.bench import machine, report
from hil.bench.report import CannotMeasure, Report
from hil.processes import StartError

BENCHES = ("pipeline", "decide", "mqtt", "http", "mcu", "wire", "outbox", "start")
MIN_SECONDS, MAX_SECONDS = 0.1, 600.0
EXIT_FAILED, EXIT_USAGE = 1, 2


def main(args: argparse.Namespace) -> int:
    """Exit code 0 if everything asked for was measured, whatever it showed; 2 if what was asked for makes no sense."""
    wanted: Sequence[str] = args.only or BENCHES
    unknown = [name for name in wanted if name not in BENCHES]
    if unknown:
        print(f"edge-agent bench: --only must be one of {', '.join(BENCHES)}, found {unknown[0]!r}", file=sys.stderr)
        return EXIT_USAGE
    if not MIN_SECONDS <= args.seconds <= MAX_SECONDS:
        limits = f"{MIN_SECONDS:g} to {MAX_SECONDS:g}"
        print(f"edge-agent bench: --seconds must be {limits}, found {args.seconds:g}", file=sys.stderr)
        return EXIT_USAGE
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        found = run(list(dict.fromkeys(wanted)), args.seconds)
    finally:
        signal.signal(signal.SIGTERM, before)
    if args.json:
        args.json.write_text(json.dumps(found.to_dict(), indent=2) + "\n")
    return EXIT_FAILED if found.failed else 0


def run(names: Sequence[str], seconds: float) -> Report:
    """Measure, print, and return what was found. What cannot be measured here is named and left out."""
    found = Report(seconds, machine.facts())
    _say(machine.text(found.machine))
    for name in names:
        # Each brings its own libraries along: only what is measured is imported.
        measurement = importlib.import_module(f"hil.bench.{name}")
        try:
            lines = measurement.measure(seconds)
        except (CannotMeasure, StartError, OSError, ImportError) as error:
            found.failed[name] = str(error)
            continue
        found.lines += lines
        report.text(name, lines, _say)
    report.verdicts(found, _say)
    return found


def _say(line: str) -> None:
    print(line, flush=True)


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    """SIGTERM ends a run as Ctrl-C does: with every process stopped."""
    raise KeyboardInterrupt
