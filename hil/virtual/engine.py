"""Inference engines of the virtual MCU: TensorFlow Lite Micro, or LiteRT's reference kernels where it has no wheel."""

from __future__ import annotations

import ctypes
import hashlib
import importlib.metadata
import os
import re
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Protocol

# Loading and running an unknown model once. A model that takes longer is none for a microcontroller.
PROBE_LIMIT_S = 30

PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None)

_ARENA_TOTAL = re.compile(rb"Arena allocation total (\d+) bytes")
_ARENA_TOO_SMALL = re.compile(rb"Failed to (?:allocate|resize)|arena", re.IGNORECASE)


class LoadResult(IntEnum):
    """As in firmware/engine/engine.h."""

    OK = 0
    INVALID = 1
    OPERATOR = 2
    ARENA = 3


class EngineError(Exception):
    def __init__(self, text: str, result: LoadResult = LoadResult.INVALID) -> None:
        super().__init__(text)
        self.result = result


@dataclass(frozen=True, slots=True)
class ModelInfo:
    input_bytes: int
    output_bytes: int
    arena_used: int


class Engine(Protocol):
    name: str
    operators: bytes
    arena_size: int

    def load(self, model: bytes) -> ModelInfo:
        """Takes the place of the model before. Raises EngineError."""

    def invoke(self, inputs: bytes, outputs: memoryview) -> None:
        """All input tensors in, all output tensors out, concatenated. Raises EngineError."""


