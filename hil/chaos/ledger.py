"""What was asked and what came of it, and whether that is what was promised."""

from __future__ import annotations

import math
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from hil.stalls import Stalls

GRACE_S = 0.1
"""An answer or a refusal is due this long after the deadline."""
LOOKS = 20
"""While the machine takes more, more may be taken; at most so often."""
EDGE_S = 0.25
"""A connection that broke this close to the death of the daemon broke because of it."""
BROKER_EDGE_S = 3.0
"""What a broker acknowledged so shortly before it was killed, it need not have handed on."""


@dataclass
class Asked:
    """One request that wants its answer now. Times are monotonic seconds. `code`: HTTP status; 0: no answer came."""

    door: str
    sample: int
    at: float
    deadline_s: float
    done: float = math.inf
    code: int = 0
    answer: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class Kept:
    """One durable item. `ids`: under which it was delivered. `acknowledged`: when we were told that it is kept."""

    sample: int
    acknowledged: float | None = None
    ids: set[str] = field(default_factory=set)
    id: str = ""


class Windows:
    """When something was away, by its name."""

    def __init__(self) -> None:
        self._spans: dict[str, list[tuple[float, float]]] = defaultdict(list)
        self._lock = threading.Lock()

    def add(self, name: str, start: float, end: float) -> None:
        with self._lock:
            self._spans[name].append((start, end))

    def overlap(self, names: Iterable[str], start: float, end: float) -> bool:
        return any(begun <= end and ended >= start for name in names for begun, ended in self._spans[name])

    def starts(self, name: str) -> list[float]:
        return [start for start, _ in self._spans[name]]


@dataclass
class Ledger:
    """Filled by the callers, judged once at the end."""

    asked: list[Asked] = field(default_factory=list)
    kept: dict[str, Kept] = field(default_factory=dict)
    results: dict[str, tuple[str, Mapping[str, Any]]] = field(default_factory=dict)
    """By the outbox's id: status and document of its first delivery."""
    repeats: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def told(self, request_id: str, id_: str) -> None:
        """The daemon says that it has the item."""
        with self.lock:
            item = self.kept.get(request_id)
            if item is not None and item.acknowledged is None:
                item.acknowledged, item.id = time.monotonic(), id_

    def delivered(self, id_: str, status: str, document: Mapping[str, Any]) -> None:
        """A message out of the outbox, as often as it comes."""
        with self.lock:
            if id_ in self.results:
                self.repeats += 1
                return
            self.results[id_] = (status, document)
            item = self.kept.get(str(document.get("request_id")))
            if item is not None:
                item.ids.add(id_)
                if item.acknowledged is None:
                    item.acknowledged, item.id = time.monotonic(), id_

    def undelivered(self) -> list[str]:
        with self.lock:
            return [name for name, item in self.kept.items() if item.acknowledged is not None and not item.ids]


class Judge:
    """What the models answer to each sample, and when what was away."""

    def __init__(
        self, labels: Mapping[str, list[str]], windows: Windows, stalls: Stalls, began: float = -math.inf
    ) -> None:
        """`labels[variant]`: of each sample what that variant says. `began`: when the gateway was empty, monotonic
        seconds."""
        self._labels = labels
        self._windows = windows
        self._stalls = stalls
        self._began = began

    def labelled(self, sample: int, answer: Mapping[str, Any], done: float = math.inf) -> bool:
        """Whether an answer is what it says it is: that variant's own answer to this input; or an earlier one, and says
        so, with an age that it can have: a clock that jumps makes none of a year."""
        label, variant = answer.get("label"), str(answer.get("variant"))
        age_s = answer.get("age_s", 0.0)
        if not isinstance(age_s, float | int) or not 0 <= age_s <= done - self._began:
            return False
        if answer.get("stale") and not answer.get("same_input"):
            return answer.get("tier") == "fallback" and "age_s" in answer
        known = self._labels.get(variant)
        tier = "fallback" if answer.get("stale") else answer.get("origin_tier")
        return known is not None and known[sample] == label and bool(answer.get("tier") == tier)

    def due(self, asked: Asked) -> float:
        """When there must be an answer: a grace after the deadline, and later by what the machine took until then."""
        least = due = asked.at + asked.deadline_s + GRACE_S
        for _ in range(LOOKS):
            later = least + self._stalls.between(asked.at, due)
            if later <= due:
                break
            due = later
        return due

    def request(self, asked: Asked) -> str:
        """One word for what came of it."""
        due = self.due(asked)
        away = ("daemon",) if asked.door == "http" else ("daemon", "door", "broker", "local link")
        excused = self._windows.overlap(away, asked.at - EDGE_S, min(asked.done, due) + EDGE_S)
        if not asked.answer:
            return "daemon away" if excused else "silent"
        if asked.done > due:
            return "answered after a stop" if excused else "late"
        if "error" in asked.answer:
            error = asked.answer["error"]
            code = error.get("code") if isinstance(error, Mapping) else None
            return "refused without cause" if code in NO_POLICY else "refused"
        if not self.labelled(asked.sample, asked.answer, asked.done):
            return "unlabelled"
        return "stale, and says so" if asked.answer.get("stale") else "answered"

    def item(
        self,
        name: str,
        item: Kept,
        ledger: Ledger,
        set_aside: set[str],
        handed_on: Mapping[str, float],
        held: set[str],
    ) -> str:
        """One word for what became of a durable item. `set_aside`: ids that damaged files knew; `held`: of these, the
        ones that were still in them; `handed_on`: when a broker acknowledged an id."""
        if item.acknowledged is None:
            return "never accepted"
        if not item.ids:
            if item.id in held:  # a key that is only remembered: the item had left the file before
                return "in the file that was set aside"
            at, killed = handed_on.get(item.id), self._windows.starts("broker killed")
            if at is not None and any(0 <= start - at <= BROKER_EDGE_S for start in killed):
                return "acknowledged by the broker, which was killed"
            return "lost"
        if len(item.ids) > 1:
            return "again, after its file was set aside" if len(item.ids - set_aside) <= 1 else "twice"
        status, document = ledger.results[next(iter(item.ids))]
        if status != "ok":
            return "answered with an error"
        if document.get("stale"):  # an earlier answer is none to a durable request
            return "unlabelled"
        return "delivered" if self.labelled(item.sample, document) else "unlabelled"


NO_POLICY = ("internal", "invalid_request", "unknown_model", None)
"""Codes of refusals that requests without a fault never get from a daemon without one."""
BAD = ("silent", "late", "unlabelled", "lost", "twice", "refused without cause", "answered with an error")
"""What no policy explains."""


def bad(counts: Iterable[Counter[str]]) -> int:
    return sum(count[word] for count in counts for word in BAD)
