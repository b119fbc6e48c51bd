"""One whole gateway for the tests of a module; tests that break it put it together again."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from gateway import Gateway

from hil.processes import Stage


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    with Stage(tmp_path_factory.mktemp("gateway")) as stage:
        gateway = Gateway(stage)
        gateway.start()
        yield gateway
