"""Command line of the virtual MCU. What it needs is imported when it runs, so that a parser costs nothing."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import zlib
from pathlib import Path

# Boards of the smaller kind have a quarter of a megabyte of RAM; half of it is left for the arena.
DEFAULT_ARENA = 128 * 1024
DEFAULT_WINDOW = 4
MAX_WINDOW = 8  # kMaxWindow in firmware/core/limits.h


def _window(text: str) -> int:
    value = int(text)
    if not 1 <= value <= MAX_WINDOW:
        raise argparse.ArgumentTypeError(f"1 to {MAX_WINDOW}")
    return value


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be above 0")
    return value


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--link", type=Path, required=True, help="symlink to the serial port, made and removed here")
    parser.add_argument(
        "--flash", type=Path, required=True, help="file that is the board's flash: one made here, or none yet"
    )
    parser.add_argument(
        "--model",
        type=Path,
        action="extend",
        nargs="+",
        default=[],
        metavar="FILE",
        help="put this model into the flash first, unless it is active there; of several the last becomes active",
    )
    parser.add_argument("--baud", type=_positive, help="pace the line to this rate (default: as fast as it goes)")
    parser.add_argument("--arena", type=_positive, default=DEFAULT_ARENA, metavar="BYTES", help="bytes of tensor arena")
    parser.add_argument("--control", type=Path, metavar="SOCKET", help="Unix socket for reset, unplug, noise, ...")
    parser.add_argument(
        "--samples",
        type=Path,
        metavar="FILE",
        help="what its sensor reads: rows of the model's input bytes (hil.samples)",
    )
    parser.add_argument(
        "--public-key",
        metavar="FILE|HEX",
        help="Ed25519 key: the board takes models signed with it only (those of --model excepted)",
    )
    parser.add_argument("--window", type=_window, default=DEFAULT_WINDOW, help="open requests the board holds")


def main(args: argparse.Namespace) -> int:
    from agent.registry.signing import SigningError, load_public

    from .engine import open_engine
    from .flash import FileFlash, FlashRefused
    from .library import Hardware, LibraryMissing, known_operators
    from .machine import Machine, Settings
    from .port import LinkClaim
    from .provision import Provisioner, ProvisionError

    with contextlib.ExitStack() as opened:
        try:
            key = load_public(args.public_key) if args.public_key is not None else None
            if key is not None:
                key.verify(b"", b"")  # says now, not during an update, that the package for it is missing
            engine = open_engine(args.arena, known_operators())
            # Before anything is written: a board that cannot have its port leaves the flash alone.
            opened.callback(LinkClaim(args.link).close)
            flash = FileFlash(args.flash)
            opened.callback(flash.close)
            if args.model:
                provisioner = Provisioner()
                provisioner.provision(Hardware(flash, provisioner.receive, engine), args.model)
            settings = Settings(
                link=args.link.absolute(),
                control=args.control,
                baud=args.baud,
                window=args.window,
                # Stable over restarts, and different for every flash file.
                unique_id=zlib.crc32(str(args.flash.resolve()).encode()),
                samples=args.samples.read_bytes() if args.samples else b"",
                verify=key.verify if key is not None else None,
            )
            machine = Machine(settings, flash, engine)
            opened.callback(machine.close)
        except (LibraryMissing, FlashRefused, ProvisionError, SigningError, ImportError, OSError) as err:
            print(f"virtual MCU: {err}", file=sys.stderr)
            return 1
        machine.stop_on_signals()
        print(json.dumps({"event": "ready", "port": str(args.link), "engine": engine.name}), flush=True)
        machine.run()
    return 0
