"""`edge-agent worker`: one worker of a cloud lane, as a process."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import os
import platform
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from agent.config import GpuSection, ModelsSection, check_broker_url
from agent.config_load import unreadable
from agent.core.clock import SystemClock
from agent.core.errors import ConfigError

log = logging.getLogger(__name__)

MAX_S = 86_400
_LEVEL = re.compile(r"[A-Za-z0-9_.-]{1,64}")


def add_parser(commands: Any) -> None:
    """Add `worker` to the subparsers of the command line."""
    parser = commands.add_parser(
        "worker",
        help="serve a cloud lane: run the catalogue's cloud variants for gateways",
        description="Serve a cloud lane over MQTT 5. Any number of workers share one (docs/mqtt.md).",
    )
    parser.add_argument("--broker", required=True, metavar="URL", help="mqtt://HOST[:PORT] or mqtts://HOST[:PORT]")
    parser.add_argument("--topic", default="edge-agent/lanes/default", help="the lane's topic (default %(default)s)")
    parser.add_argument("--catalog", type=Path, metavar="FILE", help="catalog.yaml; default: the one that ships")
    parser.add_argument(
        "--trusted-key",
        action="append",
        default=[],
        metavar="FILE|HEX",
        help="public key that may have signed the catalogue; may be repeated",
    )
    parser.add_argument(
        "--allow-unsigned",
        action="store_true",
        help="serve a catalogue that no trusted key signed, in a process of its own",
    )
    parser.add_argument(
        "--state-dir",
        type=Path,
        metavar="DIR",
        help="where the highest counter of a signed catalogue is kept, so that no earlier one is served after it",
    )
    parser.add_argument("--id", metavar="NAME", help="of this worker; default: host name and process id")
    parser.add_argument("--group", metavar="NAME", help="workers of one group share the requests; default: the lane's")
    parser.add_argument("--max-concurrent", type=_count, default=2, metavar="N", help="inferences at once (default 2)")
    parser.add_argument("--max-queued", type=_queue, default=64, metavar="N", help="requests that wait (default 64)")
    parser.add_argument("--threads", type=_count, default=1, metavar="N", help="for each inference (default 1)")
    parser.add_argument("--providers", default="tensorrt,cuda,cpu", help="ONNX Runtime's (default %(default)s)")
    parser.add_argument("--timeout-ms", type=_milliseconds, default=10_000.0, metavar="MS", help="of one inference")
    parser.add_argument(
        "--duplicate-window-s", type=float, default=60.0, metavar="S", help="how long an answer serves repeats (60)"
    )
    parser.add_argument("--drain-s", type=float, default=5.0, metavar="S", help="how long a stop waits (default 5)")
    parser.add_argument("--username", metavar="NAME")
    parser.add_argument("--password-env", metavar="VARIABLE", help="environment variable that holds the password")
    parser.add_argument("--ca-file", type=Path, metavar="FILE")
    parser.add_argument("--cert-file", type=Path, metavar="FILE")
    parser.add_argument("--key-file", type=Path, metavar="FILE")
    parser.add_argument(
        "--delay-ms",
        type=_milliseconds,
        default=0.0,
        metavar="MS",
        help="latency added to each request, as a slow network would: for tests and demonstrations only",
    )
    parser.add_argument(
        "--jitter-ms",
        type=_milliseconds,
        default=0.0,
        metavar="MS",
        help="mean of what is added to that at random, exponentially distributed",
    )
    parser.add_argument("--log-level", choices=("debug", "info", "warning", "error"), default="info")
    parser.add_argument("--log-format", choices=("json", "text"), default="json")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Serve until SIGTERM or SIGINT. Raises `ConfigError`."""
    problems = _problems(args)
    if problems:
        raise ConfigError(problems)
    with contextlib.suppress(ImportError):
        import uvloop

        return uvloop.run(_serve(args))
    return asyncio.run(_serve(args))


def _problems(args: argparse.Namespace) -> list[str]:
    problems = []
    try:
        check_broker_url(args.broker)
    except ValueError as error:
        problems.append(f"--broker: {error}")
    if not 0 < len(args.topic) <= 200 or not args.topic.isprintable() or any(char in args.topic for char in "+#"):
        problems.append("--topic: must be 1 to 200 printable characters without + and #")
    for name in ("id", "group"):
        value = getattr(args, name)
        if value is not None and _LEVEL.fullmatch(value) is None:
            problems.append(f"--{name}: must be 1 to 64 letters, digits, '_', '.' or '-'")
    if args.password_env is not None and args.password_env not in os.environ:
        problems.append(f"--password-env: the environment has no variable {args.password_env}")
    if (args.cert_file is None) != (args.key_file is None):
        problems.append("--cert-file and --key-file go together")
    return [*problems, *_unusable(args)]


