"""`.onnx` files on ONNX Runtime.

ONNX Runtime falls back to the CPU without an error, so the provider is read from the session that was made, and its
own fall-back while running is turned off.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from agent.core.types import Tensor, Tensors
from agent.runtimes.base import Format, ModelRunner, RuntimeUnavailable

_PROVIDERS = {"tensorrt": "TensorrtExecutionProvider", "cuda": "CUDAExecutionProvider", "cpu": "CPUExecutionProvider"}
_DTYPES = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(int8)": "int8",
    "tensor(uint8)": "uint8",
    "tensor(int16)": "int16",
    "tensor(int32)": "int32",
    "tensor(int64)": "int64",
}
_ERRORS_ONLY = 3  # ONNX Runtime's severity scale; its warnings about unused initialisers are not for a gateway's log.


class OnnxRuntime:
    """`providers` in order of preference; `strict` refuses any but the first. Raises `RuntimeUnavailable`.

    `threads` are those of each inference (intra-op).
    """

    format: Format = "onnx"

    def __init__(self, threads: int = 1, providers: Sequence[str] = ("cpu",), *, strict: bool = False) -> None:
        try:
            self._ort = importlib.import_module("onnxruntime")
        except ImportError as error:
            missing = error.name == "onnxruntime"
            raise RuntimeUnavailable(
                "onnxruntime is not installed" if missing else f"onnxruntime cannot be imported: {error}"
            ) from None
        self.name = f"onnxruntime {self._ort.__version__}"
        self._threads = threads
        self._wanted = _PROVIDERS[providers[0]] if strict else None
        offered = self._ort.get_available_providers()
        self._providers = [_PROVIDERS[provider] for provider in providers if _PROVIDERS[provider] in offered]
        if not self._providers or (strict and self._providers[0] != self._wanted):
            raise RuntimeUnavailable(f"{self.name} here has no {providers[0]} provider; it has: {', '.join(offered)}")

    def load(self, path: Path, data: bytes | None = None) -> ModelRunner:
        runner = SessionRunner(self._ort, path, self._threads, self._providers, self.name, data)
        if self._wanted is not None and runner.execution_provider != self._wanted:
            raise RuntimeUnavailable(f"{path.name} runs on {runner.execution_provider}, not on {self._wanted}")
        return runner


class SessionRunner:
    """A model in one session. The provider named is the first the session took; single operators that it lacks run
    on the next one."""

    reentrant = True
    """`InferenceSession.run` may be called from several threads, so a model is in memory once."""

    def __init__(
        self, ort: Any, path: Path, threads: int, providers: Sequence[str], library: str, data: bytes | None = None
    ) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # Idle threads must not burn a core.
        options.log_severity_level = _ERRORS_ONLY
        self._errors = _library_errors(ort)
        try:
            self._session = ort.InferenceSession(
                str(path) if data is None else data, options, providers=list(providers)
            )
        except self._errors as error:
            raise ValueError(f"{path.name} is not a usable model: {error}") from None
        self._session.disable_fallback()
        self._outputs = [output.name for output in self._session.get_outputs()]
        self.execution_provider: str = self._session.get_providers()[0]
        self.provider = f"{library}/{self.execution_provider}"
        self._run = self._session.run

    def zeros(self) -> dict[str, Tensor]:
        try:
            return {
                tensor.name: np.zeros([size if isinstance(size, int) else 1 for size in tensor.shape], dtype)
                for tensor in self._session.get_inputs()
                for dtype in (_DTYPES[tensor.type],)
            }
        except KeyError as error:
            raise ValueError(f"an input is of type {error}, which is not supported") from None

    def run(self, inputs: Tensors) -> dict[str, Tensor]:
        try:
            values = self._run(self._outputs, dict(inputs))
        except self._errors as error:
            raise RuntimeError(str(error)) from None
        return dict(zip(self._outputs, values, strict=True))

    def close(self) -> None:
        del self._run, self._session


def _library_errors(ort: Any) -> tuple[type[Exception], ...]:
    """ONNX Runtime's exceptions have no common base but `Exception`; the bindings raise two built-in ones as well."""
    state = ort.capi.onnxruntime_pybind11_state
    own = [kind for kind in vars(state).values() if isinstance(kind, type) and issubclass(kind, Exception)]
    return (*own, RuntimeError, ValueError)
