"""What arrives at a door as bytes and text, made into what `routing.admission` takes. Raises `InvalidRequest`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic_core import from_json

from agent.core.errors import InvalidRequest, UnknownKey

MAX_OPTIONS = 32
MAX_CONTAINERS = 65_536
"""Arrays and objects in one document: each costs a hundred times its two bytes, and the collector walks over all of
them, so that a payload of nothing else would hold the loop up for half a second. A nested picture of 224 x 224 has
fewer."""
DTYPES = ("float32", "float16", "int8", "uint8", "int16", "int32", "int64")
"""How raw bytes may be read."""


class Undecodable(InvalidRequest):
    """The bytes are not JSON."""

    code = "undecodable"


class TooLarge(InvalidRequest):
    """More bytes than the setting allows."""

    code = "too_large"
    http_status = 413


@dataclass(frozen=True, slots=True)
class RawOptions:
    """What goes with raw tensor bytes: how to read them, and the keys of a request document."""

    dtype: str | None = None
    scale: float = 1.0
    options: Mapping[str, Any] = field(default_factory=dict)


def decode_json(data: bytes) -> Any:
    """JSON of bounded depth, in UTF-8. NaN passes, so that admission can name the tensor that holds it.

    Raises `Undecodable`, which names the position.
    """
    if data.count(b"[") + data.count(b"{") > MAX_CONTAINERS:
        raise Undecodable(
            f"(payload): holds more than {MAX_CONTAINERS} arrays and objects; send the tensor flat, or as raw bytes",
            field="(payload)",
        )
    try:
        return from_json(data, cache_strings="keys")
    except ValueError as error:
        raise Undecodable(f"(payload): is not JSON: {error}", field="(payload)") from None


def read_options(pairs: Iterable[tuple[str, str]]) -> RawOptions:
    """Options given as text, for example `deadline_ms` 50, `use_cache` false, `allowed_regions` eu,us, `dtype` int8."""
    options: dict[str, Any] = {}
    for key, text in pairs:
        if key in options:
            raise UnknownKey(f"{key[:64]}: is given twice", field=key[:64])
        if len(options) >= MAX_OPTIONS:
            raise InvalidRequest(f"(options): at most {MAX_OPTIONS} can be given", field="(options)")
        options[key] = _READERS.get(key, _text)(key, text)
    dtype = options.pop("dtype", None)
    if dtype is not None and dtype not in DTYPES:
        raise InvalidRequest(f"dtype: must be one of {', '.join(DTYPES)}, found {dtype[:32]!r}", field="dtype")
    return RawOptions(dtype, options.pop("scale", 1.0), options)


def check_model(document: object, model: str) -> None:
    """Refuse a document that names another model than the place it came to. Raises `InvalidRequest`."""
    named = document.get("model") if isinstance(document, Mapping) else None
    if named is not None and named != model:
        found = repr(named)[:64]
        raise InvalidRequest(f"model: must be {model!r} as in the topic, or left out; found {found}", field="model")


def named_producer(document: object) -> object:
    """Who a document or a set of options says it comes from; None: it does not say."""
    return document.get("producer") if isinstance(document, Mapping) else None


def _text(key: str, text: str) -> str:
    return text


def _real(key: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise InvalidRequest(f"{key}: must be a number, found {text[:32]!r}", field=key)
    return value


def _whole(key: str, text: str) -> int:
    if not text.isascii() or not text.isdecimal() or len(text) > 9:
        raise InvalidRequest(f"{key}: must be a whole number, found {text[:32]!r}", field=key)
    return int(text)


def read_flag(key: str, text: str) -> bool:
    """`true` or `false`. Raises `InvalidRequest`."""
    if text not in ("true", "false"):
        raise InvalidRequest(f"{key}: must be true or false, found {text[:32]!r}", field=key)
    return text == "true"


def _names(key: str, text: str) -> list[str]:
    return [name for name in text.split(",") if name]


_READERS: Mapping[str, Callable[[str, str], Any]] = {
    "deadline_ms": _real,
    "timeout_ms": _real,
    "scale": _real,
    "priority": _whole,
    "max_retries": _whole,
    "use_cache": read_flag,
    "explain": read_flag,
    "shadow": read_flag,
    "allowed_regions": _names,
}
