"""What the figures were measured on: a number without its machine says nothing."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from agent import __version__

DISTRIBUTIONS = (
    "ai-edge-litert",
    "tflite-runtime",
    "onnxruntime",
    "tflite-micro",
    "numpy",
    "fastapi",
    "uvicorn",
    "uvloop",
    "httptools",
    "paho-mqtt",
    "pyserial",
    "cobs",
)


def facts() -> dict[str, Any]:
    """CPU, cores, load, system and versions, as plain JSON types."""
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_mb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e6),
        "load_before": round(os.getloadavg()[0], 2),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "edge-agent": __version__,
        "mosquitto": _mosquitto(),
        "versions": {name: found for name in DISTRIBUTIONS if (found := _version(name)) is not None},
    }


def generic(facts: Mapping[str, Any]) -> dict[str, Any]:
    """What figures were measured on, without what tells one machine of a kind from another."""
    words = facts["system"].split()
    return {
        "cpu": facts["cpu"],
        "cores": facts["cores"],
        "system": f"{words[0]} {words[-1]}",
        "python": facts["python"],
        "load_before": facts["load_before"],
    }


def text(machine: dict[str, Any]) -> str:
    """One line for people."""
    cores = f"{machine['cores']} cores" if machine["cores"] > 1 else "1 core"
    return (
        f"{machine['cpu']}, {cores}, {machine['memory_mb']} MB; {machine['system']}; Python {machine['python']}; "
        f"load {machine['load_before']:.2f} before the run"
    )


def _cpu_model() -> str:
    """As the kernel names it; ARM boards name themselves in the device tree."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
        return Path("/proc/device-tree/model").read_text().rstrip("\0\n")
    except OSError:
        return platform.processor() or "unknown CPU"


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def _mosquitto() -> str | None:
    executable = shutil.which("mosquitto") or shutil.which("mosquitto", path="/usr/sbin:/usr/local/sbin")
    if executable is None:
        return None
    shown = subprocess.run([executable, "-h"], capture_output=True, text=True, check=False).stdout
    words = shown.partition("\n")[0].split()
    return words[-1] if words else None
