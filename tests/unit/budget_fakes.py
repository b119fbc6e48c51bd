"""Budgets for the tests, and a ledger on paper."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from agent.routing.budget import Budget, Terms
from agent.routing.meter import Allowance, nano_usd

LANE, OTHER = "cloud:eu", "cloud:us"
PRICES = {LANE: 0.001, OTHER: 0.0}
DAY_S, HOUR_S, MINUTE_S = 86_400.0, 3_600.0, 60.0


class Paper:
    """A ledger whose writing a test lets happen. What is written goes through JSON, as in a file."""

    def __init__(self, *, prompt: bool = True) -> None:
        self.prompt = prompt
        self.kept: Any = None
        self.pending: tuple[str, Callable[[str], None]] | None = None
        self.writes = 0

    def write(self, document: Mapping[str, Any], done: Callable[[str], None]) -> None:
        assert self.pending is None, "one at a time"
        self.pending = (json.dumps(document), done)
        if self.prompt:
            self.finish()

    def finish(self, problem: str = "", *, landed: bool | None = None) -> None:
        if self.pending is not None:
            (text, done), self.pending = self.pending, None
            if not problem if landed is None else landed:
                self.kept = json.loads(text)
                self.writes += 1
            done(problem)


def budget(*limits: Allowance, ledger: Paper | None = None, **terms: Any) -> Budget:
    made = Budget(limits, PRICES, Terms(**terms), ledger)
    made.restore(None, boot="boot-1", now=0.0, wall=1e9)
    if ledger is not None:
        made.keep(0.0, 1e9)
    return made


def usd(amount: float, window: str = "day", scope: str = "") -> Allowance:
    return Allowance(scope, "usd", window, nano_usd(amount))


def spent(made: Budget, now: float, cost_usd: float, *, lane: str = LANE, priority: int = 5) -> bool:
    """Use it, if nothing speaks against it."""
    if made.objection(lane, cost_usd, 0, priority, now):
        return False
    made.spend(lane, cost_usd, 0, now)
    return True


def byte_limit(amount: int) -> Allowance:
    return Allowance("", "bytes", "day", amount)
