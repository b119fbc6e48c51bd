"""`edge-agent mcu info`: what a board says of itself, in words or as JSON."""

from __future__ import annotations

import argparse
import dataclasses
import json
from typing import Any, Final

from agent.core.clock import Clock
from agent.core.errors import ConfigError
from agent.link.session import Session
from agent.registry.catalog import load_catalog
from agent.registry.locate import catalog_path
from agent.wire.codes import Capability, Rollback, SlotState, StatId, name_of
from agent.wire.messages import Hello, Slot

ANSWER_TIMEOUT_S: Final = 5.0
SYNC_PINGS: Final = 8
"""As many exchanges bound the offset of the board's clock."""
CAPABILITIES: Final = {
    Capability.ENGINE: "infers",
    Capability.STREAMS: "samples a sensor of its own",
    Capability.ED25519: "verifies signatures",
    Capability.KEEPS_MODELS: "keeps models without power",
}


async def info(session: Session, args: argparse.Namespace, clock: Clock) -> None:
    """Print HELLO in words, or as JSON. Raises as `Session.request`."""
    hello = session.hello
    left_s = await _trial_left_s(session, clock) if hello.trial is not None else 0.0
    for _ in range(SYNC_PINGS):
        await session.ping(b"", clock.monotonic() + ANSWER_TIMEOUT_S)
    if args.json:
        print(json.dumps(_as_json(hello) | {"trial_left_s": left_s, "clock": _clock_json(session, clock)}, indent=2))
        return

    print(f"board         {hello.board}, {f'unique id {hello.uid:016x}' if hello.uid else 'no unique id'}")
    print(f"firmware      {hello.build}, protocol {hello.major}.{hello.minor}")
    has_engine = Capability.ENGINE in hello.capabilities
    operators = f"{len(hello.operators)} operators" if has_engine else "so it takes no models and answers no inference"
    print(f"engine        {hello.engine}, {operators}")
    print(f"last reset    {name_of(hello.reset_cause).lower().replace('_', ' ')}, boot {hello.boot_id:016x}")
    able = ", ".join(words for bit, words in CAPABILITIES.items() if bit in hello.capabilities)
    lacks = ", ".join(words for bit, words in CAPABILITIES.items() if bit not in hello.capabilities)
    print(f"capabilities  {able or 'none'}{f'; not: {lacks}' if lacks else ''}")
    print(f"clock         {clock_words(session, clock)}")
    print(f"memory        arena {hello.arena}, slots of {hello.slot_size} bytes")
    print(f"line          frames of {hello.max_frame}, messages of {hello.max_message} bytes, window {hello.window}")
    for slot in hello.slots:
        about = [name_of(slot.state).lower()]
        if slot.state != SlotState.EMPTY:
            about += [_model_name(slot), f"{slot.length} bytes"]
            about += [f"counter {slot.counter}", f"sha256 {slot.sha256.hex()[:16]}"]
        if slot.runs:
            about += [f"{slot.input_bytes} bytes in, {slot.output_bytes} out", f"arena {slot.arena_used} bytes"]
        print(f"slot {slot.index}        {', '.join(about)}")
    if hello.trial is not None:
        bound = f"at its next reset or in {left_s:.0f} s" if left_s else "never, as there is none"
        print(f"trial         not confirmed; back to the former model {bound}")
    if isinstance(hello.rollback, Rollback) and hello.rollback:
        print(f"rolled back   {hello.rollback.words}")


async def _trial_left_s(session: Session, clock: Clock) -> float:
    """Until the board goes back by itself; 0 where it has no model to go back to."""
    stats = await session.stats(clock.monotonic() + ANSWER_TIMEOUT_S)
    return dict(stats.values).get(StatId.TRIAL_LEFT_US, 0) / 1e6


def _as_json(hello: Hello) -> dict[str, Any]:
    fields = {field.name: getattr(hello, field.name) for field in dataclasses.fields(hello)}
    slots = [
        {field.name: getattr(slot, field.name) for field in dataclasses.fields(slot)}
        | {"state": name_of(slot.state).lower(), "sha256": slot.sha256.hex()}
        for slot in hello.slots
    ]
    return fields | {
        "reset_cause": name_of(hello.reset_cause).lower(),
        "rollback": name_of(hello.rollback).lower(),
        "boot_id": f"{hello.boot_id:016x}",
        "uid": f"{hello.uid:016x}",
        "capabilities": [bit.name.lower() for bit in Capability if bit in hello.capabilities and bit.name],
        "slots": slots,
    }


def _clock_json(session: Session, clock: Clock) -> dict[str, float]:
    found = session.clock_sync.estimate(clock.monotonic())
    assert found is not None
    return {"offset_s": round(found.offset_s, 6), "error_s": round(found.bound_s, 6)}


def clock_words(session: Session, clock: Clock) -> str:
    """Where the board's clock stands, after a few PINGs."""
    found = session.clock_sync.estimate(clock.monotonic())
    assert found is not None
    side = "behind" if found.offset_s < 0 else "ahead of"
    return f"{abs(found.offset_s):.6f} s {side} this machine's monotonic one, good to {found.bound_s * 1e3:.3f} ms"


def _model_name(slot: Slot) -> str:
    """As the catalogue that ships calls it."""
    try:
        variant = load_catalog(catalog_path(None), verify=False).by_sha256(slot.sha256.hex())
    except ConfigError:
        variant = None
    return variant.name if variant is not None else "a model that does not ship"
