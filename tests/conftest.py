"""What every test may ask for."""

from __future__ import annotations

import gc
import os
import platform
import re
from collections.abc import Generator
from typing import Any

import pytest
from fakes import FakeTarget, make_catalog
from hypothesis import HealthCheck, settings

from agent.config import RoutingSection
from agent.core.clock import ManualClock
from agent.core.types import Tier
from agent.registry.catalog import Catalog, Family
from agent.routing.router import Router

# Examples are cheap here, machines are not: a gateway's own CPU may be as slow as the slowest of them.
settings.register_profile("edge", deadline=None, print_blob=True)
# The same examples in every run: what CI says of a change is said of the change.
settings.register_profile(
    "ci", settings.get_profile("edge"), derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("ci" if os.environ.get("CI") else "edge")


_MISSING = re.compile(
    r"not installed|could not import|no (iotcore|C compiler|mosquitto|address sanitizer)|lacks|no .* wheel"
)
"""Reasons for a skip that a machine with everything does not give."""
_ELSEWHERE = re.compile("tflite_micro|TensorFlow Lite Micro wheel")
"""What is to be had for x86-64 alone."""


def _missing(reason: str) -> bool:
    has = platform.machine() == "x86_64" or not _ELSEWHERE.search(reason)
    return has and _MISSING.search(reason) is not None


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, Any, Any]:
    """Python 3.11 cannot parse source while it parses source (gh-106905): a finaliser that logs a traceback while that
    of a failed test is formatted would end the whole run. In CI a missing tool is a failure, not a skip."""
    gc.disable()
    try:
        report: pytest.TestReport = yield
    finally:
        gc.enable()
    if report.skipped and os.environ.get("CI") and _missing(str(report.longrepr)):
        report.outcome, report.longrepr = "failed", f"skipped in CI: {report.longrepr}"
    return report


@pytest.hookimpl(trylast=True)
def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """A failure is told at once: a run that is cut off has said what was wrong. Workers of pytest-xdist leave it to the
    process that prints."""
    if report.failed and "PYTEST_XDIST_WORKER" not in os.environ:
        print(f"\nFAILED {report.nodeid} ({report.when})\n{report.longreprtext[-1500:]}", flush=True)


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture(scope="session")
def catalog() -> Catalog:
    return make_catalog()


@pytest.fixture(scope="session")
def family(catalog: Catalog) -> Family:
    return catalog.family("toy")


@pytest.fixture
def fleet() -> dict[str, FakeTarget]:
    targets = [
        FakeTarget(Tier.EDGE_MCU),
        FakeTarget(Tier.EDGE_GPU),
        FakeTarget(Tier.CLOUD_GPU, cost_usd=0.002),
        FakeTarget(Tier.CLOUD_SERVERLESS, cost_usd=0.004),
    ]
    return {target.traits.name: target for target in targets}


@pytest.fixture
def router(fleet: dict[str, FakeTarget], clock: ManualClock) -> Router:
    """Ranks by the fixed points: gpu, mcu, cloud, serverless for a request of class near."""
    return Router(list(fleet.values()), RoutingSection(policy="scorecard"), clock)
