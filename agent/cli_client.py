"""`edge-agent infer` and `edge-agent status`: ask a running daemon over HTTP."""

from __future__ import annotations

import argparse
import json
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

DEFAULT_URL = "http://127.0.0.1:8080"
TIMEOUT_S = 60.0
"""Longer than any answer takes: the daemon keeps the request's own deadline."""
MAX_INPUT_BYTES = 64 << 20


def add_parsers(commands: Any) -> None:
    infer = commands.add_parser("infer", help="ask a running daemon")
    infer.add_argument("model", help="family, for example digits")
    infer.add_argument("input", type=Path, metavar="FILE", help=".npy array, or .json (an array or a whole request)")
    infer.add_argument("--index", type=int, help="which row of a .npy file that holds many samples")
    infer.add_argument("--class", dest="latency_class", choices=["realtime", "near", "interactive", "batch"])
    infer.add_argument("--deadline-ms", type=float)
    infer.add_argument("--priority", type=int)
    infer.add_argument("--variant", help="only this variant will do")
    infer.add_argument("--no-cache", action="store_true", help="a fresh cached answer will not do")
    infer.add_argument("--json", action="store_true", help="print the whole answer")
    infer.set_defaults(run=_infer)
    status = commands.add_parser("status", help="show the state of a running daemon")
    status.add_argument("--json", action="store_true", help="print the whole status")
    status.set_defaults(run=_status)
    for parser in (infer, status):
        parser.add_argument("--url", default=DEFAULT_URL, help=f"of the daemon (default {DEFAULT_URL})")


def _infer(args: argparse.Namespace) -> int:
    document = _document(args.input, args.index)
    if document is None:
        return 2
    document["model"] = args.model
    options = {
        "latency_class": args.latency_class,
        "deadline_ms": args.deadline_ms,
        "priority": args.priority,
        "variant": args.variant,
    }
    document |= {key: value for key, value in options.items() if value is not None}
    if args.no_cache:
        document["use_cache"] = False
    code, answer = _call(f"{args.url}/infer", document)
    if args.json or code != 200:
        print(json.dumps(answer, indent=2))
        return 0 if code == 200 else 1
    age = f", {answer['age_s']:.0f} s old" if answer["cached"] else ""
    stale = " STALE" if answer["stale"] else ""
    print(f"{answer['label']}  ({answer['confidence']:.1%} sure{age}){stale}")
    timing = answer["timing_ms"]
    print(f"  by       {answer['tier']} ({answer['target']}), {answer['provider']}")
    print(f"  model    {answer['model']}/{answer['variant']}  {answer['model_sha256'][:16]}")
    parts = ", ".join(f"{name} {timing[name]:.2f}" for name in ("queue", "link", "compute"))
    print(f"  took     {timing['total']:.2f} ms ({parts}); deadline {'met' if answer['deadline_met'] else 'MISSED'}")
    print(f"  cost     {answer['cost_usd']:g} USD")
    for reason in answer["reasons"]:
        print(f"  why      {reason}")
    return 0


def _status(args: argparse.Namespace) -> int:
    code, status = _call(f"{args.url}/status", None)
    if args.json or code != 200:
        print(json.dumps(status, indent=2))
        return 0 if code == 200 else 1
    ready = "ready" if status["ready"] else f"NOT READY: {status['reason']}"
    print(f"{status['gateway']}: {ready}, up {status['uptime_s']:.0f} s, version {status['version']}")
    for target in status["targets"]:
        times = target["service_ms"]
        took = f"p50 {times['p50']:.2f} ms, p95 {times['p95']:.2f} ms" if times else "not measured yet"
        state = "up  " if target["available"] else "DOWN"
        print(f"  {state} {target['name']:20} {took:34} {target['in_flight']}/{target['max_concurrent']} in flight")
        if target["reason"]:
            print(f"       {target['reason']}")
    counters = status["counters"]
    print(
        f"  {counters['answered']} answered, {counters['refused']} refused, {counters['cached']} from the cache, "
        f"{counters['stale']} stale, {counters['cost_usd']:g} USD"
    )
    return 0


def _document(path: Path, index: int | None) -> dict[str, Any] | None:
    """The request's body from a file, or None after saying what is wrong with it."""
    try:
        if path.stat().st_size > MAX_INPUT_BYTES:
            raise ValueError(f"larger than {MAX_INPUT_BYTES} bytes")
        if path.suffix == ".npy":
            import numpy as np

            array = np.load(path, allow_pickle=False)
            return {"inputs": (array if index is None else array[index]).tolist()}
        loaded = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, IndexError) as error:
        print(f"edge-agent: {path}: {error}", file=sys.stderr)
        return None
    return loaded if isinstance(loaded, dict) and "inputs" in loaded else {"inputs": loaded}


def _call(url: str, document: dict[str, Any] | None) -> tuple[int, dict[str, Any]]:
    """HTTP status and decoded body. A daemon that cannot be reached exits with a sentence."""
    if not url.startswith(("http://", "https://")):
        raise SystemExit(f"edge-agent: {url}: must begin with http:// or https://")
    data = None if document is None else json.dumps(document).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})  # noqa: S310 scheme checked above
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as response:  # noqa: S310
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        try:
            return error.code, json.load(error)
        except ValueError:
            return error.code, {"error": {"code": str(error.code), "message": error.reason}}
    except (urllib.error.URLError, OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise SystemExit(f"edge-agent: no daemon answers at {url}: {reason}") from None
