"""Protocol buffers by hand, and ONNX files that no exporter writes."""

from __future__ import annotations

import struct

INT64, BOOL, FLOAT = 7, 9, 1  # TensorProto.DataType


def varint(value: int) -> bytes:
    found = b""
    while value > 0x7F:
        found += bytes([value & 0x7F | 0x80])
        value >>= 7
    return found + bytes([value])


def field(number: int, value: bytes | int) -> bytes:
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def constant(name: str, kind: int, raw: bytes, *shape: int) -> bytes:
    """A TensorProto."""
    dims = b"".join(field(1, size) for size in shape)
    return dims + field(2, kind) + field(8, name.encode()) + field(9, raw)


def external(name: str, location: str) -> bytes:
    """A TensorProto whose data is in another file."""
    entry = field(1, b"location") + field(2, location.encode())
    return field(1, 1) + field(2, FLOAT) + field(8, name.encode()) + field(13, entry) + field(14, 1)


def value(name: str, kind: int, *shape: int) -> bytes:
    """A ValueInfoProto."""
    dims = b"".join(field(1, field(1, size)) for size in shape)
    return field(1, name.encode()) + field(2, field(1, field(1, kind) + field(2, dims)))


def node(operator: str, inputs: list[str], outputs: list[str], attributes: bytes = b"") -> bytes:
    names = b"".join(field(1, name.encode()) for name in inputs) + b"".join(field(2, n.encode()) for n in outputs)
    return names + field(4, operator.encode()) + attributes


def graph(nodes: list[bytes], constants: list[bytes], inputs: list[bytes], outputs: list[bytes]) -> bytes:
    parts = ((1, nodes), (5, constants), (11, inputs), (12, outputs))
    return field(2, b"g") + b"".join(field(number, part) for number, found in parts for part in found)


def model(of: bytes) -> bytes:
    """A ModelProto, opset 13."""
    return field(1, 8) + field(8, field(2, 13)) + field(7, of)


def endless(name: str, *shape: int) -> bytes:
    """Takes and gives one float tensor, after 2**63 - 1 rounds of a Loop."""
    body = graph(
        [node("Identity", ["go"], ["go_on"]), node("Neg", ["v"], ["w"])],
        [],
        [value("i", INT64), value("go", BOOL), value("v", FLOAT, *shape)],
        [value("go_on", BOOL), value("w", FLOAT, *shape)],
    )
    attribute = field(5, field(1, b"body") + field(6, body) + field(20, 5))
    rounds = constant("rounds", INT64, struct.pack("<q", (1 << 63) - 1))
    loop = node("Loop", ["rounds", "yes", name], ["out"], attribute)
    io = [value(name, FLOAT, *shape)], [value("out", FLOAT, *shape)]
    return model(graph([loop], [rounds, constant("yes", BOOL, b"\1")], *io))


def glutton(megabytes: int, name: str, *shape: int) -> bytes:
    """A few hundred bytes that ask for memory: a shape made while it runs, which no dimension in the file tells."""
    sizes = constant("sizes", INT64, struct.pack("<2q", megabytes, 1 << 18), 2)
    nodes = [node("ConstantOfShape", ["sizes"], ["many"]), node("ReduceSum", ["many"], ["sum"])]
    nodes.append(node("Add", [name, "sum"], ["out"]))
    return model(graph(nodes, [sizes], [value(name, FLOAT, *shape)], [value("out", FLOAT, *shape)]))
