"""Events: one bounded line each, nothing secret in it, and no flood."""

import io
import json
import logging
import os
import tempfile
from collections.abc import Iterator
from typing import Any

import pytest

from agent.telemetry import events
from agent.telemetry.events import EventHandler, setup


class Capture:
    """A logger of its own, and what its handler wrote."""

    def __init__(self, form: Any = "json", *, journal: bool = False) -> None:
        self.stream = io.StringIO()
        self.time = 0.0
        self.handler = EventHandler(self.stream, form, journal=journal, now=lambda: self.time)
        self.log = logging.Logger("agent.test")
        self.log.addHandler(self.handler)

    @property
    def lines(self) -> list[str]:
        return self.stream.getvalue().splitlines()

    @property
    def documents(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.lines]


@pytest.fixture
def capture() -> Capture:
    return Capture()


@pytest.fixture
def restored_logging() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level, raising = root.handlers[:], root.level, logging.raiseExceptions
    root.handlers.clear()
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    logging.raiseExceptions = raising
    logging.captureWarnings(False)


def test_an_event(capture: Capture) -> None:
    capture.log.info("lane connected", extra={"lane": "eu-west", "rtt_ms": 12.5, "attempt": 1, "level": "x"})
    (document,) = capture.documents
    stamp = document.pop("ts")
    assert len(stamp) == len("2026-01-01T00:00:00.000Z")
    assert stamp.endswith("Z")
    assert document == {
        "level": "info",
        "event": "lane connected",
        "logger": "agent.test",
        "lane": "eu-west",
        "rtt_ms": 12.5,
        "attempt": 1,
        "level_": "x",
    }


def test_text_is_for_people() -> None:
    capture = Capture("text")
    capture.log.warning("lane lost", extra={"lane": "eu west", "retry_in_s": 4})
    assert capture.lines[0].split(" ", 1)[1] == 'WARNING lane lost lane="eu west" retry_in_s=4'


def test_the_journal_has_the_time_and_the_level() -> None:
    text, document = Capture("text", journal=True), Capture("json", journal=True)
    for capture in (text, document):
        capture.log.error("lane lost")
    assert text.lines == ["<3>ERROR   lane lost"]
    assert json.loads(document.lines[0].removeprefix("<3>"))["ts"], "the fields of JSON do not depend on where it goes"


def test_an_exception_is_one_event(capture: Capture) -> None:
    try:
        raise ValueError("password=hunter2 is wrong\nsecond line")
    except ValueError:
        capture.log.exception("reload failed")
    (document,) = capture.documents
    assert document["error"].startswith("ValueError: password=*** is wrong")
    assert "test_events.py" in document["traceback"]
    assert "hunter2" not in capture.stream.getvalue()


@pytest.mark.parametrize(
    "log",
    [
        lambda log: log.info("login", extra={"password": "hunter2"}),
        lambda log: log.info("login", extra={"mqtt_Token": "hunter2"}),
        lambda log: log.info("login", extra={"lane": {"name": "eu", "client_secret": "hunter2"}}),
        lambda log: log.info("login", extra={"lanes": [{"api_key": "hunter2"}]}),
        lambda log: log.info("connecting with password=%s", "hunter2"),
        lambda log: log.info('body {"password": "hunter2", "user": "u"}'),
        lambda log: log.info("connecting to mqtt://user:hunter2@broker:1883/x"),
        lambda log: log.info("connecting", extra={"broker": "mqtts://user:hunter2@broker"}),
        lambda log: log.info("connecting to mqtt://user:%shunter2@broker", "x" * 300),
        lambda log: log.info("connecting to mqtt://user:a/hunter2@broker and mqtt://user:a@hunter2@broker"),
    ],
)
@pytest.mark.parametrize("form", ["json", "text"])
def test_secrets_are_masked(log: Any, form: str) -> None:
    capture = Capture(form)
    log(capture.log)
    assert "***" in capture.stream.getvalue()
    assert "hunter2" not in capture.stream.getvalue()


@pytest.mark.parametrize("form", ["json", "text"])
@pytest.mark.parametrize("character", ["\n", "\r", "\x1b", "\u2028", "\x00", "\ud800", "\u202e"])
def test_what_a_sensor_sent_cannot_forge_a_line(form: str, character: str) -> None:
    capture = Capture(form)
    capture.log.info("bad name %s", f"x{character}2026 ERROR", extra={"topic": f"a{character}b"})
    assert len(capture.lines) == 1
    assert character not in capture.lines[0]
    capture.stream.getvalue().encode("utf-8")


