"""Stored requests: asked in order, tried again, given up by age; and what is kept of them."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mqtt_fakes import catalog, result
from pydantic_core import from_json

from agent.config import OutboxSection, RoutingSection
from agent.core.clock import ManualClock
from agent.core.errors import InferenceError, InvalidRequest, Unavailable, UnknownModel
from agent.core.types import InferenceRequest, InferenceResult
from agent.durable import asker as durable_asker
from agent.durable.asker import Asker, put
from agent.durable.pace import Pace
from agent.durable.records import LOCAL, UPLINK, Return, arrival_key, message_of, request_item, stored_request
from agent.ingress.durable import Acknowledgements
from agent.link.mqtt import Message, MessageProperties
from agent.registry.catalog import Catalog
from agent.routing.admission import Admission
from agent.store.outbox import BY_PRODUCER, Outbox, Stored
from tests.brokers import until

SETTINGS = OutboxSection(enabled=True, commit_wait_ms=0, retry_max_s=1, max_age_s=100)


class Rig:
    def __init__(self, folder: Path) -> None:
        loop = asyncio.get_running_loop()
        self.clock = ManualClock()
        self.catalog: Catalog = catalog()
        self.admission = Admission(self.catalog, RoutingSection(), self.clock, 5.0)

        def deliver(call: Callable[[], None]) -> None:
            loop.call_soon_threadsafe(call)

        self.outbox = Outbox(folder / "outbox.sqlite", SETTINGS, self.clock, deliver=deliver)
        self.asked: list[InferenceRequest] = []
        self.behave: Callable[[InferenceRequest], None] = lambda request: None
        self.stale = False
        self.rules: dict[str, frozenset[str]] = {}
        self.asker = Asker(
            self.outbox,
            self._infer,
            self.catalog,
            SETTINGS,
            self.clock,
            uplink_topic=lambda request: "up/gw" if request.uplink else None,
            regions=lambda producer, asked: self.rules.get(producer, asked),
        )
        self.outbox.stored = self._stored

    async def _infer(self, request: InferenceRequest) -> InferenceResult:
        self.asked.append(request)
        await asyncio.sleep(0)
        self.behave(request)
        variant = self.catalog.family("toy").variants["small"]
        return result(request, variant)._replace(stale=self.stale)

    def _stored(self, fresh: Any) -> None:
        for route, producer in fresh or [(BY_PRODUCER, None)]:
            if route == BY_PRODUCER:
                self.asker.stored(producer)

    def request(self, name: str, producer: str = "p", **options: Any) -> InferenceRequest:
        document = {"inputs": [1, 2, 3, 4], "request_id": name, "delivery": "durable", **options}
        return self.admission.from_document(document, model="toy", producer=producer, asked_by="service:mes")

    async def accept(self, request: InferenceRequest, sensor: str | None = None) -> None:
        await put(self.outbox, [request_item(request, Return("back", b"c", sensor), None, repeat=True)])

    def results(self, route: str = LOCAL) -> list[dict[str, Any]]:
        return [from_json(stored.body) for stored in self.outbox.page(route, 0, 100)]


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[Rig]:
    rig = Rig(tmp_path)
    rig.outbox.start()
    await until(lambda: rig.outbox.ready)
    work = asyncio.create_task(rig.asker.work())
    yield rig
    work.cancel()
    await rig.asker.close(1.0)
    await asyncio.to_thread(rig.outbox.close)


async def test_an_answer_takes_the_place_of_its_request(rig: Rig) -> None:
    await rig.accept(rig.request("a", idempotency_key="k"), sensor="s")
    await until(rig.results)
    (answer,) = rig.results()
    assert (answer["request_id"], answer["sensor"]) == ("a", "s")
    assert rig.outbox.rows(BY_PRODUCER) == 0
    (asked,) = rig.asked
    assert asked.idempotency_key is None  # the pipeline must not remember a try
    assert asked.deadline - asked.received == 5.0
    topic, properties = message_of(rig.outbox.page(LOCAL, 0, 1)[0], 50.0)
    assert (topic, properties.correlation_data, properties.get("status")) == ("back", b"c", "ok")


async def test_in_order_for_each_producer_and_again_until_it_works(rig: Rig) -> None:
    down = True

    def behave(request: InferenceRequest) -> None:
        if down and request.producer == "blocked":
            raise Unavailable("no lane")

    rig.behave = behave
    for number in range(5):
        await rig.accept(rig.request(f"b{number}", "blocked"))
        await rig.accept(rig.request(f"f{number}", "free"))
    await until(lambda: len(rig.results()) == 5)
    assert [answer["request_id"] for answer in rig.results()] == [f"f{number}" for number in range(5)]
    assert {asked.id for asked in rig.asked if asked.producer == "blocked"} == {"b0"}
    down = False
    rig.asker.nudge()
    await until(lambda: len(rig.results()) == 10)
    assert [answer["request_id"] for answer in rig.results()[5:]] == [f"b{number}" for number in range(5)]


async def test_the_next_is_asked_without_waiting_for_the_disk(rig: Rig) -> None:
    """A commit for each answer would be 20 answers in a second where commits wait 50 ms for company."""
    commits = 0

    def count(name: str) -> None:
        nonlocal commits
        commits += name == "committed"

    rig.outbox._settings = SETTINGS.model_copy(update={"commit_wait_ms": 1000})
    items = [[request_item(rig.request(str(number)), Return("back"), None, repeat=True)] for number in range(64)]
    await asyncio.gather(*(put(rig.outbox, item) for item in items))
    assert rig.outbox._file is not None
    rig.outbox._file._step = count

    def all_answered() -> bool:
        rig.clock.advance(0.01)
        return len(rig.results()) == 64

    await until(all_answered)
    assert [answer["request_id"] for answer in rig.results()] == [str(number) for number in range(64)]
    assert commits <= 3


async def test_the_order_is_kept_when_the_disk_takes_some_and_not_others(rig: Rig) -> None:
    """The first answer is lost with its commit. Those behind it, in later commits, may not take its place."""
    failed = False

    def fail(name: str) -> None:
        nonlocal failed
        if name == "begun" and rig.asked and not failed:
            failed = True
            raise sqlite3.OperationalError("disk I/O error")

    async def infer(request: InferenceRequest) -> InferenceResult:
        if request.id == "1":
            await until(lambda: failed)
        return await rig._infer(request)

    rig.asker._infer = infer
    assert rig.outbox._file is not None
    rig.outbox._file._step = fail
    items = [[request_item(rig.request(str(number)), Return("back"), None, repeat=True)] for number in range(12)]
    await asyncio.gather(*(put(rig.outbox, item) for item in items))

    def all_answered() -> bool:
        rig.asker.nudge()
        rig.clock.advance(0.01)
        return rig.outbox.ready and len(rig.results()) == 12

    await until(all_answered)
    assert failed
    assert len(rig.asked) > 12
    assert [answer["request_id"] for answer in rig.results()] == [str(number) for number in range(12)]


async def test_regions_are_those_of_today_when_it_is_asked(rig: Rig) -> None:
    """A producer's rule may have become stricter since its request was stored."""
    rig.rules["ruled"] = frozenset({"eu"})
    await rig.accept(rig.request("a", "ruled", allowed_regions=["eu", "us"]))
    await rig.accept(rig.request("b", "free", allowed_regions=["eu", "us"]))
    await until(lambda: len(rig.results()) == 2)
    regions = {asked.producer: asked.allowed_regions for asked in rig.asked}
    assert regions == {"ruled": {"eu"}, "free": {"eu", "us"}}
    assert {asked.asked_by for asked in rig.asked} == {"service:mes"}


