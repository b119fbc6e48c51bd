"""One JSON line for each request, in a file that is rotated: `docs/traces.md` has the schema.

A thread makes and writes the lines. A request only puts references into a bounded queue; what finds no room, or cannot
be written, is dropped and counted.
"""

from __future__ import annotations

import hashlib
import logging
import os
import queue
import threading
import time
from collections.abc import Iterable, Mapping
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from pydantic_core import to_json

from agent.core.lasting import lasting_thread
from agent.core.types import InferenceRequest, Tensors
from agent.telemetry.story import Story

if TYPE_CHECKING:
    from agent.registry.catalog import Catalog
    from agent.targets.base import TargetTraits

log = logging.getLogger(__name__)

SCHEMA = 1
MAX_QUEUED = 4096
"""Requests that wait to be written."""
MAX_QUEUED_BYTES = 32 << 20
"""Of their tensors together."""
MAX_LINES = 64
"""Written at once at the latest."""
FLUSH_S = 1.0
"""What was written is in the hands of the system after this long, so that a SIGKILL loses no more."""
RETRY_S = 10.0
"""After the file could not be written."""
CLOSE_S = 5.0
"""How long a stop waits for what is queued."""
TRUTH = "truth"
"""The key of a request's metadata that holds the right label, where the caller knows it."""


class _Item(NamedTuple):
    request: InferenceRequest
    story: Story
    bytes: int


