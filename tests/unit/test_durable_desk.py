"""Which answers are passed on to the cloud, and which configurations of it are possible."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from mqtt_fakes import catalog, request
from pydantic import ValidationError

from agent.config import AuditSection, Config, ProducerSection, RoutingSection
from agent.core.clock import ManualClock
from agent.core.errors import AuditUnavailable
from agent.core.types import InferenceRequest, InferenceResult
from agent.durable import desk as desk_module
from agent.durable.desk import Desk
from agent.durable.records import Return, request_item, stored_request
from agent.routing.admission import Admission
from agent.security.audit import Audit
from agent.security.audit_file import audit_files, read_lines
from agent.store.outbox import BY_PRODUCER, Stored
from agent.supervisor import Supervisor
from tests.brokers import until

LANE = {"name": "eu", "broker": "mqtt://127.0.0.1:1", "region": "eu-west"}


def tree(**sections: Any) -> Config:
    whole = {"gateway": {"id": "gw"}, "outbox": {"enabled": True}, "cloud": {"lanes": [LANE]}, **sections}
    return Config.model_validate(whole)


async def never(_: InferenceRequest) -> InferenceResult:
    raise AssertionError


async def test_what_the_uplink_takes(tmp_path: Path) -> None:
    desk = Desk(tree(uplink={"lane": "eu"}), tmp_path, never, catalog(), ManualClock())
    plain = request()
    assert desk.uplink_topic(plain) is None
    told = replace(plain, uplink=True)
    assert desk.uplink_topic(told) == "edge-agent/results/gw"
    assert desk.uplink_topic(replace(told, allowed_regions=frozenset({"eu-west"}))) == "edge-agent/results/gw"
    assert desk.uplink_topic(replace(told, allowed_regions=frozenset({"us"}))) is None
    without = Desk(tree(), tmp_path, never, catalog(), ManualClock())
    assert without.uplink_topic(told) is None


@pytest.mark.parametrize(
    ("producer", "asked", "passed_on"),
    [("free", [], True), ("eu", [], True), ("us", [], False), ("eu", ["us"], False), ("us", ["eu-west"], False)],
)
async def test_the_uplink_keeps_to_the_rule_of_a_producer(
    tmp_path: Path, producer: str, asked: list[str], passed_on: bool
) -> None:
    """Over the outbox as well: what is stored is what the rule left of the request's regions."""
    rules = {"eu": ProducerSection(allowed_regions=("eu-west",)), "us": ProducerSection(allowed_regions=("us",))}
    admission = Admission(catalog(), RoutingSection(), ManualClock(), 5.0, producers=rules)
    document = {"inputs": [1, 2, 3, 4], "delivery": "durable", "allowed_regions": asked}
    question = replace(admission.from_document(document, model="toy", producer=producer), uplink=True)
    item = request_item(question, Return("t"), None, repeat=True)
    stored = Stored(1, BY_PRODUCER, item.producer, item.id, item.head, item.body, 0.0, True)
    again, _ = stored_request(stored, catalog(), 0.0)
    assert again.allowed_regions == question.allowed_regions
    desk = Desk(tree(uplink={"lane": "eu"}), tmp_path, never, catalog(), ManualClock())
    assert (desk.uplink_topic(again) is not None) == passed_on


class Recorded:
    """A desk with an audit trail."""

    def __init__(self, folder: Path, **section: Any) -> None:
        self.audit = Audit(AuditSection(enabled=True, fsync_s=0, **section), folder, ManualClock(), {})
        self.desk = Desk(tree(), folder, never, catalog(), ManualClock(), audit=self.audit)
        self.desk._loop = asyncio.get_running_loop()
        self.desk.outbox.start()

    async def close(self) -> list[dict[str, Any]]:
        """Lines of the trail."""
        await asyncio.to_thread(self.desk.outbox.close)
        await asyncio.to_thread(self.audit.close)
        return [json.loads(line) for path in audit_files(self.audit.folder) for line in read_lines(path)]


async def test_what_is_accepted_is_on_record_once(tmp_path: Path) -> None:
    recorded = Recorded(tmp_path)
    recorded.audit.open()
    asked = replace(request(), durable=True, asked_by="service:mes", idempotency_key="k")
    await recorded.desk.accept(asked)
    await recorded.desk.accept(asked)
    first, again = await recorded.close()
    assert {key: first[key] for key in ("kind", "what", "outcome", "who", "producer", "request_id", "model")} == {
        "kind": "act",
        "what": "accept",
        "outcome": "accepted",
        "who": "service:mes",
        "producer": "anonymous",
        "request_id": asked.id,
        "model": "toy",
    }
    assert (again["what"], again["outcome"]) == ("accept", "duplicate")


async def test_nothing_is_accepted_that_cannot_be_put_on_record(tmp_path: Path) -> None:
    recorded = Recorded(tmp_path, on_full="refuse", queue=16)  # and nobody writes yet
    for _ in range(16):
        await recorded.desk.accept(replace(request(), durable=True))
    with pytest.raises(AuditUnavailable) as caught:
        await recorded.desk.accept(replace(request(), durable=True, id="r17"))
    assert caught.value.request_id == "r17"
    assert recorded.desk.outbox.rows(BY_PRODUCER) == 16
    recorded.audit.open()
    assert len(await recorded.close()) == 16


async def test_a_target_that_is_back_is_asked_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(desk_module, "WATCH_S", 0.001)
    there: set[str] = {"eu"}
    looks, nudges = [0], [0]

    def askable() -> frozenset[str]:
        looks[0] += 1
        return frozenset(there)

    async def look_again() -> None:
        seen = looks[0]
        await until(lambda: looks[0] >= seen + 2)

    desk = Desk(tree(), tmp_path, never, catalog(), ManualClock(), askable=askable)
    monkeypatch.setattr(desk.asker, "nudge", lambda: nudges.__setitem__(0, nudges[0] + 1))
    supervisor = Supervisor(ManualClock())
    supervisor.spawn("outbox", desk._watch)
    await look_again()
    await look_again()
    there.clear()
    await look_again()
    assert nudges == [1], "gone is no reason to ask"
    there.add("eu")
    await look_again()
    assert nudges == [2]
    await supervisor.stop()


SENSOR = {"model": "toy"}


@pytest.mark.parametrize(
    ("sections", "says"),
    [
        ({"uplink": {"lane": "us"}}, "uplink.lane 'us' is none of cloud.lanes"),
        ({"uplink": {"lane": "eu"}, "outbox": {"enabled": False}}, "uplink needs outbox.enabled: true"),
        ({"mqtt": {"enabled": False}}, "outbox needs mqtt.enabled: true"),
        ({"outbox": {}, "sensors": {"a/b": {**SENSOR, "durable": True}}}, "sensors.a/b.durable needs outbox.enabled"),
        ({"sensors": {"a/b": {**SENSOR, "uplink": True}}}, "sensors.a/b.uplink needs uplink.lane"),
    ],
)
def test_configurations_that_are_impossible(sections: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        tree(**sections)
