"""`edge-agent infer` and `edge-agent status`: ask a running daemon over HTTP."""

from __future__ import annotations

import argparse
import http.client
import json
import os
import ssl
import sys
import urllib.error
import urllib.request
import zipfile
from collections.abc import Mapping
from http import HTTPStatus
from pathlib import Path
from typing import Any

from agent.core.errors import plain_words

EXIT_OK, EXIT_FAILED, EXIT_USAGE, EXIT_STALE = 0, 1, 2, 3

DEFAULT_URL = "http://127.0.0.1:8080"
TIMEOUT_S = 60.0
"""Longer than any answer takes: the daemon keeps the request's own deadline."""
MAX_INPUT_BYTES = 64 << 20
ANSWER_KEYS = ("label", "confidence", "model_sha256", "timing_ms", "stale")
STATUS_KEYS = ("gateway", "ready", "targets", "components", "counters")


def add_parsers(commands: Any) -> None:
    infer = commands.add_parser("infer", help="ask a running daemon")
    infer.add_argument("model", help="family, for example digits")
    infer.add_argument(
        "input",
        type=Path,
        metavar="FILE",
        help=".npy array, .npz with an array `inputs`, or JSON (an array or a whole request)",
    )
    infer.add_argument("--index", type=int, help="which row of a .npy or .npz file that holds many samples")
    infer.add_argument("--class", dest="latency_class", choices=["realtime", "near", "interactive", "batch"])
    infer.add_argument("--deadline-ms", type=float)
    infer.add_argument("--priority", type=int)
    infer.add_argument("--variant", help="only this variant will do")
    infer.add_argument(
        "--accuracy",
        choices=("high", "acceptable", "adaptive"),
        help="how right the answer has to be (docs/cascade.md)",
    )
    infer.add_argument(
        "--no-cache",
        action="store_true",
        help="take no fresh answer from the cache; an earlier one, marked STALE, still comes when nothing can be asked",
    )
    infer.add_argument(
        "--fresh", action="store_true", help=f"an earlier answer (STALE) is a failure: exit code {EXIT_STALE}"
    )
    infer.add_argument("--json", action="store_true", help="print the whole answer, or the whole refusal")
    infer.set_defaults(run=_infer)
    status = commands.add_parser("status", help="show the state of a running daemon")
    status.add_argument("--json", action="store_true", help="print the whole status")
    status.set_defaults(run=_status)
    for parser in (infer, status):
        add_connection(parser)


def add_connection(parser: argparse.ArgumentParser) -> None:
    """The options of whoever asks a daemon: what `call` takes."""
    parser.add_argument("--url", default=DEFAULT_URL, help=f"of the daemon (default {DEFAULT_URL})")
    holder = "holds the token; otherwise the variable EDGE_AGENT_TOKEN does"
    parser.add_argument("--token-file", type=Path, metavar="FILE", help=holder)
    parser.add_argument("--ca-file", type=Path, metavar="FILE", help="the authority of an https:// daemon, in PEM")


def _infer(args: argparse.Namespace) -> int:
    document = _document(args.input, args.index)
    if document is None:
        return EXIT_USAGE
    document["model"] = args.model
    options = {
        "latency_class": args.latency_class,
        "deadline_ms": args.deadline_ms,
        "priority": args.priority,
        "variant": args.variant,
        "accuracy": args.accuracy,
    }
    document |= {key: value for key, value in options.items() if value is not None}
    if args.no_cache:
        document["use_cache"] = False
    code, answer = call(args, "/infer", document, *ANSWER_KEYS)
    if args.json:
        print(json.dumps(answer, indent=2))
    elif code == 200:
        _show_answer(answer)
    if code != 200:
        return EXIT_FAILED if args.json else refused(answer)
    return EXIT_STALE if args.fresh and answer["stale"] else EXIT_OK


