"""YAML of unknown origin, as plain Python values. Whatever the bytes are, `NotYaml` is the only error.

Aliases, tags and keys given twice are refused: an alias makes a small file a large tree (or an endless one), a tag runs
constructors, and of two equal keys the reader would see the first and the daemon obey the second.
"""

from __future__ import annotations

import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

_QUOTED = re.compile(r"'<[a-z ]+>'|'[^']{3,}'|\"[^\"]{3,}\"")
"""What PyYAML quotes in its messages: names of its own tokens, and text from the document."""


class NotYaml(ValueError):
    """Says where and what, without repeating the text there: it may be a secret."""


class _Loader(yaml.SafeLoader):
    """`yaml.SafeLoader` without aliases, tags, merge keys and duplicate keys."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        if isinstance(event, yaml.AliasEvent):
            raise _refusal("aliases are not supported", event.start_mark)
        if getattr(event, "tag", None) not in (None, "!"):
            raise _refusal("tags are not supported", event.start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise _refusal("keys must be plain text", key_node.start_mark)
            if key_node.tag == "tag:yaml.org,2002:merge":
                raise _refusal("merge keys are not supported", key_node.start_mark)
            if key_node.value in seen:
                raise _refusal("this key is given twice", key_node.start_mark)
            seen.add(key_node.value)
        return super().construct_mapping(node, deep)


def _refusal(problem: str, mark: Any) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=mark)


def _masked(quoted: re.Match[str]) -> str:
    return quoted.group() if quoted.group().startswith("'<") else "…"


def parse_yaml(text: str) -> Any:
    """The single document in `text`. Raises `NotYaml`."""
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506 - a stricter SafeLoader
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise NotYaml(where + _QUOTED.sub(_masked, error.problem or "cannot be understood")) from None
    except yaml.reader.ReaderError as error:
        raise NotYaml(f"character {error.position}: {error.reason}") from None
    except RecursionError:
        raise NotYaml("nested too deeply") from None
    except Exception as error:  # scalars that look like a date, a number, … and are none: six kinds of exception
        raise NotYaml(f"a value cannot be read ({type(error).__name__})") from None


def read_yaml(path: Path, limit: int) -> Any:
    """The document in a file of at most `limit` bytes. Raises `NotYaml` and `OSError`."""
    return decode_yaml(read_bounded(path, limit))


def read_bounded(path: Path, limit: int) -> bytes:
    """The content of a file of at most `limit` bytes. Raises `NotYaml` and `OSError`."""
    with path.open("rb") as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise NotYaml(f"larger than {limit} bytes")
    return data


def decode_yaml(data: bytes) -> Any:
    """The single document in `data`. Raises `NotYaml`."""
    try:
        return parse_yaml(data.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise NotYaml(f"byte {error.start}: not UTF-8") from None
