"""Which answers are passed on to the cloud, and which configurations of it are possible."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from mqtt_fakes import catalog, request
from pydantic import ValidationError

from agent.config import Config
from agent.core.clock import ManualClock
from agent.core.types import InferenceRequest, InferenceResult
from agent.durable.desk import Desk

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