async def test_a_stale_answer_is_none(rig: Rig) -> None:
    rig.stale = True
    await rig.accept(rig.request("a"))
    await until(lambda: rig.asker.counters.retried)
    assert rig.results() == []
    rig.stale = False
    rig.asker.nudge()
    await until(rig.results)


async def test_too_old_is_answered_so(rig: Rig) -> None:
    def behave(request: InferenceRequest) -> None:
        raise Unavailable("no lane")

    rig.behave = behave
    await rig.accept(rig.request("a"))
    await until(lambda: rig.asker.counters.retried)
    rig.clock.jump(10 * 365 * 86_400.0)
    rig.asker.nudge()
    await until(lambda: rig.asker.counters.retried >= 2)
    rig.clock.advance(101)
    rig.asker.nudge()
    await until(rig.results)
    assert rig.results()[0]["error"]["code"] == "expired"
    assert "no lane" in rig.results()[0]["error"]["message"]


async def test_a_refusal_that_would_come_again_is_the_answer(rig: Rig) -> None:
    def behave(request: InferenceRequest) -> None:
        raise UnknownModel("toy is no more")

    rig.behave = behave
    await rig.accept(rig.request("a"))
    await until(rig.results)
    assert rig.results()[0]["error"]["code"] == "unknown_model"


async def test_answers_of_the_uplink_go_both_ways_in_one_commit(rig: Rig) -> None:
    await rig.accept(replace(rig.request("a", "press"), uplink=True))
    await until(rig.results)
    (up,) = rig.outbox.page(UPLINK, 0, 9)
    topic, properties = message_of(up, 1.0)
    assert topic == "up/gw/press"
    assert properties.get("idempotency-key") == rig.outbox.page(LOCAL, 0, 9)[0].id
    assert from_json(up.body)["producer"] == "press"


