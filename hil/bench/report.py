"""What a run found: lines for people, and the same figures as JSON."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from hil.bench.stats import Summary

SCHEMA = 1


class CannotMeasure(Exception):
    """A part that a measurement needs is missing here."""


@dataclass(frozen=True, slots=True)
class Aim:
    """A limit on the ratio to the peer, or on the figure itself. `allowance` is taken off the figure first: the
    model's own time, where an aim says "plus the invoke"."""

    limit: float
    of: str = "ratio"
    """`ratio` or `figure`."""
    allowance: float = 0.0
    allowance_name: str = ""

    def text(self, unit: str) -> str:
        limit = f"<= {self.limit:.2f}x" if self.of == "ratio" else f"<= {self.limit:g} {unit}"
        return f"{limit} plus {self.allowance_name}" if self.allowance_name else limit


@dataclass(frozen=True, slots=True)
class Line:
    """One figure. `higher_is_better`: a rate, so the ratio is the peer's over ours: a ratio is always a cost."""

    bench: str
    name: str
    unit: str
    ours: Summary
    peer_name: str = ""
    peer: Summary | None = None
    aim: Aim | None = None
    note: str = ""
    higher_is_better: bool = False

    @property
    def ratio(self) -> float | None:
        """What it costs in units of what the peer costs."""
        if self.peer is None:
            return None
        if self.higher_is_better:
            return self.peer.p50 / self.ours.p50
        return self.ours.p50 / self.peer.p50

    @property
    def judged(self) -> float | None:
        """The number that is held against the aim's limit."""
        if self.aim is None:
            return None
        if self.aim.of == "figure":
            return self.ours.p50 - self.aim.allowance
        if self.peer is None:
            return None
        if self.aim.allowance:
            return (self.ours.p50 - self.aim.allowance) / self.peer.p50
        return self.ratio

    @property
    def met(self) -> bool | None:
        judged = self.judged
        return None if judged is None or self.aim is None else judged <= self.aim.limit

    def to_dict(self) -> dict[str, Any]:
        ratio, judged = self.ratio, self.judged
        return {
            "bench": self.bench,
            "name": self.name,
            "unit": self.unit,
            **{key: _rounded(value) for key, value in asdict(self.ours).items()},
            "peer": None
            if self.peer is None
            else {"name": self.peer_name, **{key: _rounded(value) for key, value in asdict(self.peer).items()}},
            "ratio": None if ratio is None else round(ratio, 3),
            "aim": None
            if self.aim is None or judged is None
            else {
                "text": self.aim.text(self.unit),
                "limit": self.aim.limit,
                "of": self.aim.of,
                "allowance": _rounded(self.aim.allowance),
                "judged": _rounded(judged),
                "met": self.met,
            },
            "note": self.note,
        }


@dataclass(slots=True)
class Report:
    """All lines of a run, and what could not be measured."""

    seconds: float
    machine: dict[str, Any]
    lines: list[Line] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "seconds": self.seconds,
            "machine": self.machine,
            "results": [line.to_dict() for line in self.lines],
            "failed": dict(self.failed),
        }


def _rounded(value: float) -> float:
    """Four significant digits: there is no more in a measurement."""
    return float(f"{value:.4g}") if isinstance(value, float) else value


HEAD = ("what", "unit", "count", "p50", "p95", "beside it", "p50", "ratio", "aim")
WIDTHS = (38, 5, 7, 9, 9, 30, 9, 6)


def text(bench: str, lines: Sequence[Line], write: Callable[[str], None]) -> None:
    """The table of one bench."""
    write("")
    write(bench)
    write("  " + _row(HEAD))
    for line in lines:
        write("  " + _row(_cells(line)))
        if line.note:
            write(f"      {line.note}")


def verdicts(report: Report, write: Callable[[str], None]) -> None:
    """Every aim once more, and whether it was met."""
    judged = [line for line in report.lines if line.met is not None]
    if judged:
        write("")
        write(f"aims met: {sum(bool(line.met) for line in judged)} of {len(judged)}")
    for line in judged:
        if not line.met:
            write(f"  not met: {line.bench}: {line.name}: {_verdict(line)}")
    for bench, reason in report.failed.items():
        write(f"  not measured: {bench}: {reason}")


def _cells(line: Line) -> tuple[str, ...]:
    peer = ("", "") if line.peer is None else (line.peer_name, _number(line.peer.p50))
    ratio = "" if line.ratio is None else f"{line.ratio:.2f}x"
    ours = line.ours
    return (
        line.name,
        line.unit,
        str(ours.count),
        _number(ours.p50),
        _number(ours.p95),
        *peer,
        ratio,
        _verdict(line),
    )


def _verdict(line: Line) -> str:
    if line.aim is None or line.judged is None:
        return ""
    verdict = "met" if line.met else "NOT MET"
    if line.aim.of == "ratio" and line.aim.allowance:
        verdict = f"{line.judged:.2f}x: {verdict}"
    return f"{line.aim.text(line.unit)}: {verdict}"


def _row(cells: Sequence[str]) -> str:
    left = {0, 1, 5}
    padded = [
        f"{cell:<{width}}" if index in left else f"{cell:>{width}}"
        for index, (cell, width) in enumerate(zip(cells, WIDTHS, strict=False))
    ]
    return " ".join([*padded, " ", *cells[len(WIDTHS) :]]).rstrip()


def _number(value: float) -> str:
    if value >= 1000:
        return f"{value:.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"
