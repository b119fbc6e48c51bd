"""The ledger of the chaos runs: what counts as answered, refused, late, silent, lost, twice, unlabelled."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from hil.chaos.ledger import Asked, Judge, Kept, Ledger, Windows, bad
from hil.stalls import Stalls

LABELS = {"digits/gateway-fp16": ["1", "2"], "gateway-fp16": ["1", "2"]}
RIGHT = {"label": "2", "variant": "gateway-fp16", "tier": "edge_gpu", "origin_tier": "edge_gpu", "same_input": True}
STALE = RIGHT | {"stale": True, "tier": "fallback", "age_s": 3.0}


class Still(Stalls):
    """A machine that took `seconds` from us."""

    def __init__(self, seconds: float = 0.0) -> None:
        super().__init__(lambda: 0)
        self.seconds = seconds

    def between(self, start: float, end: float) -> float:
        return self.seconds


def judged(
    answer: dict[str, Any], done: float = 10.05, away: tuple[str, float, float] | None = None, **how: Any
) -> str:
    windows = Windows()
    if away:
        windows.add(*away)
    asked = Asked(how.get("door", "http"), 1, 10.0, 0.1, done, 200, answer)
    return Judge(LABELS, windows, Still(how.get("stall", 0.0)), began=0.0).request(asked)


@pytest.mark.parametrize(
    ("answer", "word"),
    [
        (RIGHT, "answered"),
        (RIGHT | {"label": "1"}, "unlabelled"),
        (RIGHT | {"label": "7"}, "unlabelled"),
        (RIGHT | {"variant": "another"}, "unlabelled"),
        (RIGHT | {"tier": "cloud_gpu"}, "unlabelled"),
        (RIGHT | {"cached": True, "tier": "edge_gpu"}, "answered"),
        (STALE, "stale, and says so"),
        (STALE | {"label": "1"}, "unlabelled"),
        (STALE | {"tier": "edge_gpu"}, "unlabelled"),
        (STALE | {"tier": "edge_gpu", "cached": True}, "unlabelled"),
        (RIGHT | {"tier": "cloud_gpu", "cached": True}, "unlabelled"),
        (STALE | {"label": "1", "same_input": False}, "stale, and says so"),
        (STALE | {"label": "1", "same_input": False, "age_s": 0.0}, "stale, and says so"),
        (STALE | {"label": "1", "same_input": False, "age_s": None}, "unlabelled"),
        (STALE | {"label": "1", "same_input": False, "age_s": -1.0}, "unlabelled"),
        (STALE | {"label": "1", "same_input": False, "age_s": 365 * 86400.0}, "unlabelled"),
        (STALE | {"age_s": 365 * 86400.0}, "unlabelled"),
        ({"error": {"code": "overloaded"}}, "refused"),
        ({"error": {"code": "internal"}}, "refused without cause"),
        ({"error": {"code": "invalid_request"}}, "refused without cause"),
        ({}, "silent"),
    ],
)
def test_what_an_answer_is(answer: dict[str, Any], word: str) -> None:
    assert judged(answer) == word


def test_a_deadline_and_a_tenth_of_a_second() -> None:
    assert judged(RIGHT, done=10.199) == "answered"
    assert judged(RIGHT, done=10.201) == "late"
    assert judged({"error": {"code": "deadline_exceeded"}}, done=10.201) == "late"


def test_what_the_machine_took_does_not_count() -> None:
    assert judged(RIGHT, done=10.25, stall=0.1) == "answered"
    assert judged(RIGHT, done=10.35, stall=0.1) == "late"


def test_a_daemon_that_was_not_let_run_and_then_killed_was_not_silent() -> None:
    assert judged({}, done=10.9, away=("daemon", 10.8, 12.0)) == "silent"
    assert judged({}, done=10.9, away=("daemon", 10.8, 12.0), stall=0.5) == "daemon away"
    assert judged({}, done=12.0, stall=0.5) == "silent"


def test_only_the_daemons_own_absence_excuses_silence() -> None:
    assert judged({}, away=("daemon", 9.0, 9.9)) == "daemon away"
    assert judged({}, away=("daemon", 8.0, 9.0)) == "silent"
    assert judged({}, away=("broker", 9.0, 11.0)) == "silent"
    assert judged({}, away=("broker", 9.0, 11.0), door="mqtt") == "daemon away"
    assert judged(RIGHT, done=12.0, away=("daemon", 9.0, 11.9)) == "answered after a stop"


def kept(ledger: Ledger, **what: Any) -> str:
    windows = Windows()
    for start in what.get("kills", ()):
        windows.add("broker killed", start, start)
    judge = Judge(LABELS, windows, Still())
    set_aside = what.get("set_aside", set())
    held = what.get("held", set_aside)
    return judge.item("a", ledger.kept["a"], ledger, set_aside, what.get("handed_on", {}), held)


def book(told: bool = True) -> Ledger:
    ledger = Ledger()
    ledger.kept["a"] = Kept(1)
    if told:
        ledger.told("a", "id-1")
    return ledger


def test_what_became_of_an_item() -> None:
    assert kept(book(told=False)) == "never accepted"
    assert kept(book()) == "lost"
    assert kept(book(), set_aside={"id-1"}) == "in the file that was set aside"
    assert kept(book(), set_aside={"id-1"}, held=set()) == "lost", "it had left the file, which only knew its key"
    assert kept(book(), handed_on={"id-1": 5.0}, kills=[6.0]) == "acknowledged by the broker, which was killed"
    assert kept(book(), handed_on={"id-1": 5.0}, kills=[4.0, 60.0]) == "lost"
    assert kept(book(), kills=[6.0]) == "lost"


def test_delivered_once_as_the_application_sees_it() -> None:
    ledger = book()
    for _ in range(3):
        ledger.delivered("id-1", "ok", RIGHT | {"request_id": "a"})
    assert (kept(ledger), ledger.repeats) == ("delivered", 2)
    ledger.delivered("id-2", "ok", RIGHT | {"request_id": "a"})
    assert kept(ledger) == "twice"
    assert kept(ledger, set_aside={"id-of-another"}) == "twice"
    assert kept(ledger, set_aside={"id-1"}) == "again, after its file was set aside"


def test_a_wrong_or_refused_result_is_not_delivered() -> None:
    ledger = book()
    ledger.delivered("id-1", "ok", RIGHT | {"request_id": "a", "label": "1"})
    assert kept(ledger) == "unlabelled"
    ledger = book()
    ledger.delivered("id-1", "expired", {"request_id": "a", "error": {"code": "expired"}})
    assert kept(ledger) == "answered with an error"
    ledger = book()
    ledger.delivered("id-1", "ok", STALE | {"request_id": "a", "cached": True, "same_input": False, "label": "1"})
    assert kept(ledger) == "unlabelled", "an earlier answer is none to a durable request"


def test_what_no_policy_explains_does_not_balance() -> None:
    assert bad((Counter({"refused without cause": 1}), Counter({"answered with an error": 2}))) == 3
    assert bad((Counter({"refused": 5}), Counter({"delivered": 5}))) == 0


def test_a_result_says_as_well_that_the_item_was_accepted() -> None:
    ledger = book(told=False)
    ledger.delivered("id-1", "ok", RIGHT | {"request_id": "a"})
    assert kept(ledger) == "delivered"
    assert ledger.undelivered() == []
