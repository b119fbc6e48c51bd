"""The property codec of MQTT 5 messages: whatever a broker sends, `ProtocolError` is the only error."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.core.errors import ProtocolError
from agent.wire import lane
from agent.wire.mqtt_properties import MAX_USER, MessageProperties, usable_topic

text = st.text(st.characters(codec="utf-8"), max_size=200)


@given(
    st.builds(
        MessageProperties,
        st.none() | text,
        st.none() | text,
        st.none() | st.binary(max_size=40),
        st.none() | st.integers(0, 0xFFFF_FFFF),
        st.lists(st.tuples(text, text), max_size=5).map(tuple),
    ),
    st.binary(max_size=5),
)
def test_what_is_written_is_read(properties: MessageProperties, tail: bytes) -> None:
    data = properties.to_bytes()
    assert MessageProperties.from_bytes(b"xy" + data + tail, 2) == (properties, 2 + len(data))


@given(st.binary(max_size=60))
def test_random_bytes(data: bytes) -> None:
    with contextlib.suppress(ProtocolError):
        MessageProperties.from_bytes(data)
    with contextlib.suppress(ProtocolError):
        MessageProperties.from_bytes(bytes([len(data)]) + data)


@given(st.binary(max_size=60))
def test_random_presence(data: bytes) -> None:
    with contextlib.suppress(ProtocolError):
        lane.Presence.from_bytes(data)
    assert lane.decode_error(data)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x05",
        b"\xff\xff\xff\xff",
        b"\x01\x7f",
        b"\x04\x01\x00\x01\x00",
        b"\x03\x02\x00\x00",
        b"\x05\x03\x00\x02\xff\xff",
        b"\x08\x03\x00\x01a\x03\x00\x01b",
        b"\x04\x26\x00\x01a",
        b"\x02\x0b\x80\x01",
    ],
)
def test_malformed(data: bytes) -> None:
    with pytest.raises(ProtocolError):
        MessageProperties.from_bytes(data)


def test_subscription_identifiers_are_passed_over() -> None:
    assert MessageProperties.from_bytes(b"\x08\x0b\x80\x01\x0b\x07\x09\x00\x00") == (
        MessageProperties(correlation_data=b""),
        9,
    )


def test_too_long_a_string_cannot_be_sent() -> None:
    with pytest.raises(ValueError, match="65535"):
        MessageProperties(user=(("k", "v" * 65_536),)).to_bytes()


@pytest.mark.parametrize("topic", ["", "a+b", "#", "a\x00", "a\nb", "a\ud800", "x" * 1025])
def test_topics_that_brokers_dislike(topic: str) -> None:
    assert not usable_topic(topic)


@pytest.mark.parametrize("topic", ["a", "größe/1", "edge/gw/results/a b"])
def test_topics_that_will_do(topic: str) -> None:
    assert usable_topic(topic)


def test_a_packet_full_of_user_properties_costs_no_more_than_a_few() -> None:
    """Two megabytes of empty ones held up the event loop for 0.4 s, before any rate was looked at."""
    body = b"\x08\x00\x01r" + b"\x26\x00\x00\x00\x00" * 400_000
    data = b"\x84\x89\x7a" + body
    found, end = MessageProperties.from_bytes(data)
    assert (found.response_topic, len(found.user), end) == ("r", MAX_USER, len(data))
