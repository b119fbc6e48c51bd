"""One daemon for all attacks, and an address for each."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from fort import Fort

from hil.processes import Stage, free_port
from tests.brokers import MOSQUITTO
from tests.certs import Authority, as_shipped

_addresses = (f"127.0.{number // 250}.{number % 250 + 2}" for number in itertools.count())


@pytest.fixture(scope="session")
def fort(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fort]:
    if MOSQUITTO is None:
        pytest.skip("mosquitto is not installed")
    folder = tmp_path_factory.mktemp("fort")
    authority = Authority(folder / "ca.pem")
    daemon_port = free_port()
    broker = as_shipped(folder, authority, authority.sign("broker"), daemon_port)
    with Stage(folder) as stage:
        try:
            broker.start()
            fort = Fort(stage, authority, broker.port, daemon_port)
            fort.start()
            yield fort
            fort.records()
            fort.nothing_private()  # whatever was attacked, and how
        finally:
            broker.kill()


@pytest.fixture
def address() -> str:
    """An address of this machine that no other test has."""
    if sys.platform != "linux":
        pytest.skip("needs all of 127.0.0.0/8")
    return next(_addresses)
