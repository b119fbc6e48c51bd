"""The chain of the audit trail: each line holds the hash of the one before it. Pure.

A line is a JSON object that ends with its own hash. That hash is the SHA-256 of the line's bytes up to `,"hash":"`; the
key `prev` among those bytes holds the hash of the line before. So a line that is changed, taken out, put in or moved is
found by whoever has the files and fifteen lines of any language.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic_core import to_json

START = "0" * 64
"""`prev` of the very first line."""
MAX_LINE = 8192
"""Bytes. Fields are bounded, so that no line comes near it."""
_MARK = b',"hash":"'
_TAIL = len(_MARK) + 64 + 2


@dataclass(frozen=True, slots=True)
class Head:
    """The last line: its number and its hash."""

    seq: int = 0
    hash: str = START

    def __str__(self) -> str:
        return f"{self.seq}:{self.hash}"


def link(head: Head, fields: Mapping[str, Any]) -> tuple[bytes, Head]:
    """The next line, with its end, and the new head. `fields` are plain JSON types."""
    body = to_json({"seq": head.seq + 1, **fields, "prev": head.hash}, inf_nan_mode="null", fallback=str)[:-1]
    digest = hashlib.sha256(body).hexdigest()
    return b'%s%s%s"}\n' % (body, _MARK, digest.encode()), Head(head.seq + 1, digest)


def read_head(line: bytes) -> Head | None:
    """Number and hash of one line; None if it is not a whole line whose hash is right."""
    line = line.removesuffix(b"\n")
    body = line[:-_TAIL]
    if line[-_TAIL : -_TAIL + len(_MARK)] != _MARK or not line.endswith(b'"}'):
        return None
    claimed = line[-66:-2].decode("ascii", "replace")
    if hashlib.sha256(body).hexdigest() != claimed:
        return None
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError):
        return None
    seq = fields.get("seq")
    return Head(seq, claimed) if isinstance(seq, int) else None


@dataclass(frozen=True, slots=True)
class Broken:
    """The first line that does not fit, counted from 1 in its file."""

    file: str
    line: int
    reason: str


@dataclass(slots=True)
class Report:
    """What `check` found. `first` is the number of the first line that is there: older files may have been deleted."""

    lines: int = 0
    first: int | None = None
    head: Head = Head()
    anchored: bool = False
    broken: Broken | None = None


def check(files: Iterable[tuple[str, Iterable[bytes]]], anchor: Head | None = None) -> Report:
    """Follow the chain over all files, in the order given, up to the first line that is broken.

    `anchor` is a head that somebody noted elsewhere: the chain must go through it. Without one, lines cut off at the
    end leave no trace.
    """
    report = Report()
    for file, number, line in _numbered(files):
        reason = _fault(report, line)
        if reason:
            report.broken = Broken(file, number, reason)
            return report
        found = read_head(line)
        assert found is not None
        report.first = found.seq if report.first is None else report.first
        report.lines += 1
        report.head = found
        report.anchored = report.anchored or found == anchor
    return report


def _numbered(files: Iterable[tuple[str, Iterable[bytes]]]) -> Iterator[tuple[str, int, bytes]]:
    for file, lines in files:
        for number, line in enumerate(lines, 1):
            yield file, number, line


def _fault(report: Report, line: bytes) -> str:
    if len(line) > MAX_LINE:
        return f"longer than {MAX_LINE} bytes"
    if not line.endswith(b"\n"):
        return "cut off: the line has no end"
    found = read_head(line)
    if found is None:
        return "changed: its hash is not that of its content"
    prev = json.loads(line).get("prev")
    if report.first is None:
        return "" if found.seq > 1 or prev == START else "the first line does not begin a chain"
    if found.seq != report.head.seq + 1:
        return f"line {report.head.seq + 1} is missing: found {found.seq}"
    return "" if prev == report.head.hash else "does not follow the line before it: its `prev` is another"
