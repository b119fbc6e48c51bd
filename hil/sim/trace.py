"""Reads a recorded trace (docs/traces.md): what was asked, what was decided, and what came of it."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agent.core.types import AccuracyMode, LatencyClass
from agent.registry.catalog import Catalog
from hil.sim.load import Kind
from hil.sim.setting import Misuse

SCHEMA = 1
OK = "ok"
_KEYS = {"header": ("schema", "models", "targets"), "request": ("at", "request", "stages", "outcome")}


@dataclass(frozen=True, slots=True)
class Record:
    """One request of the trace. `at_s` is seconds since the first one."""

    number: int
    at_s: float
    request: Mapping[str, Any]
    stages: tuple[Mapping[str, Any], ...]
    outcome: Mapping[str, Any]

    @property
    def kind(self) -> Kind:
        asked = self.request
        return Kind(
            asked["producer"],
            asked["model"],
            LatencyClass(asked["latency_class"]),
            1.0,
            float(asked["deadline_ms"]),
            int(asked["priority"]),
            AccuracyMode(asked["accuracy"]),
            frozenset(asked["allowed_regions"]),
            asked["variant"],
            int(asked["max_retries"]),
            bool(asked["use_cache"]),
        )

    @property
    def truth(self) -> str | None:
        label: str | None = self.request.get("truth")
        return label

    def attempts(self) -> Iterator[Mapping[str, Any]]:
        for stage in self.stages:
            yield from stage["attempts"]

    def candidates(self) -> Iterator[Mapping[str, Any]]:
        for stage in self.stages:
            yield from (stage["decision"] or {}).get("candidates", ())


@dataclass(frozen=True, slots=True)
class Trace:
    """`targets` and `models` are those of the last header. `skipped`: lines that are cut off or of an unknown kind."""

    targets: Mapping[str, Mapping[str, Any]]
    models: Mapping[str, Any]
    records: tuple[Record, ...]
    skipped: int


def read(path: Path) -> Trace:
    """One file, compressed by gzip if its name ends in `.gz`. Raises `OSError`, and `Misuse` for what is no trace."""
    header: Mapping[str, Any] | None = None
    found: list[tuple[float, Mapping[str, Any]]] = []
    skipped, wrong = 0, ""
    for number, line in enumerate(_lines(path), 1):
        try:
            document = json.loads(line)
            kind = document["kind"]
            lacking = [key for key in _KEYS.get(kind, ()) if key not in document]
        except (ValueError, KeyError, TypeError) as error:
            skipped += 1
            wrong = wrong or f"line {number}: {_fault(error)}"
            continue
        if lacking:
            raise Misuse(f"{path}: is no trace: line {number}: its {kind} has no `{lacking[0]}`")
        if kind == "header":
            if document["schema"] > SCHEMA:
                raise Misuse(f"{path}:{number}: schema {document['schema']}; this version reads up to {SCHEMA}")
            header = document
        elif kind == "request" and header is not None:
            found.append((float(document["at"]), document))
        else:
            skipped += 1
    if header is None:
        raise Misuse(f"{path}: is no trace: {wrong or 'it has no header'}")
    if not found:
        raise Misuse(f"{path}: holds no recorded request")
    found.sort(key=lambda one: one[0])
    first = found[0][0]
    records = tuple(
        Record(number, at - first, one["request"], tuple(one["stages"]), one["outcome"])
        for number, (at, one) in enumerate(found)
    )
    return Trace(header["targets"], header["models"], records, skipped)


def _fault(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"is not JSON, or cut off, at column {error.colno}"
    return "is not text" if isinstance(error, UnicodeDecodeError) else "has no `kind`, as every line of a trace has"


def _lines(path: Path) -> Iterator[bytes]:
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as lines:
            yield from lines
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise Misuse(f"{path}: is no trace: not whole as a gzip file: {error}") from None


def check_models(trace: Trace, catalog: Catalog) -> None:
    """Raises `Misuse` if the trace asks for what the catalogue does not have."""
    for record in trace.records:
        model, variant = record.request["model"], record.request["variant"]
        if model not in catalog.families or variant not in (None, *catalog.families[model].variants):
            asked = model if variant is None else f"{model}/{variant}"
            raise Misuse(f"the trace asks for {asked}, which the catalogue does not have: give --catalog")
    for model, variants in trace.models.items():
        family = catalog.families.get(model)
        for id_, about in variants.items():
            known = None if family is None else family.variants.get(id_)
            if known is not None and known.sha256 != about["sha256"]:
                raise Misuse(f"{model}/{id_} is another file in the catalogue than in the trace: give --catalog")
