"""What the MQTT parts do with whatever a broker may deliver, without one: an answer or a refusal by name, one line in
the log of each refusal and none of the rest, and nothing left behind."""

from __future__ import annotations

import asyncio
import json
from functools import partial
from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from agent.config import LaneSection, LimitsSection, MqttSection, RateSection, SecuritySection, SensorSection
from agent.core.clock import SystemClock
from agent.core.errors import TargetError
from agent.ingress.durable import DurableDoor
from agent.ingress.mqtt import MqttDoor
from agent.link.mqtt import LinkOptions, Message, MessageProperties
from agent.security.access import Guard
from agent.targets.cloud import MAX_WORKERS, CloudLane
from agent.telemetry.metrics import Metrics
from agent.wire import lane, oip
from agent.wire.mqtt_properties import usable_topic
from agent.worker import Worker, WorkerSettings
from tests.fuzz.messages import LEVEL, PROPERTIES, STRING, Published, play
from tests.fuzz.payloads import HUNDRED, around, damaged
from tests.unit.mqtt_fakes import LARGE, FakeCore, FakeDesk, FakePool, catalog, request

QUESTION = around([[1.0, 2.0, 3.0, 4.0]]) | st.just(np.arange(4, dtype=np.float32).tobytes())
CATALOG = catalog()
CLOCK = SystemClock()
FREE = RateSection(per_s=1000, burst=1000)
LIMITS = LimitsSection(identity=FREE, producer=FREE)

# --- the door ---------------------------------------------------------------------------------------------------------

SENSORS = {
    "plant/+/vibration": SensorSection(model="toy", field="values", scale=0.5, latency_class="realtime"),
    "plant/raw": SensorSection(model="toy", format="raw", dtype="int16", scale=0.1, deadline_ms=42),
    "plant/list": SensorSection(model="toy", name="named", use_cache=False),
}
TOPICS = st.one_of(
    st.builds("edge/gw/infer/{}".format, LEVEL),
    st.builds("edge/gw/infer/{}/{}".format, LEVEL, LEVEL),
    st.builds("plant/{}/vibration".format, LEVEL),
    st.sampled_from(["edge/gw/infer/toy", "edge/gw/infer/toy/m7", "edge/gw/explain", *list(SENSORS)[1:]]),
)


@HUNDRED
@given(TOPICS, QUESTION, PROPERTIES, st.booleans())
def test_the_door(topic: str, payload: bytes, properties: MessageProperties, retain: bool) -> None:
    section = MqttSection(max_in_flight=4, max_payload_bytes=4096)
    guard = Guard(SecuritySection(limits=LIMITS), CLOCK)
    door = MqttDoor(FakeCore(), section, SENSORS, "gw", Metrics(), CLOCK, guard=guard)
    told = Published(door.link)

    async def story() -> None:
        await door.start()
        told.deliver(topic, payload, properties, retain=retain)
        await asyncio.gather(*door._tasks)
        await door.close_door()
        assert door._status_task is not None
        door._status_task.cancel()

    log = play(story)
    assert (door.in_flight, sum(door._busy_sensors.values())) == (0, 0)
    refusals = log.of("turned away")
    if retain:  # old: sent again after a reconnect
        assert (told.sent, refusals, door.counters.replayed) == ([], [], 1)
        return
    ((where, _, back),) = told.sent
    (document,) = told.documents()
    assert back.correlation_data == properties.correlation_data
    asked = properties.response_topic
    if asked is not None and usable_topic(asked) and not topic.startswith("plant/"):
        assert where == asked
    if "error" in document:
        assert document["error"]["message"]
        assert [line["outcome"] for line in refusals] == [document["error"]["code"]] == [back.get("status")]
    else:
        assert (refusals, back.get("status")) == ([], "ok")
        assert document["label"] if topic != "edge/gw/explain" else document["request_id"] == "known"


# --- the durable door -------------------------------------------------------------------------------------------------

