"""What a model file is and does, measured from the file alone."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from ai_edge_litert import schema_py_generated as schema
from ai_edge_litert.interpreter import Interpreter
from numpy.typing import NDArray
from tflite_micro import runtime as micro

Array = NDArray[np.generic]

ARENA_STEP = 16  # bytes: the alignment that TensorFlow Lite Micro asks of an arena
ARENA_LIMIT = 1 << 20
WEIGHTED_OPERATORS = {"CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED", "Conv", "Gemm"}
OPERATOR_NAMES = {code: name for name, code in vars(schema.BuiltinOperator).items() if not name.startswith("_")}


@dataclass(frozen=True)
class Tensor:
    """An input or output of the file; `quantisation` is (scale, zero point) or None."""

    name: str
    dtype: str
    shape: list[int]
    quantisation: tuple[float, int] | None

    def encode(self, values: NDArray[np.float32]) -> Array:
        """Real values as this tensor stores them."""
        if self.quantisation is None:
            return values.astype(self.dtype)
        scale, zero_point = self.quantisation
        limits = np.iinfo(self.dtype)
        steps = np.round(values / scale) + zero_point
        return np.clip(steps, limits.min, limits.max).astype(self.dtype)

    def decode(self, stored: Array) -> NDArray[np.float32]:
        """The real values of what this tensor stores."""
        if self.quantisation is None:
            return stored.astype(np.float32)
        scale, zero_point = self.quantisation
        return ((stored.astype(np.float32) - zero_point) * scale).astype(np.float32)


@dataclass(frozen=True)
class Artefact:
    """A model file with one input and one output.

    `operators` are in order of first use; `parameters` counts the weights and biases.
    """

    data: bytes
    format: str
    operators: list[str]
    parameters: int
    input: Tensor
    output: Tensor

    def session(self) -> Callable[[Array], Array]:
        """A function from one stored input to one stored output, on this machine's CPU."""
        if self.format == "onnx":
            session = onnxruntime.InferenceSession(self.data, providers=["CPUExecutionProvider"])
            return lambda stored: session.run(None, {self.input.name: stored})[0]
        interpreter = Interpreter(model_content=self.data)
        interpreter.allocate_tensors()
        source = interpreter.get_input_details()[0]["index"]
        target = interpreter.get_output_details()[0]["index"]

        def run(stored: Array) -> Array:
            interpreter.set_tensor(source, stored)
            interpreter.invoke()
            return interpreter.get_tensor(target)

        return run

    def probabilities(self, inputs: NDArray[np.float32]) -> NDArray[np.float32]:
        """Class probabilities [n, classes] of canonical inputs [n, ...], one at a time."""
        run = self.session()
        rows = [self.output.decode(run(self.input.encode(sample[None])))[0] for sample in inputs]
        return np.stack(rows)


def load(path: Path) -> Artefact:
    """Reads a .tflite or .onnx file; raises ValueError for anything else."""
    match path.suffix:
        case ".tflite":
            return parse_tflite(path.read_bytes())
        case ".onnx":
            return parse_onnx(path.read_bytes())
    raise ValueError(f"{path}: neither .tflite nor .onnx")


def parse_tflite(data: bytes) -> Artefact:
    """Reads operators and weights from the flatbuffer and tensors from the interpreter."""
    model = schema.ModelT.InitFromObj(schema.Model.GetRootAsModel(data, 0))
    (graph,) = model.subgraphs
    operators: dict[str, None] = {}
    weights: dict[int, int] = {}
    for node in graph.operators:
        code = model.operatorCodes[node.opcodeIndex]
        name = OPERATOR_NAMES[max(code.builtinCode, code.deprecatedBuiltinCode)]
        operators[name] = None
        if name in WEIGHTED_OPERATORS:
            weights |= {i: int(np.prod(graph.tensors[i].shape)) for i in node.inputs[1:] if i >= 0}
    interpreter = Interpreter(model_content=data)
    (source,), (target,) = interpreter.get_input_details(), interpreter.get_output_details()
    return Artefact(
        data,
        "tflite",
        list(operators),
        sum(weights.values()),
        _tflite_tensor(source),
        _tflite_tensor(target),
    )


def _tflite_tensor(details: dict) -> Tensor:
    scale, zero_point = details["quantization"]
    return Tensor(
        details["name"],
        np.dtype(details["dtype"]).name,
        [int(size) for size in details["shape"]],
        (float(scale), int(zero_point)) if scale else None,
    )


def parse_onnx(data: bytes) -> Artefact:
    """Reads operators, weights and tensors from the protobuf."""
    graph = onnx.load_from_string(data).graph
    sizes = {tensor.name: int(np.prod(tensor.dims)) for tensor in graph.initializer}
    weights = {
        name: sizes[name] for node in graph.node if node.op_type in WEIGHTED_OPERATORS for name in node.input[1:]
    }
    (source,), (target,) = graph.input, graph.output
    return Artefact(
        data,
        "onnx",
        list(dict.fromkeys(node.op_type for node in graph.node)),
        sum(weights.values()),
        _onnx_tensor(source),
        _onnx_tensor(target),
    )


def _onnx_tensor(value: onnx.ValueInfoProto) -> Tensor:
    kind = value.type.tensor_type
    dtype = onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type).name
    return Tensor(value.name, dtype, [size.dim_value for size in kind.shape.dim], None)


def micro_outputs(artefact: Artefact, stored: Array) -> Array:
    """Outputs [n, ...] of TensorFlow Lite Micro for stored inputs [n, ...]."""
    interpreter = micro.Interpreter.from_bytes(artefact.data, arena_size=ARENA_LIMIT)
    rows = []
    for sample in stored:
        interpreter.set_input(sample[None], 0)
        interpreter.invoke()
        rows.append(interpreter.get_output(0)[0])
    return np.stack(rows)


def measure_arena(artefact: Artefact) -> int:
    """Smallest arena, in bytes and a multiple of 16, in which the micro runtime runs the model.

    Raises ValueError if even `ARENA_LIMIT` is too small. Pointers of this machine count: a 32-bit
    microcontroller needs less.
    """
    low, high = 0, ARENA_LIMIT // ARENA_STEP
    if not _runs_in(artefact.data, ARENA_LIMIT):
        raise ValueError(f"does not run in an arena of {ARENA_LIMIT} bytes")
    while high - low > 1:
        middle = (low + high) // 2
        if _runs_in(artefact.data, middle * ARENA_STEP):
            high = middle
        else:
            low = middle
    return high * ARENA_STEP


def _runs_in(data: bytes, arena: int) -> bool:
    probe = Path(__file__).with_name("arena_probe.py")
    command = [sys.executable, str(probe), str(arena)]
    return subprocess.run(command, input=data, capture_output=True, check=False).returncode == 0
