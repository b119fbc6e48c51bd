"""To whom a link gives what comes, also while a broker hangs and after a former daemon."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from agent.link.mqtt import LinkOptions, Message, MessageProperties, MqttLink


def message(topic: str, acknowledge: Any = None) -> Message:
    return Message(topic, b"x", 1, False, MessageProperties(), 0.0, 1, acknowledge=acknowledge)


async def test_whoever_gives_up_a_broker_that_hangs_gets_nothing_more_all_the_same() -> None:
    """It may go on, or a new connection may be made, while the daemon finishes what it has."""

    class Hangs:
        async def unsubscribe(self, topic_filter: str) -> int:
            await asyncio.Event().wait()
            return 0

    link, got = MqttLink(LinkOptions("mqtt://nowhere", "a")), list[Message]()
    await link.subscribe("in", got.append)
    link._connection = Hangs()  # type: ignore[assignment]
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            await link.unsubscribe("in")
    link._dispatch(message("in"))
    assert (got, link.counters.unrouted) == ([], 1)


async def test_what_is_nobodys_is_acknowledged_at_once_unless_somebody_keeps_the_order() -> None:
    link, got, sent = MqttLink(LinkOptions("mqtt://nowhere", "a")), list[Message](), list[str]()
    link._dispatch(message("old", lambda: sent.append("at once")))
    assert sent == ["at once"]
    link.unrouted = got.append
    link._dispatch(message("old", lambda: sent.append("never by the link")))
    assert (len(got), len(sent), link.counters.unrouted) == (1, 1, 2)
