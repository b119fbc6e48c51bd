"""`edge-agent models sign-catalog`, `verify-catalog` and `inspect`: who vouches for a catalogue; what a file is."""

from __future__ import annotations

import argparse
import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agent.core.errors import ConfigError, plain_words

if TYPE_CHECKING:
    from agent.registry.catalog import Catalog
    from agent.runtimes.base import LoadedModel

EXIT_OK, EXIT_FAILED = 0, 1
MEMORY_MB, SECONDS = 1024, 60.0


def add_parsers(actions: argparse._SubParsersAction[Any]) -> None:
    """Add them to the actions of `edge-agent models`."""
    which = argparse.ArgumentParser(add_help=False)
    which.add_argument("--catalog", type=Path, metavar="FILE", required=True, help="catalog.yaml")

    limits = argparse.ArgumentParser(add_help=False)
    most = "that opening a file may take (default %(default)s)"
    limits.add_argument("--memory-mb", type=int, default=MEMORY_MB, metavar="MB", help=most)
    limits.add_argument("--seconds", type=float, default=SECONDS, metavar="S", help=most)

    sign = actions.add_parser(
        "sign-catalog", parents=[which, limits], help="sign a catalogue, and with it every file whose SHA-256 it holds"
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
        parents=[limits],
        help="look through a model file, and open it in a disposable process with limits; exit code 0: it runs",
    )
    inspect.add_argument("file", type=Path, metavar="FILE.tflite|FILE.onnx")
    inspect.set_defaults(run=_inspect)


def _sign(args: argparse.Namespace) -> int:
    from agent.registry.catalog import load_catalog
    from agent.registry.signing import PrivateKey, SigningError
    from agent.registry.trust import CatalogSignature, signature_path

    catalog = load_catalog(args.catalog)  # what is signed is whole, and its files are those that it records
    _inspect_all(catalog, args.memory_mb, args.seconds)
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
    from agent.runtimes.base import RuntimeUnavailable

    format = {".tflite": "tflite", ".onnx": "onnx"}.get(args.file.suffix)
    if format is None:
        raise ConfigError([f"{args.file}: must be named .tflite or .onnx"])
    try:
        data = args.file.read_bytes()
        _look_through(args.file, data, format)
        print(f"{args.file}: its structure is sound")
        loaded = asyncio.run(_try(args.file, data, format, args.memory_mb, args.seconds))
    except OSError as error:
        raise ConfigError([f"{args.file}: cannot be read: {plain_words(error)}"]) from None
    except (ValueError, RuntimeUnavailable) as error:
        print(f"{args.file}: no: {error}")
        return EXIT_FAILED
    times = sorted(loaded.samples_s)
    took = f", {1e3 * times[len(times) // 2]:.2f} ms a run" if times else ""
    print(f"{args.file}: it runs: {loaded.provider}{took}")
    return EXIT_OK


def _inspect_all(catalog: Catalog, memory_mb: int, seconds: float) -> None:
    """What is signed is sound, runs within the limits, and is what the catalogue says of it. Raises `ConfigError`."""
    from agent.registry.tensors import misfit
    from agent.runtimes.base import RuntimeUnavailable

    problems = []
    for family in catalog.families.values():
        for variant in family.variants.values():
            path = catalog.path(variant)
            try:
                loaded = inspect(path, path.read_bytes(), variant.format, memory_mb, seconds)
                if fault := misfit(variant, loaded.inputs, loaded.outputs):
                    raise ValueError(fault)
                print(f"{variant.name}: {loaded.provider}")
            except RuntimeUnavailable as error:  # Those who sign need not have what gateways have.
                print(f"{variant.name}: its structure is sound; it was not run: {error}")
            except (ValueError, OSError) as error:
                problems.append(f"{variant.name}: {variant.path}: {error}; it is not signed")
    if problems:
        raise ConfigError(problems)


def inspect(path: Path, data: bytes, format: Any, memory_mb: int = MEMORY_MB, seconds: float = SECONDS) -> LoadedModel:
    """Look through the content of a file, then open it and run it once in a disposable process. Raises
    `RuntimeUnavailable` or `ValueError`."""
    _look_through(path, data, format)
    return asyncio.run(_try(path, data, format, memory_mb, seconds))


def _look_through(path: Path, data: bytes, format: Any) -> None:
    """Raises `ValueError`."""
    from agent.registry.model_structure import check_structure

    check_structure(path.name, data, format)


async def _try(path: Path, data: bytes, format: Any, memory_mb: int, seconds: float) -> LoadedModel:
    """In a disposable process. Raises `RuntimeUnavailable` or `ValueError`."""
    import hashlib

    from agent.core.clock import SystemClock
    from agent.registry.model_structure import check_structure
    from agent.runtimes.base import Confinement, ModelFile
    from agent.runtimes.isolated import ProcessEngine
    from agent.runtimes.runners import RuntimeOptions

    confinement = Confinement(memory_mb, seconds, check_structure)
    engine = ProcessEngine(RuntimeOptions(), 1, seconds, SystemClock(), confinement)
    try:
        return await engine.load(ModelFile(path, format, hashlib.sha256(data).hexdigest(), len(data)))
    finally:
        await engine.close()
