"""The bare invoke: a model file on its library with nothing around it, on one thread as the daemon runs it."""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from agent.core.types import Tensor
from agent.registry.catalog import Catalog, Family, Variant
from agent.registry.tensors import to_variant
from agent.runtimes.litert import CHATTER
from hil.bench.report import CannotMeasure
from hil.bench.stats import Sampler, timed
from hil.demo.players import heldout

Invoke = Callable[[Tensor], object]
MAX_INPUTS = 64


def canonical_inputs(catalog: Catalog, family: Family) -> list[Tensor]:
    """Held-out samples of the family's one input."""
    samples, _ = heldout(catalog.root / family.data.heldout)
    shape = family.inputs[0].shape
    return [sample.reshape(shape) for sample in samples[:MAX_INPUTS]]


def bare_invoke(catalog: Catalog, variant: Variant) -> Invoke:
    """Set the input, run, get the output. Raises `CannotMeasure` if the library is not installed."""
    try:
        with CHATTER:
            return (_litert if variant.format == "tflite" else _onnx)(catalog.path(variant))
    except ImportError as error:
        raise CannotMeasure(f"{variant.name}: {error}") from None


def bare_sampler(catalog: Catalog, family: Family, variant: Variant) -> Sampler:
    """Seconds of each bare invoke; inputs are quantised beforehand."""
    invoke = bare_invoke(catalog, variant)
    (name,) = (spec.name for spec in variant.inputs)
    inputs = itertools.cycle(
        [to_variant({family.inputs[0].name: sample}, variant)[name] for sample in canonical_inputs(catalog, family)]
    )
    return timed(invoke, inputs)


def _litert(path: Path) -> Invoke:
    try:
        module = importlib.import_module("ai_edge_litert.interpreter")
    except ImportError:
        module = importlib.import_module("tflite_runtime.interpreter")
    interpreter = module.Interpreter(model_path=str(path), num_threads=1)
    interpreter.allocate_tensors()
    (given,), (wanted,) = interpreter.get_input_details(), interpreter.get_output_details()
    at, out = given["index"], wanted["index"]

    def invoke(value: Tensor) -> object:
        interpreter.set_tensor(at, value)
        interpreter.invoke()
        return interpreter.get_tensor(out)

    return invoke


def _onnx(path: Path) -> Invoke:
    ort: Any = importlib.import_module("onnxruntime")
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    (given,), outputs = session.get_inputs(), [output.name for output in session.get_outputs()]
    return lambda value: session.run(outputs, {given.name: value})
