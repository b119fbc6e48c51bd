"""Model images to push: those of the catalogue, and larger ones that are the same model with filling behind it."""

from __future__ import annotations

import random

from agent.link.push import ModelImage
from agent.registry.catalog import Catalog, Variant
from agent.registry.operators import operator_codes
from agent.registry.selftest import load_selftest


def image_of(catalog: Catalog, variant: Variant, *, size: int = 0, seed: int = 0) -> ModelImage:
    """The variant as the catalogue has it, with its self-test.

    `size`: fill the model file up to so many bytes, which no reader of it looks at; the seed makes each filling
    another model to the board.
    """
    model = catalog.path(variant).read_bytes()
    model += random.Random(seed).randbytes(max(0, size - len(model)))
    samples = load_selftest(catalog.root / variant.selftest) if variant.selftest is not None else ()
    return ModelImage(
        model=model,
        counter=variant.version,
        arena=variant.arena_bytes or 0,
        selftest=b"".join(samples[0]) if samples else b"",
        samples=samples,
        operators=operator_codes(variant.operators),
        allow_lower_counter=True,  # the suite goes back and forth between models
    )
