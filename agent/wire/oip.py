"""Open Inference Protocol v2 (KServe's "V2"): inference requests and responses, with the binary tensor data extension.

    {"inputs": [{"name": "pixels", "datatype": "FP32", "shape": [1, 8, 8, 1],
                 "parameters": {"binary_data_size": 256}}]}<256 raw little-endian bytes>

The JSON header comes first; its length travels beside the message (`Inference-Header-Content-Length` over HTTP, the
user property `inference-header-content-length` over MQTT). Without it the whole message is JSON, and tensors are
nested or flat lists under `data`. Sans-I/O, bounded, strict: whatever is wrong raises `ProtocolError`.

https://kserve.github.io/website/docs/concepts/architecture/data-plane/v2-protocol
https://github.com/triton-inference-server/server/blob/main/docs/protocol/extension_binary_data.md
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import numpy as np
from pydantic_core import from_json, to_json

from agent.core.errors import ProtocolError
from agent.core.types import Tensor, Tensors

CONTENT_TYPE = "application/octet-stream"
"""Of a message with binary tensor data."""
HEADER_LENGTH = "inference-header-content-length"

MAX_TENSORS = 16
MAX_DIMENSIONS = 8
MAX_HEADER_BYTES = 64 << 10
"""Of a header with raw bytes behind it. A message that is all JSON is bounded by its door."""
MAX_NAME = 256

DATATYPES = {
    "float32": "FP32",
    "float16": "FP16",
    "float64": "FP64",
    "int8": "INT8",
    "int16": "INT16",
    "int32": "INT32",
    "int64": "INT64",
    "uint8": "UINT8",
    "uint16": "UINT16",
    "uint32": "UINT32",
    "uint64": "UINT64",
    "bool": "BOOL",
}
"""numpy's names to the protocol's. BYTES and BF16 are not for the models of this catalogue."""
_DTYPES = {datatype: np.dtype(dtype).newbyteorder("<") for dtype, datatype in DATATYPES.items()}


@dataclass(frozen=True, slots=True)
class RequestedOutput:
    """An output that the caller named, and whether it wants raw bytes."""

    name: str
    binary: bool


@dataclass(frozen=True, slots=True)
class OipRequest:
    """`outputs` empty: all of them, raw if `binary_output`."""

    inputs: dict[str, Tensor]
    outputs: tuple[RequestedOutput, ...] = ()
    id: str | None = None
    parameters: Mapping[str, Any] = field(default_factory=dict)
    binary_output: bool = False


@dataclass(frozen=True, slots=True)
class OipResponse:
    model_name: str
    outputs: dict[str, Tensor]
    model_version: str | None = None
    id: str | None = None
    parameters: Mapping[str, Any] = field(default_factory=dict)


def encode_request(
    inputs: Tensors, *, id: str | None = None, parameters: Mapping[str, Any] | None = None
) -> tuple[bytes, int]:
    """The message and the length of its header. All tensors are raw, and raw outputs are asked for."""
    header = {} if id is None else {"id": id}
    return _encode(header, "inputs", inputs, {**(parameters or {}), "binary_data_output": True})


def decode_request(data: bytes, header_length: int | None = None) -> OipRequest:
    """Raises `ProtocolError`. Binary inputs are views of `data`."""
    header, raw = _split(data, header_length)
    inputs, rest = _tensors(header, "inputs", raw)
    if rest:
        raise ProtocolError(f"{rest} bytes follow the last tensor")
    parameters = _parameters(header)
    binary = parameters.get("binary_data_output", False) is True
    outputs = tuple(
        RequestedOutput(_name(entry, f"outputs[{at}]"), _parameters(entry).get("binary_data", binary) is True)
        for at, entry in enumerate(_entries(header, "outputs"))
    )
    return OipRequest(inputs, outputs, _text(header, "id"), parameters, binary)


def encode_response(response: OipResponse, *, binary: bool = True) -> tuple[bytes, int | None]:
    """The message and the length of its header; None where the whole of it is JSON."""
    header: dict[str, Any] = {"model_name": response.model_name}
    if response.model_version is not None:
        header["model_version"] = response.model_version
    if response.id is not None:
        header["id"] = response.id
    if binary:
        return _encode(header, "outputs", response.outputs, response.parameters)
    if response.parameters:
        header["parameters"] = dict(response.parameters)
    header["outputs"] = [
        {"name": name, "datatype": _datatype(value), "shape": list(value.shape), "data": value.ravel().tolist()}
        for name, value in response.outputs.items()
    ]
    return to_json(header, inf_nan_mode="null"), None


def decode_response(data: bytes, header_length: int | None = None) -> OipResponse:
    """Raises `ProtocolError`. Binary outputs are views of `data`."""
    header, raw = _split(data, header_length)
    outputs, rest = _tensors(header, "outputs", raw)
    if rest:
        raise ProtocolError(f"{rest} bytes follow the last tensor")
    return OipResponse(
        _text(header, "model_name") or "",
        outputs,
        _text(header, "model_version"),
        _text(header, "id"),
        _parameters(header),
    )


def header_length(text: str | None) -> int | None:
    """The value of `Inference-Header-Content-Length`. Raises `ProtocolError`."""
    if text is None:
        return None
    if not (text.isascii() and text.isdigit() and len(text) <= 9):
        raise ProtocolError(f"{HEADER_LENGTH} must be a whole number, found {text[:32]!r}")
    return int(text)


def _encode(header: dict[str, Any], key: str, tensors: Tensors, parameters: Mapping[str, Any]) -> tuple[bytes, int]:
    entries, raw = [], []
    for name, value in tensors.items():
        data = value.astype(value.dtype.newbyteorder("<"), copy=False).tobytes()
        raw.append(data)
        entries.append(
            {
                "name": name,
                "datatype": _datatype(value),
                "shape": value.shape,
                "parameters": {"binary_data_size": len(data)},
            }
        )
    if parameters:
        header["parameters"] = dict(parameters)
    header[key] = entries
    text = to_json(header)
    return b"".join((text, *raw)), len(text)


def _datatype(value: Tensor) -> str:
    try:
        return DATATYPES[value.dtype.name]
    except KeyError:
        raise ProtocolError(f"tensors of {value.dtype.name} cannot be sent") from None


def _split(data: bytes, header_length: int | None) -> tuple[dict[str, Any], memoryview]:
    """The decoded header, and the raw bytes behind it."""
    end = len(data) if header_length is None else header_length
    if header_length is not None and not 0 < header_length <= min(len(data), MAX_HEADER_BYTES):
        limit = min(len(data), MAX_HEADER_BYTES)
        raise ProtocolError(f"{HEADER_LENGTH} must be 1 to {limit}, found {header_length}")
    view = memoryview(data)
    try:
        header = from_json(data if header_length is None else bytes(view[:end]), allow_inf_nan=False)
    except ValueError as error:
        raise ProtocolError(f"the header is not JSON: {error}") from None
    if not isinstance(header, dict):
        raise ProtocolError("the header must be a JSON object")
    return header, view[end:]


def _tensors(header: dict[str, Any], key: str, raw: memoryview) -> tuple[dict[str, Tensor], int]:
    """All tensors of a list, and how many raw bytes are left over."""
    entries = _entries(header, key)
    if not entries:
        raise ProtocolError(f"{key} must hold 1 to {MAX_TENSORS} tensors")
    tensors: dict[str, Tensor] = {}
    offset = 0
    for at, entry in enumerate(entries):
        where = f"{key}[{at}]"
        name = _name(entry, where)
        if name in tensors:
            raise ProtocolError(f"{where}: the name {name!r} is there twice")
        datatype = entry.get("datatype")
        dtype = _DTYPES.get(datatype) if isinstance(datatype, str) else None
        if dtype is None:
            raise ProtocolError(f"{where}.datatype must be one of {', '.join(_DTYPES)}, found {str(datatype)[:32]!r}")
        shape = _shape(entry.get("shape"), where)
        size = _parameters(entry).get("binary_data_size")
        if size is None:
            tensors[name] = _listed(entry.get("data"), dtype, shape, where)
            continue
        if "data" in entry:
            raise ProtocolError(f"{where} has both data and binary_data_size")
        expected = math.prod(shape) * dtype.itemsize
        if type(size) is not int or size != expected:
            raise ProtocolError(f"{where}: binary_data_size must be {expected} for its shape, found {str(size)[:32]}")
        if offset + size > len(raw):
            raise ProtocolError(f"{where}: the message ends {offset + size - len(raw)} bytes too early")
        tensors[name] = np.frombuffer(raw[offset : offset + size], dtype).reshape(shape)
        offset += size
    return tensors, len(raw) - offset


def holds_only(value: object, *kinds: type) -> bool:
    """Whether it is a value of these types and no others, or lists of such. To be asked before numpy makes an array of
    what a stranger sent: it would take true for 1, and make one long text among many short ones gigabytes."""
    level: Sequence[Any] = (value,)
    for _ in range(MAX_DIMENSIONS + 1):
        found = set(map(type, level))
        if found <= set(kinds):
            return True
        if found != {list}:
            return False
        level = list(chain.from_iterable(level))
    return False


def _listed(data: object, dtype: np.dtype[Any], shape: tuple[int, ...], where: str) -> Tensor:
    """A tensor out of a JSON list, flat or nested, without losing a value to its type."""
    if not isinstance(data, list):
        raise ProtocolError(f"{where}.data must be a list, or binary_data_size must be given")
    if not holds_only(data, bool if dtype.kind == "b" else int, bool if dtype.kind == "b" else float):
        raise ProtocolError(f"{where}.data must hold values of {dtype.name}")
    try:
        value = np.asarray(data)
    except (ValueError, TypeError, OverflowError):
        raise ProtocolError(f"{where}.data: rows differ in length") from None
    kinds = {"b": "b", "f": "fiu"}.get(dtype.kind, "iu")
    if value.size != math.prod(shape) or (value.ndim != 1 and value.shape != shape):
        raise ProtocolError(f"{where}.data must have shape {list(shape)}, found {list(value.shape)}")
    if value.size and value.dtype.kind not in kinds:
        raise ProtocolError(f"{where}.data must hold values of {dtype.name}")
    with np.errstate(over="ignore"):
        tensor: Tensor = value.astype(dtype).reshape(shape)
    if dtype.kind in "iu" and not np.array_equal(tensor.ravel(), value.ravel()):
        raise ProtocolError(f"{where}.data holds a value that {dtype.name} cannot")
    return tensor


def _shape(value: object, where: str) -> tuple[int, ...]:
    if not isinstance(value, list) or not 0 < len(value) <= MAX_DIMENSIONS:
        raise ProtocolError(f"{where}.shape must be a list of 1 to {MAX_DIMENSIONS} numbers")
    if not all(type(size) is int and 0 <= size <= 1 << 31 for size in value) or math.prod(value) > 1 << 31:
        raise ProtocolError(f"{where}.shape must hold whole numbers from 0, together at most 2^31")
    return tuple(value)


def _entries(header: dict[str, Any], key: str) -> Sequence[dict[str, Any]]:
    entries = header.get(key, [])
    if not isinstance(entries, list) or len(entries) > MAX_TENSORS:
        raise ProtocolError(f"{key} must be a list of at most {MAX_TENSORS} objects")
    if not all(isinstance(entry, dict) for entry in entries):
        raise ProtocolError(f"{key} must hold objects")
    return entries


def _parameters(entry: Mapping[str, Any]) -> Mapping[str, Any]:
    parameters = entry.get("parameters")
    if parameters is None:
        return {}
    if not isinstance(parameters, dict):
        raise ProtocolError("parameters must be an object")
    return parameters


def _name(entry: Mapping[str, Any], where: str) -> str:
    name = entry.get("name")
    if not isinstance(name, str) or not 0 < len(name) <= MAX_NAME:
        raise ProtocolError(f"{where}.name must be 1 to {MAX_NAME} characters")
    return name


def _text(header: Mapping[str, Any], key: str) -> str | None:
    value = header.get(key)
    if value is not None and (not isinstance(value, str) or len(value) > MAX_NAME):
        raise ProtocolError(f"{key} must be a string of at most {MAX_NAME} characters")
    return value
