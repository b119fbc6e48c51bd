"""The table on the screen: which tier answers whom, how fast, how sure and why."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from hil.demo.ledger import Asked, Ledger
from hil.demo.players import Sensor

COLOURS = {
    "edge_mcu": "green",
    "edge_gpu": "cyan",
    "cloud_gpu": "blue",
    "cloud_serverless": "magenta",
    "fallback": "yellow",
}
WINDOW_S = 2.0
"""The table shows the answers to what was asked lately."""
PLAIN_INTERVAL_S = 2.5
"""Without a terminal: a block of lines this often."""


class Screen:
    """Redraws a table in a terminal; prints a block of lines now and then elsewhere."""

    def __init__(self, sensors: Sequence[Sensor], ledger: Ledger) -> None:
        self.console = Console(highlight=False, soft_wrap=True)
        self._sensors = sensors
        self._ledger = ledger
        self._scene = ""
        self._scene_s = 0.0
        self._started = time.monotonic()
        self._printed = 0.0
        self._live = Live(console=self.console, refresh_per_second=4, transient=True)
        self._terminal = self.console.is_terminal

    def __enter__(self) -> Callable[[str], None]:
        self._started = time.monotonic()
        if self._terminal:
            self._live.start()
        return self.say

    def __exit__(self, *_: object) -> None:
        if self._terminal:
            self._live.stop()

    def say(self, event: str) -> None:
        """Something happens on the stage. What was asked before it says nothing of it any more."""
        self._scene, self._scene_s = event, time.monotonic()
        self._printed = self._scene_s
        self.console.print(f"[bold]{time.monotonic() - self._started:6.1f} s  {event}[/bold]", highlight=False)

    def refresh(self) -> None:
        """Called a few times a second."""
        now = time.monotonic()
        if self._terminal:
            self._live.update(Group(self._table(now), Text(self._scene, style="bold")))
        elif now - self._printed >= PLAIN_INTERVAL_S:
            self._printed = now
            for sensor in self._sensors:
                cells = self._cells(sensor, now)
                self.console.print(f"          {cells[0]:18} {cells[1]:18} {cells[2]:>14} {cells[3]:>5}  {cells[4]}")

    def _table(self, now: float) -> Table:
        table = Table(title=f"edge-agent: who answers whom  ({now - self._started:.0f} s)", expand=True)
        for heading in ("sensor, class", "answered by", "latency", "sure"):
            table.add_column(heading, no_wrap=True)
        table.add_column("why", ratio=1, no_wrap=True, overflow="ellipsis")
        for sensor in self._sensors:
            who, tier, *rest = self._cells(sensor, now)
            table.add_row(who, Text(tier, style=COLOURS.get(tier.split()[0] if tier else "", "")), *rest)
        return table

    def _cells(self, sensor: Sensor, now: float) -> tuple[str, str, str, str, str]:
        """Of the latest answer in the window to what was asked since the last event."""
        rows = [
            row
            for row in self._ledger.rows()
            if row.sensor == sensor.name
            and row.answer
            and row.answered_s > now - WINDOW_S
            and row.sent_s > self._scene_s
        ]
        who = f"{sensor.name}, {sensor.latency_class}"
        if not rows:
            return who, "", "", "", "waiting for an answer"
        last = max(rows, key=lambda row: row.answered_s)
        answer = last.answer or {}
        latency = f"{(last.answered_s - last.sent_s) * 1e3:.1f} ms"
        if "error" in answer:
            return who, "refused", latency, "", str(answer["error"]["message"])
        sure = "" if answer["confidence"] is None else f"{answer['confidence']:.0%}"
        late = "" if answer["deadline_met"] else " LATE"
        return who, tier_text(last), latency + late, sure, why(last)


def tier_text(row: Asked) -> str:
    answer = row.answer or {}
    return f"{answer['tier']}" + (f" {answer['age_s']:.0f} s old" if answer.get("stale") else "")


def why(row: Asked) -> str:
    """The last of the reasons: the rule that decided."""
    reasons = (row.answer or {}).get("reasons") or [""]
    return str(reasons[-1])
