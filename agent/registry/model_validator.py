"""Checks a TensorFlow Lite model before it is sent to a board: the same rules, verdicts and reasons as the board's own
(`firmware/core/validator.h`), so that a model which the board would refuse does not cross the line first.

What is checked and what is not is written there. A test compares the two on thousands of broken models.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from agent.core.errors import EdgeAgentError
from agent.registry.flatbuffer import Buffer, Table, Vector
from agent.wire.codes import ErrorCode

SCHEMA_VERSION: Final = 3
MAX_TENSORS: Final = 512
MAX_OPERATORS: Final = 512
MAX_OPERATOR_CODES: Final = 64
MAX_BUFFERS: Final = 1024
MAX_RANK: Final = 6
MAX_MODEL_IO: Final = 8
MAX_CHANNELS: Final = 4096
INFER_HEAD_BYTES: Final = 12
RESULT_HEAD_BYTES: Final = 16

INT32_MAX: Final = 0x7FFF_FFFF
ABSENT: Final = 0xFFFF_FFFF
"""-1: an optional tensor that is not there."""
INFINITY_BITS: Final = 0x7F80_0000
MINUS_ZERO_BITS: Final = 0x8000_0000

ELEMENT_BYTES: Final = {0: 4, 2: 4, 3: 1, 4: 8, 6: 1, 7: 2, 9: 1}
"""Of FLOAT32, INT32, UINT8, INT64, BOOL, INT16, INT8; the kernels take no other types."""
RESHAPE_OPTIONS: Final = 17
SQUEEZE_OPTIONS: Final = 30
STRIDES: Final = {1: (1, 2), 2: (1, 2), 5: (1, 2, 3, 4), 49: (1, 2)}
"""Fields of convolutions' and pools' options that engines divide by."""
MAX_STRIDE: Final = 0x7FFF
SOFTMAX_OPTIONS: Final = 9
LEAST_SOFTMAX_SCALE: Final = 2.0**-26 * (1 + 2.0**-24)
"""A product of two floats, exact as here, that is above this is above 2^-26 where the board rounds it to a float."""
OFFLINE_PLAN: Final = b"OfflineMemoryAllocation"
"""The metadata that TensorFlow Lite Micro looks for: a memory plan that it would follow unchecked."""


@dataclass(frozen=True, slots=True)
class Arity:
    """What a kernel reads without looking.

    `outputs` is None where their number is the operator's own. `options` is the kind that it must have, `rank` that of
    input 0 and output 0, `filter_rank` that of input 1; 0: any.
    """

    min_inputs: int
    max_inputs: int
    outputs: int | None = 1
    options: int = 0
    rank: int = 0
    filter_rank: int = 0


ARITY: Final = {
    0: Arity(2, 2, options=11),  # ADD
    1: Arity(1, 1, options=5, rank=4),  # AVERAGE_POOL_2D
    2: Arity(1, 16, options=10),  # CONCATENATION
    3: Arity(2, 3, options=1, rank=4, filter_rank=4),  # CONV_2D
    4: Arity(2, 3, options=2, rank=4, filter_rank=4),  # DEPTHWISE_CONV_2D
    6: Arity(1, 1),  # DEQUANTIZE
    9: Arity(2, 3, options=8, filter_rank=2),  # FULLY_CONNECTED
    14: Arity(1, 1),  # LOGISTIC
    17: Arity(1, 1, options=5, rank=4),  # MAX_POOL_2D
    18: Arity(2, 2, options=21),  # MUL
    19: Arity(1, 1),  # RELU
    21: Arity(1, 1),  # RELU6
    22: Arity(1, 2),  # RESHAPE
    25: Arity(1, 1, options=9),  # SOFTMAX
    28: Arity(1, 1),  # TANH
    34: Arity(2, 2),  # PAD
    39: Arity(2, 2),  # TRANSPOSE
    40: Arity(2, 2, options=27),  # MEAN
    41: Arity(2, 2, options=28),  # SUB
    43: Arity(1, 1, options=30),  # SQUEEZE
    45: Arity(4, 4, options=32),  # STRIDED_SLICE
    49: Arity(2, 2, None, options=35),  # SPLIT
    55: Arity(2, 2),  # MAXIMUM
    56: Arity(2, 2, options=40),  # ARG_MAX
    57: Arity(2, 2),  # MINIMUM
    60: Arity(3, 3),  # PADV2
    67: Arity(3, 4, options=49),  # TRANSPOSE_CONV
    70: Arity(2, 2),  # EXPAND_DIMS
    74: Arity(2, 2, options=27),  # SUM
    77: Arity(1, 1),  # SHAPE
    83: Arity(1, 16, options=59),  # PACK
    97: Arity(2, 2, options=74, rank=4),  # RESIZE_NEAREST_NEIGHBOR
    98: Arity(1, 1, options=75),  # LEAKY_RELU
    114: Arity(1, 1),  # QUANTIZE
    117: Arity(1, 1),  # HARD_SWISH
}
"""By the schema's builtin code."""