KEPT = st.one_of(
    st.builds("edge/gw/durable/{}".format, LEVEL),
    st.builds("edge/gw/durable/{}/{}".format, LEVEL, LEVEL),
    st.builds("plant/{}".format, LEVEL),
    st.sampled_from(["edge/gw/durable/toy", "edge/gw/durable/toy/m7", "plant/press"]),
)


@HUNDRED
@given(KEPT, QUESTION, PROPERTIES)
def test_the_durable_door(topic: str, payload: bytes, properties: MessageProperties) -> None:
    desk = FakeDesk()
    guard = Guard(SecuritySection(limits=LIMITS), CLOCK)
    section = MqttSection(max_payload_bytes=4096)
    sensors = {"plant/+": SensorSection(model="toy", durable=True)}
    door = DurableDoor(FakeCore(), desk, section, sensors, "gw", Metrics(), guard)  # type: ignore[arg-type]
    acknowledged: list[bool] = []

    async def story() -> None:
        await door.start()
        route = "plant/+" if topic.startswith("plant/") else "edge/gw/durable/+" + "/+" * (topic.count("/") - 3)
        acknowledge = partial(acknowledged.append, True)
        desk.link.callbacks[route](
            Message(topic, payload, 1, False, properties, CLOCK.monotonic(), 7, acknowledge=acknowledge)
        )
        await asyncio.gather(*door._tasks)

    log = play(story)
    assert acknowledged == [True], "else the broker sends nothing more, or the same without end"
    assert door.status()["being_stored"] == 0
    refusals = log.of("turned away")
    if desk.accepted:
        told = 1 if properties.response_topic is not None and not topic.startswith("plant/") else 0
        assert [status for _, status, _ in desk.link.published] == ["accepted"] * told
        assert (refusals, door.counters.refused) == ([], 0)
    else:
        ((_, status, document),) = desk.link.published
        assert document["error"]["message"]
        assert [line["outcome"] for line in refusals] == [status] == [document["error"]["code"]]


# --- a lane's worker --------------------------------------------------------------------------------------------------

SOUND, SOUND_HEADER = oip.encode_request({"x": np.array([[1, 2, 3, 4]], np.float32)})
NUMBERS = st.lists(st.floats(width=32) | st.just(np.nan), min_size=4, max_size=4).map(
    lambda values: oip.encode_request({"x": np.array([values], np.float32)})[0]
)
FITTING = st.tuples(st.just((oip.HEADER_LENGTH, str(SOUND_HEADER))), st.just((lane.BUDGET_MS, "5000")))
ASKED = st.builds(
    MessageProperties,
    response_topic=st.just("replies") | st.none() | STRING,
    correlation_data=st.none() | st.binary(max_size=20),
    message_expiry_s=st.none() | st.integers(0, 100),
    user=FITTING,
)


@HUNDRED
@given(st.tuples(damaged(SOUND) | NUMBERS, ASKED) | st.tuples(QUESTION, PROPERTIES))
def test_a_worker(asked: tuple[bytes, MessageProperties]) -> None:
    payload, properties = asked
    worker = Worker(WorkerSettings("lanes/a", "w1"), CATALOG, FakePool(), LinkOptions("mqtt://none", "w1"), CLOCK)
    told = Published(worker.link)

    async def story() -> None:
        await worker.start()
        told.deliver(lane.request_topic("lanes/a", "toy", LARGE), payload, properties)
        await asyncio.gather(*worker._tasks)

    log = play(story)
    assert worker._jobs == {}
    counters = worker.status()
    assert len(told.sent) == counters["answered"]
    assert counters["answered"] + counters["expired"] + counters["unanswerable"] == counters["received"] == 1
    assert log.written.getvalue().count("\n") == counters["unanswerable"] + len(log.of("request expired"))
    for where, reply, back in told.sent:
        assert (where, back.correlation_data) == (properties.response_topic, properties.correlation_data)
        if back.get(lane.STATUS) == lane.OK:
            outputs = oip.decode_response(reply, oip.header_length(back.get(oip.HEADER_LENGTH))).outputs
            assert np.isfinite(outputs["y"]).all()
        else:
            assert back.get(lane.STATUS) == lane.INVALID
            assert lane.decode_error(reply) != "(no usable message)"


