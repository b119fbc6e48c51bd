"""Which models of unknown origin have run within the limits before: a restart need not try them again.

A file of the daemon's own state. What counts is the digest of the content, with what it ran on and within which limits;
what failed is not kept, as the machine may have been busy.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Final

MOST: Final = 256
"""Entries that are kept; the oldest goes first."""
MAX_BYTES: Final = 64 * 1024
LIBRARIES: Final = ("ai-edge-litert", "tflite-runtime", "onnxruntime", "onnxruntime-gpu")

log = logging.getLogger(__name__)


class Passed:
    """`conditions`: whatever else a verdict depends on, as plain values. Without a `path` nothing is kept."""

    def __init__(self, path: Path | None, conditions: object) -> None:
        self._path = path
        self._conditions = json.dumps([conditions, [_version(name) for name in LIBRARIES]], sort_keys=True)

    def has(self, sha256: str) -> bool:
        return self._key(sha256) in self._read()

    def add(self, sha256: str) -> None:
        """Replaces the file as a whole. A disk that does not take it costs the next start the trial, and no more."""
        if self._path is None:
            return
        key = self._key(sha256)
        keys = [*(known for known in self._read() if known != key), key][-MOST:]
        fresh = self._path.with_name(f".{self._path.name}.{os.getpid()}")
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            fresh.write_text(json.dumps({"passed": keys}) + "\n")
            fresh.replace(self._path)
        except OSError as error:
            log.warning("models that passed cannot be kept", extra={"reason": str(error)})

    def _key(self, sha256: str) -> str:
        return hashlib.sha256(f"{sha256} {self._conditions}".encode()).hexdigest()

    def _read(self) -> list[str]:
        if self._path is None:
            return []
        try:
            with self._path.open("rb") as file:
                keys = json.loads(file.read(MAX_BYTES))["passed"]
        except (OSError, ValueError, KeyError, TypeError):
            return []
        return [key for key in keys if isinstance(key, str)] if isinstance(keys, list) else []


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""
