"""What must hold, line by line: each figure beside its limit, and whether it is met."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hil.sim.figures import Figures


@dataclass(frozen=True, slots=True)
class Verdict:
    """One line. `text` is the figure with its limit, for people."""

    what: str
    text: str
    figure: float
    limit: float
    met: bool
    beside: str = ""

    def to_dict(self) -> dict[str, Any]:
        return {
            "what": self.what,
            "figure": round(self.figure, 6),
            "limit": self.limit,
            "met": self.met,
            "text": self.text,
            "beside": self.beside,
        }


def above(what: str, figure: float, limit: float, beside: str = "") -> Verdict:
    """A share that must be larger."""
    return Verdict(what, f"{figure:.2%}, must be above {limit:.0%}", figure, limit, figure > limit, beside)


def below(what: str, figure: float, limit: float, beside: str = "") -> Verdict:
    """A share that must be smaller."""
    return Verdict(what, f"{figure:.2%}, must be below {limit:.0%}", figure, limit, figure < limit, beside)


def at_least(what: str, figure: float, limit: float, beside: str = "") -> Verdict:
    return Verdict(what, f"{figure:.2%}, must be at least {limit:.0%}", figure, limit, figure >= limit, beside)


def at_most(what: str, figure: float, limit: float, unit: str, beside: str = "") -> Verdict:
    text = f"{figure:.3g} {unit}, must be at most {limit:g} {unit}"
    return Verdict(what, text, figure, limit, figure <= limit, beside)


def under(what: str, figure: float, limit: float, unit: str) -> Verdict:
    return Verdict(what, f"{figure:.3g} {unit}, must be under {limit:g} {unit}", figure, limit, figure < limit)


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
