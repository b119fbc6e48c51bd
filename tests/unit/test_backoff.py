"""Back-off with the time and the dice in the test's hand."""

from __future__ import annotations

import random

import pytest

from agent.link.backoff import Backoff


def test_the_ceiling_doubles_up_to_the_maximum() -> None:
    backoff = Backoff(0.5, 10.0, lambda: 1.0)
    assert [backoff.failed(0.0) for _ in range(7)] == [0.5, 1.0, 2.0, 4.0, 8.0, 10.0, 10.0]


def test_jitter_is_full() -> None:
    rng = random.Random(3)
    waits = []
    for _ in range(2000):
        backoff = Backoff(1.0, 60.0, rng.random)
        backoff.failed(0.0)
        waits.append(backoff.failed(0.0))
    assert 0 <= min(waits) < 0.01
    assert 1.99 < max(waits) <= 2.0
    assert 0.95 < sum(waits) / len(waits) < 1.05


def test_permanent_failure_waits_longest_at_once() -> None:
    backoff = Backoff(0.5, 120.0, lambda: 0.0)
    assert backoff.failed(7.0, permanent=True) == 120.0
    assert backoff.retry_at == 127.0


def test_due_and_success() -> None:
    backoff = Backoff(2.0, 8.0, lambda: 0.5)
    assert backoff.due(0.0)
    backoff.failed(100.0)
    assert not backoff.due(100.9)
    assert backoff.due(101.0)
    backoff.failed(101.0)
    assert backoff.failures == 2
    backoff.succeeded()
    assert backoff.due(0.0)
    assert backoff.failures == 0
    assert backoff.failed(0.0) == 1.0


def test_many_failures_do_not_overflow() -> None:
    backoff = Backoff(0.001, 30.0, lambda: 1.0)
    for _ in range(5000):
        wait = backoff.failed(0.0)
    assert wait == 30.0


@pytest.mark.parametrize(("initial", "maximum"), [(0.0, 1.0), (-1.0, 1.0), (2.0, 1.0)])
def test_bounds_are_checked(initial: float, maximum: float) -> None:
    with pytest.raises(ValueError, match="initial_s"):
        Backoff(initial, maximum, random.random)
