"""What cloud lanes may use of money, bytes and requests. Pure: time is an argument, the file is somebody else's.

A limit (`usd_per_day: 5`) is kept by a `Meter` in two ways.

    cap    what was used in the last day, and in any day before, is at most the limit
    pace   a token bucket: `burst` of the limit may be used at once, and what was used comes back evenly over the day

The cap is the owner's number and holds for everybody. The pace keeps a busy hour from using up the whole day; requests
of high priority may run ahead of it by `borrow` of the limit more.

What is used is counted before the attempt (`spend`) and corrected afterwards (`settle`), so that attempts at the same
time cannot overshoot together. A `Ledger` makes the count survive the process: the file always says at least what was
used, because it holds a lease for each meter, an amount that may be used without writing again and that counts as used
after a crash. Amounts are integers (nano-USD, bytes, requests) and time is integer milliseconds, so nothing drifts.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

NANO = 1_000_000_000
GATEWAY = ""
"""The scope of limits on all lanes together."""
SLOTS = 60
"""A window is counted in so many parts; what was used stays counted for up to one part more than the window."""
WINDOWS_MS: Mapping[str, int] = {"minute": 60_000, "hour": 3_600_000, "day": 86_400_000}
UNITS = ("usd", "bytes", "requests")
LEASE_PARTS: Mapping[str, int] = {"minute": 1, "hour": 10, "day": 50}
"""Of a limit, what one lease is: large enough to write seldom, small enough to lose little in a crash."""
RETRY_S = 10.0
"""After the ledger could not be written."""
CHECKPOINT_S = 900.0
"""What is in use is written at least this often, so that a power cut does not lose much of the time that passed."""
SCHEMA = 1


class Limit(NamedTuple):
    """At most `amount` (nano-USD, bytes or requests) of `unit` in a `window`, by the lane `scope` or by all."""

    scope: str
    unit: str
    window: str
    amount: int


class Ledger(Protocol):
    """Keeps a document safe."""

    def write(self, document: Mapping[str, Any], done: Callable[[str], None]) -> None:
        """Have it written; `done` is called with an empty text when it would survive a power cut, else with why not.
        Returns at once; at most one is on its way."""
        ...


class Meter:
    """One limit. Times are milliseconds of budget time, which never goes back."""

    __slots__ = ("_ahead", "_at", "_burst", "_recent", "_spare", "_window_ms", "lease", "limit", "next_lease", "used")

    def __init__(self, limit: Limit, burst: float, borrow: float) -> None:
        self.limit = limit
        self._window_ms = WINDOWS_MS[limit.window]
        self._burst = round(limit.amount * burst) * self._window_ms
        self._spare = round(limit.amount * borrow) * self._window_ms
        self._at = 0
        self._ahead = 0
        """What was used and has not come back, times the window: it shrinks by `limit.amount` each millisecond."""
        self._recent: deque[list[int]] = deque()
        """(part of the window, amount), oldest first."""
        self.used = 0
        self.lease = 0
        """What may be used until the ledger is written again."""
        self.next_lease: int | None = None
        """The lease that is being written, less what was used meanwhile."""

    def objection(self, amount: int, t_ms: int, *, high: bool) -> str:
        """Why not to use `amount` now, for people; empty: nothing speaks against it."""
        if not amount:
            return ""
        self._advance(t_ms)
        limit, unit = self.limit.amount, self.limit.unit
        if self.used + amount > limit:
            return f"{self._name()}: {_words(unit, max(0, limit - self.used))} left, needs {_words(unit, amount)}"
        allowed = self._burst + (self._spare if high else 0)
        # A single request larger than the burst goes when nothing is ahead of the pace: it would never go otherwise.
        excess = self._ahead + min(amount * self._window_ms, allowed) - allowed
        if excess > 0:
            return f"{self._name()}: ahead of its pace, again in {-(-excess // limit) / 1e3:.1f} s"
        return ""

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
        return max(0, self.limit.amount - self.used)

    def left_now(self, t_ms: int) -> int:
        """What a request of ordinary priority may use at once."""
        self._advance(t_ms)
        return max(0, min(self.limit.amount - self.used, (self._burst - self._ahead) // self._window_ms))

    def to_document(self, t_ms: int, lease: int) -> dict[str, Any]:
        self._advance(t_ms)
        limit = self.limit
        return {
            "scope": limit.scope,
            "unit": limit.unit,
            "window": limit.window,
            "at_ms": self._at,
            "ahead": self._ahead,
            "recent": [list(entry) for entry in self._recent],
            "lease": lease,
        }

    def restore(self, document: Mapping[str, Any], t_ms: int) -> None:
        """Continue from a document. What it leased may have been used until this moment. Raises `ValueError`."""
        recent = [[_whole(part), _whole(amount)] for part, amount in document["recent"]]
        self._at = _whole(document["at_ms"])
        if self._at > t_ms or recent != sorted(recent):
            raise ValueError("times out of order")
        self._ahead = _whole(document["ahead"])
        self._recent = deque(recent)
        self.used = sum(amount for _, amount in recent)
        self.charge(_whole(document["lease"]), t_ms)
        self.lease = 0

    def exhaust(self, t_ms: int) -> None:
        """Count all as used: nobody knows what was."""
        self._at, self._ahead, self.used = t_ms, 0, 0
        self._recent.clear()
        self.charge(self.limit.amount, t_ms)
        self.lease = 0

    def lease_wanted(self, largest: int) -> int:
        """A full lease: never less than what the last one has left, which may be used while the next is written."""
        share = -(-self.limit.amount // LEASE_PARTS[self.limit.window])
        return max(min(max(share, 4 * largest), self.limit.amount), self.lease)

    def _advance(self, t_ms: int) -> None:
        if t_ms <= self._at:
            return
        self._ahead = max(0, self._ahead - self.limit.amount * (t_ms - self._at))
        self._at = t_ms
        part = t_ms * SLOTS // self._window_ms
        while self._recent and part - self._recent[0][0] > SLOTS:
            self.used -= self._recent.popleft()[1]

    def _name(self) -> str:
        scope = f" of {self.limit.scope}" if self.limit.scope else ""
        return f"budget{scope} of {_words(self.limit.unit, self.limit.amount)} a {self.limit.window}"


class Receipt(NamedTuple):
    """What one attempt was charged, to be settled when it is over."""

    meters: tuple[Meter, ...]
    parts: tuple[int, ...]
    nano_usd: int
    bytes: int


@dataclass(frozen=True, slots=True)
class Terms:
    """How limits are kept: see the module's text. `priority`: from here on a request may run ahead by `borrow`."""

    burst: float = 0.25
    borrow: float = 0.25
    priority: int = 8
    count_time_off: bool = False
    """Whether time counts during which the machine was off. It is told by the wall clock, which may be wrong."""


