"""What cloud lanes may use of money, bytes and requests. Pure: time is an argument, the file is somebody else's.

Each limit is a `Meter`. What is used is counted before the attempt (`spend`) and corrected afterwards (`settle`), so
that attempts at the same time cannot overshoot together. A `Ledger` makes the count survive the process: it always has
at least what was used, because it holds a lease for each meter, an amount that may be used without writing again and
that counts as used after a crash. `docs/budgets.md` has the rules in full.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from agent.config import AmountsSection, BudgetsSection, LaneSection
from agent.routing.meter import GATEWAY, UNITS, WINDOWS_MS, Allowance, Meter, nano_usd, shown, whole

RETRY_S = 10.0
"""After the ledger could not be written."""
CHECKPOINT_S = 900.0
"""What is in use is written at least this often, so that a power cut does not lose much of the time that passed."""
MAX_PRICES = 64
USUAL_BYTES = 4096
"""What a request is taken to need until a larger one comes; leases go by it."""
SCHEMA = 1


class Ledger(Protocol):
    """Keeps a document safe."""

    def write(self, document: Mapping[str, Any], done: Callable[[str], None]) -> None:
        """Have it written; `done` is called with an empty text when it would survive a power cut, else with why not.
        Returns at once; at most one is on its way."""
        ...


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
    overhead_bytes: int = 0
    """Of each request, beside the payloads that a lane counts."""
    count_time_off: bool = False
    """Whether time counts during which the machine was off. It is told by the wall clock, which may be wrong."""


TERMS = Terms()


class Budget:
    """The limits of all lanes. A lane that no limit names, and every edge target, is free.

    `lanes` are all targets that limits of the gateway as a whole are about, with the price of one request in USD.
    `ledger` None: what is used does not survive the process. `now` is monotonic seconds, `wall` Unix time.
    """

    def __init__(
        self,
        allowances: Iterable[Allowance],
        lanes: Mapping[str, float],
        terms: Terms = TERMS,
        ledger: Ledger | None = None,
    ) -> None:
        self._terms = terms
        self._ledger = ledger
        self._meters = tuple(Meter(allowance, terms.burst, terms.borrow) for allowance in allowances)
        self._of = {
            lane: tuple(meter for meter in self._meters if meter.allowance.scope in (GATEWAY, lane)) for lane in lanes
        }
        self._offset_ms = 0
        """From monotonic time to budget time, which goes on over restarts and never goes back."""
        self._wall_offset_ms = 0
        self._latest_wall_ms = 0
        """The latest wall time ever seen: a clock that is set back and forth is not paid twice."""
        self._boot = ""
        self._nano: dict[float, int] = {}
        self._largest = [nano_usd(max(lanes.values(), default=0.0)), USUAL_BYTES, 1]
        """Of one request, so far. It never shrinks, and so no lease does."""
        self._writing = False
        self._written = float("-inf")
        self._changed = True
        self._retry = float("-inf")
        self.problem = ""
        """Why what is used cannot be written, in the ledger's words; empty if it can."""

    def objection(self, lane: str, cost_usd: float, bytes: int, priority: int, now: float) -> str:
        """Why a lane must not be asked now, for people; empty: it may. Nothing is used up by asking."""
        meters = self._of.get(lane, ())
        if not meters:
            return ""
        t_ms, high = self._time(now), priority >= self._terms.priority
        nano = self._nano.get(cost_usd)
        if nano is None:
            nano = self._price(cost_usd)
        # An attempt takes some bytes, whatever is estimated: none go when none are left.
        amounts = (nano, bytes + self._terms.overhead_bytes or 1, 1)
        granted, leased = True, self._ledger is not None
        for meter in meters:
            amount = amounts[meter.kind]
            if not meter.allows(amount, t_ms, high=high):
                return meter.objection(amount, t_ms, high=high)
            if leased and meter.lease < amount:
                granted = False
        return "" if granted else self._not_granted(meters, amounts, now)

    def _not_granted(self, meters: Sequence[Meter], amounts: Sequence[int], now: float) -> str:
        """A lease is used up: have the ledger written. Empty if that was done at once."""
        self._largest = [max(pair) for pair in zip(self._largest, amounts, strict=True)]
        self._write(now)
        if all(meter.lease >= amounts[meter.kind] for meter in meters):
            return ""
        return f"budget: what is used cannot be recorded: {self.problem or 'the file is being written'}"

    def _price(self, cost_usd: float) -> int:
        """In nano-USD, remembered: there are as many prices as lanes."""
        if len(self._nano) >= MAX_PRICES:
            self._nano.clear()
        return self._nano.setdefault(cost_usd, nano_usd(cost_usd))

    def spend(self, lane: str, cost_usd: float, bytes: int, now: float) -> Receipt:
        """Count an attempt that begins now, whatever `objection` says; `bytes` is the most it is expected to take."""
        meters, t_ms = self._of.get(lane, ()), self._time(now)
        amounts = (self._price(cost_usd), bytes + self._terms.overhead_bytes, 1)
        parts = tuple([meter.charge(amounts[meter.kind], t_ms) for meter in meters])
        self._used(now, meters)
        return Receipt(meters, parts, amounts[0], bytes)

    def settle(self, receipt: Receipt, cost_usd: float, bytes: int, now: float) -> None:
        """Correct what an attempt was charged to what it took."""
        t_ms = self._time(now)
        excess = (self._price(cost_usd) - receipt.nano_usd, bytes - receipt.bytes, 0)
        for meter, part in zip(receipt.meters, receipt.parts, strict=True):
            more = excess[meter.kind]
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
                "lane": meter.allowance.scope or None,
                "unit": meter.allowance.unit,
                "window": meter.allowance.window,
                "limit": shown(meter.allowance.unit, meter.allowance.amount),
                "left": shown(meter.allowance.unit, meter.left(t_ms)),
                "left_now": shown(meter.allowance.unit, meter.left_now(t_ms)),
                "used": shown(meter.allowance.unit, meter.used),
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
            self._latest_wall_ms = whole(document["wall_ms"])
            self._offset_ms = whole(document["at_ms"]) + passed_ms - now_ms
            kept = {(entry["scope"], entry["unit"], entry["window"]): entry for entry in document["meters"]}
            for meter in self._meters:
                entry = kept.get(meter.allowance[:3])
                if entry is not None:
                    meter.restore(entry, self._time(now))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"cannot be read: {error}") from None

    def _passed_ms(self, document: Mapping[str, Any], now_ms: int) -> int:
        """How much time has passed for certain since the document was written."""
        if not self._boot or not document["boot"]:
            passed_ms = 0
        elif self._boot == document["boot"]:
            return max(0, now_ms - whole(document["monotonic_ms"]))
        else:
            passed_ms = now_ms
        if self._terms.count_time_off:
            passed_ms = max(passed_ms, now_ms + self._wall_offset_ms - whole(document["wall_ms"]))
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
        if any(2 * meter.lease < meter.lease_wanted(self._largest[meter.kind]) for meter in meters):
            self._write(now)

    def _write(self, now: float) -> None:
        if self._ledger is None or self._writing or now < self._retry:
            return
        leases = [meter.lease_wanted(self._largest[meter.kind]) for meter in self._meters]
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


def budget_of(section: BudgetsSection, lanes: Sequence[LaneSection], ledger: Ledger | None) -> Budget | None:
    """The budget of a configuration; None where nothing is limited. Lanes go by the names of their targets."""
    found = allowances(section)
    for lane in lanes:
        found += allowances(lane.budget, lane.target)
    terms = Terms(
        section.burst,
        section.borrow,
        section.borrow_priority,
        section.overhead_bytes,
        section.count_time_off,
    )
    return Budget(found, {lane.target: lane.cost_per_request for lane in lanes}, terms, ledger) if found else None


def allowances(section: AmountsSection, scope: str = GATEWAY) -> list[Allowance]:
    """Every limit that a section of the configuration sets."""
    found = []
    for unit in UNITS:
        for window in WINDOWS_MS:
            amount = getattr(section, f"{unit}_per_{window}")
            if amount is not None:
                found.append(Allowance(scope, unit, window, nano_usd(amount) if unit == "usd" else amount))
    return found


def _ms(seconds: float) -> int:
    return int(seconds * 1000)
