"""What counts as waiting for the broker: bytes that are queued, not all that were since the queue was last empty."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator

import pytest

from agent.core.clock import SystemClock
from agent.link.mqtt_client import LinkFull, LinkOptions
from agent.link.mqtt_connection import MqttConnection

PAYLOAD = b"x" * 50_000


class Narrow:
    """A connection whose broker reads only when it is told to."""

    def __init__(self) -> None:
        ours, self.theirs = socket.socketpair()
        for end in (ours, self.theirs):
            end.setblocking(False)
        options = LinkOptions("mqtt://nowhere", "a", max_backlog_bytes=1_000_000)
        self.connection = MqttConnection(options, lambda message: None, SystemClock())
        self.connection._client._sock = self.connection._sock = ours
        self.connection._fd = ours.fileno()

    def read(self, size: int) -> None:
        while size > 0:
            try:
                size -= len(self.theirs.recv(size))
            except BlockingIOError:
                return

    def publish(self) -> None:
        self.connection.publish("replies", PAYLOAD, 0, False, None, None)


@pytest.fixture
async def narrow() -> AsyncIterator[Narrow]:
    made = Narrow()
    yield made
    made.connection.abort()
    made.theirs.close()


async def test_a_line_that_is_never_idle_is_not_taken_for_a_full_one(narrow: Narrow) -> None:
    while not narrow.connection._writing:
        narrow.publish()
    for _ in range(2):
        narrow.publish()
    for _ in range(60):  # 3 MB pass, and never is more than a few messages queued, or none
        narrow.read(len(PAYLOAD))
        narrow.connection._flush()
        assert narrow.connection._client.want_write()
        narrow.publish()
    assert len(narrow.connection._client._out_packet) < 10


async def test_what_is_not_read_is_bounded(narrow: Narrow) -> None:
    with pytest.raises(LinkFull, match="wait for the broker to read them"):
        for _ in range(100):
            narrow.publish()
            await asyncio.sleep(0)
    assert sum(packet["to_process"] for packet in narrow.connection._client._out_packet) <= 1_000_000
