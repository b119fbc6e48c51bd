"""`edge-agent explain`: how one of the last requests was decided, as a table for a person."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from urllib.parse import quote

from agent.cli_client import EXIT_FAILED, EXIT_OK, add_connection, answerer, call, refused


def add_parser(commands: Any) -> None:
    explain = commands.add_parser("explain", help="show how a request was decided: candidates, estimates, attempts")
    explain.add_argument("request_id", metavar="ID", help="the request_id of an answer or a refusal")
    explain.add_argument("--json", action="store_true", help="print the whole explanation")
    add_connection(explain)
    explain.set_defaults(run=_explain)


def _explain(args: argparse.Namespace) -> int:
    code, explanation = call(args, f"/explain/{quote(args.request_id, safe='')}", None, "request", "stages", "outcome")
    if args.json:
        print(json.dumps(explanation, indent=2))
        return EXIT_OK if code == 200 else EXIT_FAILED
    if code != 200:
        return refused(explanation)
    print("\n".join(lines(explanation)))
    return EXIT_OK


def lines(explanation: Mapping[str, Any]) -> Iterator[str]:
    """What is printed."""
    asked = explanation["request"]
    pinned = f"/{asked['variant']}" if asked["variant"] else ""
    regions = f", regions {', '.join(asked['allowed_regions'])}" if asked["allowed_regions"] else ""
    yield (
        f"{explanation['request_id']}: {asked['model']}{pinned} of {asked['producer']}, {asked['latency_class']}, "
        f"{asked['deadline_ms']:g} ms, priority {asked['priority']}, accuracy {asked['accuracy']}{regions}"
    )
    for note in asked["notes"]:
        yield f"  note: {note}"
    if not explanation["stages"]:
        yield "  routing was not asked"
    for stage in explanation["stages"]:
        yield ""
        yield from _stage(stage)
    yield ""
    yield _outcome(explanation["outcome"])
    for reason in explanation["reasons"]:
        yield f"  why    {reason}"


def _stage(stage: Mapping[str, Any]) -> Iterator[str]:
    decision = stage["decision"]
    yield f"{stage['stage']}, {stage['at_ms']:g} ms after receipt, policy {decision['policy']}"
    weights = ", ".join(f"{term} {weight:g}" for term, weight in decision["weights"].items())
    if weights:
        yield f"  weights: {weights}"
    place = {(play["target"], play["variant"]): str(number) for number, play in enumerate(decision["ranked"], 1)}
    heading = ("", "target", "variant", "p50 ms", "p95 ms", "success", "accuracy", "USD", "bytes", "utility", "terms")
    candidates = (_candidate(one, place) for one in decision["candidates"])
    rows = [heading, *sorted(candidates, key=lambda row: (row[0] == "-", int(row[0].strip("-") or 0)))]
    yield from _table(rows)
    for one in stage["attempts"]:
        error = f": {one['error']}" if one.get("error") else ""
        play = f"{one['target']}/{one['variant']}{' (beside the one before)' if one.get('hedge') else ''}"
        yield f"  asked  {play}: {one['outcome']} after {one['elapsed_ms']:g} ms{error}"


def _candidate(one: Mapping[str, Any], place: Mapping[tuple[str, str], str]) -> tuple[str, ...]:
    """The number is the place in the ranking; without one, the last column says what ruled it out."""
    estimate = one["estimate"]
    guess = "" if estimate["measured"] else "~"
    terms = " ".join(f"{term} {value:+.3g}" for term, value in one["terms"].items() if value)
    why = f"{one['excluded']}: {one['text']}" if one["excluded"] else terms + (" (at risk)" if one["at_risk"] else "")
    return (
        place.get((one["target"], one["variant"]), "-"),
        one["target"],
        one["variant"] or "(none)",
        f"{guess}{estimate['p50_ms']:.2f}",
        f"{guess}{estimate['p95_ms']:.2f}",
        f"{estimate['success']:.1%}",
        f"{estimate['accuracy']:.3f}",
        f"{estimate['cost_usd']:g}",
        str(estimate["bytes"]),
        "-" if one["utility"] is None else f"{one['utility']:.3f}",
        why,
    )


def _table(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Words to the left, numbers to the right, the last column as long as it likes."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
        cells[:3] = [cell.ljust(width) for cell, width in zip(row[:3], widths, strict=False)]
        yield f"  {'  '.join([*cells[:-1], row[-1]])}".rstrip()


def _outcome(outcome: Mapping[str, Any]) -> str:
    took = f"after {outcome['total_ms']:g} ms, {outcome['cost_usd']:g} USD"
    if outcome["status"] == "refused":
        return f"refused: {outcome['code']}: {outcome['message']} ({took})"
    sure = "" if outcome["confidence"] is None else f", {outcome['confidence']:.1%} sure"
    by = f"{answerer(outcome)}, variant {outcome['variant']}"
    late = "" if outcome["deadline_met"] else ", LATE"
    age = "" if outcome["status"] == "computed" else f", {outcome['age_s']:g} s old"
    escalation = f", {outcome['escalation']}" if outcome["escalation"] else ""
    return f"{outcome['status']}: {outcome['label']}{sure} by {by}{age}{escalation} ({took}{late})"
