"""Figures as tables for people."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from hil.sim.figures import Figures

HEAD = (
    ("", 15),
    ("requests", 8),
    ("accuracy", 8),
    ("in time", 7),
    ("useful", 7),
    ("fallback", 8),
    ("refused", 7),
    ("edge", 6),
    ("mean ms", 8),
    ("p50 ms", 7),
    ("p95 ms", 7),
    ("p99 ms", 7),
    ("USD", 7),
    ("MB", 6),
    ("close", 6),
    ("regret", 7),
)
"""Titles and widths; docs/routing-proof.md says what they mean."""


def table(rows: Mapping[str, Figures]) -> list[str]:
    """A line for each row, below the head."""
    return [
        "  " + _row([title for title, _ in HEAD]),
        *("  " + _row([name, *cells(row)]) for name, row in rows.items()),
    ]


def markdown(rows: Mapping[str, Figures]) -> list[str]:
    """The same for a page."""
    head = [title for title, _ in HEAD]
    lines = [head, ["---", *(["---:"] * (len(head) - 1))], *([name, *cells(row)] for name, row in rows.items())]
    return ["| " + " | ".join(line) + " |" for line in lines]


def cells(row: Figures) -> list[str]:
    return [
        str(row.requests),
        *map(_share, (row.accuracy, row.in_time, row.useful, row.fallback, row.refused / max(1, row.requests))),
        _share(row.edge),
        *(f"{value:.1f}" for value in (row.mean_ms, row.p50_ms, row.p95_ms, row.p99_ms)),
        f"{row.cost_usd:.3f}",
        f"{row.bytes / 1e6:.2f}",
        _share(row.close),
        f"{row.regret:.4f}",
    ]


def counts(title: str, found: Mapping[str, int]) -> str:
    listed = ", ".join(f"{name} {count}" for name, count in found.items()) or "none"
    return f"  {title}: {listed}"


def _share(value: float) -> str:
    return f"{value * 100:.1f}%"


def _row(values: Sequence[str]) -> str:
    widths: Iterable[int] = (width for _, width in HEAD)
    return " ".join(
        value.ljust(width) if index == 0 else value.rjust(width)
        for index, (value, width) in enumerate(zip(values, widths, strict=True))
    )