@pytest.mark.parametrize("form", ["json", "text"])
def test_lines_are_bounded(form: str) -> None:
    capture = Capture(form)
    deep: Any = "x"
    for _ in range(200):
        deep = [deep]
    huge = {"many": list(range(100_000)), "deep": deep, "map": {str(n): "x" * 1000 for n in range(1000)}}
    capture.log.info("x" * 100_000, extra={**huge, **{f"f{n}": "y" * 10_000 for n in range(100)}})
    assert len(capture.lines) == 1
    assert len(capture.lines[0]) <= events.MAX_LINE
    if form == "json":
        assert capture.documents[0]["truncated"] is True


@pytest.mark.parametrize("value", [float("nan"), float("inf"), object(), b"\xff", {1: 2}, {"a", "b"}])
def test_any_value_can_be_logged(capture: Capture, value: Any) -> None:
    capture.log.info("odd", extra={"value": value})
    assert "value" in capture.documents[0]
    assert "NaN" not in capture.lines[0]


def test_repeated_warnings_are_counted(capture: Capture) -> None:
    for attempt in range(100):
        capture.log.warning("lane lost", extra={"lane": "eu", "attempt": attempt})
    capture.log.warning("lane lost", extra={"lane": "us"})
    assert len(capture.lines) == events.REPEAT_BURST + 1, "another lane is another warning; another number is not"
    capture.time += events.REPEAT_WINDOW_S
    capture.log.info("anything")
    told = capture.documents[-2]
    assert (told["event"], told["repeated"], told["attempt"]) == ("lane lost", 95, 99)
    assert capture.documents[-1]["event"] == "anything"
    capture.log.warning("lane lost", extra={"lane": "eu", "attempt": 100})
    assert capture.documents[-1]["attempt"] == 100, "a new window begins"


def test_information_is_never_held_back(capture: Capture) -> None:
    for _ in range(20):
        capture.log.info("answered")
    assert len(capture.lines) == 20


def test_the_count_is_told_at_the_end(capture: Capture) -> None:
    for _ in range(7):
        capture.log.warning("lane lost")
    capture.handler.close()
    assert capture.documents[-1]["repeated"] == 2


def test_the_memory_of_repeats_is_bounded(capture: Capture) -> None:
    for _ in range(6):
        capture.log.warning("the first")
    for number in range(3 * events.REPEAT_KINDS):
        capture.log.warning("kind %d", number)
    told = [document for document in capture.documents if "repeated" in document]
    assert [document["event"] for document in told] == ["the first"], "who is pushed out is told on the way"


def test_a_broken_stream_takes_nothing_down(restored_logging: None) -> None:
    with tempfile.TemporaryFile("w") as stream:
        setup("info", "json", stream)
    logging.getLogger("agent.x").error("the stream is closed")
    logging.getLogger().handlers[0].close()


def test_setup_sends_everything_to_one_place(restored_logging: None) -> None:
    stream = io.StringIO()
    setup("info", "json", stream)
    setup("info", "json", stream)
    logging.getLogger("agent.x").debug("not shown")
    logging.getLogger("agent.x").info("shown")
    logging.getLogger("uvicorn.error").info("not the daemon's")
    logging.getLogger("uvicorn.error").warning("shown as well")
    assert [json.loads(line)["event"] for line in stream.getvalue().splitlines()] == ["shown", "shown as well"]


def test_the_journal_is_recognised(restored_logging: None, monkeypatch: pytest.MonkeyPatch) -> None:
    with tempfile.TemporaryFile("w+") as stream:
        stat = os.fstat(stream.fileno())
        monkeypatch.setenv("JOURNAL_STREAM", f"{stat.st_dev}:{stat.st_ino}")
        setup("info", "text", stream)
        logging.getLogger("agent.x").info("hello")
        monkeypatch.setenv("JOURNAL_STREAM", "1:2")
        setup("info", "text", stream)
        logging.getLogger("agent.x").info("hello")
        stream.seek(0)
        first, second = stream.read().splitlines()
    assert first == "<6>INFO    hello"
    assert second.endswith("Z INFO    hello")
