"""What differs between two configurations, and what is said of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from agent.config import Config
from agent.core.clock import ManualClock
from agent.core.errors import ConfigError
from agent.registry.catalog import load_catalog
from agent.registry.locate import catalog_path
from agent.registry.trust import SHIPPED
from agent.settings import MAX_CHANGES, Reloads, Settings, changes, load_settings

CATALOG = load_catalog(catalog_path(None))


def settings(**sections: object) -> Settings:
    return Settings(Config.model_validate(sections), CATALOG, SHIPPED)


def test_keys_that_differ_are_named_without_their_values() -> None:
    lane = {"name": "eu", "broker": "mqtt://a", "topic": "t", "password": "the secret of the lane"}
    after = settings(http={"port": 1234}, cloud={"lanes": [lane]})
    assert changes(settings(), after) == ["cloud.lanes", "http.port"]
    assert changes(after, after) == []


def test_another_secret_is_a_change() -> None:
    lane = {"name": "eu", "broker": "mqtt://a", "topic": "t", "username": "u"}
    before = settings(cloud={"lanes": [lane | {"password": "one"}]})
    assert changes(before, settings(cloud={"lanes": [lane | {"password": "two"}]})) == ["cloud.lanes"]


def test_many_changes_are_counted() -> None:
    sensors = {f"sensors/{number}": {"model": "digits"} for number in range(80)}
    named = changes(settings(), settings(sensors=sensors))
    assert len(named) == MAX_CHANGES + 1 and named[-1] == "and 30 more"


def test_another_catalogue_is_a_change() -> None:
    smaller = {name: family for name, family in CATALOG.families.items() if name != "motion"}
    other = Settings(Config(), CATALOG.model_copy(update={"families": smaller}), SHIPPED)
    assert changes(settings(), other) == ["catalogue: motion"]
    assert other.digest() != settings().digest() == settings().digest()


def test_unknown_models_are_faults_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "edge-agent.yaml"
    path.write_text("sensors: {a/b: {model: nothing}}\nedge_mcu: {port: /dev/x, streams: [{name: s, model: other}]}\n")
    with pytest.raises(ConfigError) as refused:
        load_settings(path)
    assert [problem.split(": ")[1] for problem in refused.value.problems] == [
        "sensors.a/b.model",
        "edge_mcu.streams.0.model",
    ]


def test_what_is_told_of_reloads() -> None:
    clock = ManualClock()
    reloads = Reloads(clock)
    reloads.begin(settings())
    assert reloads.component() == {
        "name": "settings",
        "state": "up",
        "reason": "",
        "since_s": 0.0,
        "since": clock.wall(),
    }
    clock.advance(5)
    reloads.refuse(["a: is wrong", "b: too"])
    assert reloads.component()["state"] == "degraded"
    assert reloads.component()["reason"].endswith("a: is wrong; b: too")
    assert (reloads.status()["generation"], reloads.status()["refused"]) == (1, 1)
    reloads.took(settings(http={"port": 1}))
    assert (reloads.component()["state"], reloads.status()["generation"]) == ("up", 2)
    reloads.refuse(["x" * 100_000])
    assert len(reloads.status()["problem"]) <= 1000
