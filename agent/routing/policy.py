"""Which target answers, with which variant, and why. Pure: same arguments, same ranking; no I/O, no clock."""

from __future__ import annotations

from collections.abc import Sequence

from agent.config import RoutingSection
from agent.routing import scorecard
from agent.routing.decision import (
    HIGH_PRIORITY,
    Budgets,
    Candidate,
    Constraint,
    Decision,
    Fixed,
    Judged,
    Limit,
    Play,
    Question,
)

__all__ = [
    "HIGH_PRIORITY",
    "Budgets",
    "Candidate",
    "Constraint",
    "Decision",
    "Fixed",
    "Judged",
    "Limit",
    "Play",
    "Question",
    "decide",
]


def decide(question: Question, candidates: Sequence[Candidate], settings: RoutingSection) -> Decision:
    """Rank the candidates by the policy of `settings`."""
    return scorecard.decide(question, candidates, settings)
