"""MQTT messages as a broker might deliver them, and a link that takes them without one."""

from __future__ import annotations

import asyncio
import io
import json
import logging
from collections.abc import Callable, Coroutine
from typing import Any

from hypothesis import strategies as st

from agent.core.clock import SystemClock
from agent.core.errors import LinkError
from agent.link.mqtt import Message, MessageProperties, MqttLink
from agent.telemetry.events import EventHandler
from agent.wire import lane, oip
from tests.fuzz.payloads import CANARY

LEVEL = st.text(st.characters(codec="utf-8", exclude_characters="/+#\0"), max_size=20) | st.just("toy")
"""One level of a topic: MQTT allows all of Unicode but NUL and the wildcards."""
STRING = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=20)
NAMES = st.sampled_from(
    (
        "dtype",
        "scale",
        "deadline_ms",
        "priority",
        "allowed_regions",
        "explain",
        "producer",
        "model",
        lane.BUDGET_MS,
        lane.IDEMPOTENCY_KEY,
        lane.STATUS,
        oip.HEADER_LENGTH,
    )
)
NUMBERS = st.integers(-(2**70), 2**70).map(str) | st.floats().map(str)
PROPERTIES = st.builds(
    MessageProperties,
    content_type=st.none() | st.sampled_from(("application/json", "application/octet-stream")) | STRING,
    response_topic=st.none() | st.just("me") | STRING,
    correlation_data=st.none() | st.binary(max_size=20),
    message_expiry_s=st.none() | st.integers(0, 2**32 - 1),
    user=st.lists(st.tuples(NAMES | STRING, NUMBERS | STRING), max_size=4).map(tuple),
)


class Published:
    """What a part says over its link, whose callbacks get what `deliver` is given as if a broker had sent it."""

    def __init__(self, link: MqttLink) -> None:
        self.link = link
        self.sent: list[tuple[str, bytes, MessageProperties]] = []
        self.answer: Callable[[MessageProperties], None] | None = None
        link.publish = self._publish  # type: ignore[method-assign]
        link.start = self._start  # type: ignore[method-assign]

    async def _start(self) -> None:
        """Stays away from any broker."""

    def _publish(self, topic: str, payload: bytes, **options: Any) -> None:
        properties = options.get("properties") or MessageProperties()
        properties.to_bytes()
        if not topic:
            raise LinkError("what the broker would refuse")
        self.sent.append((topic, payload, properties))
        if self.answer is not None:
            self.answer(properties)

    def deliver(self, topic: str, payload: bytes, properties: MessageProperties, *, retain: bool = False) -> None:
        self.link._dispatch(Message(topic, payload, 1, retain, properties, SystemClock.monotonic()))
        assert self.link.counters.unrouted == 0, topic
        assert self.link.counters.callback_errors == 0

    def documents(self) -> list[dict[str, Any]]:
        return [json.loads(payload) for _, payload, _ in self.sent]


class Log(EventHandler):
    """Lines as the daemon writes them. None of them holds a traceback, or the value that stands for a secret."""

    def __init__(self) -> None:
        self.written = io.StringIO()
        super().__init__(self.written)
        self.setLevel(logging.WARNING)

    def __enter__(self) -> Log:
        logging.getLogger("agent").addHandler(self)
        return self

    def __exit__(self, *_: object) -> None:
        logging.getLogger("agent").removeHandler(self)
        assert "traceback" not in self.written.getvalue(), self.written.getvalue()
        assert CANARY not in self.written.getvalue(), self.written.getvalue()

    def handleError(self, record: logging.LogRecord) -> None:
        raise AssertionError(f"a line could not be written: {record.getMessage()}")

    def of(self, event: str) -> list[dict[str, Any]]:
        lines = [json.loads(line) for line in self.written.getvalue().splitlines()]
        return [line for line in lines if line["event"] == event]


def play(story: Callable[[], Coroutine[Any, Any, None]]) -> Log:
    """Runs it in a loop of its own, in which nothing fails unseen; what was logged."""
    unseen: list[dict[str, Any]] = []

    async def watched() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: unseen.append(context))
        async with asyncio.timeout(60):
            await story()

    with Log() as log:
        asyncio.run(watched())
    assert unseen == []
    return log
