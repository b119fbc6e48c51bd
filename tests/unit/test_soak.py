"""The soak's own judgement: what is flat, what is lost."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest

from hil.demo.ledger import Asked
from hil.soak import traffic
from hil.soak.traffic import PATIENCE_S, Recent, settled
from hil.soak.watch import Sample, verdict
from hil.stalls import Stalls

FLAT = Sample(0.0, 80.0, 50.0, 40, 7, 100, 0, 0, 2.0, 10.0, 5.0, 1.0)


def judged(samples: list[Sample]) -> dict[str, bool]:
    return {what: flat for what, _, _, flat in verdict(samples)}


def test_a_flat_run_is_flat() -> None:
    assert all(judged([FLAT] * 100).values())


@pytest.mark.parametrize(
    ("field", "step", "line"),
    [
        ("memory_mb", 0.1, "memory, MB"),
        ("children_mb", 0.1, "children, MB"),
        ("descriptors", 1, "descriptors"),
        ("threads", 1, "threads"),
        ("p99_ms", 0.2, "p99, ms"),
        ("refused", 1, "refused, %"),
    ],
)
def test_what_rises_is_named(field: str, step: float, line: str) -> None:
    rising = [replace(FLAT, **{field: getattr(FLAT, field) + step * n}) for n in range(100)]
    assert [what for what, flat in judged(rising).items() if not flat] == [line]


def test_what_rises_while_it_warms_up_does_not_count() -> None:
    assert all(judged([replace(FLAT, memory_mb=40.0)] * 20 + [FLAT] * 80).values())


def test_one_lost_request_is_enough() -> None:
    assert not judged([FLAT] * 99 + [replace(FLAT, lost=1)])["lost requests"]


def test_the_ledger_forgets_what_is_answered_and_gives_up_what_is_not() -> None:
    ledger = Recent(Stalls(lambda: 0))
    for name, at in (("a", 0.0), ("b", 1.0), ("c", 2.0)):
        ledger.sent(name, Asked("meter", "digits", "realtime", "1", at))
    ledger.received("b", {"label": "1"}, 1.25)
    ledger.received("c", {"error": {"code": "overloaded"}}, 2.5)
    ledger.received("b", {"label": "1"}, 9.0)
    ledger.sent("d", Asked("meter", "digits", "realtime", "1", PATIENCE_S + 3.0))
    assert set(ledger.asked) == {"d"}
    assert ledger.took_ms == {"meter": [250.0, 500.0]}
    assert (ledger.answered, ledger.refused, ledger.lost) == (2, 1, 1)


def test_what_is_open_at_the_end_is_lost_unless_it_is_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = Recent(Stalls(lambda: 0))
    for name in ("a", "b"):
        ledger.sent(name, Asked("meter", "digits", "realtime", "1", time.monotonic()))
    assert ledger.take()[3] == 0
    ledger.received("a", {"label": "1"}, time.monotonic())
    monkeypatch.setattr(traffic, "PATIENCE_S", 0.1)  # only now: a slow machine would give them up before
    last = settled(FLAT, ledger)
    assert (last.answered, last.lost) == (FLAT.answered + 1, 1)
