"""The circuit breaker, with time and chance as arguments."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from agent.config import BreakerSection
from agent.routing.breaker import BACKOFF_FACTOR, JITTER, Breaker, BreakerState

SETTINGS = BreakerSection(failures=5, error_rate=0.5, window=20, backoff_initial_s=0.5, backoff_max_s=8)


def longest(low: float, high: float) -> float:
    return high


def breaker(settings: BreakerSection = SETTINGS) -> Breaker:
    return Breaker(settings, longest)


def opened(settings: BreakerSection = SETTINGS) -> Breaker:
    found = breaker(settings)
    for _ in range(settings.failures):
        found.failed(100.0)
    assert found.state is BreakerState.OPEN
    return found


def probe(found: Breaker, now: float) -> None:
    assert found.allows(now)
    assert found.began(now)


def test_the_fifth_failure_in_a_row_opens_it() -> None:
    found = breaker()
    for _ in range(4):
        found.failed(100.0)
        assert found.allows(100.0)
    found.failed(100.0)
    assert found.state is BreakerState.OPEN
    assert not found.allows(100.0)
    assert found.consecutive_failures == 5


def test_a_success_between_them_starts_the_count_again() -> None:
    found = breaker()
    for _ in range(4):
        found.failed(100.0)
    found.succeeded()
    for _ in range(4):
        found.failed(100.0)
    assert found.state is BreakerState.CLOSED


def test_half_of_a_full_window_opens_it() -> None:
    found = breaker()
    for _ in range(9):
        found.succeeded()
        found.failed(100.0)
    found.succeeded()
    assert found.state is BreakerState.CLOSED  # 9 of 19: the window is not full
    found.failed(100.0)
    assert found.state is BreakerState.OPEN  # 10 of 20


def test_less_than_the_error_rate_does_not() -> None:
    found = breaker()
    for _ in range(100):
        found.failed(100.0)
        found.succeeded()
        found.succeeded()
    assert found.state is BreakerState.CLOSED


def test_after_it_closed_old_failures_are_forgotten() -> None:
    found = breaker()
    for _ in range(10):
        found.succeeded()
        found.failed(100.0)
    assert found.state is BreakerState.OPEN
    probe(found, 101.0)
    found.succeeded()
    for _ in range(9):
        found.failed(101.0)
        found.succeeded()
    assert found.state is BreakerState.CLOSED


def test_one_probe_only() -> None:
    found = opened()
    assert not found.allows(100.4)
    assert not found.began(100.4)
    probe(found, 100.5)
    assert found.state is BreakerState.HALF_OPEN
    assert not found.allows(100.5)
    assert not found.began(100.5)
    assert not found.allows(1e9)


def test_the_probes_success_closes_it() -> None:
    found = opened()
    probe(found, 100.5)
    found.succeeded()
    assert found.state is BreakerState.CLOSED
    assert found.consecutive_failures == 0
    assert found.allows(100.5)


def test_the_back_off_doubles_up_to_its_maximum_and_starts_again_after_a_success() -> None:
    found, now, waits = opened(), 100.0, []
    for _ in range(40):
        waits.append(found.retry_at - now)
        assert not found.allows(found.retry_at - 0.001)
        now = found.retry_at
        probe(found, now)
        found.failed(now, probe=True)
    assert waits == [0.5, 1, 2, 4, 8] + [8] * 35
    probe(found, found.retry_at)
    found.succeeded()
    for _ in range(5):
        found.failed(now)
    assert found.retry_at - now == 0.5


@given(seed=st.integers(), openings=st.integers(0, 50))
def test_jitter_shortens_by_a_fifth_at_most(seed: int, openings: int) -> None:
    found = Breaker(SETTINGS, random.Random(seed).uniform)
    now = 100.0
    for _ in range(5):
        found.failed(now)
    for _ in range(openings):
        now = found.retry_at
        probe(found, now)
        found.failed(now, probe=True)
    whole = min(8.0, 0.5 * BACKOFF_FACTOR**openings)
    assert whole * (1 - JITTER) - 1e-9 <= found.retry_at - now <= whole + 1e-9


def test_jitter_differs_between_gateways() -> None:
    times = set()
    for seed in range(10):
        found = Breaker(SETTINGS, random.Random(seed).uniform)
        found.failed(0.0, permanent=True)
        times.add(found.retry_at)
    assert len(times) == 10


def test_a_permanent_failure_opens_it_at_once_for_the_longest_time() -> None:
    found = breaker()
    found.failed(100.0, permanent=True)
    assert found.state is BreakerState.OPEN
    assert found.retry_at == 108.0


def test_a_permanent_failure_prolongs_an_open_breaker() -> None:
    found = opened()
    found.failed(100.1, permanent=True)
    assert found.retry_at == 108.1


def test_what_came_back_is_probed_at_once() -> None:
    found = breaker()
    found.failed(100.0, permanent=True)
    found.came_back(101.0)
    probe(found, 101.0)
    assert not found.allows(101.0)


def test_coming_back_never_delays_and_changes_nothing_else() -> None:
    found = opened()
    found.came_back(200.0)
    assert found.retry_at == 100.5
    probe(found, 200.0)
    found.came_back(200.0)
    assert found.state is BreakerState.HALF_OPEN
    closed = breaker()
    closed.came_back(1.0)
    assert closed.state is BreakerState.CLOSED


def test_a_probe_that_tells_nothing_leaves_room_for_another() -> None:
    found = opened()
    probe(found, 100.5)
    found.released(probe=True)
    probe(found, 100.5)
    assert not found.allows(100.5)


@pytest.mark.parametrize("ending", ["failed", "released"])
def test_attempts_from_before_it_opened_do_not_end_the_probe(ending: str) -> None:
    found = opened()
    probe(found, 100.5)
    if ending == "failed":
        found.failed(100.6)
    else:
        found.released()
    assert found.state is BreakerState.HALF_OPEN
    assert found.retry_at == 100.5
    assert not found.allows(100.6)


def test_failures_of_attempts_from_before_do_not_prolong_the_wait() -> None:
    found = opened()
    for now in (100.1, 100.4, 100.6):
        found.failed(now)
    assert found.retry_at == 100.5


def test_a_probe_that_fails_after_the_breaker_closed_is_one_failure_among_others() -> None:
    found = opened()
    probe(found, 100.5)
    found.succeeded()  # of an attempt that began before it opened
    found.failed(100.6, probe=True)
    assert found.state is BreakerState.CLOSED
    assert found.consecutive_failures == 1


class BreakerMachine(RuleBasedStateMachine):
    """Attempts that overlap and end in any order, beside the three sentences of the module's docstring."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.settings = BreakerSection(failures=3, error_rate=0.5, window=6, backoff_initial_s=1, backoff_max_s=10)
        self.breaker = Breaker(self.settings, longest)
        self.running: list[bool] = []
        self.probes = 0

    @rule(seconds=st.sampled_from([0.0, 0.5, 1.0, 3.0, 12.0]))
    def pass_time(self, seconds: float) -> None:
        self.now += seconds

    @precondition(lambda self: self.breaker.allows(self.now))
    @rule()
    def begin(self) -> None:
        closed = self.breaker.state is BreakerState.CLOSED
        is_probe = self.breaker.began(self.now)
        assert is_probe is not closed
        self.running.append(is_probe)

    def end(self, data: st.DataObject) -> bool:
        return self.running.pop(data.draw(st.integers(0, len(self.running) - 1)))

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def succeed(self, data: st.DataObject) -> None:
        self.end(data)
        self.breaker.succeeded()
        assert self.breaker.state is BreakerState.CLOSED
        self.running = [False] * len(self.running)  # a breaker that closed knows of no probe

    @precondition(lambda self: self.running)
    @rule(data=st.data(), permanent=st.booleans())
    def fail(self, data: st.DataObject, permanent: bool) -> None:
        was_probe, before = self.end(data), self.breaker.state
        self.breaker.failed(self.now, probe=was_probe, permanent=permanent)
        if permanent or was_probe:
            assert self.breaker.state is BreakerState.OPEN
            assert self.now < self.breaker.retry_at <= self.now + self.settings.backoff_max_s
            self.running = [False] * len(self.running)
        elif before is not BreakerState.CLOSED:
            assert self.breaker.state is before

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        before = self.breaker.state
        self.breaker.released(probe=self.end(data))
        assert self.breaker.state is before

    @rule()
    def come_back(self) -> None:
        probing = any(self.running)
        self.breaker.came_back(self.now)
        if not probing:
            assert self.breaker.allows(self.now) or self.breaker.state is BreakerState.HALF_OPEN

    @invariant()
    def one_probe_at_most(self) -> None:
        assert sum(self.running) <= 1
        if any(self.running):
            assert not self.breaker.allows(self.now)

    @invariant()
    def never_shut_for_longer_than_the_maximum(self) -> None:
        if not any(self.running):
            assert self.breaker.allows(self.now + self.settings.backoff_max_s)


TestBreakerMachine = BreakerMachine.TestCase
