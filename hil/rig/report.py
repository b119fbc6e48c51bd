"""What a run found: text for people, JSON and JUnit for machines."""

from __future__ import annotations

import platform
import shlex
import textwrap
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from hil.rig.check import Figure, Outcome, Verdict

SCHEMA: Final = 1
WORDS: Final = {
    Verdict.PASSED: "pass",
    Verdict.FAILED: "FAIL",
    Verdict.SKIPPED: "skip",
    Verdict.ERROR: "ERROR",
}
WIDTH: Final = 118
LEGEND: Final = (
    "Each check says what it expects, then what was found. A figure that has a limit shows it in brackets; one without "
    "is for information. FAIL: the board, its cable or the gateway did not do as expected. ERROR: the rig could not do "
    "its part, which says nothing about the board. The line 'again' repeats a check with the same faults in the same "
    "places."
)


@dataclass(slots=True)
class Report:
    """One run. `about` is the board in words, `began` Unix time."""

    board: str
    about: str
    seed: int
    began: float
    outcomes: list[Outcome] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def counts(self) -> Counter[Verdict]:
        return Counter(outcome.verdict for outcome in self.outcomes)

    @property
    def ok(self) -> bool:
        return not self.counts[Verdict.FAILED] and not self.counts[Verdict.ERROR]

    def replay(self, outcome: Outcome) -> str:
        """The command that runs one check again."""
        only = shlex.quote(outcome.check.key)
        return f"script/hil --board {shlex.quote(self.board)} --seed {self.seed} --only {only}"

    def to_dict(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "board": self.board,
            "about": self.about,
            "seed": self.seed,
            "began": self.began,
            "seconds": round(self.seconds, 1),
            "machine": platform.machine(),
            "python": platform.python_version(),
            "ok": self.ok,
            "counts": {verdict.value: self.counts[verdict] for verdict in Verdict},
            "checks": [outcome.to_dict() | {"again": self.replay(outcome)} for outcome in self.outcomes],
        }

    def to_junit(self) -> str:
        """JUnit XML as CI systems read it: a suite for each group."""
        root = ET.Element("testsuites", name=f"rig {self.board}", time=f"{self.seconds:.3f}")
        for group in dict.fromkeys(outcome.check.group for outcome in self.outcomes):
            members = [outcome for outcome in self.outcomes if outcome.check.group == group]
            counts = Counter(outcome.verdict for outcome in members)
            suite = ET.SubElement(
                root,
                "testsuite",
                name=f"rig.{self.board}.{group}",
                tests=str(len(members)),
                failures=str(counts[Verdict.FAILED]),
                errors=str(counts[Verdict.ERROR]),
                skipped=str(counts[Verdict.SKIPPED]),
                time=f"{sum(outcome.seconds for outcome in members):.3f}",
            )
            properties = ET.SubElement(suite, "properties")
            ET.SubElement(properties, "property", name="seed", value=str(self.seed))
            for outcome in members:
                self._case(suite, outcome)
        ET.indent(root)
        return '<?xml version="1.0" encoding="utf-8"?>\n' + ET.tostring(root, encoding="unicode") + "\n"

    def _case(self, suite: ET.Element, outcome: Outcome) -> None:
        case = ET.SubElement(
            suite, "testcase", classname=suite.get("name", ""), name=outcome.check.name, time=f"{outcome.seconds:.3f}"
        )
        tags = {Verdict.FAILED: "failure", Verdict.ERROR: "error", Verdict.SKIPPED: "skipped"}
        if tag := tags.get(outcome.verdict):
            ET.SubElement(case, tag, message=_printable(outcome.reason)).text = self.replay(outcome)
        ET.SubElement(case, "system-out").text = _printable("\n".join(lines_of(outcome)))


def head(report: Report, count: int, write: Callable[[str], None]) -> None:
    write(f"edge-agent rig: {count} checks of {report.board}{f' ({report.about})' if report.about else ''}")
    write(f"seed {report.seed}")
    write("")
    for line in textwrap.wrap(LEGEND, WIDTH):
        write(line)


class Printer:
    """Writes each outcome as it comes, under its group's title."""

    def __init__(self, report: Report, write: Callable[[str], None]) -> None:
        self._report, self._write = report, write
        self._group = ""

    def show(self, outcome: Outcome) -> None:
        if outcome.check.group != self._group:
            self._group = outcome.check.group
            self._write("")
            self._write(self._group.upper())
        self._write(f"  {WORDS[outcome.verdict]:5} {outcome.check.name}  ({outcome.seconds:.1f} s)")
        for line in lines_of(outcome):
            for part in textwrap.wrap(line, WIDTH - 8, subsequent_indent="  ", break_long_words=False) or [""]:
                self._write(f"        {part}")
        if outcome.verdict in (Verdict.FAILED, Verdict.ERROR):
            self._write(f"        again: {self._report.replay(outcome)}")


def lines_of(outcome: Outcome) -> list[str]:
    """What is written below the name of a check."""
    findings = outcome.findings
    lines = [f"expected: {outcome.check.expects}"]
    if outcome.reason:
        lines += [f"{'reason' if outcome.verdict is Verdict.SKIPPED else 'FOUND'}: {outcome.reason}"]
    lines += [_figure(figure) for figure in findings.figures]
    lines += [f"- {note}" for note in findings.notes]
    return lines + [f"line: {line}" for line in findings.lines]


def summary(report: Report, of: int, write: Callable[[str], None]) -> None:
    """The verdict, and everything that a reader must not overlook. `of`: how many checks there are."""
    counts = report.counts
    write("")
    told = ", ".join(f"{counts[verdict]} {verdict.value}" for verdict in Verdict if counts[verdict])
    write(f"{len(report.outcomes)} checks in {report.seconds:.0f} s: {told or 'nothing was run'}. Seed {report.seed}.")
    for verdict in (Verdict.FAILED, Verdict.ERROR):
        for outcome in _of(report.outcomes, verdict):
            write(f"  {WORDS[verdict]} {outcome.check.key}: {outcome.reason.splitlines()[-1]}")
    reasons = Counter(outcome.reason for outcome in _of(report.outcomes, Verdict.SKIPPED))
    for reason, count in reasons.items():
        write(f"  not checked ({count}): {reason}")
    if not report.ok:
        write("It does not hold up.")
    elif counts[Verdict.PASSED]:
        done = counts[Verdict.PASSED]
        if done == of:
            write("The board, its line and the gateway hold up.")
        else:
            write(f"{done} of {of} checks: what was checked holds up.")


def _of(outcomes: Sequence[Outcome], verdict: Verdict) -> list[Outcome]:
    return [outcome for outcome in outcomes if outcome.verdict is verdict]


def _figure(figure: Figure) -> str:
    value = f"{figure.value:.0f}" if figure.value == int(figure.value) else f"{figure.value:.3g}"
    if abs(figure.value) >= 1000:
        value = f"{figure.value:.0f}"
    limit = f"  [{figure.limit()}]" if figure.limit() else ""
    note = f"  ({figure.note})" if figure.note else ""
    return f"{figure.name:42} {value:>9} {figure.unit}{limit}{note}".rstrip()


def _printable(text: str) -> str:
    """XML has no place for control characters."""
    return "".join(char if char.isprintable() or char in "\n\t" else "\N{REPLACEMENT CHARACTER}" for char in text)
