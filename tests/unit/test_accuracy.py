"""Running accuracies: agreement to accuracy, the alarm and its band, and what survives a restart."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pytest
from cascade_fakes import calibrated_catalog, calibrated_family
from fakes import make_catalog
from hypothesis import given
from hypothesis import strategies as st

from agent.config import DriftSection
from agent.registry.accuracy import Accuracies, Alarm
from agent.registry.catalog import Variant

SETTINGS = DriftSection(window=200, min_samples=50, margin=0.02)


class Watch:
    def __init__(self, path: Path | None = None, settings: DriftSection = SETTINGS) -> None:
        catalog = calibrated_catalog()
        self.accuracies = Accuracies(catalog, settings, path)
        self.alarms: list[Alarm] = []
        self.accuracies.listeners.append(self.alarms.append)
        self.small: Variant = catalog.family("toy").variants["small"]
        self.large: Variant = catalog.family("toy").variants["large"]

    def see(self, agreed: int, differed: int = 0) -> None:
        outcomes = np.array([True] * agreed + [False] * differed)
        np.random.default_rng(0).shuffle(outcomes)
        for outcome in outcomes:
            self.accuracies.observe(self.small, bool(outcome))

    @property
    def accuracy(self) -> float:
        return self.accuracies.accuracy_of(self.small)


def test_at_first_the_catalogue_is_believed() -> None:
    watch = Watch()
    assert watch.accuracy == 0.93
    assert watch.accuracies.accuracy_of(watch.large) == 0.99


def test_agreement_moves_accuracy_by_the_formula() -> None:
    watch = Watch()
    watch.see(90, 10)
    observed = 0.9 * 0.995 + 0.1 * 0.1
    assert watch.accuracy == pytest.approx((200 * 0.93 + 100 * observed) / 300)


@given(st.lists(st.booleans(), max_size=300))
def test_accuracy_stays_a_share_and_rises_with_agreement(outcomes: list[bool]) -> None:
    watch, better = Watch(), Watch()
    for outcome in outcomes:
        watch.accuracies.observe(watch.small, outcome)
        better.accuracies.observe(better.small, True)
    assert 0 <= watch.accuracy <= better.accuracy <= 1


def test_agreeing_with_the_reference_shows_nobody_to_be_better_than_it() -> None:
    watch = Watch()
    watch.see(1000)
    assert watch.accuracy == pytest.approx((200 * 0.93 + 200 * 0.99) / 400)


def test_what_is_not_watched_is_not_counted() -> None:
    watch = Watch()
    watch.accuracies.observe(watch.large, False)
    assert watch.accuracies.accuracy_of(watch.large) == 0.99


def test_an_alarm_begins_and_ends_once_each(caplog: pytest.LogCaptureFixture) -> None:
    watch = Watch()
    with caplog.at_level(logging.INFO):
        watch.see(150, 50)
        watch.see(10, 10)
        assert [alarm.active for alarm in watch.alarms] == [True]
        watch.see(200)
    assert [alarm.active for alarm in watch.alarms] == [True, False]
    assert [record.levelname for record in caplog.records if "drift" in record.message] == ["WARNING", "INFO"]
    assert watch.alarms[0].high < watch.alarms[0].band_low <= watch.alarms[1].agreement


def test_in_an_alarm_the_catalogue_no_longer_counts() -> None:
    watch = Watch()
    watch.see(100, 100)
    assert watch.accuracy == pytest.approx(0.5 * 0.995 + 0.5 * 0.1)


def test_too_few_samples_are_no_alarm() -> None:
    watch = Watch()
    watch.see(0, 49)
    assert watch.alarms == []
    watch.see(0, 1)
    assert len(watch.alarms) == 1


def test_more_agreement_than_expected_is_no_alarm() -> None:
    watch = Watch()
    watch.see(1000)
    assert watch.alarms == []


def test_false_alarms_are_rare_and_true_ones_are_soon() -> None:
    """400 gateways see 2,000 samples each as the held-out data promise; then agreement falls by ten points."""
    random = np.random.default_rng(1)
    settings = DriftSection()
    false, found, late = 0, 0, []
    for _ in range(100):
        watch = Watch(settings=settings)
        for outcome in random.random(2000) < 0.94:
            watch.accuracies.observe(watch.small, bool(outcome))
        false += any(alarm.active for alarm in watch.alarms)
        watch.alarms.clear()
        for count, outcome in enumerate(random.random(1000) < 0.84):
            watch.accuracies.observe(watch.small, bool(outcome))
            if watch.alarms:
                found += 1
                late.append(count)
                break
    assert false <= 2
    assert found >= 98
    assert np.median(late) < settings.window


def test_a_restart_forgets_nothing(tmp_path: Path) -> None:
    path = tmp_path / "accuracy.json"
    watch = Watch(path)
    watch.see(100, 100)
    kept = watch.accuracies.pending()
    assert kept is not None
    watch.accuracies.write(kept)
    assert watch.accuracies.pending() is None
    again = Watch(path)
    again.accuracies.load()
    assert again.accuracy == watch.accuracy
    assert [state.active for state in again.accuracies.states()] == [True, False]
    assert again.accuracies.status() == watch.accuracies.status()


def test_what_was_seen_of_another_file_does_not_count(tmp_path: Path) -> None:
    path = tmp_path / "accuracy.json"
    watch = Watch(path)
    watch.see(100, 100)
    watch.accuracies.write(watch.accuracies.pending() or b"")
    family = calibrated_family()
    family["variants"]["small"]["sha256"] = "e" * 64
    other = Accuracies(make_catalog(toy=family), SETTINGS, path)
    other.load()
    assert other.status()["toy/small"]["samples"] == 0


@pytest.mark.parametrize(
    "damage",
    [
        b"",
        b"[]",
        b"{",
        b'{"KEY": 3}',
        b'{"KEY": {"agreed": "012", "alarm": false}}',
        b'{"KEY": {"agreed": "01"}}',
        b"\xff",
    ],
)
def test_a_damaged_file_is_no_reason_not_to_start(tmp_path: Path, damage: bytes) -> None:
    path = tmp_path / "accuracy.json"
    path.write_bytes(damage.replace(b"KEY", b"a" * 64 + b":" + b"c" * 64))
    watch = Watch(path)
    watch.accuracies.load()
    assert watch.accuracy == 0.93
    watch.see(1)
    watch.accuracies.write(watch.accuracies.pending() or b"")
    assert json.loads(path.read_text())


def test_a_folder_that_cannot_be_written_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    watch = Watch(tmp_path / "missing" / "accuracy.json")
    watch.see(1)
    watch.accuracies.write(watch.accuracies.pending() or b"")
    assert "running accuracies are not kept" in caplog.text
