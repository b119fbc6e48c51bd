"""Reads and writes `catalog.yaml`: stable order, one line for each small mapping or list."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import yaml

SCHEMA = 1
FAMILY_ORDER = ("digits", "motion")
HEADER = "# What this folder holds. Written by train_digits.py and train_motion.py.\n"
INLINE_KEYS = {"labels", "inputs", "outputs", "shape", "targets", "operators", "accuracy", "calibration"}


class _Inline:
    """A node to be written on one line."""

    def __init__(self, value: Any) -> None:
        self.value = value


class _Dumper(yaml.SafeDumper):
    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        """Indents lists inside mappings."""
        super().increase_indent(flow, False)


def _represent_inline(dumper: yaml.SafeDumper, node: _Inline) -> yaml.Node:
    represented = dumper.represent_data(node.value)
    _set_flow(represented)
    return represented


def _set_flow(node: yaml.Node) -> None:
    if isinstance(node, yaml.CollectionNode):
        node.flow_style = True
        for child in node.value:
            for part in child if isinstance(child, tuple) else (child,):
                _set_flow(part)


_Dumper.add_representer(_Inline, _represent_inline)


def _laid_out(node: Any) -> Any:
    if not isinstance(node, dict):
        return node
    return {k: _Inline(v) if k in INLINE_KEYS else _laid_out(v) for k, v in node.items()}


def read(path: Path) -> dict[str, Any]:
    """The catalogue as plain data."""
    catalog: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return catalog


def write_family(path: Path, name: str, entry: dict[str, Any]) -> None:
    """Replaces one family's entry, or creates the catalogue with it."""
    families = read(path)["families"] if path.exists() else {}
    families[name] = entry
    ordered = {key: families[key] for key in FAMILY_ORDER if key in families}
    body = yaml.dump(
        _laid_out({"schema": SCHEMA, "families": ordered}),
        Dumper=_Dumper,
        sort_keys=False,
        width=1000,
        default_flow_style=False,
    )
    path.write_text(HEADER + body, encoding="utf-8")


def sha256(path: Path) -> str:
    """Hexadecimal digest of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()
