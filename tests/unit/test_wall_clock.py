"""Deadlines, ages and budgets are monotonic: a wall clock that jumps changes none of them.

The parts have tests of their own (cache, outbox, budgets). Here: that nobody else asks what time it is.
"""

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

MAY_ASK = {
    "agent/app.py": "budgets over a reboot",
    "agent/build.py": "when a trace began",
    "agent/core/clock.py": "the clock itself",
    "agent/core/component.py": "for people: since when a component is as it is",
    "agent/durable/asker.py": "for people: when an answer was given",
    "agent/durable/desk.py": "for people: when an answer was given",
    "agent/ingress/streams.py": "for people: when a board sampled",
    "agent/pipeline.py": "for people: when an answer was given",
    "agent/security/access.py": "tokens end on a date",
    "agent/security/audit.py": "for people: when it happened",
    "agent/security/certificates.py": "certificates end on a date",
    "agent/store/cache.py": "ages over a reboot; while the machine runs they are monotonic",
    "agent/targets/mcu_board.py": "for people: since when a board is there",
    "agent/telemetry/story.py": "for people: when a request came",
}
CALLS = {("time", "time"), ("time", "time_ns"), ("datetime", "now"), ("datetime", "utcnow"), ("date", "today")}


def asks(path: Path) -> bool:
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Attribute):
            owner = node.value.id if isinstance(node.value, ast.Name) else ""
            if (owner, node.attr) in CALLS:
                return True
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "wall":
            return True
    return False


def test_only_these_ask_for_the_wall_clock() -> None:
    found = {str(path.relative_to(ROOT)) for path in (ROOT / "agent").rglob("*.py") if asks(path)}
    assert found == set(MAY_ASK)
