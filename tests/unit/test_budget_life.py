"""Budgets over years of crashes, power cuts and clocks that are set: no window is ever exceeded."""

from __future__ import annotations

import json
import math

from budget_fakes import DAY_S, LANE, OTHER, PRICES, Paper, byte_limit, usd
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from agent.routing.budget import Budget, Receipt, Terms
from agent.routing.meter import NANO, WINDOWS_MS, Allowance, nano_usd

LIMITS = (
    usd(0.02, "day"),
    usd(0.005, "hour"),
    Allowance("", "requests", "minute", 6),
    byte_limit(20_000),
    usd(0.012, "day", LANE),
    Allowance(LANE, "bytes", "hour", 5_000),
    Allowance(OTHER, "requests", "day", 30),
)
YEAR_S = 365 * DAY_S
WAITS_S = st.sampled_from([0.0, 0.0, 0.4, 12.0, 49.0, 59.2, 61.0, 600.0, 3_530.0, 20_000.0, 85_000.0, 2e5])
LANES = st.sampled_from([LANE, OTHER])
COSTS_USD = st.sampled_from([0.0, 0.0, 0.0001, 0.001, 0.004])
SIZES = st.sampled_from([0, 0, 100, 1_000, 4_000])
TIMES = st.sampled_from([1, 2, 3, 30])
SHARES = st.sampled_from([0.0, 0.5, 1.0])


class Life(RuleBasedStateMachine):
    """A gateway through years: it asks, crashes, is switched off, and somebody plays with its clock.

    The truth is kept apart: `used` has every amount with the true time of its use.
    """

    @initialize(burst=st.sampled_from([0.1, 0.25, 1.0, 1.0]), borrow=st.sampled_from([0.0, 0.5]))
    def begin(self, burst: float, borrow: float) -> None:
        self.terms = Terms(burst=burst, borrow=borrow)
        self.true_s = 1e6
        self.wall_off_s = 1e9
        self.boots = 1
        self.booted_s = 0.0
        self.paper = Paper()
        self.used: list[tuple[float, str, dict[str, int]]] = []
        self.running: list[tuple[Receipt, dict[str, int]]] = []
        self.start()

    def now(self) -> float:
        return self.true_s - self.booted_s

    def start(self) -> None:
        self.running.clear()
        self.budget = Budget(LIMITS, PRICES, self.terms, self.paper)
        wall = self.true_s + self.wall_off_s
        self.budget.restore(self.paper.kept, boot=f"boot-{self.boots}", now=self.now(), wall=wall)
        self.budget.keep(self.now(), wall)

    @rule(wait_s=WAITS_S, lane=LANES, cost_usd=COSTS_USD, size=SIZES, high=st.booleans(), times=TIMES)
    def ask(self, wait_s: float, lane: str, cost_usd: float, size: int, high: bool, times: int) -> None:
        self.true_s += wait_s
        for _ in range(times):
            if self.budget.objection(lane, cost_usd, size, 9 if high else 1, self.now()):
                return
            receipt = self.budget.spend(lane, cost_usd, size, self.now())
            amounts = {"usd": nano_usd(cost_usd), "bytes": size, "requests": 1}
            self.used.append((self.true_s, lane, amounts))
            self.running.append((receipt, amounts))

    @precondition(lambda self: self.running)
    @rule(wait_s=WAITS_S, which=st.integers(0, 10**6), share=SHARES)
    def settle(self, wait_s: float, which: int, share: float) -> None:
        self.true_s += wait_s
        receipt, amounts = self.running.pop(which % len(self.running))
        amounts["bytes"] = math.floor(receipt.bytes * share)
        self.budget.settle(receipt, amounts["usd"] / NANO, amounts["bytes"], self.now())

    @rule(prompt=st.booleans(), problem=st.sampled_from(["", "disk full"]), landed=st.booleans())
    def the_disk_changes_its_pace(self, prompt: bool, problem: str, landed: bool) -> None:
        self.paper.prompt = prompt
        self.paper.finish(problem, landed=landed or not problem)
        self.budget.keep(self.now(), self.true_s + self.wall_off_s)

    @rule(seconds=st.sampled_from([-10 * YEAR_S, -YEAR_S, -DAY_S, -61.0, 61.0, DAY_S, YEAR_S]))
    def clock_is_set(self, seconds: float) -> None:
        self.wall_off_s += seconds

    @rule(off_s=WAITS_S, landed=st.booleans(), power_cut=st.booleans(), up_s=WAITS_S)
    def killed(self, off_s: float, landed: bool, power_cut: bool, up_s: float) -> None:
        """What was being written may have reached the disk or not; nobody was told."""
        if self.paper.pending is not None:
            text, _ = self.paper.pending
            self.paper.pending = None
            if landed:
                self.paper.kept = json.loads(text)
        self.true_s += off_s
        if power_cut:
            self.boots += 1
            self.booted_s = self.true_s
            self.true_s += up_s
        self.start()

    @rule(off_s=WAITS_S)
    def stopped(self, off_s: float) -> None:
        self.paper.pending = None
        self.paper.kept = json.loads(json.dumps(self.budget.document(self.now())))
        self.true_s += off_s
        self.start()

    @invariant()
    def no_window_is_exceeded(self) -> None:
        for limit in LIMITS:
            since = self.true_s - WINDOWS_MS[limit.window] / 1e3
            used = sum(
                amounts[limit.unit] for at, lane, amounts in self.used if at >= since and limit.scope in ("", lane)
            )
            assert used <= limit.amount, limit


TestLife = Life.TestCase
TestLife.settings = hypothesis_settings(max_examples=200, stateful_step_count=50, deadline=None)
