"""Draws the figures of a proof. Needs matplotlib: the extra `proof`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hil.bench.report import CannotMeasure

OURS_COLOUR, ORACLE_COLOUR, OTHER_COLOUR = "#d1495b", "#2e8b57", "#7a8ba3"


def draw(folder: Path, document: Mapping[str, Any]) -> list[Path]:
    """One picture for each workload. Raises `CannotMeasure` if matplotlib is not installed."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError as error:
        raise CannotMeasure(f"--plots needs the extra `proof`: {error}") from None
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, results in document["workloads"].items():
        rows: Mapping[str, Mapping[str, float]] = results["strategies"]
        figure, (worth, latency, regret) = pyplot.subplots(1, 3, figsize=(15, 4.5), constrained_layout=True)
        figure.suptitle(f"{name}: {next(iter(rows.values()))['requests']} requests")
        _worth(worth, rows)
        _latency(latency, rows)
        _regret(regret, rows)
        path = folder / f"routing-{name}.png"
        figure.savefig(path, dpi=100, metadata={"Software": ""})
        pyplot.close(figure)
        paths.append(path)
    return paths


def _worth(axes: Any, rows: Mapping[str, Mapping[str, float]]) -> None:
    """What is paid against what is got for it."""
    for name, row in rows.items():
        cost = row["cost_usd"] / row["requests"] * 1000
        axes.scatter(cost, row["useful"] * 100, color=_colour(name), s=40)
        axes.annotate(name, (cost, row["useful"] * 100), textcoords="offset points", xytext=(5, 4), fontsize=8)
    axes.margins(x=0.3, y=0.1)
    axes.set_xlabel("USD for 1,000 requests")
    axes.set_ylabel("right and in time, % of all requests")


def _latency(axes: Any, rows: Mapping[str, Mapping[str, float]]) -> None:
    for position, (name, row) in enumerate(rows.items()):
        quantiles = [row["p50_ms"], row["p95_ms"], row["p99_ms"]]
        axes.plot([quantiles[0], quantiles[-1]], [position, position], color=_colour(name))
        axes.scatter(quantiles, [position] * 3, color=_colour(name), s=[60, 30, 15])
    axes.set_yticks(range(len(rows)), list(rows))
    axes.set_xscale("log")
    axes.set_xlabel("ms from receipt to answer: p50, p95, p99")


def _regret(axes: Any, rows: Mapping[str, Mapping[str, float]]) -> None:
    axes.barh(list(rows), [row["regret"] for row in rows.values()], color=[_colour(name) for name in rows])
    axes.set_xlabel("regret: utility missed on average")


def _colour(name: str) -> str:
    return {"ours": OURS_COLOUR, "oracle": ORACLE_COLOUR}.get(name, OTHER_COLOUR)
