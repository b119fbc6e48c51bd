"""`.tflite` files on LiteRT, or on its predecessor `tflite_runtime` where LiteRT has no wheel (32-bit ARM).

XNNPACK is the CPU path. LiteRT applies it by itself and does not say whether it did, so the provider is read from the
prepared graph: a `DELEGATE` node stands for the operators that XNNPACK took.
"""

from __future__ import annotations

import importlib
import logging
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import numpy as np

from agent.core.types import Tensor, Tensors
from agent.runtimes.base import Format, ModelRunner, RuntimeUnavailable

log = logging.getLogger(__name__)

_LIBRARIES = (
    ("ai_edge_litert.interpreter", "ai-edge-litert", "litert"),
    ("tflite_runtime.interpreter", "tflite-runtime", "tflite_runtime"),
)
# A device node of some GPU. Without one, `auto` does not load 19 MB of accelerator library to learn that it fails.
_GPU_NODES = ("/dev/dri/renderD128", "/dev/nvidia0", "/dev/nvhost-gpu", "/dev/mali0", "/dev/kgsl-3d0")


class LiteRtRuntime:
    """`accelerator` `gpu` or `auto`: the GPU accelerator where it takes the whole model, else the CPU.

    `threads` are XNNPACK's for each inference. `strict` with `gpu` refuses the CPU. Raises `RuntimeUnavailable`.
    """

    format: Format = "tflite"

    def __init__(
        self, threads: int = 1, accelerator: Literal["auto", "cpu", "gpu"] = "auto", *, strict: bool = False
    ) -> None:
        self._threads = threads
        self._accelerator = accelerator
        self._strict = strict
        self._interpreter, self.name = _import_interpreter()

    def load(self, path: Path) -> ModelRunner:
        if self._accelerator == "gpu" or (self._accelerator == "auto" and any(map(_exists, _GPU_NODES))):
            try:
                return CompiledRunner(path, self.name, "gpu")
            except (ImportError, RuntimeError, ValueError) as error:
                if self._accelerator == "gpu" and self._strict:
                    raise RuntimeUnavailable(f"LiteRT's GPU accelerator does not take {path.name}: {error}") from None
                log.info("%s runs on the CPU: the GPU accelerator does not take it: %s", path.name, error)
        return InterpreterRunner(self._interpreter, path, self._threads, self.name)


class InterpreterRunner:
    """A model on the CPU: `set_tensor`, `invoke`, `get_tensor` by index is the least there is around an invocation."""

    reentrant = False

    def __init__(self, interpreter: Any, path: Path, threads: int, library: str) -> None:
        try:
            loaded = interpreter(model_path=str(path), num_threads=threads)
            loaded.allocate_tensors()
        except (ValueError, RuntimeError) as error:
            raise ValueError(f"{path.name} is not a usable model: {error}") from None
        self._details = loaded.get_input_details()
        self._inputs = [(detail["name"], detail["index"]) for detail in self._details]
        self._outputs = [(detail["name"], detail["index"]) for detail in loaded.get_output_details()]
        self._set, self._invoke, self._get = loaded.set_tensor, loaded.invoke, loaded.get_tensor
        self.provider = f"{library}/{_kernels(loaded)}"

    def zeros(self) -> dict[str, Tensor]:
        return {detail["name"]: np.zeros(detail["shape"], detail["dtype"]) for detail in self._details}

    def run(self, inputs: Tensors) -> dict[str, Tensor]:
        try:
            for name, index in self._inputs:
                self._set(index, inputs[name])
        except KeyError as error:
            raise ValueError(f"input {error} is missing") from None
        self._invoke()
        return {name: self._get(index) for name, index in self._outputs}

    def close(self) -> None:
        del self._set, self._invoke, self._get


