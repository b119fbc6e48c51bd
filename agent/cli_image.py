"""What a command line names as the model for a microcontroller, and the image that is made of it."""

from __future__ import annotations

import argparse
import hashlib
from dataclasses import dataclass
from pathlib import Path

from agent.core.errors import ConfigError
from agent.link.push import ModelImage
from agent.registry.catalog import Catalog, Variant, load_catalog
from agent.registry.locate import catalog_path
from agent.registry.operators import operator_codes
from agent.registry.selftest import load_selftest
from agent.registry.signing import SUFFIX


@dataclass(frozen=True, slots=True)
class Chosen:
    """A model. `variant` is None for a file that the catalogue does not know; `samples` are of its self-test."""

    path: Path
    model: bytes
    variant: Variant | None
    samples: tuple[tuple[bytes, bytes], ...]
    catalog: Catalog

    @property
    def name(self) -> str:
        return self.variant.name if self.variant is not None else self.path.name

    @property
    def selftest(self) -> bytes:
        """The first sample, as an image carries it: input bytes, expected output bytes."""
        return b"".join(self.samples[0]) if self.samples else b""

    @property
    def signature_path(self) -> Path:
        """Where its signature is looked for."""
        return self.path.with_name(self.path.name + SUFFIX)

    def image(self, counter: int, *, allow_lower_counter: bool, board: str = "") -> ModelImage:
        """Raises `ConfigError` if the catalogue names operators that no board has."""
        variant = self.variant
        return ModelImage(
            model=self.model,
            counter=counter,
            arena=variant.arena_bytes or 0 if variant is not None else 0,
            selftest=self.selftest,
            allow_lower_counter=allow_lower_counter,
            board=board,
            operators=operator_codes(variant.operators) if variant is not None else (),
            samples=self.samples,
        )


def choose(args: argparse.Namespace) -> Chosen:
    """Find the model that `args.model` names in `args.catalog`. Raises `ConfigError` or `UnknownModel`."""
    catalog = load_catalog(catalog_path(args.catalog), verify=False)
    if args.model.endswith(".tflite"):
        path = Path(args.model)
        model = _read(path)
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
        path = catalog.path(variant)
        model = _read(path)
        if _sha256(model) != variant.sha256:
            raise ConfigError([f"{path}: is not the file that the catalogue records"])
    selftest = None if variant is None else variant.selftest
    return Chosen(path, model, variant, load_selftest(catalog.root / selftest) if selftest else (), catalog)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError([f"{path}: cannot be read: {error.strerror}"]) from None


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
