"""The figures of docs/routing-proof.md, made of the JSON that lies beside it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hil.sim import tables
from hil.sim.figures import Figures

BEGIN, END = "<!-- figures: edge-agent bench routing -->", "<!-- end of figures -->"


def write(path: Path, document: Mapping[str, Any]) -> None:
    """Put the figures where the page has its marks. Raises `OSError`, and `ValueError` if it has none."""
    put(path, BEGIN, render(document))


def put(path: Path, begin: str, figures: str) -> None:
    """`figures`, which begin with `begin` and end with `END`, in place of what the page has there. Raises `OSError`,
    and `ValueError` if the page has no such marks."""
    text = path.read_text()
    before, mark, rest = text.partition(begin)
    _, end, after = rest.partition(END)
    if not mark or not end:
        raise ValueError(f"{path}: has no {begin} with {END} behind it")
    path.write_text(before + figures + after)


def render(document: Mapping[str, Any]) -> str:
    """The figures with their marks."""
    lines = [BEGIN, ""]
    for name, results in document["workloads"].items():
        rows = {row: Figures(**found) for row, found in results["strategies"].items()}
        classes = {f"ours, {row}": Figures(**found) for row, found in results["classes"].items()}
        lines += [f"### Workload `{name}`", "", *tables.markdown({**rows, **classes}), ""]
    lines += ["### What must hold", ""]
    for title, verdicts in document["verdicts"].items():
        lines += [f"**{title}**", ""]
        for one in verdicts:
            beside = f" ({one['beside']})" if one["beside"] else ""
            lines.append(f"- {'pass' if one['met'] else '**MISS**'}: {one['what']}: {one['text']}{beside}")
        lines.append("")
    for name, crowd in document["crowds"].items():
        lines += [f"**10,000 requests at once, {name}**: {_crowd(crowd)}", ""]
    return "\n".join([*lines, END])


def _crowd(crowd: Mapping[str, Any]) -> str:
    answered = ", ".join(f"{name} {count}" for name, count in sorted(crowd["answered"].items()))
    refused = ", ".join(f"{name} {count}" for name, count in sorted(crowd["refused"].items())) or "none"
    longest = ", ".join(f"{name} {value:.2f} s" for name, value in sorted(crowd["longest_s"].items()))
    return (
        f"{crowd['asked']} asked; answered: {answered}; refused: {refused}; without a reason: {crowd['unexplained']}; "
        f"in line at most {crowd['most_waiting']}; memory {crowd['peak_kb_each']:.1f} kB each; longest: {longest}."
    )
