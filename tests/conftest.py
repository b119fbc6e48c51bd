"""What every test may ask for."""

from __future__ import annotations

import pytest
from fakes import make_catalog
from hypothesis import settings

from agent.core.clock import ManualClock
from agent.registry.catalog import Catalog, Family

# Examples are cheap here, machines are not: a gateway's own CPU may be as slow as the slowest of them.
settings.register_profile("edge", deadline=None, print_blob=True)
settings.load_profile("edge")


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture(scope="session")
def catalog() -> Catalog:
    return make_catalog()


@pytest.fixture(scope="session")
def family(catalog: Catalog) -> Family:
    return catalog.family("toy")
