"""`edge-agent models`: list a catalogue, calibrate it, make keys, sign models and catalogues, check signatures."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agent import cli_catalogue
from agent.core.errors import UnknownModel

if TYPE_CHECKING:
    from agent.registry.signing import PublicKey

EXIT_OK, EXIT_FAILED, EXIT_USAGE = 0, 1, 2


def add_parser(commands: argparse._SubParsersAction[Any]) -> None:
    """Add `models` and its subcommands to those of `edge-agent`."""
    models = commands.add_parser("models", help="list the models of a catalogue; calibrate them; sign them")
    models.add_argument("--catalog", type=Path, metavar="FILE")
    models.set_defaults(run=_list)
    actions = models.add_subparsers(dest="action", metavar="ACTION")

    calibrate = actions.add_parser(
        "calibrate",
        help="fit confidence and thresholds of a family to its held-out data and write them into the catalogue",
    )
    calibrate.add_argument("family", metavar="FAMILY")
    calibrate.add_argument("--catalog", type=Path, metavar="FILE", default=argparse.SUPPRESS)
    calibrate.add_argument(
        "--max-loss",
        type=float,
        default=0.005,
        metavar="SHARE",
        help="answers that may become wrong by not asking the most accurate variant (default 0.005)",
    )
    calibrate.add_argument("--check", action="store_true", help="write nothing; exit code 1 if the catalogue differs")
    calibrate.add_argument("--json", type=Path, metavar="FILE", help="write the figures and the curves here")
    calibrate.add_argument("--plot", type=Path, metavar="FILE", help="draw accuracy against offload (extra `proof`)")
    calibrate.set_defaults(run=_calibrate)

    which = argparse.ArgumentParser(add_help=False)
    which.add_argument("model", metavar="FAMILY[/VARIANT] | FILE.tflite")
    catalog_help = "catalog.yaml; default: the one that ships"
    which.add_argument("--catalog", type=Path, metavar="FILE", default=argparse.SUPPRESS, help=catalog_help)

    keygen = actions.add_parser("keygen", help="make a pair of Ed25519 keys: FILE, which is secret, and FILE.pub")
    keygen.add_argument("file", type=Path, metavar="FILE")
    keygen.set_defaults(run=_keygen)

    sign = actions.add_parser("sign", parents=[which], help="write the signature of a model beside it")
    sign.add_argument("--key", type=Path, required=True, metavar="FILE", help="private key")
    sign.add_argument("--counter", type=_counter, metavar="N", help="version counter; default: the catalogue's")
    sign.add_argument("--board", default="", metavar="NAME", help="only for boards of this name; default: any")
    sign.add_argument("--allow-downgrade", action="store_true", help="boards may take it in place of a later version")
    sign.add_argument("--out", type=Path, metavar="FILE", help="default: the model's name with .sig.json")
    sign.set_defaults(run=_sign)

    cli_catalogue.add_parsers(actions)

    verify = actions.add_parser("verify", parents=[which], help="whether a model's signature holds; exit code 0: yes")
    verify.add_argument("--signature", type=Path, metavar="FILE", help="default: the model's name with .sig.json")
    verify.add_argument("--key", action="append", default=[], metavar="FILE|HEX", help="public key; may be repeated")
    verify.add_argument("--config", type=Path, metavar="FILE", help="trust models.trusted_keys of this configuration")
    verify.set_defaults(run=_verify)


def _list(args: argparse.Namespace) -> int:
    from agent.registry.catalog import load_catalog
    from agent.registry.locate import catalog_path

    catalog = load_catalog(catalog_path(args.catalog))
    print(
        f"{'model':24} {'targets':20} {'format':7} {'bytes':>9} {'parameters':>10} {'accuracy':>9} {'sure from':>9}  "
        "sha256"
    )
    for family in catalog.families.values():
        for variant in family.variants.values():
            cascade = None if variant.calibration is None else variant.calibration.cascade
            print(
                f"{variant.name:24} {','.join(variant.targets):20} {variant.format:7} {variant.bytes:9} "
                f"{variant.parameters:10} {variant.accuracy.value:9.4f} "
                f"{'-' if cascade is None else f'{cascade.threshold:.4f}':>9}  {variant.sha256[:16]}"
            )
    return EXIT_OK


def _calibrate(args: argparse.Namespace) -> int:
    from agent.cli_calibrate import run

    try:
        return run(args)
    except UnknownModel as error:
        return _usage(str(error))


def _keygen(args: argparse.Namespace) -> int:
    from agent.registry.signing import PrivateKey

    key = PrivateKey.generate()
    public = key.save(args.file)
    print(f"private key   {args.file} (keep it off the gateways)")
    print(f"public key    {public}")
    print(f"key id        {key.public.id}")
    print(f"for firmware  -DEDGE_PUBLIC_KEY='\"{key.public.raw.hex()}\"'")
    return EXIT_OK


def _sign(args: argparse.Namespace) -> int:
    from agent.cli_image import choose
    from agent.registry.signing import PrivateKey, SignedManifest, SigningError
    from agent.runtimes.base import RuntimeUnavailable
    from agent.wire.update import BOARD_BYTES

    if len(args.board.encode()) > BOARD_BYTES or not args.board.isascii() or " " in args.board:
        return _usage(f"--board: must be up to {BOARD_BYTES} ASCII characters without blanks, found {args.board!r}")
    try:
        chosen = choose(args)
    except UnknownModel as error:
        return _usage(str(error))
    if args.counter is None and chosen.variant is None:
        return _usage(f"--counter: is needed, as the catalogue does not know {args.model}")
    counter = args.counter if args.counter is not None else chosen.variant.version if chosen.variant else 0
    key = PrivateKey.load(args.key)
    try:
        cli_catalogue.inspect(chosen.path, chosen.model, "tflite")
    except RuntimeUnavailable as error:  # Those who sign need not have what gateways have.
        print(f"{chosen.name}: its structure is sound; it was not run: {error}")
    except ValueError as error:
        raise SigningError(f"{chosen.name}: {error}; it is not signed") from None
    image = chosen.image(counter, allow_lower_counter=args.allow_downgrade, board=args.board)
    signed = SignedManifest.make(chosen.variant.name if chosen.variant is not None else "", image.manifest(0), key)
    path = args.out or chosen.signature_path
    signed.save(path)
    which = f"boards named {args.board}" if args.board else "any board"
    print(f"{chosen.name}: counter {counter}, for {which}, signed with key {signed.key_id}: {path}")
    return EXIT_OK


def _verify(args: argparse.Namespace) -> int:
    from agent.cli_image import choose
    from agent.registry.signing import SignedManifest, SigningError, load_public

    named = [*args.key, *_trusted(args.config)]
    if not named:
        return _usage("--key or --config: name the keys that are trusted")
    try:
        chosen = choose(args)
    except UnknownModel as error:
        return _usage(str(error))
    keys: list[PublicKey] = [load_public(text) for text in named]
    path = args.signature or chosen.signature_path
    try:
        signed = SignedManifest.load(path)
        key = signed.check(chosen.model, chosen.selftest, keys)
        entry = chosen.variant.name if chosen.variant is not None else ""
        if signed.model != entry:
            raise SigningError(
                f"it says to be of {signed.model or 'no model of a catalogue'}, this is {entry or 'none'}"
            )
    except SigningError as error:
        print(f"{chosen.name}: no: {error}")
        return EXIT_FAILED
    manifest = signed.manifest
    print(f"{chosen.name}: yes: signed with key {key.id}, counter {manifest.counter}, board {manifest.board or 'any'}")
    return EXIT_OK


def _trusted(path: Path | None) -> tuple[str, ...]:
    from agent.config_load import load_config

    return load_config(path, unseen=[]).models.trusted_keys if path is not None else ()


def _usage(text: str) -> int:
    print(f"edge-agent models: {text}", file=sys.stderr)
    return EXIT_USAGE


def _counter(text: str) -> int:
    value = int(text)
    if not 0 <= value < 1 << 32:
        raise argparse.ArgumentTypeError(f"must be 0 to {(1 << 32) - 1}, found {value}")
    return value
