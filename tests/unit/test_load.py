"""The load sampler on fake sysfs trees: what is not there is left out."""

from __future__ import annotations

from pathlib import Path

import pytest

from agent.telemetry.load import LoadSampler

ALWAYS = {"memory", "memory_available_bytes", "own_memory_bytes"}


def write(root: Path, files: dict[str, str]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return root


def test_missing_sensors_are_absent_not_zero(tmp_path: Path) -> None:
    sampler = LoadSampler(tmp_path)
    assert set(sampler.sample()) == ALWAYS, "the first sample has no interval to be the mean of"
    second = sampler.sample()
    assert set(second) == ALWAYS | {"cpu", "own_cpu"}
    assert 0 <= second["cpu"] <= 1 and 0 < second["memory"] < 1
    assert second["own_memory_bytes"] > 1e6
    assert sampler.latest is second


@pytest.mark.parametrize(
    ("path", "raw", "share"),
    [
        ("devices/gpu.0/load", "437\n", 0.437),
        ("devices/platform/17000000.gpu/load", "0\n", 0.0),
        ("devices/platform/bus@0/gpu.0/load", "1000\n", 1.0),
        ("class/devfreq/17000000.ga10b/device/load", "250", 0.25),
        ("class/drm/card0/device/gpu_busy_percent", "31\n", 0.31),
    ],
)
def test_accelerator_load(tmp_path: Path, path: str, raw: str, share: float) -> None:
    sampler = LoadSampler(write(tmp_path, {path: raw}))
    assert sampler.sample()["accelerator"] == pytest.approx(share)
    (tmp_path / path).unlink()
    assert "accelerator" not in sampler.sample()


def test_the_hottest_zone_counts_and_disconnected_ones_do_not(tmp_path: Path) -> None:
    zones = {"0": "47500\n", "1": "51250\n", "2": "-256000\n", "3": "not a number\n"}
    write(tmp_path, {f"class/thermal/thermal_zone{zone}/temp": value for zone, value in zones.items()})
    assert LoadSampler(tmp_path).sample()["temperature_c"] == 51.25
    write(tmp_path, {f"class/thermal/thermal_zone{zone}/temp": "-256000" for zone in zones})
    assert "temperature_c" not in LoadSampler(tmp_path).sample()