async def test_a_fault_of_the_core_is_tried_again(rig: Rig) -> None:
    faults = [RuntimeError("bug"), InferenceError("fault")]

    def behave(request: InferenceRequest) -> None:
        if faults:
            raise faults.pop()

    rig.behave = behave
    await rig.accept(rig.request("a"))
    await until(lambda: not faults or rig.asker.nudge())
    await until(lambda: rig.results() or rig.asker.nudge())
    assert rig.results()[0]["label"]


async def test_a_request_is_kept_whole(rig: Rig) -> None:
    request = rig.request(
        "a",
        priority=9,
        max_retries=2,
        timeout_ms=30,
        variant="small",
        allowed_regions=["eu"],
        use_cache=False,
        accuracy="high",
        explain=True,
        shadow=False,
        metadata={"k": "v"},
        deadline_ms=1500,
    )
    item = request_item(request, Return("t"), None, repeat=True)
    stored = Stored(1, BY_PRODUCER, item.producer, item.id, item.head, item.body, 0.0, True)
    again, back = stored_request(stored, rig.catalog, 50.0)
    assert back == Return("t")
    assert (again.received, again.deadline) == (50.0, 51.5)
    for name in InferenceRequest.__slots__:
        if name in ("received", "deadline"):
            continue
        if name == "inputs":
            np.testing.assert_array_equal(again.inputs["x"], request.inputs["x"])
        else:
            assert getattr(again, name) == getattr(request, name), name


@pytest.mark.parametrize("head", [b"", b"{}", b"[1]", b'{"back": 1}'])
def test_a_request_that_cannot_be_read(head: bytes) -> None:
    with pytest.raises(InvalidRequest):
        stored_request(Stored(1, BY_PRODUCER, "p", "i", head, b"", 0.0, True), catalog(), 0.0)


def test_pace() -> None:
    pace = Pace(100.0)
    assert sum(pace.take(0.0) for _ in range(100)) == 5
    assert pace.wait_s() == pytest.approx(0.01)
    assert pace.take(0.0101)
    assert sum(pace.take(1000.0) for _ in range(100)) == 5


def test_arrival_keys_tell_packets_and_contents_apart() -> None:
    keys = {arrival_key("t", b"1", None, 7), arrival_key("t", b"2", None, 7), arrival_key("t", b"1", None, 8)}
    assert len(keys | {arrival_key("u", b"1", None, 7), arrival_key("t", b"1", b"c", 7)}) == 5


def test_pubacks_keep_the_order_of_their_messages() -> None:
    sent: list[int] = []
    owed = Acknowledgements()
    messages = [
        Message("t", b"", 1, False, MessageProperties(), 0.0, mid, acknowledge=lambda mid=mid: sent.append(mid))
        for mid in range(3)
    ]
    first, second, third = map(owed.owe, messages)
    owed.ready(third)
    owed.ready(second)
    assert sent == []
    owed.ready(first)
    assert sent == [0, 1, 2]


async def test_a_backlog_of_many_producers_is_worked_off_without_a_pause(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One commit tells all that were being asked, so they end in the same turn of the loop: their places are free."""
    monkeypatch.setattr(durable_asker, "IDLE_S", 1e6)
    monkeypatch.setitem(globals(), "SETTINGS", SETTINGS.model_copy(update={"commit_wait_ms": 50}))
    rig = Rig(tmp_path)
    rig.outbox.start()
    await until(lambda: rig.outbox.ready)
    await asyncio.gather(*(rig.accept(rig.request(f"r{i}", f"p{i}")) for i in range(40)))
    work = asyncio.create_task(rig.asker.work())
    await until(lambda: len(rig.results()) == 40, what="all are answered")
    work.cancel()
    await rig.asker.close(1.0)
    await asyncio.to_thread(rig.outbox.close)


async def test_requests_behind_a_page_of_damaged_ones_are_answered(tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    rig.outbox.start()
    await until(lambda: rig.outbox.ready)
    for i in range(20):
        await rig.accept(rig.request(f"r{i}"))
    with contextlib.closing(sqlite3.connect(tmp_path / "outbox.sqlite")) as file, file:
        file.execute("UPDATE items SET head = x'00' WHERE seq <= 16")
    rig.outbox.stored = lambda fresh: None  # nobody asks again meanwhile
    work = asyncio.create_task(rig.asker.work())
    await until(lambda: len(rig.results()) == 4, what="the good ones are answered")
    work.cancel()
    await rig.asker.close(1.0)
    await asyncio.to_thread(rig.outbox.close)