# --- a lane's gateway -------------------------------------------------------------------------------------------------


def reply(**changes: Any) -> tuple[bytes, int]:
    execution = lane.Execution(LARGE, "fake/cpu", "w1", 0.001, 0.002).to_parameters() | changes
    return oip.encode_response(
        oip.OipResponse("toy", {"y": np.array([[0.25, 0.75]], np.float32)}, "large", parameters=execution)
    )


ANSWER, ANSWER_HEADER = reply()
ANSWERED = st.just(((lane.STATUS, lane.OK), (oip.HEADER_LENGTH, str(ANSWER_HEADER))))
ANYTHING = st.tuples(damaged(ANSWER) | QUESTION, ANSWERED | PROPERTIES.map(lambda made: made.user))
TIMES = st.floats() | st.integers(-(2**70), 2**70) | st.none() | STRING


def _stated(queue_ms: object, compute_ms: object) -> tuple[bytes, tuple[tuple[str, str], ...]]:
    payload, header = reply(queue_ms=queue_ms, compute_ms=compute_ms)
    return payload, ((lane.STATUS, lane.OK), (oip.HEADER_LENGTH, str(header)))


STATED = st.builds(_stated, TIMES, TIMES)
PRESENCE = lane.Presence("w1", 2, (lane.ServedModel("toy", "large", LARGE, "fake/cpu"),)).to_bytes()


def a_lane() -> tuple[CloudLane, Published]:
    target = CloudLane(
        LaneSection(name="a", broker="mqtt://none", topic="lanes/a"), "gw", catalog(), CLOCK, max_bytes=1e9
    )
    return target, Published(target.link)


@HUNDRED
@given(ANYTHING | STATED)
def test_what_a_worker_replies(made: tuple[bytes, tuple[tuple[str, str], ...]]) -> None:
    payload, user = made
    target, told = a_lane()
    question, family = request(), CATALOG.family("toy")

    def answered(asked: MessageProperties) -> None:
        assert asked.response_topic is not None
        back = MessageProperties(correlation_data=asked.correlation_data, user=user)
        told.deliver(asked.response_topic, payload, back)

    async def story() -> None:
        await target.start()
        told.answer = answered
        try:
            answer = await target.infer(question, family, family.variants["large"], question.deadline)
        except TargetError as error:
            assert str(error)
        else:
            assert np.isfinite(answer.outputs["y"]).all()
            assert answer.outputs["y"].shape == (1, 2)
            assert 0 <= answer.queue_s < np.inf and 0 <= answer.compute_s < np.inf and answer.link_s >= 0

    log = play(story)
    assert log.written.getvalue() == "", "the router says what became of an attempt"
    assert target.status()["waiting"] == 0


@HUNDRED
@given(st.lists(st.tuples(LEVEL, damaged(PRESENCE) | QUESTION, PROPERTIES), min_size=1, max_size=4))
def test_who_says_to_be_present(present: list[tuple[str, bytes, MessageProperties]]) -> None:
    target, told = a_lane()

    async def story() -> None:
        await target.start()
        for worker, payload, properties in present:
            told.deliver(lane.presence_topic("lanes/a", worker), payload, properties, retain=True)
        served = target.variants_for(CATALOG.family("toy"), None)
        assert {variant.sha256 for variant in served} <= {LARGE}

    log = play(story)
    assert len(log.of("unusable presence")) == target.status()["malformed"]
    json.dumps(target.status())


def test_more_workers_than_anybody_has() -> None:
    target, told = a_lane()

    async def story() -> None:
        await target.start()
        for number in range(MAX_WORKERS + 10):
            told.deliver(lane.presence_topic("lanes/a", f"w{number}"), PRESENCE, MessageProperties(), retain=True)

    play(story)
    assert len(target.status()["workers"]) == MAX_WORKERS
