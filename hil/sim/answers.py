"""What the shipped models answer to their held-out samples: run once, then looked up.

The microcontroller's int8 files run in LiteRT here; TensorFlow Lite Micro's outputs are within one step of 1/256 of
them (models/README.md).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from agent.core.types import Tensor
from agent.registry.catalog import Catalog, Family
from agent.registry.tensors import dequantise, to_variant
from hil.bench.bare import bare_invoke
from hil.demo.players import heldout


@dataclass(frozen=True, slots=True)
class Samples:
    """The held-out part of one family. `inputs` are canonical tensors, each of its own identity; `right[variant]` says
    for each sample whether that variant's answer is right, `outputs[variant]` what it is."""

    family: Family
    inputs: tuple[Tensor, ...]
    truth: tuple[str, ...]
    outputs: dict[str, tuple[dict[str, Tensor], ...]]
    right: dict[str, npt.NDArray[np.bool_]]

    def __len__(self) -> int:
        return len(self.inputs)


def run_models(catalog: Catalog) -> dict[str, Samples]:
    """By family. Raises `CannotMeasure` if a runtime is not installed."""
    return {name: _of(catalog, family) for name, family in catalog.families.items()}


def _of(catalog: Catalog, family: Family) -> Samples:
    values, classes = heldout(catalog.root / family.data.heldout)
    shape = family.inputs[0].shape
    inputs = tuple(np.ascontiguousarray(value.reshape(shape)) for value in values)
    outputs: dict[str, tuple[dict[str, Tensor], ...]] = {}
    right: dict[str, npt.NDArray[np.bool_]] = {}
    given, wanted = family.inputs[0].name, family.outputs[0]
    for variant in family.variants.values():
        invoke = bare_invoke(catalog, variant)
        (source,), (sink,) = variant.inputs, variant.outputs
        raw = [np.asarray(invoke(to_variant({given: value}, variant)[source.name])).copy() for value in inputs]
        answers = [{wanted.name: dequantise(value, sink).reshape(wanted.shape)} for value in raw]
        outputs[variant.id] = tuple(answers)
        right[variant.id] = np.array(
            [int(answer[wanted.name].argmax()) == index for answer, index in zip(answers, classes, strict=True)]
        )
    return Samples(family, inputs, tuple(family.labels[int(index)] for index in classes), outputs, right)
