"""The message codec against the golden vectors, round trips, and hostile bodies."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.core.errors import ProtocolError
from agent.wire import codes, messages, stream, update
from agent.wire.body import Message
from agent.wire.fragments import Fragment

VECTORS = json.loads((Path(__file__).parents[1] / "vectors" / "frames.json").read_text(encoding="utf-8"))
CLASSES: dict[str, Any] = {
    cls.TYPE.name: cls
    for module in (messages, stream, update)
    for cls in vars(module).values()
    if isinstance(cls, type) and cls.__module__ == module.__name__ and hasattr(cls, "TYPE")
}
CLASSES["FRAGMENT"] = Fragment


def as_vector(value: Any) -> Any:
    """A field as the vectors write it."""
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, tuple):
        return [as_vector(item) for item in value]
    if isinstance(value, messages.Slot):
        return {field.name: as_vector(getattr(value, field.name)) for field in fields(value)}
    return value


ABSENT = {"signature": "", "board": "", "operators": [], "rollback": 0, "trial_s": 0}
"""Of a body that does not have the field."""


def check_fields(message: Any, expected: dict[str, Any]) -> None:
    found = {field.name: as_vector(getattr(message, field.name)) for field in fields(message)}
    for name, default in ABSENT.items():
        if name in found and name not in expected:
            assert found.pop(name) == default
    assert found == expected


def test_every_type_of_the_page_has_its_class_and_number() -> None:
    assert {member.name: member.value for member in codes.MessageType} == VECTORS["types"]
    assert set(CLASSES) == {*VECTORS["types"], "FRAGMENT"}


@pytest.mark.parametrize("entry", VECTORS["messages"], ids=lambda entry: entry["name"])
def test_golden_message(entry: dict[str, Any]) -> None:
    body = bytes.fromhex(entry["body_hex"])
    message = CLASSES[entry["type"]].from_bytes(body)
    check_fields(message, entry["fields"])
    assert message.to_bytes() == body


@pytest.mark.parametrize("entry", VECTORS["grown"], ids=lambda entry: entry["name"])
def test_bodies_may_grow(entry: dict[str, Any]) -> None:
    check_fields(CLASSES[entry["type"]].from_bytes(bytes.fromhex(entry["body_hex"])), entry["fields"])


@pytest.mark.parametrize("entry", VECTORS["short"], ids=lambda entry: entry["name"])
def test_short_bodies_are_refused_with_a_clear_text(entry: dict[str, Any]) -> None:
    name = "fragment" if entry["type"] == "FRAGMENT" else entry["type"]
    with pytest.raises(ProtocolError, match=f"{name} of {len(entry['body_hex']) // 2} bytes ends inside"):
        CLASSES[entry["type"]].from_bytes(bytes.fromhex(entry["body_hex"]))


@given(st.sampled_from(sorted(CLASSES)), st.binary(max_size=400))
def test_random_bodies_parse_or_raise_protocol_error(name: str, body: bytes) -> None:
    try:
        message: Message = CLASSES[name].from_bytes(body)
    except ProtocolError:
        return
    assert CLASSES[name].from_bytes(message.to_bytes()) == message or name in ("LOG", "ERROR", "HELLO")


@given(st.sampled_from(VECTORS["messages"]), st.data())
def test_mutated_bodies_parse_or_raise_protocol_error(entry: dict[str, Any], data: st.DataObject) -> None:
    body = bytearray.fromhex(entry["body_hex"])
    for _ in range(data.draw(st.integers(1, 4))):
        if body:
            body[data.draw(st.integers(0, len(body) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(body)))
    for candidate in (bytes(body), bytes(body[:cut])):
        try:
            CLASSES[entry["type"]].from_bytes(candidate)
        except ProtocolError:
            continue


def test_unknown_numbers_of_a_later_minor_version_are_kept() -> None:
    error = messages.Error.from_bytes(b"\x63\x00later")
    assert (error.code, str(error)) == (99, "99: later")
    assert str(messages.Error.from_bytes(b"\x09\x00")) == "MODEL_MISMATCH"
    assert messages.Log.from_bytes(b"\x09x").level == 9


def test_broken_utf8_in_texts_refuses_nothing() -> None:
    assert messages.Log.from_bytes(b"\x01a\xff").text == "a\N{REPLACEMENT CHARACTER}"


HELLO = messages.Hello.from_bytes(
    next(bytes.fromhex(entry["body_hex"]) for entry in VECTORS["messages"] if entry["name"] == "hello_full")
)


def test_hello_names_its_active_slot() -> None:
    assert HELLO.active is not None
    assert HELLO.active.counter == 7


@pytest.mark.parametrize(
    ("at", "value", "text"),
    [(2, b"\xff\x00", "max_frame 255"), (8, b"\x00", "window 0")],
)
def test_hello_outside_the_page_is_refused(at: int, value: bytes, text: str) -> None:
    body = bytearray(HELLO.to_bytes())
    body[at : at + len(value)] = value
    with pytest.raises(ProtocolError, match=text):
        messages.Hello.from_bytes(bytes(body))


def test_two_active_slots_are_refused() -> None:
    body = bytearray(HELLO.to_bytes())
    body[-53] = codes.SlotState.TRIAL
    with pytest.raises(ProtocolError, match="more than one active"):
        messages.Hello.from_bytes(bytes(body))


def test_stats_by_name_leaves_out_unknown_ids() -> None:
    stats = messages.Stats(((codes.StatId.UPTIME_US, 5), (200, 6)))
    assert stats.by_name() == {"uptime_us": 5}


def test_missing_chunks_follow_the_bitmap_and_go_beyond_it() -> None:
    bitmap = bytearray(32)
    bitmap[0] = 0b10
    bitmap[31] = 0x80
    status = update.ModelStatus(1, 1, 10, 2605, 30, 10, bytes(bitmap), bytes(32))
    missing = list(status.missing())
    assert missing == [10, *range(30, 2560, 10), *range(2570, 2605, 10)]
    assert not status.complete


def test_a_complete_transfer_misses_nothing() -> None:
    status = update.ModelStatus(0xFF, 0, 0, 0, 0, 0, bytes(32), bytes(32))
    assert status.complete
    assert list(status.missing()) == []


def test_unfinished_transfer_without_chunk_size_is_refused() -> None:
    body = update.ModelStatus(1, 1, 0, 100, 0, 0, bytes(32), bytes(32)).to_bytes()
    with pytest.raises(ProtocolError, match="0 bytes"):
        update.ModelStatus.from_bytes(body)


def test_signature_covers_the_manifest_with_chunk_zero() -> None:
    begin = update.ModelBegin(1, 0, 1072, 20, 0, 1, 4096, 1, bytes(32), bytes(32), 1, bytes(64))
    signed = begin.signed()
    assert len(signed) == 21 + 64
    assert signed[2:4] == b"\0\0"
    assert begin.to_bytes()[4:85] == signed[4:]


@pytest.mark.parametrize("kind", [2, 255])
def test_unknown_signature_kind_is_refused(kind: int) -> None:
    begin = update.ModelBegin(1, 0, 1072, 20, 0, 1, 4096, 1, bytes(32), bytes(32))
    with pytest.raises(ProtocolError, match="signature_kind"):
        update.ModelBegin.from_bytes(begin.to_bytes()[:-1] + bytes([kind]))
