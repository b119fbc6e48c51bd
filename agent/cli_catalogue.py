"""`edge-agent models sign-catalog`, `verify-catalog` and `inspect`: who vouches for a catalogue; what a file is."""

from __future__ import annotations

import argparse
import asyncio
from pathlib import Path
from typing import Any

from agent.core.errors import ConfigError

EXIT_OK, EXIT_FAILED = 0, 1


def add_parsers(actions: argparse._SubParsersAction[Any]) -> None:
    """Add them to the actions of `edge-agent models`."""
    which = argparse.ArgumentParser(add_help=False)
    which.add_argument("--catalog", type=Path, metavar="FILE", required=True, help="catalog.yaml")

    sign = actions.add_parser(
        "sign-catalog", parents=[which], help="sign a catalogue, and with it every file whose SHA-256 it holds"
    )
    sign.add_argument("--key", type=Path, required=True, metavar="FILE", help="private key")
    sign.add_argument("--counter", type=int, metavar="N", help="version; default: one more than the last signature's")
    sign.add_argument("--allow-downgrade", action="store_true", help="may take the place of a later one")
    sign.set_defaults(run=_sign)

    verify = actions.add_parser("verify-catalog", parents=[which], help="whether its signature holds; exit code 0: yes")
    verify.add_argument("--key", action="append", default=[], metavar="FILE|HEX", help="public key; may be repeated")
    verify.set_defaults(run=_verify)

    inspect = actions.add_parser(
        "inspect",
        help="look through a model file, and open it in a disposable process with limits; exit code 0: it runs",
    )
    inspect.add_argument("file", type=Path, metavar="FILE.tflite|FILE.onnx")
    inspect.add_argument("--memory-mb", type=int, default=1024, metavar="MB", help="default: %(default)s")
    inspect.add_argument("--seconds", type=float, default=60, metavar="S", help="default: %(default)s")
    inspect.set_defaults(run=_inspect)


def _sign(args: argparse.Namespace) -> int:
    from agent.registry.catalog import load_catalog
    from agent.registry.signing import PrivateKey, SigningError
    from agent.registry.trust import CatalogSignature, signature_path

    load_catalog(args.catalog)  # what is signed is whole, and its files are those that it records
    path = signature_path(args.catalog)
    counter = args.counter
    if counter is None:
        try:
            counter = CatalogSignature.load(path).counter + 1 if path.exists() else 1
        except SigningError as error:
            raise ConfigError([f"{error}; name the --counter"]) from None
    if not 0 <= counter < 1 << 32:
        raise ConfigError([f"--counter: must be 0 to {(1 << 32) - 1}, found {counter}"])
    key = PrivateKey.load(args.key)
    CatalogSignature.make(args.catalog, counter, key, allow_downgrade=args.allow_downgrade).save(path)
    print(f"{args.catalog}: counter {counter}, signed with key {key.public.id}: {path}")
    print(f"for gateways  models.trusted_keys: [{key.public.raw.hex()}]")
    return EXIT_OK


def _verify(args: argparse.Namespace) -> int:
    from agent.registry.trust import trust_of

    trust = trust_of(args.catalog, args.key)
    print(f"{args.catalog}: {'yes' if trust.trusted else 'no'}: {trust.why}")
    return EXIT_OK if trust.trusted else EXIT_FAILED


def _inspect(args: argparse.Namespace) -> int:
    from agent.registry.model_structure import check_structure

    format = {".tflite": "tflite", ".onnx": "onnx"}.get(args.file.suffix)
    if format is None:
        raise ConfigError([f"{args.file}: must be named .tflite or .onnx"])
    try:
        check_structure(args.file, format)
        print(f"{args.file}: its structure is sound")
        print(f"{args.file}: {asyncio.run(_try(args, format))}")
    except ValueError as error:
        print(f"{args.file}: no: {error}")
        return EXIT_FAILED
    return EXIT_OK


async def _try(args: argparse.Namespace, format: Any) -> str:
    """Raises `ValueError`."""
    import hashlib

    from agent.core.clock import SystemClock
    from agent.registry.model_structure import check_structure
    from agent.runtimes.base import Confinement, ModelFile, RuntimeUnavailable
    from agent.runtimes.isolated import ProcessEngine
    from agent.runtimes.runners import RuntimeOptions

    confinement = Confinement(args.memory_mb, args.seconds, check_structure)
    engine = ProcessEngine(RuntimeOptions(), 1, args.seconds, SystemClock(), confinement)
    digest = hashlib.sha256(args.file.read_bytes()).hexdigest()
    try:
        loaded = await engine.load(ModelFile(args.file, format, digest))
    except RuntimeUnavailable as error:
        raise ValueError(str(error)) from None
    finally:
        await engine.close()
    took = f", {1e3 * sorted(loaded.samples_s)[len(loaded.samples_s) // 2]:.2f} ms a run" if loaded.samples_s else ""
    return f"it runs: {loaded.provider}{took}"
