"""The audit trail: a bounded queue on the event loop, and a thread that chains, writes and rotates.

What is lost is never silent: in `drop` mode the number of lines that are missing is in the chain itself (`kind: gap`),
in `/status` and in the metrics; in `refuse` mode nothing is answered while a line could be lost.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from itertools import count, islice
from pathlib import Path
from typing import Any, get_args

from pydantic_core import to_json

from agent.config import AuditField, AuditSection
from agent.core.clock import Clock
from agent.core.errors import AuditUnavailable, InferenceError
from agent.core.lasting import lasting_thread
from agent.core.types import InferenceRequest, InferenceResult
from agent.security.audit_file import AuditFiles, audit_files
from agent.security.jwts import read_key_file, require_secret

log = logging.getLogger(__name__)

BATCH = 512
"""Lines written at once."""
GATHER_S = 0.1
"""How long the first of a batch waits for others."""
RETRY_S = 1.0
"""While the disk fails: between two tries."""
CLOSE_S = 5.0
MAX_TEXT = 256
"""Characters of one field."""
MAX_LIST = 5000
"""Bytes of a list: with all other fields a line stays below `chain.MAX_LINE`."""
ADMITTED_ROOM = 100_000
"""In `refuse` mode: for requests that were in flight when the queue became full (`routing.max_in_flight` of them)."""
PSEUDONYM_HEX = 32
"""128 bits: no two producers of a gateway will share one."""
MASK = "***"
PRODUCER_IS_WHO = ("mqtt:", "sensor:")
"""Identities that are named after a producer: what is done to `producer` is done to that name too."""

Mask = Callable[[str], str]
_Event = tuple[float, str, Mapping[str, Any]]
"""Wall time, kind, fields: as it happened, for the thread to make a line of."""


def pseudonym(key: bytes, value: str) -> str:
    """HMAC-SHA-256 of the value by the key, the first 128 bits in hex. The same value gives the same pseudonym; without
    the key nobody can tell which, not even by trying all names there are."""
    return hmac.new(key, value.encode("utf-8", "backslashreplace"), hashlib.sha256).hexdigest()[:PSEUDONYM_HEX]


def load_key(section: AuditSection) -> bytes | None:
    """Raises `ConfigError`."""
    if section.key_file is None:
        return None
    return require_secret(read_key_file(section.key_file, "security.audit.key_file"), "security.audit.key_file")


class Audit:
    """Records requests, refusals and acts. Every method but `close` is for the event loop and does not block."""

    def __init__(self, section: AuditSection, state_dir: Path, clock: Clock, regions: Mapping[str, str | None]) -> None:
        """`regions` are those of the targets, by name. Raises `ConfigError`."""
        self.folder = section.dir or state_dir / "audit"
        self._section = section
        self._clock = clock
        self._regions = regions
        self._masks = _masks(section, load_key(section))
        self._files = AuditFiles(self.folder, section.max_file_bytes, section.keep_files)
        self._waiting: deque[_Event] = deque()
        self._changed = threading.Condition()
        self._closing = False
        self._opened = False
        self._thread: threading.Thread | None = None
        self._lost_untold = 0
        self._dropped = self._write_errors = 0
        self._problem = ""
        self._set_aside = ""

    # --- life ---

    def open(self) -> None:
        """Begin to write; a disk that fails shows in `problem`, and is tried again."""
        self._thread = lasting_thread("audit", self._run)

    def close(self) -> None:
        """Write what waits, for at most five seconds, and force it to the disk."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join(CLOSE_S)
        if self._waiting:
            log.error("audit lines lost", extra={"count": len(self._waiting), "reason": self._problem})

    @property
    def alive(self) -> bool:
        """Whether somebody writes, or tries to."""
        return self._thread is not None and self._thread.is_alive()

    # --- what is recorded ---

    def require(self) -> None:
        """Raises `AuditUnavailable` in `refuse` mode while a line might not reach the disk."""
        if self._section.on_full == "refuse" and (self._problem or len(self._waiting) >= self._section.queue):
            raise AuditUnavailable("the audit trail cannot be written", retry_after_s=RETRY_S)

    def request(self, request: InferenceRequest, outcome: InferenceResult | InferenceError | None) -> None:
        """What came of a request that was admitted; None: it was abandoned."""
        fields: dict[str, Any] = {
            "who": request.asked_by,
            "producer": request.producer,
            "request_id": request.id,
            "model": request.model,
            "class": request.latency_class.value,
        }
        if isinstance(outcome, InferenceResult):
            fields |= {
                "outcome": "stale" if outcome.stale else "cached" if outcome.cached else "ok",
                "tier": outcome.tier.value,
                "target": outcome.target,
                "region": self._regions.get(outcome.target),
                "variant": outcome.variant,
                "model_sha256": outcome.model_sha256,
            }
        else:
            fields["outcome"] = outcome.code if outcome else "abandoned"
        if outcome and outcome.attempts:  # also those that failed may have carried the inputs there
            fields["attempts"] = [[a.target, self._regions.get(a.target), a.outcome] for a in outcome.attempts]
        self._put("request", fields)

    def accepted(self, request: InferenceRequest, *, duplicate: bool) -> None:
        """A durable request is on the disk, or was before; what comes of it has a line of its own."""
        self.act(
            "accept",
            outcome="duplicate" if duplicate else "accepted",
            who=request.asked_by,
            producer=request.producer,
            request_id=request.id,
            model=request.model,
        )

    def refusal(self, fields: Mapping[str, Any]) -> None:
        """What a door turned away: `who`, `from`, `door`, `outcome`, `field`."""
        self._put("refusal", fields)

    def act(self, what: str, **fields: Any) -> None:
        """Something that an administrator did, or the daemon itself: a start, a stop, another configuration."""
        self._put("act", {"what": what, **fields})

    def _put(self, kind: str, fields: Mapping[str, Any]) -> None:
        admitted = kind != "refusal" and self._section.on_full == "refuse"  # before the queue was full
        with self._changed:
            if len(self._waiting) >= self._section.queue + (ADMITTED_ROOM if admitted else 0):
                self._dropped += 1
                self._lost_untold += 1
                return
            if not self._waiting:
                self._changed.notify_all()
            self._waiting.append((self._clock.wall(), kind, fields))

    # --- state ---

    def problem(self) -> str:
        """Why lines are not written, or what was found wrong at the start; empty when all is well."""
        return self._problem or self._set_aside

    def status(self) -> dict[str, Any]:
        """For `/status`. `head` is the anchor: noted elsewhere, it shows when lines are cut off."""
        return {
            "head": str(self._files.head),
            "synced": self._files.synced.seq,
            "waiting": len(self._waiting),
            "dropped": self._dropped,
            "write_errors": self._write_errors,
            "files_deleted": self._files.deleted,
            "problem": self.problem(),
        }

    # --- the thread ---

    def _run(self) -> None:
        synced_at = self._clock.monotonic()
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closing, timeout=self._patience_s(synced_at))
                if not self._closing and 0 < len(self._waiting) < BATCH:
                    self._changed.wait(GATHER_S)
                batch = list(islice(self._waiting, BATCH))
                closing, lost = self._closing, self._lost_untold
            try:
                self._write(batch, lost)
                now = self._clock.monotonic()
                if closing or now - synced_at >= self._section.fsync_s:
                    if self._files.synced.seq != self._files.head.seq:
                        self._files.sync()
                    synced_at = now
            except OSError as error:
                self._failed(f"{error.strerror or error}")
                if closing:
                    break
                with self._changed:
                    self._changed.wait_for(lambda: self._closing, RETRY_S)
                continue
            except Exception as error:  # what cannot be written at all must not keep the rest from being written
                log.exception("audit lines could not be made")
                self._failed(f"{type(error).__name__}: {len(batch)} lines could not be made")
                self._give_up(len(batch))
            if closing and not self._waiting:
                break
        self._files.close()

    def _give_up(self, count: int) -> None:
        with self._changed:
            for _ in range(count):
                self._waiting.popleft()
            self._dropped += count
            self._lost_untold += count

    def _patience_s(self, synced_at: float) -> float | None:
        """Until what is written is due to be forced to the disk; None: nothing is."""
        if self._files.synced.seq == self._files.head.seq:
            return None if self._opened else 0.0
        return max(0.0, synced_at + self._section.fsync_s - self._clock.monotonic())

    def _write(self, batch: Sequence[_Event], lost: int) -> None:
        if not self._opened:
            self._open_files()
        gap = [self._entry(self._clock.wall(), "gap", {"lost": lost})] if lost else []
        if batch or gap:
            self._files.append([*gap, *(self._entry(*event) for event in batch)])
        with self._changed:
            for _ in batch:
                self._waiting.popleft()
            self._lost_untold -= lost
        if self._problem:
            log.info("audit trail is written again")
            self._problem = ""

    def _entry(self, wall: float, kind: str, fields: Mapping[str, Any]) -> dict[str, Any]:
        """What is written: masked, and cut to size."""
        at = datetime.fromtimestamp(wall, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        entry = {"at": at, "kind": kind, **fields}
        self._mask_made_id(entry)
        for field, mask in self._masks.items():
            if entry.get(field) is not None:
                entry[field] = mask(str(entry[field]))
        who = entry.get("who", "")
        if "producer" in self._masks and "who" not in self._masks and who.startswith(PRODUCER_IS_WHO):
            kind_of, _, producer = who.partition(":")
            entry["who"] = f"{kind_of}:{self._masks['producer'](producer)}"
        return {key: _bounded(value) for key, value in entry.items()}

    def _mask_made_id(self, entry: dict[str, Any]) -> None:
        """The daemon's own ids of streamed samples begin with the producer: what is done to that is done here too."""
        mask, producer, request_id = self._masks.get("producer"), entry.get("producer"), entry.get("request_id") or ""
        if mask and producer and "request_id" not in self._masks and request_id.startswith(f"{producer}-"):
            entry["request_id"] = mask(producer) + request_id[len(producer) :]

    def _open_files(self) -> None:
        """A last file that is no chain is set aside, and the chain goes on from the one before it."""
        torn = 0
        for _ in range(len(audit_files(self.folder)) + 1):
            try:
                torn = self._files.open()
                break
            except ValueError as error:
                self._files.close()
                damaged = audit_files(self.folder)[-1]
                damaged.rename(_free(damaged.with_suffix(".jsonl.damaged")))
                self._set_aside = f"{damaged.name} was set aside as damaged"
                log.error("audit trail damaged", extra={"file": damaged.name, "reason": str(error)})
        if torn or self._set_aside:
            found = {"torn_bytes": torn, "set_aside": self._set_aside}
            self._files.append([self._entry(self._clock.wall(), "act", {"what": "audit resumed", **found})])
        self._opened = True

    def _failed(self, reason: str) -> None:
        self._write_errors += 1
        if reason != self._problem:
            log.error("audit trail cannot be written", extra={"reason": reason, "on_full": self._section.on_full})
        self._problem = reason


def _free(path: Path) -> Path:
    """That name, or one with a number: what was set aside before under it is a record as well."""
    return next(name for at in count() if not (name := path.with_name(path.name + f".{at}" * bool(at))).exists())


def _bounded(value: Any) -> Any:
    if type(value) is str:
        return _fit(value)
    return _cut(value) if type(value) is list else value


def _cut(items: list[Any]) -> list[Any]:
    """As many as fit, and how many more there were."""
    kept: list[Any] = []
    room = MAX_LIST
    for item in map(_bounded, items):
        room -= len(to_json(item, fallback=str)) + 1
        if room < 0:
            return [*kept, f"and {len(items) - len(kept)} more"]
        kept.append(item)
    return kept


def _fit(text: str) -> str:
    """Cut to size, and without lone surrogates, which UTF-8 cannot hold."""
    text = text[:MAX_TEXT]
    return text if text.isascii() else text.encode("utf-8", "backslashreplace").decode()


def _masks(section: AuditSection, key: bytes | None) -> dict[str, Mask]:
    masks: dict[str, Mask] = {}
    for field in get_args(AuditField):
        rule = section.rule(field)
        if rule == "mask":
            masks[field] = lambda _: MASK
        elif rule == "pseudonym" and key is not None:
            masks[field] = lambda value, key=key: pseudonym(key, value)  # type: ignore[misc]
    return masks
