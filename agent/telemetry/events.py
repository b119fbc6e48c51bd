"""One line on standard error for each event: JSON for machines, or text for people.

Written with the standard library, `log.warning("lane lost", extra={"lane": "eu-west"})`: the message says what
happened and stays the same, the fields say to what. Lines are bounded, secrets are masked, and a warning that repeats
itself is written a few times and then counted.
"""

from __future__ import annotations

import json
import logging
import os
import re
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from typing import Any, Literal, TextIO

MAX_LINE = 4096
"""Characters in a line; fields that do not fit are left out, and `truncated` says so."""
MAX_TEXT = 512
"""Characters in one value. Tracebacks get four times that, from their end."""
MAX_FIELDS = 32
MAX_ITEMS = 16
"""Items of a list or mapping that is a field's value."""

REPEAT_BURST = 5
"""Identical warnings written within a window, before they are only counted."""
REPEAT_WINDOW_S = 60.0
REPEAT_KINDS = 256
"""Different warnings that are remembered at once."""

_SECRET = re.compile(r"password|passwd|token|secret|credential|api_?key|authorization", re.IGNORECASE)
_SECRET_IN_TEXT = re.compile(
    r"(?i)\b([\w-]*(?:password|passwd|token|secret|api_?key)[\w-]*[\"']?\s*[=:]\s*[\"']?)[^\s\"',;&]+"
)
_CREDENTIALS_IN_URL = re.compile(r"(?i)\b([a-z][a-z0-9+.-]*://)\S+@")
_MASK = "***"
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName", "color_message"}
_PRIORITY = {logging.DEBUG: 7, logging.INFO: 6, logging.WARNING: 4, logging.ERROR: 3, logging.CRITICAL: 2}
_NOISY = ("asyncio", "uvicorn", "httpx", "httpcore", "paho")
"""Libraries whose events below a warning are not the daemon's."""


def setup(level: str = "info", form: Literal["json", "text"] = "json", stream: TextIO | None = None) -> logging.Handler:
    """Send every logger's events to `stream` (standard error) and nowhere else. Returns the handler; close it last."""
    stream = sys.stderr if stream is None else stream
    handler = EventHandler(stream, form, journal=_is_journal(stream, os.environ.get("JOURNAL_STREAM", "")))
    root = logging.getLogger()
    for old in root.handlers[:]:
        root.removeHandler(old)
        old.close()
    root.addHandler(handler)
    root.setLevel(level.upper())
    for name in _NOISY:
        library = logging.getLogger(name)
        library.handlers.clear()
        library.propagate = True
        library.setLevel(logging.INFO if level == "debug" else logging.WARNING)
    logging.captureWarnings(True)
    logging.raiseExceptions = False
    return handler


