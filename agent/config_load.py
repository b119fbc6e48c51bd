"""Read the configuration: YAML file, then `EDGE_AGENT__SECTION__KEY` from the environment, then secrets.

In strings of the file, `${NAME}` is replaced by the environment variable NAME, and `${credential:NAME}` by the systemd
credential NAME (systemd.exec(5), LoadCredential=). What came that way is never shown in an error, nor is the value of
a key that holds a secret.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, get_args

from pydantic import SecretStr, ValidationError

from agent.config import Config, Section, Substituted
from agent.core.documents import NotYaml, parse_yaml, read_yaml
from agent.core.errors import ConfigError

ENV_PREFIX = "EDGE_AGENT__"
MAX_CONFIG_BYTES = 1_000_000
MAX_DEPTH = 16
"""No key of the tree lies deeper than five levels."""
_REFERENCE = re.compile(r"\$\{(credential:)?([A-Za-z0-9_.-]{1,100})\}")
_SECRET_KEY = re.compile(r"password|secret|token|key$", re.IGNORECASE)
_USERINFO = re.compile(r"//[^/]*@")

At = tuple[str, ...]
"""Path of a key."""


def load_config(path: Path | None, environ: Mapping[str, str] | None = None) -> Config:
    """The validated tree. `path` None: defaults and environment alone. Raises `ConfigError`."""
    environ = os.environ if environ is None else environ
    name = str(path) if path is not None else "environment"
    tree = _read(path) if path is not None else {}
    variables = _apply_environment(tree, environ)
    references: dict[At, str] = {}
    problems: list[str] = []
    tree = _substitute(tree, (), environ, references, problems)
    if problems:
        raise ConfigError([f"{name}: {problem}" for problem in problems])
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        faults = error.errors(include_url=False, include_context=False)
    raise ConfigError([f"{_origin(fault, name, variables)}: {_describe(fault, references)}" for fault in faults])


def _read(path: Path) -> dict[str, Any]:
    try:
        tree = read_yaml(path, MAX_CONFIG_BYTES)
    except OSError as error:
        raise ConfigError([f"{path}: cannot be read: {error.strerror or error}"]) from None
    except NotYaml as error:
        raise ConfigError([f"{path}: cannot be read as YAML: {error}"]) from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError([f"{path}: must be a mapping of sections, found a {type(tree).__name__}"])
    return tree


def _apply_environment(tree: dict[str, Any], environ: Mapping[str, str]) -> dict[At, str]:
    """`EDGE_AGENT__CLOUD__LANES__0__BROKER=mqtt://…` sets `cloud.lanes.0.broker`, of a lane that the file has.

    Values are read as YAML, where they are YAML; those of keys that hold a secret are taken as they are. Returns the
    variable that set each path.
    """
    variables = {}
    for variable in sorted(key for key in environ if key.startswith(ENV_PREFIX)):
        keys = tuple(variable[len(ENV_PREFIX) :].lower().split("__"))
        value: Any = environ[variable]
        if not _SECRET_KEY.search(keys[-1]):
            with suppress(NotYaml):  # or it stays text, such as [::1]:8080
                value = parse_yaml(value)
        _set(tree, keys, value, variable)
        variables[keys] = variable
    return variables


def _set(tree: dict[str, Any], keys: At, value: Any, variable: str) -> None:
    node: Any = tree
    for position, key in enumerate(keys):
        last = position == len(keys) - 1
        if isinstance(node, list):
            if not key.isdecimal() or int(key) >= len(node):
                raise ConfigError([f"{variable}: {'.'.join(keys[:position])} has no item {key!r}"])
            index: Any = int(key)
        elif isinstance(node, dict):
            index = key
            if not last and not isinstance(node.get(key), dict | list):
                node[key] = {}
        else:
            raise ConfigError([f"{variable}: {'.'.join(keys[:position])} is not a section"])
        if last:
            node[index] = value
        else:
            node = node[index]


def _substitute(node: Any, at: At, environ: Mapping[str, str], references: dict[At, str], problems: list[str]) -> Any:
    if len(at) > MAX_DEPTH:
        problems.append(f"{'.'.join(at[:4])}: nested too deeply")
        return None
    if isinstance(node, dict):
        return {
            key: _substitute(value, (*at, _shown(key)), environ, references, problems) for key, value in node.items()
        }
    if isinstance(node, list):
        return [_substitute(value, (*at, str(i)), environ, references, problems) for i, value in enumerate(node)]
    if not isinstance(node, str) or "${" not in node:
        return node

    def replace(match: re.Match[str]) -> str:
        references[at] = match.group(0)
        value = _lookup(match.group(2), credential=match.group(1) is not None, environ=environ)
        if value is None:
            problems.append(f"{'.'.join(at)}: {match.group(0)} is not set")
            return ""
        return value

    text = _REFERENCE.sub(replace, node)
    return Substituted(text) if at in references else text


def _lookup(name: str, *, credential: bool, environ: Mapping[str, str]) -> str | None:
    if not credential:
        return environ.get(name)
    folder = environ.get("CREDENTIALS_DIRECTORY")
    if folder is None or name in (".", ".."):
        return None
    try:
        return (Path(folder) / name).read_text(encoding="utf-8").rstrip("\n")
    except (OSError, ValueError):
        return None


def _origin(fault: Any, name: str, variables: Mapping[At, str]) -> str:
    """The file, or the variable that set the key, something around it or something within it."""
    at = tuple(str(part).lower() for part in fault["loc"])
    for keys, variable in variables.items():
        if at[: len(keys)] == keys or (at and keys[: len(at)] == at):
            return variable
    return name


def _describe(fault: Any, references: Mapping[At, str]) -> str:
    """One line: path of the key, what was found, what is allowed."""
    at = tuple(_shown(part) for part in fault["loc"])
    where = ".".join(at) or "(whole file)"
    if fault["type"] == "extra_forbidden":
        return f"{where}: unknown key; {_known_keys(at)}"
    message = fault["msg"].removeprefix("Value error, ")
    found = fault.get("input")
    if at in references:
        return f"{where}: {message}, found the value of {references[at]}"
    if (
        any(_SECRET_KEY.search(part) for part in at)
        or isinstance(found, dict | list | tuple | SecretStr | Substituted | None)
        or fault["type"] == "missing"
    ):
        return f"{where}: {message}"
    return f"{where}: {message}, found {_shown(found)!r}"


def _shown(value: Any) -> str:
    if isinstance(value, int) and value.bit_length() > 128:
        return "a very large number"
    return _USERINFO.sub("//…@", str(value))[:80]


def _known_keys(at: At) -> str:
    section: type[Section] = Config
    for part in at[:-1]:  # the index of a list or a topic is no field, and stays in the section
        field = section.model_fields.get(part)
        section = next(_sections(field.annotation), section) if field else section
    known = sorted(section.model_fields)
    near = [key for key in known if key.startswith(at[-1])] if at[-1] else []
    near = near or difflib.get_close_matches(at[-1], known, n=1, cutoff=0.7)
    return f"did you mean {near[0]}?" if near else f"allowed: {', '.join(known)}"


def _sections(annotation: Any) -> Iterator[type[Section]]:
    """The sections that a type is made of."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        yield annotation
    for part in get_args(annotation):
        yield from _sections(part)
