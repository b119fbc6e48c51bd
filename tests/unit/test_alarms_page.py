"""docs/operations.md has every alarm: what it means and what to do."""

from __future__ import annotations

import ast
import re
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


def test_every_error_in_the_log_is_explained_somewhere() -> None:
    """In what operators read: what is an error needs somebody."""
    pages = "".join(path.read_text() for path in (ROOT / "docs").glob("*.md"))
    missing = []
    for path in SOURCES:
        for found in re.finditer(r'log\.(?:error|critical)\(\s*f?"([^"%{]+)', path.read_text()):
            words = found.group(1).strip(" :")
            if words not in pages:
                missing.append(f"{path.name}: {words}")
    assert not missing


def test_every_metric_of_the_rules_is_in_the_table() -> None:
    table = PAGE[PAGE.index("## Metrics") : PAGE.index("## Alarms")]
    recorded = {rule["record"] for group in RULES["groups"] for rule in group["rules"] if "record" in rule}
    for rule in alerts():
        expression = rule["expr"]
        for name in recorded:
            expression = expression.replace(name, "")
        for name in re.findall(r"edge_agent_([a-z_]+)", expression):
            assert re.search(rf"`{name}`|\b{name}\b", table), f"{rule['alert']}: {name}"
