"""Held-out inputs of a model as a board's sensor would read them: a table for `hil.virtual --samples`.

python -m hil.samples digits FILE
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np

from agent.core.errors import ConfigError, UnknownModel
from agent.registry.catalog import Catalog, load_catalog
from agent.registry.locate import catalog_path
from agent.registry.tensors import pack, to_variant
from hil.demo.players import heldout


def table(catalog: Catalog, name: str) -> bytes:
    """One row for each held-out sample: the inputs of the family's variant for microcontrollers, in its own type.

    Raises `UnknownModel`, also for a family without such a variant.
    """
    family = catalog.family(name)
    variant = family.variant_for("edge_mcu", None)
    if variant is None:
        raise UnknownModel(f"{name} has no variant for microcontrollers")
    (spec,) = family.inputs
    values, _ = heldout(catalog.root / family.data.heldout)
    rows = ({spec.name: np.asarray(value).reshape(spec.shape)} for value in values)
    return b"".join(pack(to_variant(row, variant), variant.inputs) for row in rows)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m hil.samples", description="A table for hil.virtual --samples")
    parser.add_argument("model")
    parser.add_argument("file", type=Path)
    args = parser.parse_args(argv)
    try:
        data = table(load_catalog(catalog_path(None)), args.model)
        args.file.write_bytes(data)
    except (ConfigError, UnknownModel, OSError) as error:
        print(f"hil.samples: {error}", file=sys.stderr)
        return 1
    print(f"{args.file}: {len(data)} bytes")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
