"""Load of the machine: CPU, memory, temperature, accelerator. A sensor that is not there is left out, never 0."""

from __future__ import annotations

from pathlib import Path

import psutil

_GPU_LOAD_PER_MILLE = ("devices/gpu.0/load", "devices/platform/*gpu*/load", "devices/platform/*/*gpu*/load")
"""Jetson's boards, by age of their kernel: 0 to 1000."""
_GPU_DEVFREQ = ("*gpu*/device/load", "*ga10b*/device/load", "*gv11b*/device/load", "*gp10b*/device/load")
"""The same where only `/sys/class/devfreq` names the device; the letters are Tegra GPU generations."""
_GPU_BUSY_PERCENT = ("class/drm/card*/device/gpu_busy_percent",)
"""amdgpu: 0 to 100."""
_MAX_SANE_C = 150.0
"""Disconnected thermal zones report values far outside; they are left out."""


class LoadSampler:
    """`sysfs` is where `/sys` is mounted. A sample reads a dozen small files: 0.3 ms, so it can be taken on
    the event loop.

    CPU load is the mean since the sample before, so the first sample has none.
    """

    def __init__(self, sysfs: Path = Path("/sys")) -> None:
        self._zones = sorted((sysfs / "class" / "thermal").glob("thermal_zone*/temp"))
        self._gpu = _find_gpu(sysfs)
        self._process = psutil.Process()
        psutil.cpu_percent()
        self._process.cpu_percent()
        self._primed = False
        self.latest: dict[str, float] = {}

    def sample(self) -> dict[str, float]:
        """Read every sensor now. Shares are 0 to 1, memory is bytes, temperature is degrees Celsius.

        Keys: `cpu`, `own_cpu` (1 is one whole core), `memory`, `memory_available_bytes`, `own_memory_bytes`,
        `temperature_c` (the hottest zone), `accelerator`.
        """
        memory = psutil.virtual_memory()
        load: dict[str, float] = {
            "memory": memory.percent / 100,
            "memory_available_bytes": memory.available,
            "own_memory_bytes": self._process.memory_info().rss,
        }
        cpu, own_cpu = psutil.cpu_percent() / 100, self._process.cpu_percent() / 100
        if self._primed:
            load["cpu"], load["own_cpu"] = cpu, own_cpu
        self._primed = True
        temperatures = [value / 1000 for zone in self._zones if (value := _read(zone)) is not None]
        sane = [value for value in temperatures if -_MAX_SANE_C < value < _MAX_SANE_C]
        if sane:
            load["temperature_c"] = max(sane)
        if self._gpu is not None:
            path, full = self._gpu
            value = _read(path)
            if value is not None:
                load["accelerator"] = min(1.0, max(0.0, value / full))
        self.latest = load
        return load


def _find_gpu(sysfs: Path) -> tuple[Path, float] | None:
    """The file that tells the accelerator's load, and its value at full load."""
    candidates = [(path, 1000.0) for pattern in _GPU_LOAD_PER_MILLE for path in sorted(sysfs.glob(pattern))]
    devfreq = sysfs / "class" / "devfreq"
    candidates += [(path, 1000.0) for pattern in _GPU_DEVFREQ for path in sorted(devfreq.glob(pattern))]
    candidates += [(path, 100.0) for pattern in _GPU_BUSY_PERCENT for path in sorted(sysfs.glob(pattern))]
    return next(((path, full) for path, full in candidates if _read(path) is not None), None)


def _read(path: Path) -> float | None:
    try:
        return float(path.read_text().strip())
    except (OSError, ValueError):
        return None