class EventHandler(logging.Handler):
    """Formats events, holds back repeated warnings, and writes lines.

    `journal`: the stream ends in systemd's journal, which takes the level from a `<n>` in front and knows the time, so
    that text lines leave it out. `now` is monotonic seconds.
    """

    def __init__(
        self,
        stream: TextIO,
        form: Literal["json", "text"] = "json",
        *,
        journal: bool = False,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__()
        self._stream = stream
        self._journal = journal
        self._form = _json_line if form == "json" else _text_line
        self._repeats = Repeats(now)

    def emit(self, record: logging.LogRecord) -> None:
        try:
            fields = dict(_fields(record))
            text = _clean(record.getMessage())
            due = self._repeats.ended()
            if record.levelno < logging.WARNING or self._repeats.admit(record, text, fields):
                due = [*due, (record, text, fields)]
            for line in due:
                self._write(*line)
        except Exception:  # logging must never take the daemon down
            self.handleError(record)

    def close(self) -> None:
        """Write what was counted and not yet told."""
        try:
            for line in self._repeats.ended(all_of_them=True):
                self._write(*line)
        except (OSError, ValueError):
            pass  # the stream is gone
        super().close()

    def _write(self, record: logging.LogRecord, text: str, fields: Mapping[str, Any]) -> None:
        line = self._form(record, text, fields, with_time=not self._journal)
        if self._journal:
            prefix = f"<{_PRIORITY.get(record.levelno, 6)}>"
            line = prefix + line.replace("\n", f"\n{prefix}")
        self._stream.write(f"{line}\n")
        self._stream.flush()


_Line = tuple[logging.LogRecord, str, Mapping[str, Any]]


class _Repeat:
    __slots__ = ("begin", "count", "last")

    def __init__(self, begin: float) -> None:
        self.begin = begin
        self.count = 0
        self.last: _Line | None = None


class Repeats:
    """Lets the first few of identical warnings through; of the others, the last one is told with a count.

    Identical: same logger, level, message and text fields (a number may differ: a delay, a count).
    """

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._seen: dict[tuple[Any, ...], _Repeat] = {}
        self._next_end = float("inf")
        self._pushed_out: list[_Line] = []

    def admit(self, record: logging.LogRecord, text: str, fields: Mapping[str, Any]) -> bool:
        """Whether this one is to be written."""
        names = tuple((key, value) for key, value in fields.items() if isinstance(value, str) and key != "traceback")
        key = (record.name, record.levelno, text, names)
        repeat = self._seen.get(key)
        if repeat is None:
            if len(self._seen) >= REPEAT_KINDS:
                self._pushed_out += _told(self._seen.pop(next(iter(self._seen))))
            repeat = self._seen[key] = _Repeat(self._now())
            self._next_end = min(self._next_end, repeat.begin + REPEAT_WINDOW_S)
        repeat.count += 1
        if repeat.count <= REPEAT_BURST:
            return True
        repeat.last = (record, text, fields)
        return False

    def ended(self, *, all_of_them: bool = False) -> list[_Line]:
        """The last of each kind whose window is over, with `repeated`: how many were held back."""
        due, self._pushed_out = self._pushed_out, []
        now = self._now()
        if not all_of_them and now < self._next_end:
            return due
        for key, repeat in list(self._seen.items()):
            if all_of_them or now >= repeat.begin + REPEAT_WINDOW_S:
                due += _told(self._seen.pop(key))
        self._next_end = min((r.begin + REPEAT_WINDOW_S for r in self._seen.values()), default=float("inf"))
        return due


def _told(repeat: _Repeat) -> list[_Line]:
    if repeat.last is None:
        return []
    record, text, fields = repeat.last
    return [(record, text, {"repeated": repeat.count - REPEAT_BURST, **fields})]


def _fields(record: logging.LogRecord) -> Iterator[tuple[str, Any]]:
    """What came by `extra`, bounded and masked; then the exception."""
    count = 0
    for key, value in vars(record).items():
        if key not in _STANDARD:
            if count == MAX_FIELDS:
                yield "truncated", True
                break
            count += 1
            yield _clean(key), _plain(key, value)
    if record.exc_info and record.exc_info[1] is not None:
        error = record.exc_info[1]
        yield "error", f"{type(error).__name__}: {_clean(str(error))}"[:MAX_TEXT]
        whole = _masked("".join(traceback.format_exception(error)))
        yield "traceback", whole[-4 * MAX_TEXT :]


def _plain(key: object, value: Any, depth: int = 0) -> Any:
    """JSON types only, cut to size."""
    if isinstance(key, str) and _SECRET.search(key):
        return _MASK
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, float):
        return value if value - value == 0 else str(value)
    if isinstance(value, Mapping) and depth < 3:
        items = list(value.items())[:MAX_ITEMS]
        return {_clean(str(name))[:64]: _plain(name, item, depth + 1) for name, item in items}
    if isinstance(value, list | tuple | set | frozenset) and depth < 3:
        return [_plain(None, item, depth + 1) for item in list(value)[:MAX_ITEMS]]
    return _clean(str(value))


def _masked(text: str) -> str:
    return _CREDENTIALS_IN_URL.sub(rf"\1{_MASK}@", _SECRET_IN_TEXT.sub(rf"\1{_MASK}", text))


def _clean(text: str) -> str:
    """One line of at most `MAX_TEXT` characters in which nothing can be mistaken for another event or a secret."""
    text = _CONTROL.sub(lambda match: repr(match.group())[1:-1], _masked(text[: 8 * MAX_TEXT]))
    return text if len(text) <= MAX_TEXT else f"{text[: MAX_TEXT - 1]}…"


def _stamp(record: logging.LogRecord) -> str:
    """RFC 3339 in UTC with milliseconds."""
    return datetime.fromtimestamp(record.created, UTC).strftime("%Y-%m-%dT%H:%M:%S.") + f"{int(record.msecs):03d}Z"


def _json_line(record: logging.LogRecord, text: str, fields: Mapping[str, Any], *, with_time: bool) -> str:
    line = {"ts": _stamp(record), "level": record.levelname.lower(), "event": text, "logger": record.name}
    kept = {f"{key}_" if key in line else key: value for key, value in fields.items()}
    whole = json.dumps({**line, **kept}, ensure_ascii=False, separators=(",", ":"), default=str)
    while len(whole) > MAX_LINE and kept:
        largest = max(kept, key=lambda key: len(str(kept[key])))
        del kept[largest]
        whole = json.dumps({**line, **kept, "truncated": True}, ensure_ascii=False, separators=(",", ":"), default=str)
    return whole


def _text_line(record: logging.LogRecord, text: str, fields: Mapping[str, Any], *, with_time: bool) -> str:
    parts = [_stamp(record)] if with_time else []
    parts += [f"{record.levelname:<7}", text]
    parts += [f"{key}={_word(value)}" for key, value in fields.items() if key != "traceback"]
    line = " ".join(parts)
    if "traceback" in fields:
        line += "\n" + "\n".join(f"    {row}" for row in str(fields["traceback"]).splitlines())
    return line if len(line) <= MAX_LINE else f"{line[: MAX_LINE - 1]}…"


def _word(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return text if text and " " not in text and '"' not in text else json.dumps(value, ensure_ascii=False, default=str)


def _is_journal(stream: TextIO, journal_stream: str) -> bool:
    """Whether the stream is the one that systemd connected to the journal (systemd.exec(5), `$JOURNAL_STREAM`)."""
    try:
        stat = os.fstat(stream.fileno())
    except (OSError, ValueError, AttributeError):
        return False
    return journal_stream == f"{stat.st_dev}:{stat.st_ino}"
