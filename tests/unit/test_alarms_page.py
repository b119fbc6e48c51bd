"""docs/operations.md has every alarm: what it means and what to do."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "operations.md").read_text()
ALARMS = PAGE[PAGE.index("## Alarms") :]
RULES = yaml.safe_load((ROOT / "deploy" / "prometheus" / "edge-agent.rules.yml").read_text())
SOURCES = sorted((ROOT / "agent").rglob("*.py"))


def alerts() -> list[dict[str, str]]:
    return [rule for group in RULES["groups"] for rule in group["rules"] if "alert" in rule]


def first_words(*names: str) -> set[str]:
    """First arguments, as far as they are known, of calls of methods with these names."""
    found = set()
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute | ast.Name) or not node.args:
                continue
            name = node.func.attr if isinstance(node.func, ast.Attribute) else node.func.id
            if name in names:
                word = node.args[0]
                if isinstance(word, ast.Constant) and isinstance(word.value, str):
                    found.add(word.value)
                elif isinstance(word, ast.JoinedStr) and isinstance(word.values[0], ast.Constant):
                    found.add(str(word.values[0].value))
    return found


@pytest.mark.parametrize("alert", [rule["alert"] for rule in alerts()])
def test_every_alert_is_explained(alert: str) -> None:
    assert f"`{alert}`" in ALARMS


def test_every_component_is_explained() -> None:
    components = {name.strip() for name in first_words("spawn") if name.strip()}
    assert {"loop", "budgets", "http door", "outbox asker"} <= components
    missing = {name for name in components if f"`{name}`" not in ALARMS and not name.startswith("outbox")}
    assert not missing
    parts = ("board PORT", "stream NAME", "models", "runtime process", "link NAME", "mqtt door")
    for name in ("cache", "drift", "audit", "recorder", "settings", *parts):
        assert f"`{name}`" in ALARMS


def test_every_alarm_topic_is_named() -> None:
    topics = {word for word in first_words("keep") if word.startswith("alarms/")}
    assert topics == {"alarms/outbox", "alarms/drift/"}
    assert all(topic in ALARMS for topic in topics)


LEVELS = ("warning", "error", "critical", "exception", "log")


def events() -> Iterator[tuple[str, str]]:
    """Where something is logged that is more than information, and what: the text up to its first variable part."""
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            match node:
                case ast.Call(func=ast.Attribute(ast.Name("log" | "_log"), level)) if level in LEVELS:
                    match node.args[level == "log"]:
                        case ast.Constant(str(text)) | ast.JoinedStr([ast.Constant(str(text)), *_]):
                            yield path.name, re.split(r"[:]? ?%", text)[0].strip()
                        case other:
                            raise AssertionError(f"{path.name}: an event without a name: {ast.unparse(other)}")


def test_every_warning_and_error_is_explained() -> None:
    """Among the alarms: whoever reads one in the log finds what it means and what to do."""
    found = set(events())
    assert len(found) > 50
    assert {("serve.py", "cannot start"), ("certificates.py", "certificate needs renewal")} <= found
    assert not {(file, text) for file, text in found if f"`{text}" not in ALARMS}


def test_every_reason_why_a_tier_cannot_be_asked_is_explained() -> None:
    reasons = set()
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            match node:
                case ast.Call(func=ast.Name("Availability"), args=[ast.Constant(False), why, *_]):
                    reasons |= {text for text in texts(why) if len(text) > 8}
    assert len(reasons) >= 6, reasons
    assert not {text for text in reasons if text not in ALARMS}


def texts(node: ast.AST) -> set[str]:
    """The constant parts of an expression."""
    parts = (one.value for one in ast.walk(node) if isinstance(one, ast.Constant) and isinstance(one.value, str))
    return {part.strip(" :;") for part in parts}


def test_every_metric_of_the_rules_is_in_the_table() -> None:
    table = PAGE[PAGE.index("## Metrics") : PAGE.index("## Alarms")]
    recorded = {rule["record"] for group in RULES["groups"] for rule in group["rules"] if "record" in rule}
    for rule in alerts():
        expression = rule["expr"]
        for name in recorded:
            expression = expression.replace(name, "")
        for name in re.findall(r"edge_agent_([a-z_]+)", expression):
            assert re.search(rf"`{name}`|\b{name}\b", table), f"{rule['alert']}: {name}"