class TraceFile:
    """A `Recorder`. `header` is the first line of every file, less what is added here."""

    def __init__(
        self,
        path: Path,
        header: Mapping[str, Any],
        *,
        started: float,
        payload: bool = False,
        max_bytes: int = 64 << 20,
        files: int = 4,
    ) -> None:
        self._path = path
        self._header = {"kind": "header", "schema": SCHEMA, **header, "payload": payload}
        self._started = started
        self._payload = payload
        self._max_bytes = max_bytes
        self._files = files
        self._queue: queue.SimpleQueue[_Item | None] = queue.SimpleQueue()
        self._queued_bytes = 0
        self._taken_bytes = 0
        self._file: FileIO | None = None
        self._size = 0
        self._lines: list[bytes] = []
        self._retry_at = 0.0
        self._thread: threading.Thread | None = None
        self.written = 0
        self.dropped = 0
        self.unwritten = 0
        self.problem = ""
        """Why lines cannot be written, in the system's words; empty if they can."""

    def start(self) -> None:
        self._thread = lasting_thread("trace-writer", self._write_all)

    def put(self, request: InferenceRequest, story: Story) -> None:
        """Have a request written. On the event loop; never waits."""
        size = sum(tensor.nbytes for tensor in request.inputs.values())
        waiting_bytes = self._queued_bytes - self._taken_bytes
        if self._queue.qsize() >= MAX_QUEUED or waiting_bytes + size > MAX_QUEUED_BYTES:
            self.dropped += 1
            return
        self._queued_bytes += size
        self._queue.put(_Item(request, story, size))

    def close(self) -> None:
        """Write what is queued. Blocking."""
        if self._thread is None:
            return
        self._queue.put(None)
        self._thread.join(CLOSE_S)
        if self._thread.is_alive():
            log.warning("trace is not complete: its disk does not keep up", extra={"queued": self._queue.qsize()})

    def status(self) -> dict[str, Any]:
        """For `/status`. `dropped`: no room in the queue; `unwritten`: the file could not be written."""
        return {
            "path": str(self._path),
            "written": self.written,
            "queued": self._queue.qsize(),
            "dropped": self.dropped,
            "unwritten": self.unwritten,
            "error": self.problem or None,
        }

    # --- the thread ----------------------------------------------------------------------------------------------

    def _write_all(self) -> None:
        flush_at = None
        while True:
            try:
                item = self._queue.get(timeout=None if flush_at is None else max(0.0, flush_at - time.monotonic()))
            except queue.Empty:
                self._flush()
                flush_at = None
                continue
            if item is None:
                break
            self._taken_bytes += item.bytes
            self._add(item)
            flush_at = flush_at or time.monotonic() + FLUSH_S
            if time.monotonic() >= flush_at or len(self._lines) >= MAX_LINES:
                self._flush()
                flush_at = None
            os.sched_yield()  # lets the event loop have the interpreter: a long queue must not hold it for milliseconds
        self._flush()
        self._shut()

    def _add(self, item: _Item) -> None:
        try:
            made = request_line(item.request, item.story, started=self._started, payload=self._payload)
            self._lines.append(_line(made))
        except Exception:  # a line that cannot be made must not end the trace
            log.exception("a trace line could not be made", extra={"request_id": item.request.id})
            self.unwritten += 1

    def _flush(self) -> None:
        """Hand the lines to the system. Those that it does not take are counted and forgotten."""
        if not self._lines:
            return
        before = self.written
        try:
            if self.problem and time.monotonic() < self._retry_at:
                return
            for line in self._lines:
                if self._file is None:
                    self._open()
                elif self._size + len(line) > self._max_bytes:
                    self._rotate()
                self._append(line)
                self.written += 1
        except OSError as error:
            self._failed(error)
        finally:
            self.unwritten += len(self._lines) - (self.written - before)
            self._lines.clear()

    def _append(self, data: bytes) -> None:
        assert self._file is not None
        taken = 0
        while taken < len(data):  # a disk that is nearly full takes a part, and refuses the rest
            taken += self._file.write(data[taken:]) or 0
        self._size += taken

    def _open(self) -> None:
        """Go on behind what is there. A last line that was cut off is ended, so that the next one is whole."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        cut_off = False
        if self._path.exists():
            with self._path.open("rb") as before:
                self._size = before.seek(0, 2)
                if self._size:
                    before.seek(-1, 2)
                    cut_off = before.read(1) != b"\n"
        else:
            self._size = 0
        self._file = FileIO(self._path, "a")
        self._append((b"\n" if cut_off else b"") + _line(self._header))
        if self.problem:
            log.info("trace is written again", extra={"path": str(self._path)})
        self.problem = ""

    def _rotate(self) -> None:
        """`trace.jsonl` becomes `trace.jsonl.1`, that becomes `.2`, and the last is removed."""
        self._shut()
        names = [self._path, *(self._path.with_name(f"{self._path.name}.{n}") for n in range(1, self._files))]
        names[-1].unlink(missing_ok=True)
        for older, newer in zip(reversed(names), reversed(names[:-1]), strict=False):
            if newer.exists():
                newer.replace(older)
        self._open()

    def _failed(self, error: OSError) -> None:
        why = f"{error.strerror or error}{'' if error.filename is None else f': {error.filename}'}"
        if not self.problem:
            log.warning("trace cannot be written: %s", why, extra={"path": str(self._path)})
        self.problem = why
        self._retry_at = time.monotonic() + RETRY_S
        self._shut()

    def _shut(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            file.close()


def trace_header(catalog: Catalog, targets: Iterable[TargetTraits]) -> dict[str, Any]:
    """What a header says of models and targets."""
    return {
        "models": {
            family.name: {
                variant.id: {
                    "sha256": variant.sha256,
                    "bytes": variant.bytes,
                    "accuracy": variant.accuracy.value,
                    "targets": list(variant.targets),
                }
                for variant in family.variants.values()
            }
            for family in catalog.families.values()
        },
        "targets": {
            traits.name: {
                "tier": traits.tier.value,
                "order": traits.order,
                "cost_usd": traits.cost_usd,
                "region": traits.region,
                "backup": traits.backup,
                "max_concurrent": traits.max_concurrent,
                "parallel": traits.parallel,
            }
            for traits in targets
        },
    }


def request_line(request: InferenceRequest, story: Story, *, started: float, payload: bool) -> dict[str, Any]:
    """What is written of one request. `started` is monotonic seconds."""
    truth = request.metadata.get(TRUTH)
    asked = {**story.request(), "input": _input(request.inputs), "truth": truth}
    if payload:
        asked["inputs"] = {name: tensor.tolist() for name, tensor in request.inputs.items()}
    outcome = story.came_to()
    label = outcome["label"]
    outcome["correct"] = None if truth is None or label is None else label == truth
    return {
        "kind": "request",
        "schema": SCHEMA,
        "at": round(story.at, 6),
        "t_s": round(request.received - started, 6),
        "request": asked,
        "stages": story.routing(),
        "outcome": outcome,
    }


def _input(inputs: Tensors) -> dict[str, Any]:
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(inputs):
        tensor = inputs[name]
        digest.update(f"{name} {tensor.dtype.str} {tensor.shape}".encode())
        digest.update(np.ascontiguousarray(tensor).data)
    filled = [tensor for tensor in inputs.values() if tensor.size]
    return {
        "digest": digest.hexdigest(),
        "bytes": sum(tensor.nbytes for tensor in inputs.values()),
        "minimum": min((float(tensor.min()) for tensor in filled), default=None),
        "maximum": max((float(tensor.max()) for tensor in filled), default=None),
    }


def _line(document: Mapping[str, Any]) -> bytes:
    return to_json(document, inf_nan_mode="null", fallback=str) + b"\n"
