"""Looks through a model file of unknown origin before any library opens it: whether what it points at lies inside it,
how deep it nests, how large its tensors are, and that it names no other files. What its operators do is not judged: for
that there is the disposable process that opens it first (`runtimes.isolated`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Final

from agent.registry.flatbuffer import Buffer, Table, Vector

MAX_FILE_BYTES: Final = 1 << 30
MAX_ENTRIES: Final = 1 << 16
"""Of any table of a TensorFlow Lite file: operators, tensors, buffers."""
MAX_SUBGRAPHS: Final = 64
MAX_ELEMENTS: Final = 1 << 31
"""Of one tensor."""
MAX_DEPTH: Final = 64
"""Of messages in messages in an ONNX file: graphs in the attributes of nodes of graphs."""
MAX_FIELDS: Final = 1 << 21
"""Of an ONNX file, all together."""
ABSENT: Final = 0xFFFF_FFFF
SCHEMA_VERSION: Final = 3
MAX_STEPS: Final = 1 << 20
"""Tables and indices of a TensorFlow Lite file that are looked at, those that several point to each time."""


def check_structure(name: str, data: bytes, format: str) -> None:
    """Of the content of a file. Raises `ValueError` that says what is wrong."""
    if len(data) > MAX_FILE_BYTES:
        raise ValueError(f"{name}: {len(data)} bytes, and models of unknown origin may have {MAX_FILE_BYTES}")
    try:
        _check_tflite(data) if format == "tflite" else _OnnxFile(data).check()
    except ValueError as error:
        raise ValueError(f"{name}: its structure is wrong: {error}") from None


# --- TensorFlow Lite: a FlatBuffer (schema.fbs of TensorFlow) ---------------------------------------------------------


def _check_tflite(data: bytes) -> None:
    file = Buffer(data)
    if len(data) < 8 or data[4:8] != b"TFL3":
        raise ValueError("it is no TFL3 file")
    root = Table(file, file.scalar(0, 4))
    if root.scalar(0, 4) != SCHEMA_VERSION:
        raise ValueError(f"its schema version is not {SCHEMA_VERSION}")
    codes, graphs, buffers = root.vector(1, 4), root.vector(2, 4), root.vector(4, 4)
    _bounded(file, "operator codes", codes)
    _bounded(file, "buffers", buffers)
    _bounded(file, "subgraphs", graphs, MAX_SUBGRAPHS)
    if graphs.size == 0:
        raise ValueError("it has no graph")
    for index in range(buffers.size):
        table = Table(file, buffers.table_at(index))
        table.vector(0, 1)
        if table.scalar(1, 8) > 1 or table.scalar(2, 8) > 1:
            raise ValueError(f"buffer {index} lies behind the FlatBuffer")
        _inside(file, f"buffer {index}")
    steps = 0
    for index in range(graphs.size):
        steps = _check_graph(file, Table(file, graphs.table_at(index)), codes.size, buffers.size, steps)


def _counted(steps: int, more: int) -> int:
    if steps + more > MAX_STEPS:
        raise ValueError(f"more than {MAX_STEPS} tensors, operators and indices")
    return steps + more


def _check_graph(file: Buffer, graph: Table, codes: int, buffers: int, steps: int) -> int:
    tensors, inputs, outputs, operators = (graph.vector(field, 4) for field in range(4))
    for what, vector in (("tensors", tensors), ("inputs", inputs), ("outputs", outputs), ("operators", operators)):
        _bounded(file, what, vector)
        steps = _counted(steps, vector.size)
    for index in range(tensors.size):
        table = Table(file, tensors.table_at(index))
        shape, buffer = table.vector(0, 4), table.scalar(2, 4)
        _inside(file, f"tensor {index}")
        if shape.size > 32 or math.prod(max(1, dim) for dim in shape) > MAX_ELEMENTS:
            raise ValueError(f"tensor {index} has more than {MAX_ELEMENTS} elements")
        if buffer >= max(1, buffers):
            raise ValueError(f"tensor {index} is in buffer {buffer} of {buffers}")
    for what, vector in (("input", inputs), ("output", outputs)):
        _indices(what, vector, tensors.size)
    for index in range(operators.size):
        table = Table(file, operators.table_at(index))
        code = table.scalar(0, 4)
        parts = [table.vector(field, 4) for field in (1, 2)]
        _inside(file, f"operator {index}")
        if code >= codes:
            raise ValueError(f"operator {index} has code {code} of {codes}")
        for part in parts:
            _bounded(file, f"tensors of operator {index}", part)
            steps = _counted(steps, part.size)
            _indices(f"operator {index}", part, tensors.size)
    return steps


def _bounded(file: Buffer, what: str, vector: Vector, most: int = MAX_ENTRIES) -> None:
    _inside(file, what)
    if vector.size > most:
        raise ValueError(f"{vector.size} {what}, where {most} are allowed")


def _inside(file: Buffer, what: str) -> None:
    if not file.ok:
        raise ValueError(f"{what} outside of the file")


def _indices(what: str, vector: Vector, count: int) -> None:
    for tensor in vector:
        if tensor >= count and tensor != ABSENT:
            raise ValueError(f"{what} names tensor {tensor} of {count}")


# --- ONNX: protocol buffers (onnx.proto of ONNX) ----------------------------------------------------------------------

_MODEL_GRAPH, _MODEL_FUNCTIONS = 7, 25
_GRAPH_NODE, _GRAPH_INITIALIZER, _GRAPH_SPARSE = 1, 5, 15
_NODE_ATTRIBUTE = 5
_ATTRIBUTE = {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"}
_FUNCTION_NODE, _FUNCTION_ATTRIBUTE = 7, 11
_SPARSE_PARTS = (1, 2)
_TENSOR_DIMS, _TENSOR_EXTERNAL, _TENSOR_LOCATION = 1, 13, 14
_NESTED = {
    "model": {_MODEL_GRAPH: "graph", _MODEL_FUNCTIONS: "function"},
    "graph": {_GRAPH_NODE: "node", _GRAPH_INITIALIZER: "tensor", _GRAPH_SPARSE: "sparse"},
    "node": {_NODE_ATTRIBUTE: "attribute"},
    "attribute": _ATTRIBUTE,
    "function": {_FUNCTION_NODE: "node", _FUNCTION_ATTRIBUTE: "attribute"},
    "sparse": dict.fromkeys(_SPARSE_PARTS, "tensor"),
    "tensor": {},
}
"""Of each kind of message, which fields hold further ones that are looked through."""


class _OnnxFile:
    def __init__(self, data: bytes) -> None:
        self._data = data
        self._fields = 0

    def check(self) -> None:
        """Without recursion: what a file says must not decide how deep this goes."""
        graphs = 0
        waiting = [("model", 0, len(self._data), 0)]
        while waiting:
            kind, start, end, depth = waiting.pop()
            if depth > MAX_DEPTH:
                raise ValueError(f"messages nest more than {MAX_DEPTH} deep")
            graphs += kind == "graph"
            elements = 1
            for field, wire, at, size, value in self._walk(start, end):
                if kind == "tensor":
                    elements = self._tensor_field(field, wire, at, size, value, elements)
                elif wire == 2 and field in _NESTED[kind]:
                    waiting.append((_NESTED[kind][field], at, at + size, depth + 1))
        if not graphs:
            raise ValueError("it has no graph")

    def _tensor_field(self, field: int, wire: int, at: int, size: int, value: int, elements: int) -> int:
        if field == _TENSOR_EXTERNAL or (field == _TENSOR_LOCATION and value == 1):
            raise ValueError("a tensor is kept in another file")
        if field == _TENSOR_DIMS:
            dims = [value] if wire == 0 else self._packed(at, at + size)
            elements = math.prod((elements, *(max(1, dim) for dim in dims)))
            if elements > MAX_ELEMENTS:
                raise ValueError(f"a tensor has more than {MAX_ELEMENTS} elements")
        return elements

    def _walk(self, start: int, end: int) -> Iterator[tuple[int, int, int, int, int]]:
        """(field, wire type, start, bytes, value) of each field of a message."""
        at = start
        while at < end:
            self._fields += 1
            if self._fields > MAX_FIELDS:
                raise ValueError(f"more than {MAX_FIELDS} fields")
            key, at = self._varint(at, end)
            field, wire, size, value = key >> 3, key & 7, 0, 0
            if wire == 0:
                value, at = self._varint(at, end)
            elif wire == 2:
                size, at = self._varint(at, end)
            elif wire in (1, 5):
                size = 8 if wire == 1 else 4
            else:
                raise ValueError(f"wire type {wire}")
            if field == 0 or size > end - at:
                raise ValueError("a field outside of its message")
            yield field, wire, at, size, value
            at += size

    def _packed(self, at: int, end: int) -> list[int]:
        found: list[int] = []
        while at < end:
            value, at = self._varint(at, end)
            found.append(value)
            if len(found) > 64:
                raise ValueError("a tensor of more than 64 dimensions")
        return found

    def _varint(self, at: int, end: int) -> tuple[int, int]:
        value = 0
        for shift in range(0, 70, 7):
            if at >= end:
                break
            byte = self._data[at]
            at += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value, at
        raise ValueError("a number that does not end")
