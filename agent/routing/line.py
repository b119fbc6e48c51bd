"""Requests that wait for a place: who is next, and who gives way. Pure: no clock, no waiting.

Order is by class, then priority, then arrival. So that the lower classes are not starved, after `passed_over` places in
a row went past somebody who had come earlier, the next one goes to whoever has waited longest, whatever the class.

Bounds are for each class and for all together. Where a class is full, its lowest priority gives way to a higher one,
the youngest first; where the whole line is full, the lowest class does. Whoever nobody gives way to is not let in.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any

from agent.config import WaitingSection
from agent.core.types import LatencyClass

ORDER = tuple(LatencyClass)
"""Tightest first."""


@dataclass(slots=True, order=True)
class Ticket:
    """One waiting request. Compares by its place in its class."""

    rank: tuple[int, int]
    """Lower is earlier: minus priority, then number of arrival."""
    latency_class: LatencyClass = field(compare=False)
    question: Hashable = field(compare=False)
    holder: Any = field(compare=False)

    @property
    def number(self) -> int:
        return self.rank[1]


class Line:
    """The waiting requests. Those of one class and one `question` fit, or do not, all together: only the first of them
    is looked at."""

    def __init__(self, settings: WaitingSection) -> None:
        self._settings = settings
        self._bounds = {kind: int(getattr(settings, kind.value)) for kind in ORDER}
        self._waiting: dict[LatencyClass, list[Ticket]] = {kind: [] for kind in ORDER}
        self._by_question: dict[LatencyClass, dict[Hashable, list[Ticket]]] = {kind: {} for kind in ORDER}
        self._by_arrival: dict[LatencyClass, OrderedDict[int, Ticket]] = {kind: OrderedDict() for kind in ORDER}
        self._arrivals = 0
        self._passed_over = 0

    def __len__(self) -> int:
        return sum(map(len, self._waiting.values()))

    def counts(self) -> dict[str, int]:
        """Waiting requests of each class."""
        return {kind.value: len(tickets) for kind, tickets in self._waiting.items()}

    def precedes(self, latency_class: LatencyClass, priority: int) -> bool:
        """Whether somebody waits who comes before a request that arrives now."""
        for kind in ORDER:
            tickets = self._waiting[kind]
            if tickets and (kind is not latency_class or -tickets[0].rank[0] >= priority):
                return True
            if kind is latency_class:
                return False
        return False

    def join(
        self, latency_class: LatencyClass, priority: int, holder: Any, question: Hashable = None
    ) -> tuple[Ticket | None, Ticket | None]:
        """The new ticket, None if there is no place for it; and whose place it took, None if there was one."""
        tickets = self._waiting[latency_class]
        evicted: Ticket | None = None
        if len(tickets) >= self._bounds[latency_class]:
            if not tickets or -tickets[-1].rank[0] >= priority:
                return None, None
            evicted = tickets[-1]
        elif len(self) >= self._settings.total:
            evicted = self._give_way(latency_class, priority)
            if evicted is None:
                return None, None
        if evicted is not None:
            self.leave(evicted)
        self._arrivals += 1
        ticket = Ticket((-priority, self._arrivals), latency_class, question, holder)
        insort(tickets, ticket)
        insort(self._by_question[latency_class].setdefault(question, []), ticket)
        self._by_arrival[latency_class][ticket.number] = ticket
        return ticket, evicted

    def leave(self, ticket: Ticket) -> bool:
        """It waits no longer. False if it did not wait any more."""
        if self._by_arrival[ticket.latency_class].pop(ticket.number, None) is None:
            return False
        alike = self._by_question[ticket.latency_class]
        for tickets in (self._waiting[ticket.latency_class], alike[ticket.question]):
            del tickets[bisect_left(tickets, ticket)]
        if not alike[ticket.question]:
            del alike[ticket.question]
        return True

    def take(self, fits: Callable[[Ticket], bool]) -> Ticket | None:
        """The next ticket for which there is room, and it waits no longer; None if there is room for nobody."""
        chosen = self._longest(fits) if self._passed_over >= self._settings.passed_over else None
        if chosen is None:
            chosen = self._first(fits)
        if chosen is None:
            return None
        self.leave(chosen)
        if any(ticket.number < chosen.number for ticket in self._oldest()):
            self._passed_over += 1
        else:
            self._passed_over = 0
        return chosen

    def _first(self, fits: Callable[[Ticket], bool]) -> Ticket | None:
        for kind in ORDER:
            heads = sorted(tickets[0] for tickets in self._by_question[kind].values())
            found = next(filter(fits, heads), None)
            if found is not None:
                return found
        return None

    def _longest(self, fits: Callable[[Ticket], bool]) -> Ticket | None:
        for ticket in sorted(self._oldest(), key=lambda ticket: ticket.number):
            if fits(ticket):
                self._passed_over = 0
                return ticket
        return None

    def _oldest(self) -> list[Ticket]:
        """Of each class whoever came first."""
        return [next(iter(tickets.values())) for tickets in self._by_arrival.values() if tickets]

    def _give_way(self, latency_class: LatencyClass, priority: int) -> Ticket | None:
        """Out of a full line: the youngest of the lowest priority of the lowest class, if that is below the new one."""
        for kind in reversed(ORDER):
            tickets = self._waiting[kind]
            if kind is latency_class:
                return tickets[-1] if tickets and -tickets[-1].rank[0] < priority else None
            if tickets:
                return tickets[-1]
        return None