class CompiledRunner:
    """A model on LiteRT's `CompiledModel`: all of it on the accelerator named, or not at all.

    Raises `ImportError` (too old a LiteRT), `RuntimeError` (no such accelerator) or `ValueError` (not all of it).
    """

    reentrant = False

    def __init__(self, path: Path, library: str, accelerator: Literal["gpu", "cpu"]) -> None:
        compiled_model = importlib.import_module("ai_edge_litert.compiled_model")
        hardware = importlib.import_module("ai_edge_litert.hardware_accelerator").HardwareAccelerator
        model = compiled_model.CompiledModel.from_file(str(path), hardware_accel=hardware[accelerator.upper()])
        if not model.is_fully_accelerated():
            raise ValueError("some of its operators would stay on the CPU")
        (signature, names), *_ = model.get_signature_list().items()
        inputs, outputs = model.get_input_tensor_details(signature), model.get_output_tensor_details(signature)
        self._inputs = [_spec(inputs[name]) for name in names["inputs"]]
        self._outputs = [_spec(outputs[name]) for name in names["outputs"]]
        self._input_buffers = model.create_input_buffers(0)
        self._output_buffers = model.create_output_buffers(0)
        self._model = model
        self.provider = f"{library}/{accelerator} accelerator"

    def zeros(self) -> dict[str, Tensor]:
        return {name: np.zeros(shape, dtype) for name, dtype, shape in self._inputs}

    def run(self, inputs: Tensors) -> dict[str, Tensor]:
        for (name, dtype, shape), buffer in zip(self._inputs, self._input_buffers, strict=True):
            value = inputs.get(name)
            if value is None or value.dtype != dtype or value.shape != shape:
                raise ValueError(f"input {name!r} must be {dtype} of shape {shape}")
            buffer.write(value)
        self._model.run_by_index(0, self._input_buffers, self._output_buffers)
        return {
            name: buffer.read(int(np.prod(shape)), dtype.type).reshape(shape)
            for (name, dtype, shape), buffer in zip(self._outputs, self._output_buffers, strict=True)
        }

    def close(self) -> None:
        for buffer in (*self._input_buffers, *self._output_buffers):
            buffer.destroy()
        self._model.close()


def _exists(path: str) -> bool:
    return Path(path).exists()


def _spec(detail: dict[str, Any]) -> tuple[str, np.dtype[Any], tuple[int, ...]]:
    return detail["name"], np.dtype(detail["dtype"]), tuple(detail["shape"])


def _import_interpreter() -> tuple[Any, str]:
    """The `Interpreter` class and the library's name with its version."""
    problems = []
    for module, distribution, name in _LIBRARIES:
        try:
            interpreter = importlib.import_module(module).Interpreter
            return interpreter, f"{name} {version(distribution)}"
        except PackageNotFoundError:
            return interpreter, name
        except ImportError as error:
            problems.append(str(error))
    raise RuntimeUnavailable(f"neither ai-edge-litert nor tflite-runtime can be imported: {'; '.join(problems)}")


def _kernels(interpreter: Any) -> str:
    """`xnnpack`, `xnnpack for N of M operators`, `built-in kernels`, or `unknown kernels` where the graph is not shown.

    The prepared graph keeps the replaced operators beside the `DELEGATE` nodes, so those are found by walking back
    from each delegate's outputs to its inputs. XNNPACK is the only delegate that is ever given.
    """
    details = getattr(interpreter, "_get_ops_details", None)  # Not a documented part of the library.
    if details is None:
        return "unknown kernels"
    nodes = details()
    delegates = [node for node in nodes if node["op_name"] == "DELEGATE"]
    operators = [node for node in nodes if node["op_name"] != "DELEGATE"]
    producers = {int(tensor): node["index"] for node in operators for tensor in node["outputs"]}
    inputs_of = {node["index"]: node["inputs"] for node in operators}
    taken: set[int] = set()
    for delegate in delegates:
        given = {int(tensor) for tensor in delegate["inputs"]}
        pending = [int(tensor) for tensor in delegate["outputs"]]
        while pending:
            tensor = pending.pop()
            producer = producers.get(tensor)
            if tensor in given or producer is None or producer in taken:
                continue
            taken.add(producer)
            pending.extend(int(before) for before in inputs_of[producer])
    if not taken:
        return "built-in kernels"
    return "xnnpack" if len(taken) == len(operators) else f"xnnpack for {len(taken)} of {len(operators)} operators"
