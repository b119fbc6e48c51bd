"""The worker, on a real broker, with the gateway's side played by the test and a stand-in for the runtimes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agent.core.clock import SystemClock
from agent.core.errors import ConfigError, TargetBusy, TargetFailed, TargetTimeout
from agent.core.types import Tensors
from agent.link.mqtt import LinkOptions, Message, MessageProperties, MqttLink
from agent.runtimes.base import RunOutcome
from agent.wire import lane, oip
from agent.worker import AnswerStore, Worker, WorkerSettings, _Reply
from tests.brokers import MOSQUITTO, Broker, mosquitto, running, until
from tests.unit.mqtt_fakes import LARGE, SMALL, FakePool, catalog

pytestmark = pytest.mark.skipif(MOSQUITTO is None, reason="mosquitto is not installed")
TOPIC = "lanes/a"


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[Broker]:
    with running(mosquitto(tmp_path)) as started:
        yield started


class Rig:
    """A gateway's side of the lane, and the workers on it."""

    def __init__(self, broker: Broker) -> None:
        self.broker = broker
        self.near = MqttLink(LinkOptions(broker.url, "near"))
        self.replies: list[Message] = []
        self.present: dict[str, bytes] = {}
        self.workers: list[Worker] = []

    async def open(self) -> None:
        await self.near.subscribe("replies", self.replies.append)
        await self.near.subscribe(lane.presence_topic(TOPIC, "+"), self._on_presence)
        await self.near.start()
        await until(lambda: self.near.connected, what="the gateway's side connects")

    def _on_presence(self, message: Message) -> None:
        self.present[message.topic.rsplit("/", 1)[1]] = message.payload

    async def worker(self, name: str = "w1", pool: FakePool | None = None, **settings: Any) -> tuple[Worker, FakePool]:
        pool = pool or FakePool()
        options = LinkOptions(self.broker.url, f"worker-{name}", backoff_initial_s=0.02, backoff_max_s=0.2)
        worker = Worker(WorkerSettings(TOPIC, name, **settings), catalog(), pool, options, SystemClock())
        self.workers.append(worker)
        await worker.start()
        await until(lambda: self.present.get(name), what=f"{name} is present")
        return worker, pool

    def ask(
        self,
        correlation: bytes = b"1",
        values: tuple[float, ...] = (1, 2, 3, 4),
        *,
        key: str | None = None,
        budget_ms: str | None = "5000",
        payload: bytes | None = None,
        response_topic: str | None = "replies",
    ) -> None:
        data, length = oip.encode_request({"x": np.array([values], np.float32)})
        user = [(oip.HEADER_LENGTH, str(length))]
        if key is not None:
            user.append((lane.IDEMPOTENCY_KEY, key))
        if budget_ms is not None:
            user.append((lane.BUDGET_MS, budget_ms))
        properties = MessageProperties(oip.CONTENT_TYPE, response_topic, correlation, 30, tuple(user))
        self.near.publish(lane.request_topic(TOPIC, "toy", LARGE), payload or data, properties=properties)

    async def answers(self, count: int = 1) -> list[Message]:
        await until(lambda: len(self.replies) >= count, what=f"{count} replies")
        return self.replies

    async def close(self) -> None:
        for worker in self.workers:
            await worker.stop()
        await self.near.stop()


@pytest.fixture
async def rig(broker: Broker) -> AsyncIterator[Rig]:
    opened = Rig(broker)
    await opened.open()
    yield opened
    await opened.close()


def status(message: Message) -> str | None:
    return message.properties.get(lane.STATUS)


async def test_answer_says_how_it_came_about(rig: Rig) -> None:
    await rig.worker()
    rig.ask(b"\x00id")
    (reply,) = await rig.answers()
    assert status(reply) == "ok"
    assert reply.properties.correlation_data == b"\x00id"
    response = oip.decode_response(reply.payload, oip.header_length(reply.properties.get(oip.HEADER_LENGTH)))
    np.testing.assert_array_equal(response.outputs["y"], np.array([[1, 2]], np.float32))
    assert response.model_name == "toy"
    assert response.model_version == "large"
    assert lane.Execution.from_parameters(response.parameters) == lane.Execution(LARGE, "fake/cpu", "w1", 0.002, 0.003)