def _show_answer(answer: dict[str, Any]) -> None:
    sure = "confidence unknown" if answer["confidence"] is None else f"{answer['confidence']:.1%} sure"
    how = {"escalated": "; a small model was not", "held": "; no more accurate model answered"}
    earlier = "" if answer["same_input"] else ": answer to an earlier input"
    age = f", {answer['age_s']:.0f} s old" if answer["cached"] else ""
    stale = " STALE" if answer["stale"] else ""
    print(f"{answer['label']}  ({sure}{how.get(answer['escalation'], '')}{earlier}{age}){stale}")
    timing = answer["timing_ms"]
    print(f"  by       {answerer(answer)}, {answer['provider']}")
    print(f"  model    {answer['model']}/{answer['variant']}  {answer['model_sha256'][:16]}")
    parts = ", ".join(f"{name} {timing[name]:.2f}" for name in ("queue", "link", "compute"))
    print(f"  took     {timing['total']:.2f} ms ({parts}); deadline {'met' if answer['deadline_met'] else 'MISSED'}")
    print(f"  cost     {answer['cost_usd']:g} USD")
    for reason in answer["reasons"]:
        print(f"  why      {reason}")


def answerer(answer: Mapping[str, Any]) -> str:
    """The tier, and its target where that has a name of its own."""
    tier, target = answer["tier"], answer["target"]
    return f"{tier} ({target})" if target != tier else str(tier)


def refused(answer: dict[str, Any]) -> int:
    """One line that says what is wrong, then why, on standard error."""
    error = answer.get("error")
    error = error if isinstance(error, dict) else {"message": str(answer)[:200]}
    code, field, message = error.get("code", "unknown error"), error.get("field"), error.get("message", "")
    # Most messages begin with the field's name.
    where = f"{field}: " if field and not message.startswith(field) else ""
    wait = f"; again in {error['retry_after_s']:g} s" if "retry_after_s" in error else ""
    print(f"edge-agent: {code}: {where}{message}{wait}", file=sys.stderr)
    for reason in answer.get("reasons", ()):
        print(f"  why      {reason}", file=sys.stderr)
    return EXIT_FAILED


def _status(args: argparse.Namespace) -> int:
    code, status = call(args, "/status", None, *STATUS_KEYS)
    if args.json:
        print(json.dumps(status, indent=2))
        return EXIT_OK if code == 200 else EXIT_FAILED
    if code != 200:
        return refused(status)
    ready = "ready" if status["ready"] else f"NOT READY: {status['reason']}"
    print(f"{status['gateway']}: {ready}, up {status['uptime_s']:.0f} s, version {status['version']}")
    for target in status["targets"]:
        times = target["service_ms"]
        aged = "~" if target.get("service_aged") else ""
        took = f"p50 {aged}{times['p50']:.2f} ms, p95 {aged}{times['p95']:.2f} ms" if times else "not measured lately"
        state = "up  " if target["available"] else "DOWN"
        print(f"  {state} {target['name']:20} {took:34} {target['in_flight']}/{target['max_concurrent']} in flight")
        if target["reason"]:
            print(f"       {target['reason']}")
    shown = {target["name"] for target in status["targets"]}
    for part in status["components"]:
        if part["state"] != "up" and part["name"] not in shown:
            print(f"  {part['state'].upper()} {part['name']}" + (f": {part['reason']}" if part["reason"] else ""))
    for budget in status.get("budgets", ()):
        print(f"  {_budget(budget)}")
    counters = status["counters"]
    print(
        f"  {counters['answered']} answered, {counters['refused']} refused, {counters['cached']} from the cache, "
        f"{counters['stale']} stale, {counters['malformed']} turned away, {counters['cost_usd']:g} USD"
    )
    return EXIT_OK


def _budget(budget: dict[str, Any]) -> str:
    """One limit: what is left of it, and whether it is used up or only ahead of its pace."""
    unit = "USD" if budget["unit"] == "usd" else budget["unit"]
    left, at_once = round(budget["left"], 6), round(budget["left_now"], 6)
    pace = "" if at_once == left else f", {at_once:.10g} {unit.removesuffix('s') if at_once == 1 else unit} at once"
    state = "DONE  " if not budget["left"] else "budget"
    lane = f" of {budget['lane']}" if budget["lane"] else ""
    return f"{state} {left:.10g} of {budget['limit']:.10g} {unit} per {budget['window']}{lane} left{pace}"


def _document(path: Path, index: int | None) -> dict[str, Any] | None:
    """The request's body from a file, or None after saying what is wrong with it."""
    try:
        if path.stat().st_size > MAX_INPUT_BYTES:
            raise ValueError(f"larger than {MAX_INPUT_BYTES} bytes")
        if path.suffix in (".npy", ".npz"):
            return {"inputs": _rows(path, index)}
        if index is not None:
            raise ValueError("--index is for .npy and .npz files")
        loaded = _decoded(path.read_bytes())
    except OSError as error:
        print(f"edge-agent: {path}: {plain_words(error)}", file=sys.stderr)
        return None
    except (ValueError, IndexError) as error:
        print(f"edge-agent: {path}: {error}", file=sys.stderr)
        return None
    return loaded if isinstance(loaded, dict) and "inputs" in loaded else {"inputs": loaded}


