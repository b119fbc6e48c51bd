"""What must hold, line by line: each figure beside its limit, and whether it is met."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import ge, gt, le, lt
from typing import Any, NamedTuple

from agent.core.types import LatencyClass, Tier
from hil.sim.figures import Figures, tier_of
from hil.sim.play import Course


class Rule(NamedTuple):
    """How a figure is held against its limit. `unit` empty: both are shares."""

    words: str
    holds: Callable[[float, float], bool]
    unit: str = ""

    def shown(self, figure: float) -> str:
        return f"{figure:.3g} {self.unit}" if self.unit else f"{figure:.2%}"

    def limited(self, limit: float) -> str:
        return f"{self.words} {limit:g} {self.unit}" if self.unit else f"{self.words} {limit:.0%}"


@dataclass(frozen=True, slots=True)
class Verdict:
    """One line. `figure` is the mean where there are several `seeds`, the figures of single ones."""

    what: str
    figure: float
    limit: float
    rule: Rule
    beside: str = ""
    seeds: tuple[float, ...] = ()

    @property
    def met(self) -> bool:
        return self.rule.holds(self.figure, self.limit)

    @property
    def text(self) -> str:
        """The figure with its limit, for people."""
        found = self.rule.shown(self.figure)
        if len(self.seeds) > 1:
            low, high = self.rule.shown(min(self.seeds)), self.rule.shown(max(self.seeds))
            found += f" ({low} to {high} over {len(self.seeds)} seeds)"
        return f"{found}, {self.rule.limited(self.limit)}"

    def to_dict(self) -> dict[str, Any]:
        return {
            "what": self.what,
            "figure": round(self.figure, 6),
            "limit": self.limit,
            "met": self.met,
            "text": self.text,
            "beside": self.beside,
            **({"seeds": [round(one, 6) for one in self.seeds]} if self.seeds else {}),
        }


def above(what: str, figure: float, limit: float, beside: str = "") -> Verdict:
    """A share that must be larger."""
    return Verdict(what, figure, limit, Rule("must be above", gt), beside)


def below(what: str, figure: float, limit: float, beside: str = "") -> Verdict:
    """A share that must be smaller."""
    return Verdict(what, figure, limit, Rule("must be below", lt), beside)


def at_least(what: str, figure: float, limit: float, beside: str = "") -> Verdict:
    return Verdict(what, figure, limit, Rule("must be at least", ge), beside)


def at_most(what: str, figure: float, limit: float, unit: str, beside: str = "") -> Verdict:
    return Verdict(what, figure, limit, Rule("must be at most", le, unit), beside)


def under(what: str, figure: float, limit: float, unit: str) -> Verdict:
    return Verdict(what, figure, limit, Rule("must be under", lt, unit))


def over_seeds(found: Sequence[Sequence[Verdict]]) -> list[Verdict]:
    """The same lines with several seeds: their means are judged. What stands beside them is of the first."""
    combined = []
    for same in zip(*found, strict=True):
        seeds = tuple(one.figure for one in same)
        combined.append(replace(same[0], figure=sum(seeds) / len(seeds), seeds=seeds))
    return combined


def routing(ours: Figures, near: Figures, cloud: Figures) -> list[Verdict]:
    """On one workload: ours, its near class, and always asking the cloud."""

    def saved(of: Callable[[Figures], float]) -> float:
        return 1.0 - of(ours) / of(cloud)

    beside = f"p95 {saved(lambda f: f.p95_ms):.1%} and mean {saved(lambda f: f.mean_ms):.1%} lower"
    behind = cloud.accuracy - ours.accuracy
    return [
        above("routing accuracy (the oracle's utility, or within 2 % of it)", ours.close, 0.95),
        under("p95 of the near class", near.p95_ms, 100.0, "ms"),
        below("fallback rate", ours.fallback, 0.05),
        under("cost of an inference", ours.cost_usd / max(1, ours.requests), 0.01, "USD"),
        above("edge utilisation", ours.edge, 0.70),
        at_least("cloud cost lower than always cloud", saved(lambda f: f.cost_usd), 0.70),
        at_least("median latency lower than always cloud", saved(lambda f: f.p50_ms), 0.80, beside),
        at_most(
            "accuracy behind always cloud",
            behind * 100,
            1.0,
            "points",
            f"{ours.accuracy:.2%} against {cloud.accuracy:.2%}; of all requests answered rightly and in time: "
            f"{ours.useful:.2%} against {cloud.useful:.2%}",
        ),
    ]


class Wrong(NamedTuple):
    """Wrong answers by what they came of."""

    realtime: int
    stale: int
    others: int

    @property
    def text(self) -> str:
        return (
            f"{self.realtime} to realtime requests, which have no time for the cloud; {self.stale} stale ones; "
            f"{self.others} others"
        )


def wrong(courses: Sequence[Course]) -> Wrong:
    """Stale answers count as such, whatever the class."""
    found = [course for course in courses if course.right is False]
    stale = sum(tier_of(course) is Tier.FALLBACK for course in found)
    realtime = sum(
        course.ask.kind.latency_class is LatencyClass.REALTIME and tier_of(course) is not Tier.FALLBACK
        for course in found
    )
    return Wrong(realtime, stale, len(found) - realtime - stale)


def lines(title: str, verdicts: Sequence[Verdict]) -> list[str]:
    """For people."""
    found = [title]
    for one in verdicts:
        found.append(f"  {'pass' if one.met else 'MISS'}  {one.what}: {one.text}")
        if one.beside:
            found.append(f"        {one.beside}")
    return found


def missed(verdicts: Mapping[str, Sequence[Verdict]]) -> int:
    return sum(not one.met for found in verdicts.values() for one in found)