TERMS = Terms()


class Budget:
    """The limits of all lanes. A lane that no limit names, and every edge target, is free.

    `lanes` are the names of all targets that limits of the gateway as a whole are about. `ledger` None: what is used
    does not survive the process. `now` is monotonic seconds, `wall` Unix time.
    """

    def __init__(
        self,
        limits: Iterable[Limit],
        lanes: Iterable[str],
        terms: Terms = TERMS,
        ledger: Ledger | None = None,
    ) -> None:
        self._terms = terms
        self._ledger = ledger
        self._meters = tuple(Meter(limit, terms.burst, terms.borrow) for limit in limits)
        self._of = {
            lane: tuple(meter for meter in self._meters if meter.limit.scope in (GATEWAY, lane)) for lane in lanes
        }
        self._offset_ms = 0
        """From monotonic time to budget time, which goes on over restarts and never goes back."""
        self._wall_offset_ms = 0
        self._latest_wall_ms = 0
        """The latest wall time ever seen: a clock that is set back and forth is not paid twice."""
        self._boot = ""
        self._largest = dict.fromkeys(UNITS, 0)
        self._writing = False
        self._written = float("-inf")
        self._changed = False
        self._retry = float("-inf")
        self.problem = ""
        """Why what is used cannot be written, in the ledger's words; empty if it can."""

    def objection(self, lane: str, cost_usd: float, bytes: int, priority: int, now: float) -> str:
        """Why a lane must not be asked now, for people; empty: it may. Nothing is used up by asking."""
        meters = self._of.get(lane, ())
        if not meters:
            return ""
        t_ms, high = self._time(now), priority >= self._terms.priority
        amounts = {"usd": nano_usd(cost_usd), "bytes": bytes, "requests": 1}
        for meter in meters:
            text = meter.objection(amounts[meter.limit.unit], t_ms, high=high)
            if text:
                return text
        if self._ledger is not None and any(meter.lease < amounts[meter.limit.unit] for meter in meters):
            for unit, amount in amounts.items():
                self._largest[unit] = max(self._largest[unit], amount)
            self._write(now)
            if any(meter.lease < amounts[meter.limit.unit] for meter in meters):
                return f"budget: what is used cannot be recorded: {self.problem or 'the file is being written'}"
        return ""

    def spend(self, lane: str, cost_usd: float, bytes: int, now: float) -> Receipt:
        """Count an attempt that begins now, whatever `objection` says; `bytes` is the most it is expected to take."""
        meters, t_ms = self._of.get(lane, ()), self._time(now)
        amounts = {"usd": nano_usd(cost_usd), "bytes": bytes, "requests": 1}
        parts = tuple([meter.charge(amounts[meter.limit.unit], t_ms) for meter in meters])
        self._used(now, meters)
        return Receipt(meters, parts, amounts["usd"], bytes)

    def settle(self, receipt: Receipt, cost_usd: float, bytes: int, now: float) -> None:
        """Correct what an attempt was charged to what it took."""
        t_ms = self._time(now)
        excess = {"usd": nano_usd(cost_usd) - receipt.nano_usd, "bytes": bytes - receipt.bytes, "requests": 0}
        for meter, part in zip(receipt.meters, receipt.parts, strict=True):
            more = excess[meter.limit.unit]
            if more > 0:
                meter.charge(more, t_ms)
            elif more < 0:
                meter.refund(-more, part)
        self._used(now, receipt.meters)

    def keep(self, now: float, wall: float) -> None:
        """To be called now and then: writes what has waited for long, tries again what could not be written."""
        self._wall_offset_ms = _ms(wall) - _ms(now)
        if self._ledger is not None and (self.problem or (self._changed and now - self._written >= CHECKPOINT_S)):
            self._write(now)

    def left(self, now: float) -> list[dict[str, Any]]:
        """For `/status`: every limit, what was used of it and what is left; `left_now`: of that, what the pace lets go
        at once."""
        t_ms = self._time(now)
        return [
            {
                "lane": meter.limit.scope or None,
                "unit": meter.limit.unit,
                "window": meter.limit.window,
                "limit": _shown(meter.limit.unit, meter.limit.amount),
                "left": _shown(meter.limit.unit, meter.left(t_ms)),
                "left_now": _shown(meter.limit.unit, meter.left_now(t_ms)),
                "used": _shown(meter.limit.unit, meter.used),
            }
            for meter in self._meters
        ]

    # --- over restarts -------------------------------------------------------------------------------------------

    def restore(self, document: Mapping[str, Any] | None, *, boot: str, now: float, wall: float) -> None:
        """Continue from what the ledger has; None: it has nothing yet. Raises `ValueError`; then call `exhaust`.

        `boot` names the machine's start: within one, monotonic time of both processes is the same clock. After another
        start only the time since then counts for certain, and the wall clock's word if `count_time_off`.
        """
        now_ms = _ms(now)
        self._boot = boot
        self._wall_offset_ms = _ms(wall) - now_ms
        self._offset_ms = -now_ms
        if document is None:
            return
        try:
            if document["schema"] != SCHEMA:
                raise ValueError(f"schema {document['schema']!r}")
            passed_ms = self._passed_ms(document, now_ms)
            self._latest_wall_ms = _whole(document["wall_ms"])
            self._offset_ms = _whole(document["at_ms"]) + passed_ms - now_ms
            kept = {(entry["scope"], entry["unit"], entry["window"]): entry for entry in document["meters"]}
            for meter in self._meters:
                entry = kept.get(meter.limit[:3])
                if entry is not None:
                    meter.restore(entry, self._time(now))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"cannot be read: {error}") from None

    def _passed_ms(self, document: Mapping[str, Any], now_ms: int) -> int:
        """How much time has passed for certain since the document was written."""
        if not self._boot or not document["boot"]:
            passed_ms = 0
        elif self._boot == document["boot"]:
            return max(0, now_ms - _whole(document["monotonic_ms"]))
        else:
            passed_ms = now_ms
        if self._terms.count_time_off:
            passed_ms = max(passed_ms, now_ms + self._wall_offset_ms - _whole(document["wall_ms"]))
        return passed_ms

    def exhaust(self, now: float) -> None:
        """Nobody knows what was used: count everything as used."""
        for meter in self._meters:
            meter.exhaust(self._time(now))

    def document(self, now: float, leases: Sequence[int] | None = None) -> dict[str, Any]:
        """Plain JSON types for `restore`. `leases`: one for each meter; None: an orderly end, nothing more is used."""
        now_ms, t_ms = _ms(now), self._time(now)
        self._latest_wall_ms = max(self._latest_wall_ms, now_ms + self._wall_offset_ms)
        leases = leases or [0] * len(self._meters)
        return {
            "schema": SCHEMA,
            "boot": self._boot,
            "monotonic_ms": now_ms,
            "wall_ms": self._latest_wall_ms,
            "at_ms": t_ms,
            "meters": [meter.to_document(t_ms, lease) for meter, lease in zip(self._meters, leases, strict=True)],
        }

    def _time(self, now: float) -> int:
        return _ms(now) + self._offset_ms

    def _used(self, now: float, meters: Sequence[Meter]) -> None:
        """Have new leases written before those in use run out."""
        if self._ledger is None or not meters:
            return
        self._changed = True
        if any(2 * meter.lease < meter.lease_wanted(self._largest[meter.limit.unit]) for meter in meters):
            self._write(now)

    def _write(self, now: float) -> None:
        if self._ledger is None or self._writing or now < self._retry:
            return
        leases = [meter.lease_wanted(self._largest[meter.limit.unit]) for meter in self._meters]
        document = self.document(now, leases)
        for meter, lease in zip(self._meters, leases, strict=True):
            meter.next_lease = lease
        self._writing = True
        self._changed = False

        def done(problem: str) -> None:
            self._writing = False
            self.problem = problem
            self._retry = now + RETRY_S if problem else float("-inf")
            self._written = self._written if problem else now
            for meter in self._meters:
                if not problem and meter.next_lease is not None:
                    meter.lease = meter.next_lease
                meter.next_lease = None

        self._ledger.write(document, done)


def nano_usd(usd: float) -> int:
    """Whole nano-USD; a price that is not zero is at least one."""
    return max(round(usd * NANO), int(usd > 0))


def _ms(seconds: float) -> int:
    return int(seconds * 1000)


def _whole(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"not a whole number: {value!r}")
    return value


def _shown(unit: str, amount: int) -> float:
    return amount / NANO if unit == "usd" else amount


def _words(unit: str, amount: int) -> str:
    return f"{amount / NANO:g} USD" if unit == "usd" else f"{amount} {unit}"