def _rows(path: Path, index: int | None) -> Any:
    """The array of a NumPy file as nested lists, or one row of it. Raises ValueError, IndexError."""
    import numpy as np

    with path.open("rb") as file:
        if not file.read(6).startswith((b"\x93NUMPY", b"PK")):
            raise ValueError("is not a NumPy file")
    try:
        array = np.load(path, allow_pickle=False)
        if not isinstance(array, np.ndarray):
            with array:
                if "inputs" not in array:
                    raise ValueError(f"has no array `inputs`; it has: {', '.join(array) or 'none'}")
                array = array["inputs"]
    except (EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"is not a NumPy file: {error}") from None
    return (array if index is None else array[index]).tolist()


def _decoded(data: bytes) -> Any:
    """Raises ValueError with the place where it stops being JSON."""
    try:
        return json.loads(data.decode("utf-8-sig"))
    except json.JSONDecodeError as error:
        raise ValueError(f"is not JSON: line {error.lineno}, column {error.colno}: {error.msg}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"is not JSON: byte {error.start} is not UTF-8") from None
    except RecursionError:
        raise ValueError("is not JSON of any use: nested too deeply") from None


def call(
    args: argparse.Namespace, path: str, document: dict[str, Any] | None, *keys: str
) -> tuple[int, dict[str, Any]]:
    """HTTP status and decoded body. A daemon that cannot be reached exits with a sentence, and so does what answers
    without `keys`: another program, or another version of this one."""
    code, answer = _exchange(args, path, document)
    if not isinstance(answer, dict) or (code == HTTPStatus.OK and not answer.keys() >= {*keys}):
        raise SystemExit(f"edge-agent: what answers at {args.url} is no edge-agent of this version")
    return code, answer


def _exchange(args: argparse.Namespace, path: str, document: dict[str, Any] | None) -> tuple[int, Any]:
    url = f"{args.url.rstrip('/')}{path}"
    if not url.startswith(("http://", "https://")):
        raise _misuse(f"--url: must begin with http:// or https://, found {args.url}")
    data = None if document is None else json.dumps(document).encode()
    headers = {"Content-Type": "application/json"}
    token = _token(args.token_file)
    context = _trust(args.ca_file) if url.startswith("https://") else None
    if token:
        headers["Authorization"] = f"Bearer {token}"
    request = urllib.request.Request(url, data, headers)  # noqa: S310 scheme checked above
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_S, context=context) as response:  # noqa: S310
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        try:
            return error.code, json.load(error)
        except ValueError:
            return error.code, {"error": {"code": str(error.code), "message": error.reason}}
    except (http.client.HTTPException, OSError, ValueError) as error:
        raise SystemExit(f"edge-agent: {_unanswered(error, args.url)}") from None


def _unanswered(error: Exception, url: str) -> str:
    """`error`: what came of asking the daemon at `url`."""
    reason = getattr(error, "reason", error)
    if isinstance(reason, ConnectionRefusedError):
        return f"nobody answers at {url}: is the daemon running?"
    return f"no daemon answers at {url}: {plain_words(reason) if isinstance(reason, OSError) else reason}"


def _token(file: Path | None) -> str | None:
    if file is None:
        return os.environ.get("EDGE_AGENT_TOKEN")
    try:
        return file.read_text().strip()
    except OSError as error:
        raise _misuse(f"--token-file: {file}: {plain_words(error)}") from None
    except ValueError:
        raise _misuse(f"--token-file: {file}: is not text") from None


def _trust(file: Path | None) -> ssl.SSLContext:
    try:
        return ssl.create_default_context(cafile=file)
    except ssl.SSLError:
        raise _misuse(f"--ca-file: {file}: holds no certificate in PEM") from None
    except OSError as error:
        raise _misuse(f"--ca-file: {file}: {plain_words(error)}") from None


def _misuse(text: str) -> SystemExit:
    print(f"edge-agent: {text}", file=sys.stderr)
    return SystemExit(EXIT_USAGE)
