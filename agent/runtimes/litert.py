"""`.tflite` files on LiteRT, or on its predecessor `tflite_runtime` where LiteRT has no wheel (32-bit ARM).

XNNPACK is the CPU path. LiteRT applies it by itself and does not say whether it did, so the provider is read from the
prepared graph: a `DELEGATE` node stands for the operators that XNNPACK took.
"""

from __future__ import annotations

import ctypes
import importlib
import logging
import os
import platform
import threading
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
        self._not_taken: set[Path] = set()
        self._interpreter, self.name = _import_interpreter()

    def load(self, path: Path, data: bytes | None = None) -> ModelRunner:
        with CHATTER:
            return self._load(path, data)

    def _load(self, path: Path, data: bytes | None) -> ModelRunner:
        gpu = self._accelerator == "gpu" or (self._accelerator == "auto" and any(map(_exists, _GPU_NODES)))
        if gpu and path not in self._not_taken:
            try:
                return CompiledRunner(path, self.name, "gpu", data)
            except (ImportError, RuntimeError, ValueError) as error:
                if self._accelerator == "gpu" and self._strict:
                    raise RuntimeUnavailable(f"LiteRT's GPU accelerator does not take {path.name}: {error}") from None
                self._not_taken.add(path)  # Another instance of it need not try.
                why = str(error).partition("\n")[0]
                log.info("%s runs on the CPU: the GPU accelerator does not take it: %s", path.name, why)
        return InterpreterRunner(self._interpreter, path, self._threads, self.name, data)


class InterpreterRunner:
    """A model on the CPU: `set_tensor`, `invoke`, `get_tensor` by index is the least there is around an invocation."""

    reentrant = False

    def __init__(self, interpreter: Any, path: Path, threads: int, library: str, data: bytes | None = None) -> None:
        model = {"model_path": str(path)} if data is None else {"model_content": data}
        try:
            loaded = interpreter(**model, num_threads=threads)
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

    def __init__(self, path: Path, library: str, accelerator: Literal["gpu", "cpu"], data: bytes | None = None) -> None:
        compiled_model = importlib.import_module("ai_edge_litert.compiled_model")
        hardware = importlib.import_module("ai_edge_litert.hardware_accelerator").HardwareAccelerator
        made, of = compiled_model.CompiledModel, hardware[accelerator.upper()]
        self._data = data  # The library reads it for as long as the model lives.
        model = (
            made.from_file(str(path), hardware_accel=of) if data is None else made.from_buffer(data, hardware_accel=of)
        )
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
        with CHATTER:
            for buffer in (*self._input_buffers, *self._output_buffers):
                buffer.destroy()
            self._model.close()


class Chatter:
    """While entered, by whatever thread, what C code prints goes to a file in memory, and then to the log at `debug`.

    LiteRT tells of every accelerator it looks for, and nothing it offers to Python silences that. In glibc `stderr` is
    a variable that may be set; descriptor 2, and so every log of this process, is not touched. Elsewhere this does
    nothing.
    """

    kept = False
    """Whether it is printed all the same: the runtime process, whose parent listens, may have last words to say."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._file: int | None = None
        self._shown: int | None = None
        self._fd = -1
        self._libc: ctypes.CDLL | None = None

    def __enter__(self) -> None:
        with self._lock:
            self._inside += 1
            if self._inside == 1 and self._opened():
                stderr = self._stderr()
                self._shown, stderr.value = stderr.value, self._file

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside or self._libc is None:
                return
            self._stderr().value = self._shown
            self._libc.fflush(ctypes.c_void_p(self._file))
            said = os.pread(self._fd, 1 << 16, 0).decode(errors="replace").strip()
            os.ftruncate(self._fd, 0)
            os.lseek(self._fd, 0, os.SEEK_SET)
        if said:
            log.debug("LiteRT said", extra={"text": said})

    def _opened(self) -> bool:
        """Made once and never closed: a thread of the library may be about to print."""
        if self._libc is None and not self.kept and platform.libc_ver()[0] == "glibc":
            libc = ctypes.CDLL(None)
            libc.fdopen.restype = ctypes.c_void_p
            self._fd = os.memfd_create("litert-stderr")
            self._file = libc.fdopen(self._fd, b"w")
            self._libc = libc if self._file else None
        return self._libc is not None

    def _stderr(self) -> ctypes.c_void_p:
        assert self._libc is not None
        return ctypes.c_void_p.in_dll(self._libc, "stderr")


CHATTER = Chatter()


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
