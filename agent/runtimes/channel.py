"""Messages between the daemon and its runtime process: a JSON header, then tensors as raw bytes.

    message := length of the rest (u32) | length of the header (u32) | header | tensors
    header  := {..., "tensors": [[name, dtype, shape], ...]}

Both ends are the same program on the same machine, so there is no version and numbers are in its byte order.
"""

from __future__ import annotations

import json
import struct
from typing import Any

import numpy as np

from agent.core.types import Tensor, Tensors

HEAD = struct.Struct("=II")
MAX_MESSAGE = 256 << 20
"""Bytes; a longer one means that the stream is out of step."""
_KINDS = "biuf"
"""numpy's letters for truth values, whole and real numbers."""


def encode(header: dict[str, Any], tensors: Tensors) -> bytes:
    """One message."""
    described = [[name, value.dtype.str, value.shape] for name, value in tensors.items()]
    head = json.dumps({**header, "tensors": described}, separators=(",", ":")).encode()
    data = [value.tobytes() for value in tensors.values()]
    return b"".join((HEAD.pack(4 + len(head) + sum(map(len, data)), len(head)), head, *data))


def size(start: bytes | bytearray) -> int:
    """Bytes of the message that begins with these, at least `HEAD.size` of them. Raises `ValueError`."""
    length: int = HEAD.unpack_from(start)[0]
    if not 4 <= length <= MAX_MESSAGE:
        raise ValueError(f"a message of {length} bytes")
    return 4 + length


def decode(message: bytes) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Header and tensors of one whole message; the tensors are views of it. Raises `ValueError`, `KeyError` or
    `TypeError`.

    A child that a model has taken over writes what it likes: only numbers are taken, for an array of objects would have
    its bytes followed as addresses of this process.
    """
    at = HEAD.size + HEAD.unpack_from(message)[1]
    header: dict[str, Any] = json.loads(message[HEAD.size : at])
    tensors: dict[str, Tensor] = {}
    for name, dtype, shape in header.pop("tensors"):
        kind = np.dtype(dtype)
        if kind.kind not in _KINDS or any(size < 0 for size in shape):
            raise ValueError(f"a tensor of {str(kind)[:32]} and shape {str(shape)[:64]}")
        value = np.ndarray(shape, kind, message, at)
        tensors[name] = value
        at += value.nbytes
    return header, tensors
