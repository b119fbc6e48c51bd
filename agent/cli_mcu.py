"""`edge-agent mcu`: look at, measure and update one microcontroller on a serial port."""

from __future__ import annotations

import argparse
import asyncio
import importlib
import statistics
import sys
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from agent.core.clock import Clock, SystemClock
from agent.core.errors import ConfigError, EdgeAgentError, LinkError, UnknownModel

if TYPE_CHECKING:
    from agent.link.session import Session

EXIT_OK, EXIT_FAILED, EXIT_USAGE, EXIT_CANNOT_OPEN = 0, 1, 2, 3

DEFAULT_BAUD: Final = 921_600
"""As `edge_mcu.baud`; USB devices and pseudo-terminals ignore it."""
OPEN_TIMEOUT_S: Final = 8.0
"""Opening the port resets many boards, and their boot loaders wait for about 2 s."""
ANSWER_TIMEOUT_S: Final = 5.0
"""A person waits; a line at 9,600 baud takes 2.3 s for the longest PING and its PONG."""
RESET_TIMEOUT_S: Final = 15.0
MAX_INTERVAL_MS: Final = 3_600_000
"""As the protocol has it."""


class _LateParser(argparse.ArgumentParser):
    """A parser that gets its arguments only when it is used, from a module that is imported only then."""

    def __init__(self, *args: Any, module: str | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._module = module

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        if self._module is not None:
            try:
                importlib.import_module(self._module).add_arguments(self)
            except ImportError as error:
                self.error(f"the virtual microcontroller is not installed here: {error}")
        return super().parse_known_args(args, namespace)


def add_parser(commands: argparse._SubParsersAction[Any]) -> None:
    """Add `mcu` and its subcommands to those of `edge-agent`."""
    parser = commands.add_parser("mcu", help="look at, measure and update a microcontroller")
    parser.set_defaults(run=run)
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION", parser_class=_LateParser)

    line = argparse.ArgumentParser(add_help=False)
    line.add_argument("--port", required=True, metavar="PORT", help="for example /dev/ttyACM0")
    line.add_argument("--baud", type=_positive, metavar="N", help=f"bits per second (default {DEFAULT_BAUD})")
    line.add_argument("--verbose", action="store_true", help="print the board's log lines as well")

    info = actions.add_parser("info", parents=[line], help="what the board is, has and holds")
    info.add_argument("--json", action="store_true", help="as JSON")

    ping = actions.add_parser("ping", parents=[line], help="round-trip time and clock offset")
    ping.add_argument("--count", type=_positive, default=10, metavar="N", help="how many (default 10)")
    ping.add_argument("--size", type=_not_negative, default=0, metavar="BYTES", help="payload (default 0)")

    push = actions.add_parser("push", parents=[line], help="send a model, prove it there and make it active")
    push.add_argument("model", metavar="FAMILY[/VARIANT] | FILE.tflite")
    push.add_argument("--catalog", type=Path, metavar="FILE", help="catalog.yaml; default: the one that ships")
    push.add_argument("--counter", type=_counter, metavar="N", help="version counter; default: the catalogue's")
    push.add_argument("--allow-downgrade", action="store_true", help="also if the board has a later version")
    push.add_argument("--force", action="store_true", help="also if it is active there; takes the other slot")
    push.add_argument("--key", type=Path, metavar="FILE", help="sign with this private key")
    push.add_argument("--signature", type=Path, metavar="FILE", help="default: MODEL.tflite.sig.json if it is there")
    push.add_argument("--unsigned", action="store_true", help="do not look for a signature beside the model")
    push.add_argument("--require-signed", action="store_true", help="as edge_mcu.require_signed_updates")
    push.add_argument(
        "--config", type=Path, metavar="FILE", help="policy, trusted keys and catalogue are those of FILE"
    )

    bench = actions.add_parser(
        "bench",
        parents=[line],
        help="round trips and throughput beside their floors",
        epilog="The floor of the wire is worked out only where --baud is given: USB has no such rate.",
    )
    bench.add_argument("--rounds", type=_positive, default=500, metavar="N", help="of each measurement (default 500)")
    bench.add_argument("--json", type=Path, metavar="FILE", help="write the figures here as well")
    bench.add_argument(
        "--push",
        type=_positive,
        metavar="KIB",
        help="also time an image of KIB KiB into the slot that is not active; what is there is lost",
    )

    stream = actions.add_parser("stream", parents=[line], help="what the board samples itself, line by line")
    stream.add_argument("--seconds", type=_positive, default=10, metavar="N", help="how long (default 10)")
    stream.add_argument(
        "--interval-ms", type=_interval_ms, default=100, metavar="N", help="between samples (default 100)"
    )
    stream.add_argument("--source", type=_source, default=0, metavar="N", help="which sensor (default 0)")
    stream.add_argument("--send-inputs", choices=("never", "always"), default="never", help="default never")

    actions.add_parser("reset", parents=[line], help="restart the board and wait until it is back")
    actions.add_parser("virtual", module="hil.virtual", help="run a microcontroller on a pseudo-terminal")


def run(args: argparse.Namespace) -> int:
    """Returns the exit code: 0 ok, 1 failed, 2 usage, 3 the port cannot be opened or nobody answers there."""
    if args.action == "virtual":
        code: int = importlib.import_module("hil.virtual").main(args)
        return code
    try:
        return asyncio.run(_on_line(args))
    except (ConfigError, UnknownModel) as error:
        return _complain(error, EXIT_USAGE)
    except (EdgeAgentError, TimeoutError) as error:
        return _complain(error, EXIT_FAILED)


async def _on_line(args: argparse.Namespace) -> int:
    from agent import cli_mcu_bench, cli_mcu_info, cli_mcu_push, cli_mcu_stream
    from agent.link.serial import open_serial
    from agent.link.session import Session
    from agent.wire.codes import name_of
    from agent.wire.messages import Log

    actions: dict[str, Callable[[Session, argparse.Namespace, Clock], Awaitable[None]]] = {
        "info": cli_mcu_info.info,
        "ping": _ping,
        "reset": _reset,
        "push": cli_mcu_push.push,
        "bench": cli_mcu_bench.bench,
        "stream": cli_mcu_stream.stream,
    }

    def show(line: Log) -> None:
        if args.verbose:
            print(f"{args.port}: {name_of(line.level).lower()}: {line.text}", file=sys.stderr)

    # What is wrong with the command line or its files is said before the board is disturbed.
    if args.action == "push":
        args.plan = cli_mcu_push.prepare(args)
    clock = SystemClock()
    try:
        transport = await open_serial(args.port, args.baud or DEFAULT_BAUD)
    except LinkError as error:
        return _complain(error, EXIT_CANNOT_OPEN)
    session = Session(transport, clock, on_log=show)
    try:
        await session.open(clock.monotonic() + OPEN_TIMEOUT_S)
    except EdgeAgentError as error:
        session.close()
        return _complain(error, EXIT_CANNOT_OPEN)
    try:
        await actions[args.action](session, args, clock)
    finally:
        session.close()
    return EXIT_OK


async def _ping(session: Session, args: argparse.Namespace, clock: Clock) -> None:
    from agent.cli_mcu_info import clock_words
    from agent.link.session import PING_OVERHEAD

    largest = session.hello.max_frame - PING_OVERHEAD
    if args.size > largest:
        raise EdgeAgentError(f"--size: the board takes up to {largest} bytes, found {args.size}")
    pings = [
        await session.ping(bytes(i & 0xFF for i in range(args.size)), clock.monotonic() + ANSWER_TIMEOUT_S)
        for _ in range(args.count)
    ]
    times = sorted(ping.round_trip_s * 1e3 for ping in pings)
    print(f"{len(times)} pings of {args.size} bytes", end=": ")
    print(f"min {times[0]:.3f}, median {statistics.median(times):.3f}, max {times[-1]:.3f} ms")
    print(f"the board's clock is {clock_words(session, clock)}")


async def _reset(session: Session, args: argparse.Namespace, clock: Clock) -> None:
    from agent.wire.codes import name_of

    began = clock.monotonic()
    hello = await session.reset(began + RESET_TIMEOUT_S)
    took_s = clock.monotonic() - began
    print(f"{hello.board} is back after {took_s:.3f} s, reset cause {name_of(hello.reset_cause).lower()}")


def _complain(error: Exception, code: int) -> int:
    print(f"edge-agent mcu: {error}", file=sys.stderr)
    return code


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, found {value}")
    return value


def _not_negative(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"must be at least 0, found {value}")
    return value


def _counter(text: str) -> int:
    return _within(text, 0, (1 << 32) - 1)


def _interval_ms(text: str) -> int:
    return _within(text, 1, MAX_INTERVAL_MS)


def _source(text: str) -> int:
    return _within(text, 0, 255)


def _within(text: str, least: int, most: int) -> int:
    """What its field on the line holds."""
    value = int(text)
    if not least <= value <= most:
        raise argparse.ArgumentTypeError(f"must be {least} to {most}, found {value}")
    return value