class TflmEngine:
    """TensorFlow Lite Micro from its own wheel."""

    def __init__(self, arena_size: int, operators: bytes) -> None:
        import tflite_micro

        self._runtime = tflite_micro.runtime
        self.name = f"tflite-micro {importlib.metadata.version('tflite-micro')}"
        self.operators = operators
        self.arena_size = arena_size
        self._interpreter: Any = None
        self._inputs: list[tuple[Any, Any, int]] = []  # dtype, shape, bytes
        self._outputs = 0
        self._arena_used: dict[bytes, int] = {}

    def load(self, model: bytes) -> ModelInfo:
        self._interpreter = None
        digest = hashlib.sha256(model).digest()
        if digest not in self._arena_used:
            self._arena_used[digest] = self._probe(model)
        interpreter = self._open(model)
        input_count, output_count = self._counts(model)
        self._inputs = _details(interpreter.get_input_details, input_count)
        outputs = _details(interpreter.get_output_details, output_count)
        self._outputs = len(outputs)
        self._interpreter = interpreter
        return ModelInfo(
            input_bytes=sum(size for _, _, size in self._inputs),
            output_bytes=sum(size for _, _, size in outputs),
            arena_used=self._arena_used[digest],
        )

    def invoke(self, inputs: bytes, outputs: memoryview) -> None:
        import numpy as np

        at = 0
        try:
            for index, (dtype, shape, size) in enumerate(self._inputs):
                tensor = np.frombuffer(inputs, dtype, size // dtype.itemsize, at).reshape(shape)
                self._interpreter.set_input(tensor, index)
                at += size
            self._interpreter.invoke()
            at = 0
            for index in range(self._outputs):
                raw = np.ascontiguousarray(self._interpreter.get_output(index)).view(np.uint8).reshape(-1)
                outputs[at : at + raw.size] = raw.data
                at += raw.size
        except (RuntimeError, ValueError) as err:
            raise EngineError(str(err) or "invoke failed") from err

    def _open(self, model: bytes) -> Any:
        try:
            return self._runtime.Interpreter.from_bytes(model, arena_size=self.arena_size)
        except (RuntimeError, ValueError) as err:
            raise EngineError(str(err) or "load failed", LoadResult.INVALID) from err

    def _counts(self, model: bytes) -> tuple[int, int]:
        """Inputs and outputs: the interpreter does not say how many there are."""
        graph = self._runtime.schema_fb.Model.GetRootAsModel(model, 0).Subgraphs(0)
        return graph.InputsLength(), graph.OutputsLength()

    def _probe(self, model: bytes) -> int:
        """Bytes of arena that the model takes. TFLM says so on stderr only, after a run."""
        import numpy as np

        def run() -> None:
            interpreter = self._open(model)
            for index, (dtype, shape, _) in enumerate(_details(interpreter.get_input_details, self._counts(model)[0])):
                interpreter.set_input(np.zeros(shape, dtype), index)
            interpreter.invoke()
            interpreter.print_allocations()

        said = run_disposable(run)
        total = _ARENA_TOTAL.search(said)
        return int(total[1]) if total else 0


class LiteRtEngine:
    """LiteRT with its reference kernels: the stand-in on machines without a TensorFlow Lite Micro wheel.

    It has no arena: `arena_used` is 0 and the limit is not enforced.
    """

    def __init__(self, arena_size: int, operators: bytes) -> None:
        from ai_edge_litert import interpreter

        self._module = interpreter
        self.name = f"litert-reference {importlib.metadata.version('ai-edge-litert')}"
        self.operators = operators
        self.arena_size = arena_size
        self._interpreter: Any = None

    def load(self, model: bytes) -> ModelInfo:
        self._interpreter = None
        run_disposable(lambda: self._open(model).invoke())
        interpreter = self._open(model)
        self._interpreter = interpreter
        inputs, outputs = interpreter.get_input_details(), interpreter.get_output_details()
        return ModelInfo(sum(map(_tensor_bytes, inputs)), sum(map(_tensor_bytes, outputs)), 0)

    def invoke(self, inputs: bytes, outputs: memoryview) -> None:
        import numpy as np

        at = 0
        try:
            for detail in self._interpreter.get_input_details():
                size, dtype = _tensor_bytes(detail), np.dtype(detail["dtype"])
                tensor = np.frombuffer(inputs, dtype, size // dtype.itemsize, at).reshape(detail["shape"])
                self._interpreter.set_tensor(detail["index"], tensor)
                at += size
            self._interpreter.invoke()
            at = 0
            for detail in self._interpreter.get_output_details():
                raw = np.ascontiguousarray(self._interpreter.get_tensor(detail["index"])).view(np.uint8).reshape(-1)
                outputs[at : at + raw.size] = raw.data
                at += raw.size
        except (RuntimeError, ValueError) as err:
            raise EngineError(str(err) or "invoke failed") from err

    def _open(self, model: bytes) -> Any:
        try:
            interpreter = self._module.Interpreter(
                model_content=model,
                num_threads=1,
                experimental_op_resolver_type=self._module.OpResolverType.BUILTIN_REF,
            )
            interpreter.allocate_tensors()
        except (RuntimeError, ValueError) as err:
            raise EngineError(str(err) or "load failed") from err
        return interpreter


def open_engine(arena_size: int, operators: bytes) -> Engine:
    try:
        return TflmEngine(arena_size, operators)
    except ImportError:
        return LiteRtEngine(arena_size, operators)


def run_disposable(call: Callable[[], object]) -> bytes:
    """Runs `call` in a forked process and returns what it wrote to stderr. Raises EngineError if it fails or dies.

    Both runtimes index by what a model file says; a crash of theirs must not be one of the board.
    """
    read, write = os.pipe()
    sys.stdout.flush()
    parent = os.getpid()
    child = os.fork()
    if child == 0:
        try:
            # It holds the board's locks as well: they must end with a board that is killed (prctl(2)).
            _LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != parent:
                os._exit(1)
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.alarm(PROBE_LIMIT_S)
            os.dup2(write, 2)
            call()
        except BaseException as err:
            os.write(2, str(err).encode())
            os._exit(1)
        os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        said = pipe.read()
    status = os.waitpid(child, 0)[1]
    if status == 0:
        return said
    if _ARENA_TOO_SMALL.search(said):
        raise EngineError("needs more arena than there is", LoadResult.ARENA)
    if os.WIFSIGNALED(status):
        raise EngineError(f"the engine crashed on it ({signal.Signals(os.WTERMSIG(status)).name})")
    raise EngineError(said.decode(errors="replace").strip()[-90:] or "the engine refused it")


def _details(get: Callable[[int], dict[str, Any]], count: int) -> list[tuple[Any, Any, int]]:
    """(dtype, shape, bytes) of each of `count` inputs or outputs."""
    import numpy as np

    return [(np.dtype(detail["dtype"]), detail["shape"], _tensor_bytes(detail)) for detail in map(get, range(count))]


def _tensor_bytes(detail: dict[str, Any]) -> int:
    import numpy as np

    items = int(np.prod(detail["shape"], dtype=np.int64))
    return items * int(np.dtype(detail["dtype"]).itemsize)
