"""Read the configuration: YAML file, then `EDGE_AGENT__SECTION__KEY` from the environment, then secrets.

In strings of the file, `${NAME}` is replaced by the environment variable NAME, and `${credential:NAME}` by the systemd
credential NAME (systemd.exec(5), LoadCredential=). What came that way is never shown in an error, nor is the value of
a key that holds a secret.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, get_args

from pydantic import SecretStr, ValidationError

from agent.config import NAME_PATTERN, TOPIC_PATTERN, BrokerSection, Config, Section, Substituted
from agent.core.documents import NotYaml, parse_yaml, read_yaml
from agent.core.errors import ConfigError

ENV_PREFIX = "EDGE_AGENT__"
OTHER_VARIABLES = frozenset(
    f"EDGE_AGENT_{name}" for name in ("EXTRAS", "NO_APT", "FIRMWARE", "TEST_PORT", "TEST_BAUD", "TOKEN")
)
"""Variables of the scripts and tests, which are no settings."""
MAX_CONFIG_BYTES = 1_000_000
MAX_INDEX_DIGITS = 9
MAX_DEPTH = 16
"""No key of the tree lies deeper than five levels."""
_REFERENCE = re.compile(r"\$\{(credential:)?([A-Za-z0-9_.-]{1,100})\}")
_OF_SERVICE = re.compile(r"\$\{(?:credential:[^}]*|CREDENTIALS_DIRECTORY)\}")
_STAND_INS = ("0" * 64, "mqtts://unseen", "1")
"""For values that cannot be looked at, where their keys want them to be of some form."""
_SECRET_KEY = re.compile(r"password|secret|token|key$", re.IGNORECASE)
_USERINFO = re.compile(r"//.*@", re.DOTALL)
"""Up to the last @: a password that does not belong there may hold a slash as well."""

_KUBERNETES = re.compile(r"EDGE_AGENT_(SERVICE_(HOST|PORT)|PORT$|PORT_\d+_)")
"""What Kubernetes sets for every container beside a service of the name `edge-agent`."""
_WORDS = {
    "missing": "is required",
    "greater_than": "must be greater than {gt}",
    "greater_than_equal": "must be at least {ge}",
    "less_than": "must be less than {lt}",
    "less_than_equal": "must be at most {le}",
    "finite_number": "must be a finite number",
    "literal_error": "must be {expected}",
    "too_short": "must have at least {min_length} items",
    "too_long": "must have at most {max_length} items",
    **dict.fromkeys(("string_type", "string_sub_type", "string_unicode"), "must be text"),
    **dict.fromkeys(("int_type", "int_parsing", "int_from_float", "int_parsing_size"), "must be a whole number"),
    **dict.fromkeys(("float_type", "float_parsing"), "must be a number"),
    **dict.fromkeys(("bool_type", "bool_parsing"), "must be true or false"),
    **dict.fromkeys(("tuple_type", "list_type"), "must be a list, such as [a, b]"),
    **dict.fromkeys(("model_type", "dict_type", "mapping_type"), "must be a section with keys of its own"),
    "path_type": "must be a path",
}
"""In plain words, what pydantic says in its own. By its type of error, with what it says about the limits."""
_PATTERNS = {
    NAME_PATTERN: "must be 1 to 64 letters, digits, _, . and -, and begin with a letter or a digit",
    TOPIC_PATTERN: "must be a topic of 1 to 200 characters, without + and #",
}

At = tuple[str, ...]
"""Path of a key."""


def load_config(
    path: Path | None, environ: Mapping[str, str] | None = None, *, unseen: list[str] | None = None
) -> Config:
    """The validated tree. `path` None: defaults and environment alone. Raises `ConfigError`.

    `unseen` is of those who look from outside of the service, where systemd hands over no credentials: it gets a line
    for each that could not be looked at, which is then no fault.
    """
    environ = os.environ if environ is None else environ
    name = str(path) if path is not None else "environment"
    _refuse_misspelt(environ)
    tree = _read(path) if path is not None else {}
    variables = _apply_environment(tree, environ)
    references: dict[At, str] = {}
    problems: list[str] = []
    tree = _substitute(tree, (), environ, references, problems)
    hidden: list[At] = []
    if unseen is not None and "CREDENTIALS_DIRECTORY" not in environ:
        hidden = [at for at, found in references.items() if _OF_SERVICE.search(found)]
        known = {_unset(at, one) for at in hidden for one in _OF_SERVICE.findall(references[at])}
        problems = [problem for problem in problems if problem not in known]
        unseen += [f"{'.'.join(at)}: {references[at]} is known to the service only" for at in hidden]
    if problems:
        raise ConfigError([f"{name}: {problem}" for problem in problems])
    try:
        config = _validated(tree, hidden)
    except ValidationError as error:
        faults = [_as_written(fault, tree) for fault in _telling(error.errors(include_url=False))]
    else:
        faults = [fault for fault in _unworkable(config) if fault["loc"] not in hidden]
        if not faults:
            return config
    raise ConfigError([f"{_origin(fault, name, variables)}: {_describe(fault, references)}" for fault in faults])


def _validated(tree: dict[str, Any], hidden: list[At]) -> Config:
    """With something in place of what could not be looked at, if that is not of the form that it must have."""
    for stand_in in _STAND_INS:
        try:
            return Config.model_validate(tree)
        except ValidationError as error:
            wrong = [fault["loc"] for fault in error.errors() if tuple(map(str, fault["loc"])) in hidden]
            if not wrong:
                raise
        for *way, last in wrong:
            node: Any = tree
            for key in way:
                node = node[key]
            node[last] = Substituted(stand_in)
    return Config.model_validate(tree)


def cautions(config: Config) -> list[str]:
    """What may keep a valid configuration from working, and cannot be known from here."""
    found = []
    gpu = config.edge_gpu
    if gpu.enabled and gpu.strict_provider and (gpu.accelerator == "gpu" or gpu.providers[0] != "cpu"):
        found.append("edge_gpu.strict_provider: only a start can tell whether the accelerator can be used")
    found += _too_small(config)
    found += _one_by_one(config)
    if config.edge_mcu.enabled:
        found += [f"edge_mcu: {port} is not there now" for port in _gone(config.edge_mcu.ports)]
    folder = _nearest(config.gateway.state_dir)
    if not os.access(folder, os.W_OK | os.X_OK):
        found.append(
            f"gateway.state_dir: {folder} cannot be written to by this user; the daemon's own must be able to, "
            "or answers are remembered only until it stops"
        )
    return found


def _gone(ports: Sequence[str]) -> Iterator[str]:
    yield from (port for port in ports if port.startswith("/") and not Path(port).exists())


def _too_small(config: Config) -> Iterator[str]:
    """Budgets that no single request fits into."""
    for index, lane in enumerate(config.cloud.lanes):
        for where, amounts in (("budgets", config.budgets), (f"cloud.lanes.{index}.budget", lane.budget)):
            for window in ("minute", "hour", "day"):
                limit = getattr(amounts, f"usd_per_{window}")
                if limit is not None and 0 < limit < lane.cost_per_request:
                    price = f"a request of lane {lane.name} costs {lane.cost_per_request:g}"
                    yield f"{where}.usd_per_{window}: {limit:g} USD let nothing through: {price}"


def _one_by_one(config: Config) -> Iterator[str]:
    """Limits on requests whose burst is a single one, though they allow several."""
    burst = config.budgets.burst
    amounts = {"budgets": config.budgets} | {
        f"cloud.lanes.{index}.budget": lane.budget for index, lane in enumerate(config.cloud.lanes)
    }
    for where, limits in amounts.items():
        for window, seconds in (("minute", 60), ("hour", 3600), ("day", 86_400)):
            limit = getattr(limits, f"requests_per_{window}")
            if limit is not None and limit > 1 and round(limit * burst) <= 1:
                yield (
                    f"{where}.requests_per_{window}: {limit} with budgets.burst {burst:g} let one through at once, "
                    f"and the next after {seconds / limit:g} s"
                )


def _unworkable(config: Config) -> Iterator[dict[str, Any]]:
    """What is valid in itself and cannot work: files that are not there, topics that are taken. Creates nothing."""
    requests = ("edge", config.gateway.id, "infer", "+", "+")
    for topic in config.sensors:
        levels = topic.split("/")
        if levels[:2] == [*requests[:2]] or (
            len(levels) in (4, 5) and all(level in ("+", own) for level, own in zip(levels, requests, strict=False))
        ):
            yield _fault(
                ("sensors", topic), "among the daemon's own topics, edge/{gateway.id}/…; readings need another"
            )
    yield from _unreadable_secrets(config)
    brokers: list[tuple[At, BrokerSection]] = [(("mqtt",), config.mqtt)] if config.mqtt.enabled else []
    brokers += [(("cloud", "lanes", str(index)), lane) for index, lane in enumerate(config.cloud.lanes)]
    for at, broker in brokers:
        for key in ("ca_file", "cert_file", "key_file"):
            path = getattr(broker, key)
            if path is not None and (reason := unreadable(path)):
                yield _fault((*at, key), f"cannot be read: {reason}", path)
    state_dir = config.gateway.state_dir
    if not _nearest(state_dir).is_dir():
        yield _fault(("gateway", "state_dir"), "must be a folder: it, or what is around it, is a file", state_dir)


def _unreadable_secrets(config: Config) -> Iterator[dict[str, Any]]:
    """Certificates and keys of the doors."""
    files: dict[At, Path] = {}
    if config.http.enabled and config.http.tls is not None:
        files["http", "tls", "cert_file"] = config.http.tls.cert_file
        files["http", "tls", "key_file"] = config.http.tls.key_file
    if config.security.jwt is not None:
        for index, key in enumerate(config.security.jwt.keys):
            files["security", "jwt", "keys", str(index), "key_file"] = key.key_file
    if config.security.audit.key_file is not None:
        files["security", "audit", "key_file"] = config.security.audit.key_file
    for at, path in files.items():
        if reason := unreadable(path):
            yield _fault(at, f"cannot be read: {reason}", path)


def _fault(at: At, message: str, found: object = None) -> dict[str, Any]:
    """In the form in which pydantic tells of one."""
    return {"loc": at, "msg": message, "type": "unworkable", "input": found}


def unreadable(path: Path) -> str | None:
    """Why, in words; None if it can be read."""
    try:
        if not path.is_file():
            return "not a file" if path.exists() else "no such file"
        with path.open("rb") as file:
            file.read(1)
    except (OSError, ValueError) as error:
        return (getattr(error, "strerror", None) or str(error)).lower()
    return None


def _nearest(path: Path) -> Path:
    """The path, or the innermost folder around it that exists."""
    return next((at for at in (path, *path.parents) if os.path.lexists(at)), path)


def _refuse_misspelt(environ: Mapping[str, str]) -> None:
    """`EDGE_AGENT_HTTP_PORT` would be taken for a setting by whoever set it, and by nobody else."""
    problems = []
    for variable in sorted(environ):
        if (
            not variable.startswith("EDGE_AGENT_")
            or variable.startswith(ENV_PREFIX)
            or variable in OTHER_VARIABLES
            or _KUBERNETES.match(variable)
        ):
            continue
        meant = variable.removeprefix("EDGE_AGENT_").replace("_", "").upper()
        right = next((name for name in _variables(Config) if name.replace("_", "") == meant), "SECTION__KEY")
        problems.append(f"{variable}: not a setting: {ENV_PREFIX}{right} is, with two underscores between its parts")
    if problems:
        raise ConfigError(problems)


def _variables(section: type[Section]) -> Iterator[str]:
    for name, field in section.model_fields.items():
        yield name.upper()
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            yield from (f"{name.upper()}__{inner}" for inner in _variables(field.annotation))


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
        if not _SECRET_KEY.search(keys[-1]) or keys[-1] == "tokens":  # a list, which holds hashes
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
            if not key.isdecimal() or len(key) > MAX_INDEX_DIGITS or int(key) >= len(node):
                raise ConfigError([f"{variable}: {'.'.join(keys[:position])} has no item {key[:32]!r}"])
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
        references[at] = references.get(at, "") + match.group(0)
        value = _lookup(match.group(2), credential=match.group(1) is not None, environ=environ)
        if value is None:
            problems.append(_unset(at, match.group(0)))
            return ""
        return value

    text = _REFERENCE.sub(replace, node)
    return Substituted(text) if at in references else text


def _unset(at: At, reference: str) -> str:
    return f"{'.'.join(at)}: {reference} is not set"


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
    at = tuple(str(part).lower() for part in fault["loc"] if part != "[key]")  # of a key that may not be one
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
    message = _plain_words(fault)
    if where == "edge_mcu.ports" and fault["type"] == "tuple_type":
        message = "must be a list, such as [/dev/ttyACM0]; a single one may be given as `port`"
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


def _telling(faults: Sequence[Any]) -> list[Any]:
    """Without what only follows from another fault: a list that is short because its items were refused."""
    return [
        fault
        for fault in faults
        if fault["type"] != "too_short"
        or not any(len(o["loc"]) > len(fault["loc"]) and o["loc"][: len(fault["loc"])] == fault["loc"] for o in faults)
    ]


def _as_written(fault: Any, tree: Mapping[str, Any]) -> Any:
    """`edge_mcu.port` stands for a list of one: the file does not have that list."""
    single = isinstance(tree.get("edge_mcu"), dict) and "port" in tree["edge_mcu"]
    return fault | {"loc": ("edge_mcu", "port")} if single and fault["loc"] == ("edge_mcu", "ports", 0) else fault


def _plain_words(fault: Any) -> str:
    limits = fault.get("ctx", {})
    if fault["type"] == "string_pattern_mismatch" and limits.get("pattern") in _PATTERNS:
        return _PATTERNS[limits["pattern"]]
    words = _WORDS.get(fault["type"])
    if words is None:
        return str(fault["msg"]).removeprefix("Value error, ").replace("Input should be", "must be")
    limits = {key: f"{value:g}" if isinstance(value, float) else value for key, value in limits.items()}
    return words.format_map(limits).replace("at least 1 items", "at least 1 item")


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
