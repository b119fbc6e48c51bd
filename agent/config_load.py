"""Read the configuration: YAML file, then `EDGE_AGENT__SECTION__KEY` from the environment, then secrets.

In strings of the file, `${NAME}` is replaced by the environment variable NAME, and `${credential:NAME}` by the systemd
credential NAME (systemd.exec(5), LoadCredential=). What came that way is never shown again: not in errors, not in logs.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import SecretStr, ValidationError

from agent.config import Config
from agent.core.errors import ConfigError

ENV_PREFIX = "EDGE_AGENT__"
MAX_CONFIG_BYTES = 1_000_000
_REFERENCE = re.compile(r"\$\{(credential:)?([A-Za-z0-9_.-]{1,100})\}")
_SECRET_KEY = re.compile(r"password|secret|token|key$", re.IGNORECASE)


def load_config(path: Path | None, environ: Mapping[str, str] | None = None) -> Config:
    """The validated tree. `path` None: defaults and environment alone. Raises `ConfigError`."""
    environ = os.environ if environ is None else environ
    name = str(path) if path is not None else "environment"
    tree = _read(path) if path is not None else {}
    _apply_environment(tree, environ)
    references: dict[tuple[str, ...], str] = {}
    problems: list[str] = []
    tree = _substitute(tree, (), environ, references, problems)
    if problems:
        raise ConfigError([f"{name}: {problem}" for problem in problems])
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise ConfigError([f"{name}: {_describe(fault, references)}" for fault in error.errors()]) from None


def _read(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise ConfigError([f"{path}: larger than {MAX_CONFIG_BYTES} bytes"])
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError([f"{path}: cannot be read: {error}"]) from None
    except yaml.YAMLError as error:
        raise ConfigError([f"{path}: not YAML: {' '.join(str(error).split())}"]) from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError([f"{path}: must be a mapping of sections, found a {type(tree).__name__}"])
    return tree


def _apply_environment(tree: dict[str, Any], environ: Mapping[str, str]) -> None:
    """`EDGE_AGENT__CLOUD__LANES__0__BROKER=mqtt://…` sets `cloud.lanes.0.broker`. Values are read as YAML."""
    for variable in sorted(key for key in environ if key.startswith(ENV_PREFIX)):
        keys = variable[len(ENV_PREFIX) :].lower().split("__")
        try:
            value = yaml.safe_load(environ[variable])
        except yaml.YAMLError:
            value = environ[variable]
        if _SECRET_KEY.search(keys[-1]) and isinstance(value, int | float):
            value = environ[variable]
        _set(tree, keys, value, variable)


def _set(tree: dict[str, Any], keys: list[str], value: Any, variable: str) -> None:
    node: Any = tree
    for position, key in enumerate(keys):
        last = position == len(keys) - 1
        if isinstance(node, list):
            if not key.isdigit() or int(key) >= len(node):
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


def _substitute(
    node: Any,
    at: tuple[str, ...],
    environ: Mapping[str, str],
    references: dict[tuple[str, ...], str],
    problems: list[str],
) -> Any:
    if isinstance(node, dict):
        return {key: _substitute(value, (*at, str(key)), environ, references, problems) for key, value in node.items()}
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

    return _REFERENCE.sub(replace, node)


def _lookup(name: str, *, credential: bool, environ: Mapping[str, str]) -> str | None:
    if not credential:
        return environ.get(name)
    folder = environ.get("CREDENTIALS_DIRECTORY")
    if folder is None:
        return None
    try:
        return (Path(folder) / name).read_text(encoding="utf-8").rstrip("\n")
    except (OSError, UnicodeDecodeError):
        return None


def _describe(fault: Any, references: Mapping[tuple[str, ...], str]) -> str:
    """One line: path of the key, what was found, what is allowed."""
    at = tuple(str(part) for part in fault["loc"])
    where = ".".join(at) or "(whole file)"
    kind, message = fault["type"], fault["msg"]
    if kind == "extra_forbidden":
        return f"{where}: unknown key"
    message = message.removeprefix("Value error, ")
    found = fault.get("input")
    if at in references:
        return f"{where}: {message}, found the value of {references[at]}"
    if _SECRET_KEY.search(at[-1] if at else "") or isinstance(found, dict | list | SecretStr | None):
        return f"{where}: {message}"
    return f"{where}: {message}, found {str(found)[:80]!r}"
