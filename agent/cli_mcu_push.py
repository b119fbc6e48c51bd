"""`edge-agent mcu push`: which model, and what the board made of it."""

from __future__ import annotations

import argparse
import hashlib
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from agent.core.clock import Clock
from agent.core.errors import ConfigError
from agent.link.push import ModelImage, push_model
from agent.link.session import Session
from agent.registry.catalog import Catalog, Variant, load_catalog
from agent.registry.locate import catalog_path
from agent.wire.codes import name_of


@dataclass(frozen=True, slots=True)
class Chosen:
    """What to push. `variant` is None for a file that the catalogue does not know."""

    model: bytes
    variant: Variant | None
    selftest: bytes
    catalog: Catalog


def choose(args: argparse.Namespace) -> Chosen:
    """Find the model that the command line names. Raises `ConfigError` or `UnknownModel`."""
    catalog = load_catalog(catalog_path(args.catalog), verify=False)
    if args.model.endswith(".tflite"):
        model = _read(Path(args.model))
        variant = catalog.by_sha256(_sha256(model))
    else:
        name, _, id_ = args.model.partition("/")
        family = catalog.family(name)
        variant = family.variant_for("edge_mcu", id_ or None)
        if variant is None:
            able = [v.name for v in family.variants.values() if "edge_mcu" in v.targets]
            raise ConfigError(
                [f"{args.model}: not a variant for microcontrollers; {name} has: {', '.join(able) or '-'}"]
            )
        model = _read(catalog.path(variant))
        if _sha256(model) != variant.sha256:
            raise ConfigError([f"{catalog.path(variant)}: is not the file that the catalogue records"])
    selftest = b"" if variant is None or variant.selftest is None else _selftest(catalog.root / variant.selftest)
    return Chosen(model, variant, selftest, catalog)


async def push(session: Session, args: argparse.Namespace, clock: Clock) -> None:
    """Send `args.chosen`, unless it is active already. Raises as `push_model`."""
    chosen: Chosen = args.chosen
    name = chosen.variant.name if chosen.variant is not None else args.model
    active = session.hello.active
    # Pushing would overwrite the model to go back to. A counter is another only if the command line says so.
    same = active is not None and active.sha256.hex() == _sha256(chosen.model)
    if active is not None and same and args.counter in (None, active.counter) and not args.force:
        print(f"{name}: already active in slot {active.index}, nothing was written; --force sends it again")
        return
    running = chosen.catalog.by_sha256(active.sha256.hex()) if active is not None else None
    if args.counter is not None:
        counter = args.counter
    elif chosen.variant is not None:
        counter = chosen.variant.version
    else:
        counter = active.counter + 1 if active is not None else 1
    # Versions are comparable within one variant only: another one replaces it whatever its number.
    other = chosen.variant is not None and running is not None and running.name != chosen.variant.name
    image = ModelImage(
        model=chosen.model,
        counter=counter,
        arena=chosen.variant.arena_bytes or 0 if chosen.variant is not None else 0,
        selftest=chosen.selftest,
        allow_lower_counter=args.allow_downgrade or other,
    )
    print(f"{name}: {len(image.model)} bytes, self-test {len(image.selftest)} bytes, counter {counter}")
    began = clock.monotonic()
    progress = _Progress()
    status = await push_model(session, image, clock, progress.show)
    progress.end()
    took_s = clock.monotonic() - began
    state = name_of(status.state).lower()
    print(f"slot {status.slot} {state}, verified by the board after {took_s:.2f} s", end="")
    print(f" ({progress.resumed_at} bytes were there already)" if progress.resumed_at else "")


class _Progress:
    """One line on a terminal; nothing where nobody watches."""

    def __init__(self) -> None:
        self.resumed_at: int | None = None

    def show(self, received: int, total: int) -> None:
        if self.resumed_at is None:
            self.resumed_at = received
        if sys.stderr.isatty():
            print(f"\r{received * 100 // total:3} % of {total} bytes", end="", file=sys.stderr, flush=True)

    def end(self) -> None:
        if sys.stderr.isatty():
            print(file=sys.stderr)


def _selftest(path: Path) -> bytes:
    """First sample of the catalogue's self-test vectors, as the page wants it: input bytes, expected output bytes."""
    try:
        with np.load(path, allow_pickle=False) as vectors:
            return bytes(vectors["inputs"][0].tobytes() + vectors["outputs"][0].tobytes())
    except (OSError, ValueError, KeyError, IndexError) as error:
        raise ConfigError([f"{path}: is no self-test of a model: {error}"]) from None


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError([f"{path}: cannot be read: {error.strerror}"]) from None


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
