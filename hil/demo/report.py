"""What the ledger shows: the summary on the screen, and the same figures as JSON."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from agent.registry.catalog import Catalog, TargetKind
from hil.demo.ledger import Asked
from hil.demo.script import Outage

TIERS = ("edge_mcu", "edge_gpu", "cloud_gpu", "cloud_serverless", "fallback")
_KIND: Mapping[str, TargetKind] = {
    "edge_mcu": "edge_mcu",
    "edge_gpu": "edge_gpu",
    "cloud_gpu": "cloud",
    "cloud_serverless": "cloud",
}
Z = 2.576
"""Standard normal quantile: 99 % two-sided."""


def summarise(rows: Sequence[Asked], outages: Sequence[Outage], catalog: Catalog, started_s: float) -> dict[str, Any]:
    """The figures of `--json`. Times are milliseconds unless named otherwise; latency is as the sensor sees it, from
    publishing the sample to having the answer."""
    answered = [row for row in rows if row.answer is not None and not row.refused]
    refused = [row for row in rows if row.refused]
    stale = [row for row in answered if _of(row, "tier") == "fallback"]
    tiers = Counter(str(_of(row, "tier")) for row in answered)
    return {
        "requests": len(rows),
        "answered": len(answered),
        "refused": len(refused),
        "lost": sum(row.answer is None for row in rows),
        "answered_twice": sum(row.answers > 1 for row in rows),
        "stale": len(stale),
        "unlabelled_stale": sum(
            not (_of(row, "stale") and _of(row, "cached") and _of(row, "reasons")) for row in stale
        ),
        "tiers": {tier: tiers.get(tier, 0) for tier in TIERS},
        "accuracy": _accuracy([row for row in answered if not row.adaptive], catalog),
        "cascade": _cascade([row for row in answered if row.adaptive]),
        "latency_ms": {
            name: _latency([row for row in answered if row.latency_class == name])
            for name in sorted({row.latency_class for row in rows})
        },
        "deadline_hits": sum(bool(_of(row, "deadline_met")) for row in answered),
        "cost_usd": round(sum(float(_of(row, "cost_usd")) for row in rows if row.answer is not None), 6),
        "outages": [_outage(outage, rows, started_s) for outage in outages],
    }


def _of(row: Asked, key: str) -> Any:
    return (row.answer or {}).get(key, 0)


def _accuracy(rows: Iterable[Asked], catalog: Catalog) -> dict[str, dict[str, dict[str, Any]]]:
    """By tier and family: the share that was right, beside what the catalogue recorded for its variant."""
    groups: dict[tuple[str, str], list[Asked]] = defaultdict(list)
    for row in rows:
        groups[str(_of(row, "tier")), row.family].append(row)
    table: dict[str, dict[str, dict[str, Any]]] = {}
    for (tier, name), group in sorted(groups.items(), key=lambda item: (TIERS.index(item[0][0]), item[0][1])):
        value = sum(row.right for row in group) / len(group)
        entry: dict[str, Any] = {"value": round(value, 4), "samples": len(group)}
        if tier in _KIND:
            variant = catalog.family(name).variant_for(_KIND[tier])
            if variant is not None:
                recorded = variant.accuracy
                # Two samples of one population, the demo's and the catalogue's: pooled share with two successes and two
                # failures added (Agresti and Caffo 2000), so that a perfect score has an error as well.
                right = value * len(group) + recorded.value * recorded.samples
                pooled = (right + 2) / (len(group) + recorded.samples + 4)
                error = Z * (pooled * (1 - pooled) * (1 / len(group) + 1 / recorded.samples)) ** 0.5
                entry |= {
                    "catalogue": recorded.value,
                    "sampling_error": round(error, 4),
                    "agrees": abs(value - recorded.value) <= error,
                }
        table.setdefault(tier, {})[name] = entry
    return table


def _cascade(rows: Sequence[Asked]) -> dict[str, Any]:
    """What was asked of the cascade. Which tier answers depends there on how hard the input is, so no tier's share can
    be held against the catalogue's accuracy; the whole can be held against the best variant's."""
    fresh = [row for row in rows if not _of(row, "stale")]
    return {
        "answered": len(rows),
        "fresh": len(fresh),
        "accuracy": round(sum(row.right for row in fresh) / len(fresh), 4) if fresh else None,
        "escalated": sum(_of(row, "escalation") == "escalated" for row in rows),
        "held": sum(_of(row, "escalation") == "held" for row in rows),
    }


def _latency(rows: Sequence[Asked]) -> dict[str, Any]:
    times = sorted((row.answered_s - row.sent_s) * 1e3 for row in rows)
    if not times:
        return {"count": 0, "p50": None, "p95": None, "p99": None}
    return {
        "count": len(times),
        **{f"p{q}": round(times[min(len(times) - 1, len(times) * q // 100)], 3) for q in (50, 95, 99)},
        "deadline_hits": sum(bool(_of(row, "deadline_met")) for row in rows),
    }


def _outage(outage: Outage, rows: Sequence[Asked], started_s: float) -> dict[str, Any]:
    during = [row for row in rows if outage.start_s <= row.sent_s < outage.end_s]
    by = Counter(str(_of(row, "tier")) for row in during if row.answer is not None and not row.refused)
    after = [row for row in rows if row.sent_s >= outage.back_s and row.answer is not None]
    first = [min((row.answered_s for row in after if _of(row, "tier") == tier), default=None) for tier in outage.tiers]
    healed = [time for time in first if time is not None]
    seconds = round(max(healed) - outage.back_s, 2) if healed and len(healed) == len(first) else None
    return {
        "name": outage.name,
        "start": round(outage.start_s - started_s, 2),
        "end": round(outage.end_s - started_s, 2),
        "back": round(outage.back_s - started_s, 2),
        "healed_after_s": seconds,
        "requests": len(during),
        "answered_by": dict(by),
        "refused": sum(row.refused for row in during),
        "lost": sum(row.answer is None for row in during),
    }


def text(summary: Mapping[str, Any], write: Callable[[str], None]) -> None:
    """The summary for people."""
    write("")
    write(
        f"{summary['requests']} requests: {summary['answered']} answered, {summary['refused']} refused with a reason, "
        f"{summary['lost']} lost; {summary['stale']} answers stale, {summary['unlabelled_stale']} of them unlabelled"
    )
    hits = summary["deadline_hits"] / max(1, summary["answered"])
    write(f"deadlines met: {hits:.1%}; cloud cost: {summary['cost_usd']:.4f} USD")
    write("")
    write(f"  {'answered by':18} {'answers':>8}   accuracy against the labels (catalogue, sampling error at 99 %)")
    for tier in TIERS:
        cells = []
        for family, figure in summary["accuracy"].get(tier, {}).items():
            cell = f"{family} {figure['value']:.1%}"
            if "catalogue" in figure:
                verdict = "" if figure["agrees"] else " DIFFERS"
                cell += f" ({figure['catalogue']:.1%} ± {figure['sampling_error']:.1%}){verdict}"
            elif tier == "fallback":
                cell += " (earlier answers)"
            cells.append(cell)
        write(f"  {tier:18} {summary['tiers'][tier]:8}   {', '.join(cells)}")
    cascade = summary["cascade"]
    if cascade["fresh"]:
        write(
            f"  adaptive: {cascade['accuracy']:.1%} of {cascade['fresh']} right; {cascade['escalated']} asked again of "
            f"the cloud, {cascade['held']} kept though unsure, because it could not be asked"
        )
    write("")
    write(f"  {'latency at the sensor':22} {'answers':>8} {'p50':>9} {'p95':>9} {'p99':>9}   deadlines met")
    for name, figure in summary["latency_ms"].items():
        if figure["count"]:
            times = " ".join(f"{figure[q]:6.1f} ms" for q in ("p50", "p95", "p99"))
            write(f"  {name:22} {figure['count']:8} {times}   {figure['deadline_hits'] / figure['count']:.1%}")
    write("")
    for outage in summary["outages"]:
        by = ", ".join(f"{tier} {count}" for tier, count in outage["answered_by"].items()) or "nobody"
        healed = outage["healed_after_s"]
        write(f"  {outage['name']}: {outage['start']:.1f} s to {outage['end']:.1f} s")
        write(f"      {outage['requests']} requests, answered by: {by}")
        write(f"      refused {outage['refused']}, lost {outage['lost']}")
        back = "not by the end of the run" if healed is None else f"{healed:.1f} s after the parts came back"
        write(f"      healed: {back}")
