"""Configuration: frozen throughout, and no input that crashes it."""

from collections.abc import Iterator
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Union, get_args, get_origin

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from agent.config import Config, HttpSection, McuSection, Section
from agent.config_load import load_config
from agent.core.documents import NotYaml, parse_yaml
from agent.core.errors import ConfigError


def load(tmp_path: Path, text: str | bytes, **environ: str) -> Config:
    path = tmp_path / "config.yaml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return load_config(path, environ)


# --- frozen ----------------------------------------------------------------------------------------------------------


def test_the_tree_is_frozen(tmp_path: Path) -> None:
    config = load(tmp_path, "sensors: {t: {model: m}}\nedge_mcu: {port: p}")
    with pytest.raises(ValidationError):
        config.http.port = 1
    with pytest.raises(ValidationError):
        config.sensors["t"].model = "x"
    with pytest.raises(TypeError):
        config.sensors["u"] = config.sensors["t"]  # type: ignore[index]
    assert isinstance(config.edge_mcu.ports, tuple)
    assert config.model_dump()["sensors"]["t"]["model"] == "m"


def mutable_types(annotation: Any) -> Iterator[Any]:
    origin = get_origin(annotation)
    if (origin or annotation) in (list, dict, set, bytearray):
        yield annotation
    if origin in (Annotated, Union, UnionType, tuple):
        for part in get_args(annotation):
            yield from mutable_types(part)


def sections(kind: type[Section] = Config) -> Iterator[type[Section]]:
    yield kind
    yield from Section.__subclasses__() if kind is Config else ()


@pytest.mark.parametrize("section", list(sections()), ids=lambda section: section.__name__)
def test_no_key_of_a_section_can_change(section: type[Section]) -> None:
    assert section.model_config["frozen"]
    assert section.model_config["extra"] == "forbid"
    for name, field in section.model_fields.items():
        assert not list(mutable_types(field.annotation)), name
        assert NoneType in get_args(field.annotation) or field.default is not None or field.default_factory, name


def test_sections_can_be_made_without_a_file() -> None:
    assert McuSection(ports=("a", "b")).max_concurrent == 4
    assert HttpSection(port=0).port == 0
    assert McuSection.model_validate({"port": "a"}).ports == ("a",)


# --- whatever it is given --------------------------------------------------------------------------------------------

SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=20), st.dates(), st.binary(max_size=5)
)
SECTION_NAMES = st.sampled_from([*Config.model_fields, "x"])
KEYS = st.sampled_from([name for section in sections() for name in section.model_fields] + ["port", "x", "0"])
TREES = st.dictionaries(
    SECTION_NAMES,
    st.recursive(
        SCALARS,
        lambda inner: st.one_of(
            st.lists(inner, max_size=3),
            st.dictionaries(KEYS, inner, max_size=4),
            st.dictionaries(st.one_of(SCALARS), inner, max_size=2),
        ),
        max_leaves=12,
    ),
    max_size=4,
)
ANYTHING = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@ANYTHING
@given(data=st.one_of(st.binary(max_size=200), st.text(max_size=200).map(lambda text: text.encode("utf-8", "ignore"))))
def test_garbage_is_refused_or_means_something(tmp_path: Path, data: bytes) -> None:
    try:
        load(tmp_path, data)
    except ConfigError as error:
        assert error.problems


@ANYTHING
@given(tree=TREES, environ=st.dictionaries(KEYS.map(lambda key: f"EDGE_AGENT__{key.upper()}"), st.text(max_size=9)))
def test_any_tree_is_refused_or_valid(tmp_path: Path, tree: Any, environ: dict[str, str]) -> None:
    try:
        config = load(tmp_path, yaml.dump(tree), **environ)
    except ConfigError as error:
        assert error.problems
        assert all(len(problem) < 2000 for problem in error.problems)
    else:
        assert isinstance(config, Config)


@settings(max_examples=300, deadline=None)
@given(text=st.text(alphabet="ab01:-[]{},&*!%@`'\"|>#?~ \n.<\\ex_", max_size=40))
def test_yaml_of_any_shape_raises_one_kind_of_error(text: str) -> None:
    try:
        parse_yaml(text)
    except NotYaml as error:
        assert len(str(error)) < 200
