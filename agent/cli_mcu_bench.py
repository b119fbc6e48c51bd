"""`edge-agent mcu bench`: the link's own cost, beside what the same bytes cost a bare pseudo-terminal and the wire."""

from __future__ import annotations

import argparse
import json
import os
import platform
import pty
import subprocess
import sys
import time
import tty
from collections.abc import Awaitable, Callable
from typing import Any, Final

from agent.cli_mcu_goodput import line_of, pipelined, transfer
from agent.core.clock import Clock
from agent.link.calls import Reply
from agent.link.session import PING_OVERHEAD, Session
from agent.wire.frame import line_bytes
from agent.wire.messages import MODEL_ID_BYTES, Result

SIZES: Final = (0, 64, 256, 1024)
"""PING payloads in bytes; those that the board does not take are left out."""
BLOCKS: Final = 10
"""Each measurement and its floor alternate this often, so that a busy moment falls on both."""
TIMEOUT_S: Final = 5.0
"""For any one exchange."""
PONG_EXTRA: Final = 16
"""Bytes that a PONG has more than its PING."""

_ECHO: Final = "import os,sys\nf=int(sys.argv[1])\nwhile d:=os.read(f,65536): os.write(f,d)"


class PtyEcho:
    """Another process that sends back what it reads from a pseudo-terminal: the floor of any serial link here."""

    def __init__(self) -> None:
        far, self._near = pty.openpty()
        tty.setraw(self._near)
        command = [sys.executable, "-S", "-c", _ECHO, str(far)]
        self._process = subprocess.Popen(command, pass_fds=[far], stderr=subprocess.DEVNULL)
        os.close(far)
        self.round_trip(b"ready")

    def round_trip(self, data: bytes) -> float:
        """Seconds until all of `data` came back."""
        began = time.perf_counter()
        os.write(self._near, data)
        missing = len(data)
        while missing > 0:
            missing -= len(os.read(self._near, missing))
        return time.perf_counter() - began

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._near)


async def bench(session: Session, args: argparse.Namespace, clock: Clock) -> None:
    """Measure, print, and write `args.json`. Raises as `Session.request`."""
    hello, rows = session.hello, []
    echo = PtyEcho()
    try:
        for size in (size for size in SIZES if size + PING_OVERHEAD <= hello.max_frame):
            line = (line_bytes(size), line_bytes(size + PONG_EXTRA))
            rows.append(await _round_trips(f"ping {size} B", _pinging(session, clock, size), line, echo, args))
        active = hello.active
        if active is not None:
            model, inputs = active.sha256[:MODEL_ID_BYTES], bytes(active.input_bytes)

            async def infer() -> Reply[Result]:
                return await session.infer(model, inputs, clock.monotonic() + TIMEOUT_S)

            reply = await infer()
            line = (reply.bytes_sent, reply.bytes_received)
            row = await _round_trips("infer", infer, line, echo, args)
            rows += [row | {"mcu_compute_us": reply.message.compute_us}]
            tensors = (active.input_bytes, active.output_bytes)
            rows += [await pipelined(infer, session.window, line, tensors, args.rounds, args.baud)]
        if args.push is not None:
            rows += [await transfer(session, args.push * 1024, clock, args.baud)]
    finally:
        echo.close()
    report = {
        "port": args.port,
        "board": hello.board,
        "engine": hello.engine,
        "machine": platform.machine(),
        "python": platform.python_version(),
        "baud": args.baud,
        "rounds": args.rounds,
        "measurements": rows,
    }
    print(f"{hello.board}, {hello.engine}, {args.rounds} rounds each; microseconds")
    print("floors: the same bytes through a bare pseudo-terminal and back; on the wire, bytes x 10 / baud (--baud)")
    for row in rows:
        print(_line(row))
    if args.json is not None:
        args.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def _pinging(session: Session, clock: Clock, size: int) -> Callable[[], Awaitable[object]]:
    data = bytes(i * 7 % 251 for i in range(size))
    return lambda: session.ping(data, clock.monotonic() + TIMEOUT_S)


async def _round_trips(
    name: str,
    exchange: Callable[[], Awaitable[object]],
    line: tuple[int, int],
    echo: PtyEcho,
    args: argparse.Namespace,
) -> dict[str, Any]:
    """One exchange at a time, in turns with the echo of as many bytes as the longer way has."""
    took: list[float] = []
    floor: list[float] = []
    same = bytes(max(line))
    for _ in range(BLOCKS):
        for _ in range(max(1, args.rounds // BLOCKS)):
            began = time.perf_counter()
            await exchange()
            took.append(time.perf_counter() - began)
        floor += [echo.round_trip(same) for _ in range(max(1, args.rounds // BLOCKS))]
    p50 = _quantile(took, 0.5)
    row: dict[str, Any] = {
        "name": name,
        "line_bytes": sum(line),
        "p50_us": _us(p50),
        "p95_us": _us(_quantile(took, 0.95)),
        "pty_echo_p50_us": _us(_quantile(floor, 0.5)),
        "pty_echo_p95_us": _us(_quantile(floor, 0.95)),
        "ratio_to_pty_echo": round(p50 / _quantile(floor, 0.5), 2),
    }
    return row | _against_wire(sum(line), p50, args.baud)


def _against_wire(count: int, took_s: float, baud: int | None) -> dict[str, float]:
    if baud is None:
        return {}
    floor_s = count * 10 / baud
    return {"wire_floor_us": _us(floor_s), "ratio_to_wire_floor": round(took_s / floor_s, 2)}


def _line(row: dict[str, Any]) -> str:
    if "payload_bytes" in row:
        return line_of(row)
    text = (
        f"{row['name']:18} p50 {row['p50_us']:8.1f}  p95 {row['p95_us']:8.1f}  "
        f"bare pty echo {row['pty_echo_p50_us']:7.1f}  ratio {row['ratio_to_pty_echo']:.2f}"
    )
    if "wire_floor_us" in row:
        text += f"  wire {row['wire_floor_us']:.1f}  ratio {row['ratio_to_wire_floor']:.2f}"
    return text


def _quantile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def _us(seconds: float) -> float:
    return round(seconds * 1e6, 1)