def _unusable(args: argparse.Namespace) -> Iterator[str]:
    for name in ("ca_file", "cert_file", "key_file"):
        path = getattr(args, name)
        if path is not None and (reason := unreadable(path)):
            yield f"--{name.replace('_', '-')}: {path}: cannot be read: {reason}"
    for name in ("duplicate_window_s", "drain_s"):
        value = getattr(args, name)
        if not 0 <= value <= MAX_S:
            yield f"--{name.replace('_', '-')}: must be 0 to {MAX_S}, found {value:g}"


async def _serve(args: argparse.Namespace) -> int:
    from agent.link.mqtt import LinkOptions
    from agent.registry.catalog import load_catalog
    from agent.registry.locate import catalog_path
    from agent.registry.model_structure import check_structure
    from agent.registry.signing import SigningError
    from agent.registry.trust import keep_counter, trust_of
    from agent.runtimes.base import Confinement
    from agent.runtimes.pool import RuntimePool
    from agent.telemetry import events
    from agent.worker import Worker, WorkerSettings

    events.setup(args.log_level, args.log_format)
    clock = SystemClock()
    catalog = load_catalog(catalog_path(args.catalog), any_file=True)
    trust = trust_of(args.catalog, args.trusted_key, args.state_dir, catalog.sha256)
    if not trust.trusted and not args.allow_unsigned:
        todo = "sign it with a --trusted-key (`edge-agent models sign-catalog`), or --allow-unsigned serves it as it is"
        raise ConfigError([f"--catalog: {args.catalog}: is not trusted: {trust.why}; {todo}"])
    worker_id = args.id or f"{re.sub(r'[^A-Za-z0-9_.-]', '-', platform.node())[:50] or 'worker'}-{os.getpid()}"
    settings = WorkerSettings(
        topic=args.topic,
        worker_id=worker_id,
        # One group for each lane: rumqttd shares a message among all of a group, whatever they subscribed to.
        group=args.group or args.topic.replace("/", "-"),
        max_concurrent=args.max_concurrent,
        max_queued=args.max_queued,
        duplicate_window_s=args.duplicate_window_s,
        drain_s=args.drain_s,
        delay_s=args.delay_ms / 1e3,
        jitter_s=args.jitter_ms / 1e3,
    )
    options = LinkOptions(
        args.broker,
        f"edge-agent-worker-{worker_id}",
        username=args.username,
        password=os.environ[args.password_env] if args.password_env else None,
        ca_file=args.ca_file,
        cert_file=args.cert_file,
        key_file=args.key_file,
    )
    confinement = None
    if not trust.trusted:
        limits, passed = ModelsSection(), args.state_dir and args.state_dir / "models-passed.json"
        confinement = Confinement(limits.trial_memory_mb, limits.trial_s, check_structure, passed)
    pool = RuntimePool(_runtime(args), clock, max_queued=args.max_queued, confinement=confinement)
    worker = Worker(settings, catalog, pool, options, clock)
    stop = asyncio.Event()
    for sig in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(sig, stop.set)
    await worker.start()
    if args.state_dir is not None:
        try:
            keep_counter(trust, args.state_dir)
        except SigningError as error:  # a disk that is full must not keep the worker from serving
            log.warning("the catalogue's counter cannot be kept", extra={"reason": str(error)})
    await stop.wait()
    await worker.stop()
    return 0


def _runtime(args: argparse.Namespace) -> GpuSection:
    try:
        return GpuSection(
            threads=args.threads,
            workers=args.max_concurrent,
            max_concurrent=args.max_concurrent,
            timeout_ms=args.timeout_ms,
            providers=tuple(args.providers.split(",")),
        )
    except ValidationError as error:
        raise ConfigError([f"--{fault['loc'][0]}: {fault['msg']}" for fault in error.errors()]) from None


def _count(text: str) -> int:
    value = int(text)
    if not 0 < value <= 64:
        raise argparse.ArgumentTypeError(f"must be 1 to 64, found {text}")
    return value


def _queue(text: str) -> int:
    value = int(text)
    if not 0 <= value <= 10_000:
        raise argparse.ArgumentTypeError(f"must be 0 to 10000, found {text}")
    return value


def _milliseconds(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 600_000:
        raise argparse.ArgumentTypeError(f"must be 0 to 600000, found {text}")
    return value