async def test_presence_tells_what_is_served_and_goes_with_the_worker(rig: Rig) -> None:
    worker, pool = await rig.worker(pool=FakePool([SMALL]), max_concurrent=3)
    presence = lane.Presence.from_bytes(rig.present["w1"])
    assert presence == lane.Presence("w1", 3, (lane.ServedModel("toy", "small", SMALL, "fake/cpu"),))
    await worker.stop()
    await until(lambda: rig.present["w1"] == b"", what="presence is cleared")
    assert pool.closed


async def test_nothing_to_serve_is_a_configuration_error(broker: Broker) -> None:
    options = LinkOptions(broker.url, "idle")
    worker = Worker(WorkerSettings(TOPIC, "idle"), catalog(), FakePool([]), options, SystemClock())
    with pytest.raises(ConfigError, match="toy/small: not here"):
        await worker.start()


async def test_duplicate_runs_once(rig: Rig) -> None:
    worker, pool = await rig.worker()
    pool.gate = asyncio.Event()
    rig.ask(b"1", key="same")
    rig.ask(b"2", key="same")
    await until(lambda: worker.counters.duplicates == 1, what="the repeat joins")
    pool.gate.set()
    await rig.answers(2)
    rig.ask(b"3", key="same")
    replies = await rig.answers(3)
    assert pool.runs == [LARGE]
    assert [reply.properties.correlation_data for reply in replies] == [b"1", b"2", b"3"]
    assert len({reply.payload for reply in replies}) == 1
    assert worker.counters.duplicates == 2


class Patient(FakePool):
    """Takes all the time there is the first time, and more: until somebody asks again."""

    def __init__(self) -> None:
        super().__init__()
        self.asked_again = asyncio.Event()

    async def run(self, sha256: str, inputs: Tensors, deadline: float) -> RunOutcome:
        if not self.runs:
            self.runs.append(sha256)
            await asyncio.sleep(max(0.0, deadline - SystemClock.monotonic()))
            await self.asked_again.wait()
            raise TargetTimeout("waited for its turn")
        return await super().run(sha256, inputs, deadline)


async def test_a_repeat_with_more_time_is_answered_when_the_first_has_run_out_of_it(rig: Rig) -> None:
    pool = Patient()
    worker, _ = await rig.worker(pool=pool)
    rig.ask(b"1", key="same", budget_ms="50")
    await until(lambda: worker.counters.received == 1, what="the first is there")
    rig.ask(b"2", key="same")
    await until(lambda: worker.counters.duplicates == 1, what="the second is there")
    pool.asked_again.set()
    (reply,) = await rig.answers()
    assert (status(reply), reply.properties.correlation_data) == ("ok", b"2")
    assert worker.counters.duplicates == 1


async def test_one_key_for_two_questions_is_two_questions(rig: Rig) -> None:
    _, pool = await rig.worker()
    rig.ask(b"1", (1, 2, 3, 4), key="same")
    rig.ask(b"2", (5, 6, 7, 8), key="same")
    replies = await rig.answers(2)
    assert len(pool.runs) == 2
    assert len({reply.payload for reply in replies}) == 2


async def test_failures_are_not_kept_for_repeats(rig: Rig) -> None:
    _, pool = await rig.worker()
    pool.error = TargetFailed("a fault")
    rig.ask(b"1", key="same")
    await rig.answers(1)
    pool.error = None
    rig.ask(b"2", key="same")
    replies = await rig.answers(2)
    assert [status(reply) for reply in replies] == ["failed", "ok"]
    assert lane.decode_error(replies[0].payload) == "a fault"


async def test_expired_is_dropped_before_it_runs(rig: Rig) -> None:
    worker, pool = await rig.worker(delay_s=0.02)
    rig.ask(b"late", budget_ms="1")
    rig.ask(b"in time")
    (reply,) = await rig.answers()
    assert reply.properties.correlation_data == b"in time"
    assert pool.runs == [LARGE]
    assert worker.counters.expired == 1


async def test_full_queue_says_busy(rig: Rig) -> None:
    worker, pool = await rig.worker(max_concurrent=1, max_queued=1)
    pool.gate = asyncio.Event()
    for number in range(3):
        rig.ask(bytes([number]))
    (reply,) = await rig.answers()
    assert status(reply) == "busy"
    assert reply.properties.correlation_data == b"\x02"
    pool.gate.set()
    assert [status(reply) for reply in await rig.answers(3)] == ["busy", "ok", "ok"]
    assert worker.counters.busy == 1


