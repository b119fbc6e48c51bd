"""One limit on what cloud lanes may use, kept in two ways: a cap for any window, and a pace below it. Pure.

    cap    what was used in the last day, and in any day before, is at most the limit
    pace   a token bucket: `burst` of the limit may be used at once, and what was used comes back evenly over the day

The cap is the owner's number and holds for everybody. The pace keeps a busy hour from using up the whole day; requests
of high priority may run ahead of it by `borrow` of the limit more. Amounts are integers (nano-USD, bytes, requests) and
time is integer milliseconds, so nothing drifts.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any, NamedTuple

NANO = 1_000_000_000
GATEWAY = ""
"""The scope of limits on all lanes together."""
UNITS = ("usd", "bytes", "requests")
WINDOWS_MS: Mapping[str, int] = {"minute": 60_000, "hour": 3_600_000, "day": 86_400_000}
SLOTS = 60
"""A window is counted in so many parts; what was used stays counted for up to one part more than the window."""
LEASE_PARTS: Mapping[str, int] = {"minute": 1, "hour": 10, "day": 50}
"""Of a limit, what one lease is: large enough to write seldom, small enough to lose little in a crash."""
LEASE_REQUESTS = 16
"""A lease is enough for so many requests at least: half of them may come while the next one is written."""


class Allowance(NamedTuple):
    """At most `amount` (nano-USD, bytes or requests) of `unit` in a `window`, by the lane `scope` or by all."""

    scope: str
    unit: str
    window: str
    amount: int


class Meter:
    """One limit. Times are milliseconds of budget time, which never goes back."""

    __slots__ = (
        "_ahead",
        "_at",
        "_burst",
        "_recent",
        "_spare",
        "_window_ms",
        "allowance",
        "kind",
        "lease",
        "next_lease",
        "used",
    )

    def __init__(self, allowance: Allowance, burst: float, borrow: float) -> None:
        self.allowance = allowance
        self.kind = UNITS.index(allowance.unit)
        self._window_ms = WINDOWS_MS[allowance.window]
        self._burst = round(allowance.amount * burst) * self._window_ms
        self._spare = round(allowance.amount * borrow) * self._window_ms
        self._at = 0
        self._ahead = 0
        """What was used and has not come back, times the window: it shrinks by the limit each millisecond."""
        self._recent: deque[list[int]] = deque()
        """(part of the window, amount), oldest first."""
        self.used = 0
        self.lease = 0
        """What may be used until the ledger is written again."""
        self.next_lease: int | None = None
        """The lease that is being written, less what was used meanwhile."""

    def allows(self, amount: int, t_ms: int, *, high: bool) -> bool:
        """Whether `amount` may be used now."""
        if t_ms > self._at:
            self._advance(t_ms)
        if self.used + amount > self.allowance.amount:
            return not amount
        return self._excess(amount, high=high) <= 0

    def objection(self, amount: int, t_ms: int, *, high: bool) -> str:
        """Why not to use `amount` now, for people; empty: nothing speaks against it."""
        if self.allows(amount, t_ms, high=high):
            return ""
        limit, unit = self.allowance.amount, self.allowance.unit
        if self.used + amount > limit:
            return f"{self._name()}: {_words(unit, max(0, limit - self.used))} left, needs {_words(unit, amount)}"
        wait_ms = -(-self._excess(amount, high=high) // limit)
        return f"{self._name()}: ahead of its pace, again in {wait_ms / 1e3:.1f} s"

    def _excess(self, amount: int, *, high: bool) -> int:
        """What has to come back before `amount` may be used. A single request larger than the burst goes when nothing
        is ahead of the pace: it would never go otherwise."""
        allowed = self._burst + self._spare if high else self._burst
        return self._ahead + min(amount * self._window_ms, allowed) - allowed if amount else 0

    def charge(self, amount: int, t_ms: int) -> int:
        """Count `amount` as used now. Returns the part of the window it is counted in."""
        self._advance(t_ms)
        part = self._at * SLOTS // self._window_ms
        if amount:
            self.used += amount
            self._ahead += amount * self._window_ms
            if self._recent and self._recent[-1][0] == part:
                self._recent[-1][1] += amount
            else:
                self._recent.append([part, amount])
            self.lease -= amount
            if self.next_lease is not None:
                self.next_lease -= amount
        return part

    def refund(self, amount: int, part: int) -> None:
        """Less was used than was charged in `part`. A lease does not grow by it: the ledger does not know yet."""
        self._ahead = max(0, self._ahead - amount * self._window_ms)
        for entry in reversed(self._recent):
            if entry[0] == part:
                taken = min(amount, entry[1])
                entry[1] -= taken
                self.used -= taken
                return

    def left(self, t_ms: int) -> int:
        """What the cap leaves now; the pace may leave less."""
        self._advance(t_ms)
        return max(0, self.allowance.amount - self.used)

    def left_now(self, t_ms: int) -> int:
        """What a request of ordinary priority may use at once."""
        self._advance(t_ms)
        return max(0, min(self.allowance.amount - self.used, (self._burst - self._ahead) // self._window_ms))

    def to_document(self, t_ms: int, lease: int) -> dict[str, Any]:
        self._advance(t_ms)
        of = self.allowance
        return {
            "scope": of.scope,
            "unit": of.unit,
            "window": of.window,
            "at_ms": self._at,
            "ahead": self._ahead,
            "recent": [list(entry) for entry in self._recent],
            "lease": lease,
        }

    def restore(self, document: Mapping[str, Any], t_ms: int) -> None:
        """Continue from a document. What it leased may have been used until this moment. Raises `ValueError`."""
        recent = [[whole(part), whole(amount)] for part, amount in document["recent"]]
        self._at = whole(document["at_ms"])
        if self._at > t_ms or recent != sorted(recent):
            raise ValueError("times out of order")
        self._ahead = whole(document["ahead"])
        self._recent = deque(recent)
        self.used = sum(amount for _, amount in recent)
        self.charge(whole(document["lease"]), t_ms)
        self.lease = 0

    def exhaust(self, t_ms: int) -> None:
        """Count all as used: nobody knows what was."""
        self._at, self._ahead, self.used = t_ms, 0, 0
        self._recent.clear()
        self.charge(self.allowance.amount, t_ms)
        self.lease = 0

    def lease_wanted(self, largest: int) -> int:
        """A full lease. It never shrinks, so that it also covers what the last one has left, which may be used while
        this one is written."""
        share = -(-self.allowance.amount // LEASE_PARTS[self.allowance.window])
        return min(max(share, LEASE_REQUESTS * largest), self.allowance.amount)

    def _advance(self, t_ms: int) -> None:
        if t_ms <= self._at:
            return
        self._ahead = max(0, self._ahead - self.allowance.amount * (t_ms - self._at))
        self._at = t_ms
        part = t_ms * SLOTS // self._window_ms
        while self._recent and part - self._recent[0][0] > SLOTS:
            self.used -= self._recent.popleft()[1]

    def _name(self) -> str:
        scope = f" of {self.allowance.scope}" if self.allowance.scope else ""
        return f"budget{scope} of {_words(self.allowance.unit, self.allowance.amount)} per {self.allowance.window}"


def nano_usd(usd: float) -> int:
    """Whole nano-USD; a price that is not zero is at least one."""
    return max(round(usd * NANO), int(usd > 0))


def shown(unit: str, amount: int) -> float:
    """USD, bytes or requests."""
    return amount / NANO if unit == "usd" else amount


def _words(unit: str, amount: int) -> str:
    return f"{amount / NANO:g} USD" if unit == "usd" else f"{amount} {unit}"


def whole(value: Any) -> int:
    """Raises `ValueError` unless it is one, and not negative."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"not a whole number: {value!r}")
    return value
