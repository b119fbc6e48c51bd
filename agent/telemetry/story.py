"""What happened to a request, in plain JSON types: the questions that were put to routing, and what came of it.

While a request runs only references are kept; a document is made of them when somebody asks for one. `docs/traces.md`
says what the keys mean: `/explain` and the lines of a trace are made of the same parts.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from operator import attrgetter
from typing import Any, NamedTuple, Protocol

from agent.core.clock import Clock
from agent.core.errors import InferenceError
from agent.core.types import Attempt, InferenceRequest, InferenceResult

_ASKED = (
    "id",
    "model",
    "producer",
    "variant",
    "latency_class",
    "priority",
    "max_retries",
    "timeout_ms",
    "allowed_regions",
    "use_cache",
    "accuracy",
    "notes",
    "received",
    "deadline",
)
_asked = attrgetter(*_ASKED)
_CAME_TO = (
    "stale",
    "cached",
    "origin_tier",
    "target",
    "variant",
    "label",
    "confidence",
    "queue_s",
    "link_s",
    "compute_s",
    "total_s",
    "deadline_met",
    "cost_usd",
    "escalation",
    "age_s",
)
_came_to = attrgetter(*_CAME_TO)


class Explained(Protocol):
    """A decision, as far as it is told."""

    def to_dict(self) -> dict[str, Any]: ...


class Stage(NamedTuple):
    """One time that routing was asked. `attempts` is filled while they end; `at` is monotonic seconds."""

    at: float
    decision: Explained
    attempts: Sequence[Attempt]


class Story(NamedTuple):
    """One request and what came of it, without its tensors. `at` is Unix time of receipt."""

    at: float
    asked: tuple[Any, ...]
    stages: Sequence[Stage]
    outcome: Mapping[str, Any] | tuple[Any, ...]
    reasons: Sequence[str]

    def request(self) -> dict[str, Any]:
        """What was asked."""
        asked = dict(zip(_ASKED, self.asked, strict=True))
        deadline_ms = round((asked.pop("deadline") - asked.pop("received")) * 1e3, 3)
        return {
            **asked,
            "latency_class": str(asked["latency_class"]),
            "accuracy": str(asked["accuracy"]),
            "allowed_regions": sorted(asked["allowed_regions"]),
            "notes": list(asked["notes"]),
            "deadline_ms": deadline_ms,
        }

    def routing(self) -> list[dict[str, Any]]:
        """Each stage with its decision and its attempts. The reasons of a decision are among those of the answer."""
        received = self.asked[_ASKED.index("received")]
        stages = []
        for number, (at, decision, attempts) in enumerate(self.stages):
            told = decision.to_dict()
            told.pop("reasons", None)
            stages.append(
                {
                    "stage": "escalation" if number else "first" if len(self.stages) > 1 else "route",
                    "at_ms": round((at - received) * 1e3, 3),
                    "decision": told,
                    "attempts": [attempt.to_dict() for attempt in attempts],
                }
            )
        return stages

    def came_to(self) -> dict[str, Any]:
        """What came of it."""
        if not isinstance(self.outcome, tuple):
            return dict(self.outcome)
        came_to = dict(zip(_CAME_TO, self.outcome, strict=True))
        stale, cached, tier = came_to.pop("stale"), came_to.pop("cached"), came_to.pop("origin_tier")
        parts = ("queue", "link", "compute", "total")
        times = {f"{part}_ms": round(came_to.pop(f"{part}_s") * 1e3, 3) for part in parts}
        return {
            "status": "stale" if stale else "cached" if cached else "computed",
            "code": None,
            "message": None,
            "tier": tier.value,
            **came_to,
            **times,
            "age_s": round(came_to["age_s"], 3),
        }

    def to_dict(self) -> dict[str, Any]:
        """The answer of `/explain`."""
        return {
            "request_id": self.asked[0],
            "at": self.at,
            "request": self.request(),
            "stages": self.routing(),
            "outcome": self.came_to(),
            "reasons": list(self.reasons),
        }


class Recorder(Protocol):
    """Takes every story, and the request with its tensors; must not block."""

    def put(self, request: InferenceRequest, story: Story) -> None: ...


class Stories:
    """The stories of requests in flight, and of the last `keep` that ended. Costs about a microsecond for each step."""

    def __init__(self, keep: int, clock: Clock, recorder: Recorder | None = None) -> None:
        self._keep = keep
        self._clock = clock
        self._recorder = recorder
        self._running: dict[tuple[str, float], list[Stage]] = {}
        self._ended: OrderedDict[str, Story] = OrderedDict()

    def begin(self, request: InferenceRequest) -> None:
        """Every request that begins also ends."""
        self._running[request.id, request.received] = []

    def routed(self, request: InferenceRequest, decision: Explained, attempts: Sequence[Attempt]) -> None:
        """Routing decided. `attempts` may be filled later. What does not belong to a request in flight is not kept."""
        stages = self._running.get((request.id, request.received))
        if stages is not None:
            stages.append(Stage(self._clock.monotonic(), decision, attempts))

    def ended(self, request: InferenceRequest, outcome: InferenceResult | InferenceError) -> Story | None:
        """The request was answered or refused. Its story, if it had begun."""
        stages = self._running.pop((request.id, request.received), None)
        if stages is None:
            return None
        passed_s = self._clock.monotonic() - request.received
        told = _came_to(outcome) if isinstance(outcome, InferenceResult) else _refused(outcome, passed_s)
        story = Story(self._clock.wall() - passed_s, _asked(request), stages, told, outcome.reasons)
        if self._keep:
            self._ended[request.id] = story
            self._ended.move_to_end(request.id)
            if len(self._ended) > self._keep:
                self._ended.popitem(last=False)
        if self._recorder is not None:
            self._recorder.put(request, story)
        return story

    def abandoned(self, request: InferenceRequest) -> None:
        """The request was cancelled."""
        self._running.pop((request.id, request.received), None)

    def explain(self, request_id: str) -> dict[str, Any] | None:
        """How a request was decided; None if it is not among those that are remembered."""
        story = self._ended.get(request_id)
        return None if story is None else story.to_dict()


def _refused(error: InferenceError, passed_s: float) -> dict[str, Any]:
    return {
        "status": "refused",
        "code": error.code,
        "message": error.message,
        "tier": None,
        "target": None,
        "variant": None,
        "label": None,
        "confidence": None,
        "queue_ms": None,
        "link_ms": None,
        "compute_ms": None,
        "total_ms": round(passed_s * 1e3, 3),
        "deadline_met": False,
        "cost_usd": error.cost_usd,
        "escalation": "",
        "age_s": 0.0,
    }
