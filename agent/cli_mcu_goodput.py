"""What of a line's rate arrives as a model or as tensors: the goodput rows of `edge-agent mcu bench`.

The floor is bytes x 10 / baud: a start bit, eight data bits and a stop bit for each.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from typing import Any, Final

from agent.core.clock import Clock
from agent.link.push import BEGIN_TIMEOUT_S, ModelImage, send_chunks
from agent.link.session import Session
from agent.wire.frame import OVERHEAD
from agent.wire.messages import MODEL_ID_BYTES
from agent.wire.update import CHUNK_OVERHEAD, CHUNK_UNIT, ModelAbort, ModelStatus

BITS: Final = 10
INFER_HEAD: Final = MODEL_ID_BYTES + 4
RESULT_HEAD: Final = MODEL_ID_BYTES + 8
TRIES: Final = 3
"""The best counts: a busy machine makes a line slower than it is, never faster."""


async def pipelined(
    exchange: Callable[[], Awaitable[object]],
    window: int,
    line: tuple[int, int],
    tensors: tuple[int, int],
    rounds: int,
    baud: int | None,
) -> dict[str, Any]:
    """As many INFERs at once as the window holds. `line` and `tensors`: bytes of one call, to the board and back."""

    async def lane() -> None:
        for _ in range(max(1, rounds // window)):
            await exchange()

    count = max(1, rounds // window) * window
    took_s = float("inf")
    for _ in range(TRIES):
        began = time.perf_counter()
        await asyncio.gather(*(lane() for _ in range(window)))
        took_s = min(took_s, time.perf_counter() - began)
    # Both directions carry at once: the longer one sets the pace.
    longer = 0 if line[0] >= line[1] else 1
    head = (INFER_HEAD, RESULT_HEAD)[longer]
    row = {
        "name": f"infer, {window} at once",
        "per_second": round(count / took_s, 1),
        "each_us": round(took_s / count * 1e6, 1),
        "line_bytes": line[longer],
        "payload_bytes": tensors[longer],
        "head_bytes": head,
        "frame_bytes": line[longer] - head - tensors[longer],
    }
    return row | _shares(line[longer], tensors[longer], took_s / count, baud)


async def transfer(session: Session, size: int, clock: Clock, baud: int | None) -> dict[str, Any]:
    """The chunks of an image of `size` random bytes, into the slot that is not active; dropped afterwards.

    Raises `RemoteError` where the board takes no image (no engine, too large), else as `send_chunks`.
    """
    chunk = (session.hello.max_frame - OVERHEAD - CHUNK_OVERHEAD) // CHUNK_UNIT * CHUNK_UNIT
    best: dict[str, Any] = {}
    for attempt in range(TRIES):
        # Other bytes each time: a board goes on with an image that it knows.
        image = ModelImage(random.Random(attempt).randbytes(size), 0, allow_lower_counter=True)
        begin = clock.monotonic() + BEGIN_TIMEOUT_S
        status = (await session.request(image.manifest(chunk), ModelStatus, begin)).message
        before = session.counters.bytes_sent
        began = time.perf_counter()
        await send_chunks(session, image.data, status, clock, lambda received, total: None)
        took_s = time.perf_counter() - began
        on_line = session.counters.bytes_sent - before
        await session.request(ModelAbort(), ModelStatus, clock.monotonic() + BEGIN_TIMEOUT_S)
        chunks = -(-size // chunk)
        row = {
            "name": f"push of {size // 1024} KiB",
            "took_ms": round(took_s * 1e3, 1),
            "line_bytes": on_line,
            "payload_bytes": size,
            "head_bytes": CHUNK_OVERHEAD * chunks,
            "frame_bytes": round(on_line / chunks - size / chunks - CHUNK_OVERHEAD, 1),
        }
        if not best or row["took_ms"] < best["took_ms"]:
            best = row | _shares(on_line, size, took_s, baud)
    return best


def _shares(on_line: int, payload: int, took_s: float, baud: int | None) -> dict[str, float]:
    """Per cent of the line's rate: with everything, and what arrives as payload."""
    if baud is None:
        return {}
    floor_s = on_line * BITS / baud
    return {
        "wire_floor_us": round(floor_s * 1e6, 1),
        "ratio_to_wire_floor": round(took_s / floor_s, 2),
        "line_share_percent": round(100 * floor_s / took_s, 1),
        "goodput_percent": round(100 * payload * BITS / baud / took_s, 1),
    }


def line_of(row: dict[str, Any]) -> str:
    """One row for a person."""
    rate = f"{row['per_second']:9.1f} per second" if "per_second" in row else f"{row['took_ms'] / 1e3:9.3f} s         "
    text = f"{row['name']:18} {rate}"
    if "goodput_percent" in row:
        text += (
            f"  wire {row['wire_floor_us']:.1f}  ratio {row['ratio_to_wire_floor']:.2f}"
            f"  line {row['line_share_percent']:.1f} %, goodput {row['goodput_percent']:.1f} %"
        )
    return f"{text}  ({row['payload_bytes']} B of payload, {row['frame_bytes']:g} B a frame)"
