"""`edge-agent mcu stream`: what a board samples itself, line by line, with no daemon."""

from __future__ import annotations

import argparse
import asyncio
import statistics
from collections.abc import Callable
from typing import Final

from agent.core.clock import Clock
from agent.core.errors import ConfigError, EdgeAgentError
from agent.link.session import Session
from agent.link.stream import BoardStream, Sampled, StreamSpec
from agent.registry.catalog import Catalog, load_catalog
from agent.registry.locate import catalog_path
from agent.registry.tensors import classify, from_variant, unpack
from agent.wire.codes import Capability, SendInputs
from agent.wire.messages import MODEL_ID_BYTES

SYNC_PINGS: Final = 8
"""As many exchanges bound the offset of the board's clock."""
ANSWER_S: Final = 5.0


async def stream(session: Session, args: argparse.Namespace, clock: Clock) -> None:
    """Start a stream, print its results for `args.seconds`, and stop it. Raises `EdgeAgentError`."""
    active = session.hello.active
    if not session.hello.capabilities & Capability.STREAMS:
        raise EdgeAgentError("the board has no sensor of its own (capability bit 2 of its HELLO)")
    if active is None:
        raise EdgeAgentError("the board runs no model: push one with edge-agent mcu push")
    for _ in range(SYNC_PINGS):
        await session.ping(b"", clock.monotonic() + ANSWER_S)
    spec = StreamSpec(
        active.sha256[:MODEL_ID_BYTES], args.interval_ms, args.source, SendInputs[args.send_inputs.upper()]
    )
    tell = _teller(active.sha256.hex())
    found: list[Sampled] = []
    running = BoardStream(session, spec, clock)
    began = clock.monotonic()
    await running.start(began + ANSWER_S)
    try:
        async with asyncio.timeout(args.seconds):
            while True:
                sampled = await running.next()
                found.append(sampled)
                print(_line(sampled, began, tell))
    except TimeoutError:
        pass
    took_s = clock.monotonic() - began
    await running.stop(clock.monotonic() + ANSWER_S)
    counters = running.counters
    print(f"{len(found)} results in {took_s:.1f} s ({len(found) / took_s:.1f} a second)", end="; ")
    print(f"{counters.lost} lost on the line, {counters.skipped} skipped on the board")
    if found:
        compute_ms = statistics.median(sampled.result.compute_us for sampled in found) / 1e3
        print(f"computing took {compute_ms:.3f} ms (median); times are good to {found[-1].bound_s * 1e3:.3f} ms")


def _teller(sha256: str) -> Callable[[bytes], str]:
    """Outputs in words: the label where the catalogue knows the model, else the bytes."""
    try:
        catalog: Catalog = load_catalog(catalog_path(None))
    except ConfigError:
        return bytes.hex
    variant = catalog.by_sha256(sha256)
    if variant is None:
        return bytes.hex
    family, known = catalog.family(variant.model), variant

    def tell(outputs: bytes) -> str:
        label, confidence = classify(from_variant(unpack(outputs, known.outputs), known, family), family)
        return f"{label} ({confidence:.1%})"

    return tell


def _line(sampled: Sampled, began: float, tell: Callable[[bytes], str]) -> str:
    result = sampled.result
    taken = sampled.taken_at if sampled.taken_at is not None else sampled.received_at
    age_ms = (sampled.received_at - taken) * 1e3
    inputs = f", {len(result.inputs)} bytes of input" if result.inputs else ""
    return f"{result.seq:6}  {taken - began:9.4f} s  {tell(result.outputs):24}  {age_ms:.2f} ms old{inputs}"