@pytest.mark.parametrize(("error", "says"), [(TargetBusy("full"), "busy"), (RuntimeError("odd"), "failed")])
async def test_runtime_errors_are_told(rig: Rig, error: Exception, says: str) -> None:
    _, pool = await rig.worker()
    pool.error = error
    rig.ask()
    assert [status(reply) for reply in await rig.answers()] == [says]


async def test_run_that_times_out_is_not_answered(rig: Rig) -> None:
    worker, pool = await rig.worker()
    pool.error = TargetTimeout("too slow")
    rig.ask()
    await until(lambda: worker.counters.expired == 1, what="it is counted")
    assert rig.replies == []


@pytest.mark.parametrize(
    ("question", "says"),
    [
        ({"payload": b"nonsense"}, "header-content-length"),
        ({"payload": b"\x00" * 1000}, "JSON"),
        ({"values": (1, 2, 3)}, "x must be float32"),
        ({"values": (1, 2, 3, float("nan"))}, "x holds NaN"),
        ({"budget_ms": "soon"}, "budget-ms"),
        ({"budget_ms": "-1"}, "budget-ms"),
        ({"budget_ms": "nan"}, "budget-ms"),
    ],
)
async def test_malformed_requests_are_told_and_counted(rig: Rig, question: dict[str, Any], says: str) -> None:
    worker, pool = await rig.worker()
    rig.ask(**question)
    (reply,) = await rig.answers()
    assert status(reply) == "invalid"
    assert says in lane.decode_error(reply.payload)
    assert worker.counters.invalid == 1
    assert pool.runs == []


@pytest.mark.parametrize("topic", [None, "", "a/#", "a/+/b", "a\x01b"])
async def test_request_that_cannot_be_answered_is_counted(rig: Rig, topic: str | None) -> None:
    worker, pool = await rig.worker()
    message = Message("any", b"", 0, False, MessageProperties(response_topic=topic), SystemClock.monotonic())
    worker._on_request(next(iter((await worker._load())[0]))[0], message)
    assert worker.counters.unanswerable == 1
    assert pool.runs == []


async def test_two_workers_share(rig: Rig) -> None:
    (_, first), (_, second) = await rig.worker("w1"), await rig.worker("w2")
    for number in range(20):
        rig.ask(bytes([number]))
    replies = await rig.answers(20)
    assert {reply.properties.correlation_data for reply in replies} == {bytes([number]) for number in range(20)}
    assert first.runs
    assert second.runs
    assert len(first.runs) + len(second.runs) == 20


async def test_stop_answers_what_is_here_and_takes_no_more(rig: Rig) -> None:
    worker, pool = await rig.worker()
    pool.gate = asyncio.Event()
    rig.ask(b"here")
    await until(lambda: pool.runs, what="the request runs")
    stopping = asyncio.ensure_future(worker.stop())
    await until(lambda: rig.present["w1"] == b"", what="presence is cleared first")
    rig.ask(b"too late")
    pool.gate.set()
    await asyncio.wait_for(stopping, 10)
    await rig.answers()
    assert [reply.properties.correlation_data for reply in rig.replies] == [b"here"]


async def test_worker_comes_back_with_the_broker(rig: Rig) -> None:
    worker, _ = await rig.worker()
    rig.broker.kill()
    await until(lambda: not worker.link.connected, what="the loss is noticed")
    rig.present.clear()
    rig.broker.start()
    await until(lambda: rig.present.get("w1"), what="it is present again")
    await until(lambda: rig.near.connected)
    rig.ask()
    assert [status(reply) for reply in await rig.answers()] == ["ok"]


def test_answer_store_is_bounded_in_number_age_and_bytes() -> None:
    store = AnswerStore(entries=2, window_s=10.0)
    for number in range(3):
        store.put(number, _Reply("ok", b"x"), now=float(number))
    assert store.get(0, 3.0) is None
    assert store.get(2, 11.9) is not None
    assert store.get(2, 12.0) is None
    store.put("long", _Reply("ok", b"x"), now=20.0, until=99.0)  # its request may come again for so long
    assert store.get("long", 98.0) is not None
    store.put("later", _Reply("ok", b"x"), now=100.0)
    assert len(store) == 1
    for number in range(3):
        store.put(number, _Reply("ok", bytes(8 << 20)), now=101.0)
    assert len(store) == 2
