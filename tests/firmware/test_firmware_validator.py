"""The model validator: what it lets through, what it refuses and why, and that no bytes break it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import flatbuffers
import pytest
from ai_edge_litert import schema_py_generated as schema
from board import INVALID_MODEL, OPERATOR, ROOT, model
from mutate import verdicts

from hil.virtual.library import known_operators, validate_model

MODELS = sorted(ROOT.glob("models/*/mcu-int8.tflite"))


def packed(change: Callable[[Any], None], data: bytes | None = None) -> bytes:
    tree = schema.ModelT.InitFromObj(schema.Model.GetRootAsModel(data or model(), 0))
    change(tree)
    builder = flatbuffers.Builder(1024)
    builder.Finish(tree.Pack(builder), b"TFL3")
    return bytes(builder.Output())


def validate(data: bytes) -> tuple[int, str]:
    """The firmware's verdict, which is the gateway's too."""
    board, gateway = verdicts(data, known_operators())
    assert board == gateway
    return board[:2]


@pytest.mark.parametrize("path", MODELS, ids=lambda p: p.parent.name)
def test_shipped_models_are_valid(path: Any) -> None:
    code, text, inputs, outputs = validate_model(path.read_bytes(), known_operators())
    assert (code, text) == (0, "")
    assert inputs > 0
    assert outputs > 0


def test_repacked_model_is_valid() -> None:
    """So that the changes below are what is refused, not the packing."""
    assert validate(packed(lambda tree: None)) == (0, "")


def graph(tree: Any) -> Any:
    return tree.subgraphs[0]


def set_shape(index: int, shape: list[int]) -> Callable[[Any], None]:
    def change(tree: Any) -> None:
        graph(tree).tensors[index].shape = shape

    return change


def change_operator(index: int, **fields: Any) -> Callable[[Any], None]:
    def change(tree: Any) -> None:
        for name, value in fields.items():
            setattr(graph(tree).operators[index], name, value)

    return change


def change_tensor(index: int, **fields: Any) -> Callable[[Any], None]:
    def change(tree: Any) -> None:
        for name, value in fields.items():
            setattr(graph(tree).tensors[index], name, value)

    return change


def change_code(**fields: Any) -> Callable[[Any], None]:
    def change(tree: Any) -> None:
        for name, value in fields.items():
            setattr(tree.operatorCodes[0], name, value)

    return change


def change_scale(scale: list[float], zero_point: list[int], axis: int = 0) -> Callable[[Any], None]:
    def change(tree: Any) -> None:
        quantization = graph(tree).tensors[0].quantization
        quantization.scale, quantization.zeroPoint, quantization.quantizedDimension = scale, zero_point, axis

    return change


def change_options(index: int, **fields: Any) -> Callable[[Any], None]:
    def change(tree: Any) -> None:
        for name, value in fields.items():
            setattr(graph(tree).operators[index].builtinOptions, name, value)

    return change


def flat(index: int) -> Callable[[Any], None]:
    def change(tree: Any) -> None:
        tensor = graph(tree).tensors[index]
        tensor.shape = [math.prod(tensor.shape)]

    return change


def offline_plan(tree: Any) -> None:
    plan = schema.MetadataT()
    plan.name, plan.buffer = "OfflineMemoryAllocation", 0
    tree.metadata = [plan]


def second_subgraph(tree: Any) -> None:
    tree.subgraphs.append(tree.subgraphs[0])


# The digits model: 0 image -> RESHAPE -> 6 -> FULLY_CONNECTED (5, 4) -> 7 -> FULLY_CONNECTED -> 8 -> SOFTMAX -> 9.
INPUT, WEIGHTS, OUTPUT = 0, 5, 9
CHANGES: dict[str, tuple[Callable[[Any], None], int, str]] = {
    "version": (lambda t: setattr(t, "version", 2), INVALID_MODEL, "schema version"),
    "no subgraph": (lambda t: setattr(t, "subgraphs", []), INVALID_MODEL, "one subgraph"),
    "two subgraphs": (second_subgraph, INVALID_MODEL, "one subgraph"),
    "no operators": (lambda t: setattr(graph(t), "operators", []), INVALID_MODEL, "number of operators"),
    "no buffers": (lambda t: setattr(t, "buffers", []), INVALID_MODEL, "number of buffers"),
    "custom operator": (change_code(customCode="mine"), OPERATOR, "custom"),
    "unknown operator": (change_code(builtinCode=126, deprecatedBuiltinCode=126), OPERATOR, "lacks"),
    "operator over 127": (change_code(builtinCode=200, deprecatedBuiltinCode=127), OPERATOR, "lacks"),
    "while loop": (change_code(builtinCode=119, deprecatedBuiltinCode=119), OPERATOR, "lacks"),
    "negative dimension": (set_shape(INPUT, [1, -8, 8, 1]), INVALID_MODEL, "shape"),
    "zero dimension": (set_shape(INPUT, [1, 0, 8, 1]), INVALID_MODEL, "shape"),
    "2^31 elements": (set_shape(INPUT, [1 << 16, 1 << 15]), INVALID_MODEL, "shape"),
    "product that wraps 64 bits": (set_shape(INPUT, [1 << 30] * 3), INVALID_MODEL, "shape"),
    "rank 7": (set_shape(INPUT, [1] * 7), INVALID_MODEL, "shape"),
    "input over max_message": (set_shape(INPUT, [1, 40_000]), INVALID_MODEL, "max_message"),
    "string tensor": (change_tensor(INPUT, type=5), INVALID_MODEL, "type"),
    "buffer index": (change_tensor(INPUT, buffer=1000), INVALID_MODEL, "buffer index"),
    "weights larger than their buffer": (set_shape(WEIGHTS, [17, 64]), INVALID_MODEL, "differ in size"),
    "weights smaller than their buffer": (set_shape(WEIGHTS, [15, 64]), INVALID_MODEL, "differ in size"),
    "variable with data": (change_tensor(WEIGHTS, isVariable=True), INVALID_MODEL, "variable"),
    "scale without zero point": (change_scale([0.1], []), INVALID_MODEL, "quantization"),
    "scales that fit no axis": (change_scale([0.1] * 3, [0] * 3, 1), INVALID_MODEL, "quantization"),
    "quantized axis": (change_scale([0.1] * 8, [0] * 8, 9), INVALID_MODEL, "quantization"),
    "scale is not a number": (change_scale([float("nan")], [0]), INVALID_MODEL, "quantization"),
    "operator code index": (change_operator(0, opcodeIndex=77), INVALID_MODEL, "operator code index"),
    "operator input index": (change_operator(1, inputs=[6, 5, 400]), INVALID_MODEL, "operator input index"),
    "required input is absent": (change_operator(1, inputs=[6, -1, 4]), INVALID_MODEL, "operator input index"),
    "input below -1": (change_operator(1, inputs=[6, 5, -2]), INVALID_MODEL, "operator input index"),
    "too few inputs": (change_operator(1, inputs=[6]), INVALID_MODEL, "operator inputs"),
    "too many inputs": (change_operator(1, inputs=[6, 5, 4, 4]), INVALID_MODEL, "operator inputs"),
    "no outputs": (change_operator(1, outputs=[]), INVALID_MODEL, "operator outputs"),
    "output index": (change_operator(1, outputs=[400]), INVALID_MODEL, "operator output index"),
    "writes a constant": (change_operator(1, outputs=[5]), INVALID_MODEL, "written twice"),
    "writes the input": (change_operator(1, outputs=[0]), INVALID_MODEL, "written twice"),
    "reads ahead": (change_operator(1, inputs=[8, 5, 4]), INVALID_MODEL, "nothing made"),
    "no options": (change_operator(1, builtinOptions=None, builtinOptionsType=0), INVALID_MODEL, "operator options"),
    "options of another operator": (change_operator(1, builtinOptionsType=9), INVALID_MODEL, "operator options"),
    "softmax by zero": (change_options(3, beta=0.0), INVALID_MODEL, "operator options"),
    "softmax by next to nothing": (change_options(3, beta=1e-30), INVALID_MODEL, "operator options"),
    "weights of rank 1": (flat(WEIGHTS), INVALID_MODEL, "rank"),
    "memory plan": (offline_plan, INVALID_MODEL, "memory plan"),
    "intermediates": (change_operator(1, intermediates=[1]), INVALID_MODEL, "intermediates"),
    "graph input index": (lambda t: setattr(graph(t), "inputs", [99]), INVALID_MODEL, "index"),
    "constant as graph input": (lambda t: setattr(graph(t), "inputs", [WEIGHTS]), INVALID_MODEL, "constant"),
    "input named twice": (lambda t: setattr(graph(t), "inputs", [0, 0]), INVALID_MODEL, "twice"),
    "no graph inputs": (lambda t: setattr(graph(t), "inputs", []), INVALID_MODEL, "number of inputs"),
    "graph output index": (lambda t: setattr(graph(t), "outputs", [-1]), INVALID_MODEL, "index"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_refused(name: str) -> None:
    change, code, text = CHANGES[name]
    got = validate(packed(change))
    assert got[0] == code
    assert text in got[1]


def test_an_absent_bias_is_allowed() -> None:
    assert validate(packed(change_operator(1, inputs=[6, 5, -1]))) == (0, "")


def test_softmax_s_factor_is_judged_as_the_board_multiplies() -> None:
    """Exactly, the product is above 2^-26; in the precision of floats it is 2^-26."""

    def change(tree: Any) -> None:
        softmax = graph(tree).operators[3]
        softmax.builtinOptions.beta = (1 + 2.0**-23) * 2.0**-13
        graph(tree).tensors[softmax.inputs[0]].quantization.scale = [(1 - 2.0**-24) * 2.0**-13]

    assert validate(packed(change)) == (INVALID_MODEL, "operator options")
    assert validate(packed(change_options(3, beta=1.0))) == (0, "")


def test_the_engine_s_operators_are_the_limit() -> None:
    assert validate_model(model(), bytes([22, 9]))[0] == OPERATOR  # no SOFTMAX
    assert validate_model(model(), b"")[0] == OPERATOR


@pytest.mark.parametrize("path", MODELS, ids=lambda p: p.parent.name)
def test_every_truncation_is_refused(path: Any) -> None:
    data = path.read_bytes()
    for length in range(len(data)):
        assert validate(data[:length])[0] in (INVALID_MODEL, OPERATOR), length
