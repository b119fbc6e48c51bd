"""What comes from outside and is parsed: lane messages, catalogues, the shipped configuration with changes in it."""

from __future__ import annotations

import resource
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from agent.config_load import load_config
from agent.core.errors import ConfigError, ProtocolError
from agent.registry.catalog import Catalog, load_catalog
from agent.registry.locate import catalog_path
from agent.wire import lane, oip
from tests.fuzz.payloads import MANY, PAYLOADS, SOME, VALUES

ROOT = Path(__file__).resolve().parents[2]
HEADERS = st.none() | st.integers(-5, 400)


@MANY
@given(PAYLOADS, HEADERS)
def test_lane_messages(payload: bytes, header: int | None) -> None:
    for decode in (oip.decode_request, oip.decode_response):
        try:
            decode(payload, header)
        except ProtocolError as error:
            assert str(error)
    try:
        lane.Presence.from_bytes(payload)
    except ProtocolError as error:
        assert str(error)
    assert lane.decode_error(payload)


@MANY
@given(st.text(max_size=20) | st.floats().map(str) | st.integers().map(str))
def test_budgets_in_lane_messages(text: str) -> None:
    try:
        seconds = lane.budget_s(text)
    except ProtocolError as error:
        assert lane.BUDGET_MS in str(error)
    else:
        assert seconds is not None and 0 <= seconds <= lane.MAX_BUDGET_S


def places(document: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where something stands in a document."""
    found = [at] if at else []
    if isinstance(document, dict):
        for key, value in document.items():
            found += places(value, (*at, key))
    elif isinstance(document, list):
        for index, value in enumerate(document[:3]):
            found += places(value, (*at, index))
    return found


def changed(document: Any, changes: list[tuple[tuple[Any, ...], Any]]) -> str:
    """As YAML, with other values in some places; where a place has gone, that change is left out."""
    fresh = yaml.safe_load(yaml.safe_dump(document))
    for at, value in changes:
        holder = fresh
        try:
            for key in at[:-1]:
                holder = holder[key]
            holder[at[-1]] = value
        except (TypeError, KeyError, IndexError):
            continue
    return yaml.safe_dump(fresh, allow_unicode=True)


def changes_of(path: Path) -> tuple[Any, st.SearchStrategy[Any]]:
    document = yaml.safe_load(path.read_text())
    change = st.tuples(st.sampled_from(places(document)), VALUES)
    return document, st.lists(change, min_size=1, max_size=4)


def _written(document: Any) -> bytes:
    return yaml.safe_dump(document, allow_unicode=True).encode()


DEFAULTS = load_config(None, {})
CONFIG, CONFIG_CHANGES = changes_of(ROOT / "systemd" / "edge-agent.yaml")
CATALOG, CATALOG_CHANGES = changes_of(catalog_path(None))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A place for catalogues, beside the files that they speak of."""
    made = tmp_path_factory.mktemp("parsers")
    for entry in catalog_path(None).parent.iterdir():
        if entry.is_dir():
            (made / entry.name).symlink_to(entry)
    return made


@SOME
@given(CONFIG_CHANGES)
def test_configurations_that_are_nearly_right(folder: Path, changes: list[tuple[tuple[Any, ...], Any]]) -> None:
    path = folder / "edge-agent.yaml"
    path.write_text(changed(CONFIG, changes))
    try:
        load_config(path, {})
    except ConfigError as error:
        assert error.problems and all(problem.startswith(str(path)) for problem in error.problems)


@SOME
@given(CATALOG_CHANGES)
def test_catalogues_that_are_nearly_right(folder: Path, changes: list[tuple[tuple[Any, ...], Any]]) -> None:
    path = folder / "catalog.yaml"
    path.write_text(changed(CATALOG, changes))
    try:
        assert isinstance(load_catalog(path, verify=False), Catalog)
    except ConfigError as error:
        assert error.problems and all(problem.startswith(str(path)) for problem in error.problems)


DOCUMENTS = st.binary(max_size=400) | st.text(max_size=200).map(str.encode) | VALUES.map(_written)
"""Bytes, text that YAML may have a use for, and any document at all."""


@MANY
@given(DOCUMENTS)
def test_what_is_no_catalogue(folder: Path, data: bytes) -> None:
    path = folder / "other.yaml"
    path.write_bytes(data)
    with pytest.raises(ConfigError) as caught:
        load_catalog(path)
    assert all(problem.startswith(str(path)) for problem in caught.value.problems)


@MANY
@given(DOCUMENTS)
def test_what_may_be_a_configuration(folder: Path, data: bytes) -> None:
    """An empty one is: all defaults."""
    path = folder / "other.yaml"
    path.write_bytes(data)
    try:
        config = load_config(path, {})
    except ConfigError as error:
        assert error.problems and all(problem.startswith(str(path)) for problem in error.problems)
    else:
        assert config == DEFAULTS


VARIABLES = st.builds(
    "EDGE_AGENT__{}__{}".format,
    st.sampled_from([key.upper() for key in CONFIG]) | st.text("AZ_09", max_size=6),
    st.sampled_from(["ENABLED", "PORT", "LANES", "LANES__0", "TOKENS", "BROKER"]) | st.text("AZ_09", max_size=6),
)
SETTINGS = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=40)
"""What the environment can hold."""


@MANY
@given(st.dictionaries(VARIABLES, SETTINGS | VALUES.map(lambda value: _written(value).decode()), max_size=3))
def test_variables(environ: dict[str, str]) -> None:
    try:
        load_config(None, environ)
    except ConfigError as error:
        # What a variable did not set, and should have, is told by its key alone.
        assert error.problems
        assert all(problem.startswith(("EDGE_AGENT__", "environment: ")) for problem in error.problems)


NESTED = {
    "brackets": b"[" * 900_000,
    "braces": b"{a: " * 220_000,
    "dashes": b"- " * 450_000,
    "keys": b"? " * 450_000,
    "aliases": b"a: &a [x, x]\n" + b"b: [*a, *a]\n",
    "one long word": b"x" * 990_000,
    "too large": b"# \n" * 400_000,
}


@pytest.mark.parametrize("data", NESTED.values(), ids=NESTED)
def test_documents_made_to_take_all_the_memory(folder: Path, data: bytes) -> None:
    path = folder / "bomb.yaml"
    path.write_bytes(data)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for load in (load_config, load_catalog):
        with pytest.raises(ConfigError):
            load(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 128 << 10, "KiB, at the most so far"
