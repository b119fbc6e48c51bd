"""What a check is, and what came of one."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hil.rig.rig import Rig


class Verdict(StrEnum):
    PASSED = "passed"
    FAILED = "failed"
    SKIPPED = "skipped"
    ERROR = "error"
    """The rig could not do its part: says nothing about the board."""


class Failed(Exception):
    """What was expected did not hold; the message says what was found."""


class Skip(Exception):
    """The check makes no sense here; the message says why."""


@dataclass(frozen=True, slots=True)
class Figure:
    """One number. `least` and `most` are limits; a figure without one is for information."""

    name: str
    value: float
    unit: str = ""
    least: float | None = None
    most: float | None = None
    note: str = ""

    @property
    def met(self) -> bool:
        return (self.least is None or self.value >= self.least) and (self.most is None or self.value <= self.most)

    def limit(self) -> str:
        if self.least is not None:
            return f"at least {self.least:g}"
        return f"at most {self.most:g}" if self.most is not None else ""

    def to_dict(self) -> dict[str, Any]:
        limits = {"least": self.least, "most": self.most}
        document = {"name": self.name, "value": float(f"{self.value:.5g}"), "unit": self.unit}
        document |= {name: limit for name, limit in limits.items() if limit is not None}
        return document | ({"note": self.note} if self.note else {})


@dataclass(slots=True)
class Findings:
    """What a check writes down while it runs."""

    figures: list[Figure] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    """Faults of the line that were used, with their seeds."""

    def figure(
        self,
        name: str,
        value: float,
        unit: str = "",
        *,
        least: float | None = None,
        most: float | None = None,
        note: str = "",
    ) -> None:
        self.figures.append(Figure(name, float(value), unit, least, most, note))

    def note(self, text: str) -> None:
        self.notes.append(text)

    def missed(self) -> str:
        """Every figure that is outside of its limit, in words; empty if none is."""
        return "; ".join(
            f"{figure.name} {figure.value:.4g}{f' {figure.unit}' if figure.unit else ''}, expected {figure.limit()}"
            for figure in self.figures
            if not figure.met
        )


Run = Callable[["Rig", Findings], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Check:
    """`expects`: one sentence that a reader of the report can judge the outcome by."""

    group: str
    name: str
    expects: str
    run: Run
    model: str | None = "digits"
    """Family that the board must hold when it begins; None: whatever it holds."""
    needs_board: bool = True
    streams: bool = False
    """Whether the board must be streaming when it begins; else it must not be."""

    @property
    def key(self) -> str:
        return f"{self.group}/{self.name}"


@dataclass(slots=True)
class Outcome:
    check: Check
    verdict: Verdict
    seconds: float
    reason: str = ""
    findings: Findings = field(default_factory=Findings)

    def to_dict(self) -> dict[str, Any]:
        return {
            "check": self.check.key,
            "expects": self.check.expects,
            "verdict": self.verdict.value,
            "reason": self.reason,
            "seconds": round(self.seconds, 3),
            "figures": [figure.to_dict() for figure in self.findings.figures],
            "notes": list(self.findings.notes),
            "lines": list(self.findings.lines),
        }


def check(
    group: str,
    name: str,
    expects: str,
    *,
    model: str | None = "digits",
    needs_board: bool = True,
    streams: bool = False,
) -> Callable[[Run], Check]:
    """Makes a check of an async function."""
    return lambda run: Check(group, name, expects, run, model, needs_board, streams)


def require(holds: object, text: str) -> None:
    """Raises `Failed` with `text` unless it holds."""
    if not holds:
        raise Failed(text)