class ModelInvalid(EdgeAgentError):
    """The board would refuse the model. `code` is INVALID_MODEL or OPERATOR; the text says which check failed."""

    def __init__(self, text: str, code: ErrorCode = ErrorCode.INVALID_MODEL) -> None:
        super().__init__(text)
        self.code = code


@dataclass(frozen=True, slots=True)
class ModelShape:
    """Bytes of all inputs and of all outputs, concatenated."""

    input_bytes: int
    output_bytes: int


def validate_model(model: bytes, operators: Iterable[int], max_message: int) -> ModelShape:
    """The sizes of a model that a board with these builtin operator codes and this `max_message` (both of its HELLO)
    takes. Raises `ModelInvalid`."""
    return _Validator(model, frozenset(operators) & ARITY.keys(), max_message).run()


class _Validator:
    def __init__(self, model: bytes, operators: frozenset[int], max_message: int) -> None:
        self._model = model
        self._file = Buffer(model)
        self._operators = operators
        self._max_message = max_message
        self._arity: list[Arity] = []
        self._made: set[int] = set()  # tensors that have a value so far

    def run(self) -> ModelShape:
        if len(self._model) < 8 or self._model[4:8] != b"TFL3":
            raise ModelInvalid("not a TFL3 file")
        root = Table(self._file, self._file.scalar(0, 4))
        if root.scalar(0, 4) != SCHEMA_VERSION:
            raise ModelInvalid("schema version")
        codes = root.vector(1, 4)
        self._buffers = root.vector(4, 4)
        subgraphs = root.vector(2, 4)
        self._check_file("root table")
        if subgraphs.size != 1:
            raise ModelInvalid("one subgraph expected")
        self._operator_codes(codes)
        self._check_buffers()
        self._check_metadata(root.vector(6, 4))

        graph = Table(self._file, subgraphs.table_at(0))
        self._tensors = graph.vector(0, 4)
        inputs, outputs, operators = (graph.vector(field, 4) for field in (1, 2, 3))
        self._check_file("subgraph")
        self._check_tensors()
        input_bytes = self._graph_inputs(inputs)
        self._check_operators(operators)
        return ModelShape(input_bytes, self._graph_outputs(outputs))

    def _check_file(self, text: str) -> None:
        if not self._file.ok:
            raise ModelInvalid(text)

    def _operator_codes(self, codes: Vector) -> None:
        if not 1 <= codes.size <= MAX_OPERATOR_CODES:
            raise ModelInvalid("number of operator codes")
        for i in range(codes.size):
            table = Table(self._file, codes.table_at(i))
            code = max(table.scalar(0, 1), table.scalar(3, 4))
            custom = table.has(1)
            self._check_file("operator code table")
            if custom:
                raise ModelInvalid("custom operator", ErrorCode.OPERATOR)
            if code not in self._operators:
                raise ModelInvalid("operator that the engine lacks", ErrorCode.OPERATOR)
            self._arity.append(ARITY[code])

    def _check_buffers(self) -> None:
        if not 1 <= self._buffers.size <= MAX_BUFFERS:
            raise ModelInvalid("number of buffers")
        for i in range(self._buffers.size):
            data = self._buffer_data(i)
            self._check_file("buffer outside the file")
            if i == 0 and data.size != 0:
                raise ModelInvalid("buffer 0 is not empty")

    def _check_metadata(self, entries: Vector) -> None:
        if not self._file.ok or entries.size > MAX_BUFFERS:
            raise ModelInvalid("metadata")
        for i in range(entries.size):
            name = Table(self._file, entries.table_at(i)).vector(0, 1)
            inside = self._file.inside(name.position, name.size, 1)
            # A text ends with a zero that its length does not count.
            ends = inside and self._file.scalar(name.position + name.size, 1) == 0 and name.position != 0
            if not self._file.ok or not ends:
                raise ModelInvalid("metadata")
            if self._model.startswith(OFFLINE_PLAN, name.position, name.position + name.size):
                raise ModelInvalid("offline memory plan")

    def _buffer_data(self, index: int) -> Vector:
        table = Table(self._file, self._buffers.table_at(index))
        # Data behind the FlatBuffer is for files over 2 GB. 1 is how converters write "not used".
        if table.scalar(1, 8) > 1 or table.scalar(2, 8) > 1:
            self._file.fail()
        return table.vector(0, 1)

    def _check_tensors(self) -> None:
        if not 1 <= self._tensors.size <= MAX_TENSORS:
            raise ModelInvalid("number of tensors")
        for i in range(self._tensors.size):
            table = Table(self._file, self._tensors.table_at(i))
            shape = table.vector(0, 4)
            size = self._tensor_bytes(i)
            buffer = table.scalar(2, 4)
            variable = table.scalar(5, 1) != 0
            self._check_file("tensor table")
            if size == 0:
                raise ModelInvalid("tensor type or shape")
            if buffer >= self._buffers.size:
                raise ModelInvalid("buffer index")
            if table.has(6) or table.has(9):
                raise ModelInvalid("sparse or variant tensor")
            data = self._buffer_data(buffer)
            if data.size != 0:
                self._check_constant(data, size, variable)
            if data.size != 0 or variable:
                self._made.add(i)
            if not self._quantization_is_sane(table, shape):
                raise ModelInvalid("quantization parameters")

    @staticmethod
    def _check_constant(data: Vector, size: int, variable: bool) -> None:
        if data.size != size:
            raise ModelInvalid("buffer and tensor differ in size")
        if variable:
            raise ModelInvalid("variable tensor with data")
        if data.position % 4 != 0:
            raise ModelInvalid("buffer is not aligned")

    def _tensor_bytes(self, index: int) -> int:
        """0 if the type or a dimension is not one that can be computed with."""
        table = Table(self._file, self._tensors.table_at(index))
        shape = table.vector(0, 4)
        size = ELEMENT_BYTES.get(table.scalar(1, 1), 0)
        if shape.size > MAX_RANK:
            return 0
        for dimension in shape:
            if not 1 <= dimension <= INT32_MAX:
                return 0
            size *= dimension
            if size > INT32_MAX:
                return 0
        return size

    def _quantization_is_sane(self, tensor: Table, shape: Vector) -> bool:
        at = tensor.target(4)
        if at == 0:
            return self._file.ok
        table = Table(self._file, at)
        scale, zero_point = table.vector(2, 4), table.vector(3, 8)
        axis = table.scalar(6, 4)
        if not self._file.ok or table.scalar(4, 1) != 0:
            return False
        if scale.size == 0:
            return zero_point.size == 0
        if zero_point.size != scale.size or scale.size > MAX_CHANNELS:
            return False
        # Neither negative nor infinite nor a NaN. Zero is written for a channel whose weights are all zero.
        if any(bits >= INFINITY_BITS and bits != MINUS_ZERO_BITS for bits in scale):
            return False
        return scale.size == 1 or (axis < shape.size and scale.size == shape[axis])

    def _graph_inputs(self, inputs: Vector) -> int:
        indices = self._graph_io(inputs)
        for index in indices:
            if index >= self._tensors.size:
                raise ModelInvalid("input or output index")
            if index in self._made:
                raise ModelInvalid("input that is constant or named twice")
            self._made.add(index)
        return self._total(indices, INFER_HEAD_BYTES)

    def _graph_outputs(self, outputs: Vector) -> int:
        indices = self._graph_io(outputs)
        for index in indices:
            if index >= self._tensors.size:
                raise ModelInvalid("input or output index")
            if index not in self._made:
                raise ModelInvalid("output that nothing makes")
        return self._total(indices, RESULT_HEAD_BYTES)

    @staticmethod
    def _graph_io(vector: Vector) -> list[int]:
        if not 1 <= vector.size <= MAX_MODEL_IO:
            raise ModelInvalid("number of inputs or outputs")
        return list(vector)

    def _total(self, indices: list[int], head: int) -> int:
        total = sum(self._tensor_bytes(index) for index in indices)
        if total > self._max_message - head:
            raise ModelInvalid("inputs or outputs over max_message")
        return total

    def _check_operators(self, operators: Vector) -> None:
        if not 1 <= operators.size <= MAX_OPERATORS:
            raise ModelInvalid("number of operators")
        for i in range(operators.size):
            table = Table(self._file, operators.table_at(i))
            code = table.scalar(0, 4)
            inputs, outputs, intermediates = (table.vector(field, 4) for field in (1, 2, 8))
            self._check_file("operator table")
            if code >= len(self._arity):
                raise ModelInvalid("operator code index")
            arity = self._arity[code]
            self._check_arity(arity, inputs, outputs)
            if intermediates.size != 0:
                raise ModelInvalid("operator with intermediates")
            if table.has(9) or table.has(10) or table.has(12):
                raise ModelInvalid("large or second options")
            if not self._options_are_sane(table, arity, inputs[0]):
                raise ModelInvalid("operator options")
            self._check_data_flow(arity, inputs, outputs)
            ranks = ((inputs[0], arity.rank), (outputs[0], arity.rank), (inputs[1], arity.filter_rank))
            if any(rank and self._rank(tensor) != rank for tensor, rank in ranks):
                raise ModelInvalid("rank of an operator's tensor")

    @staticmethod
    def _check_arity(arity: Arity, inputs: Vector, outputs: Vector) -> None:
        if not arity.min_inputs <= inputs.size <= arity.max_inputs:
            raise ModelInvalid("operator inputs")
        good = 1 <= outputs.size <= MAX_MODEL_IO if arity.outputs is None else outputs.size == arity.outputs
        if not good:
            raise ModelInvalid("operator outputs")

    def _rank(self, tensor: int) -> int:
        return Table(self._file, self._tensors.table_at(tensor)).vector(0, 4).size

    def _options_are_sane(self, operator: Table, arity: Arity, first_input: int) -> bool:
        """Options are scalars, except for RESHAPE and SQUEEZE, whose field 0 is a list of integers."""
        kind = operator.scalar(3, 1)
        at = operator.target(4)
        if arity.options and (at == 0 or kind != arity.options):
            return False
        if at == 0:
            return self._file.ok
        table = Table(self._file, at)
        # An option may be read as a scalar of up to 8 bytes that begins at the table's last byte.
        self._file.inside(table.end, 1, 7)
        if kind in (RESHAPE_OPTIONS, SQUEEZE_OPTIONS):
            return table.vector(0, 4).size <= MAX_RANK and self._file.ok
        if any(not 1 <= table.scalar(field, 4) <= MAX_STRIDE for field in STRIDES.get(kind, ())):
            return False
        if arity.options == SOFTMAX_OPTIONS and not self._beta_is_sane(table.scalar(0, 4), first_input):
            return False
        return self._file.ok

    def _beta_is_sane(self, bits: int, tensor: int) -> bool:
        """The factor of SOFTMAX: quantized, engines take it as a number of at least 2^-26 of the input's scale."""
        if not 0 < bits < INFINITY_BITS or tensor >= self._tensors.size:
            return False
        at = Table(self._file, self._tensors.table_at(tensor)).target(4)
        if at == 0:
            return True
        scale = Table(self._file, at).vector(2, 4)
        return scale.size == 0 or _float(bits) * _float(scale[0]) > LEAST_SOFTMAX_SCALE

    def _check_data_flow(self, arity: Arity, inputs: Vector, outputs: Vector) -> None:
        """An operator reads only what was made before it, and no tensor is written twice."""
        for k, tensor in enumerate(inputs):
            # Absent tensors stand only behind those that the kernel always reads.
            if tensor == ABSENT and k >= arity.min_inputs:
                continue
            if tensor >= self._tensors.size:
                raise ModelInvalid("operator input index")
            if tensor not in self._made:
                raise ModelInvalid("operator reads what nothing made")
        for tensor in outputs:
            if tensor >= self._tensors.size:
                raise ModelInvalid("operator output index")
            if tensor in self._made:
                raise ModelInvalid("tensor is written twice")
            self._made.add(tensor)


def _float(bits: int) -> float:
    return float(struct.unpack("<f", bits.to_bytes(4, "little"))[0])
