"""What the daemon counts, and how Prometheus sees it.

The request path adds to plain numbers on the event loop (about a microsecond for each request); `prometheus_client`
families are made of them when somebody scrapes. State that other parts hold already (breakers, queues, load) is not
copied on change: it is read from `status()` at scrape time. Labels are names from the configuration and members of
enumerations, never a request, a producer or a model's input; each table is bounded all the same.
"""

from __future__ import annotations

import logging
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

from agent import __version__
from agent.core.errors import DeadlineExceeded, InferenceError, TargetBusy
from agent.core.types import Attempt, InferenceResult, LatencyClass
from agent.telemetry.quality import Quality, drift_families

CONTENT_TYPE = CONTENT_TYPE_LATEST

BUCKETS_S = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.035, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1.0, 2.0, 5.0)
"""Upper bounds of the latency histogram. The class limits 10, 100 and 500 ms are among them."""

MAX_SERIES = 1024
"""Label combinations in any one table; further ones are counted as `other`."""
MAX_READINGS = 256
"""Numbers taken from one part of the status."""

_OTHER = "other"
_BREAKER_STATES = ("closed", "half_open", "open")
_log = logging.getLogger(__name__)

_Key = tuple[str, ...]


class _Answers:
    """What is counted for one (class, tier, target, status)."""

    __slots__ = ("buckets", "count", "met", "other_input", "seconds")

    def __init__(self) -> None:
        self.count = 0
        self.met = 0
        self.other_input = 0
        self.seconds = 0.0
        self.buckets = [0] * (len(BUCKETS_S) + 1)


class Metrics:
    """Counts requests. Every `started()` is followed by exactly one of `answered`, `refused` and `abandoned`.

    Not thread-safe: called on the event loop only.
    """

    def __init__(self) -> None:
        self.active = 0
        self._started = 0
        self._answers: dict[_Key, _Answers] = {}
        self._refusals: dict[_Key, int] = {}
        self._attempts: dict[_Key, int] = {}
        self._hedges: dict[_Key, int] = {}
        self._costs: dict[_Key, float] = {}
        self._malformed: dict[_Key, int] = {}
        self._abandoned = 0
        self.quality = Quality()
        self._status: Callable[[], Mapping[str, Any]] | None = None
        self._status_failures = 0
        self.registry = CollectorRegistry(auto_describe=False)
        self.registry.register(_Families(self._families))
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)

    def started(self) -> None:
        """A request was admitted."""
        self._started += 1
        self.active += 1

    def answered(self, result: InferenceResult) -> None:
        """It was answered, from wherever."""
        self.active -= 1
        status = "stale" if result.stale else "cached" if result.cached else "computed"
        key = (result.latency_class, result.tier, result.target, status)
        answers = self._answers.get(key) or self._answers_for(key)
        answers.count += 1
        answers.seconds += result.total_s
        answers.buckets[bisect_left(BUCKETS_S, result.total_s)] += 1
        if result.deadline_met:
            answers.met += 1
        if not result.same_input:
            answers.other_input += 1
        self._tried(result.attempts, result.cost_usd)

    def refused(self, error: InferenceError, latency_class: LatencyClass) -> None:
        """It was refused after it had been admitted."""
        self.active -= 1
        _count(self._refusals, (error.code, latency_class))
        self._tried(error.attempts, error.cost_usd)

    def abandoned(self) -> None:
        """It was cancelled before there was an answer or a refusal: the daemon is stopping."""
        self.active -= 1
        self._abandoned += 1

    def malformed(self, door: str, code: str = "undecodable") -> None:
        """Something at a door did not become a request: `undecodable`, or the code of the refusal."""
        _count(self._malformed, (door, code))

    def watch(self, status: Callable[[], Mapping[str, Any]]) -> None:
        """Read gauges from this at each scrape."""
        self._status = status

    def counters(self) -> dict[str, Any]:
        """Totals since the start, for `/status`: `answered` is `cached` plus all of `by_tier`."""
        totals = {"computed": 0, "cached": 0, "stale": 0}
        by_tier: dict[str, int] = {}
        met = 0
        for (_, tier, _, status), answers in self._answers.items():
            totals[status] = totals.get(status, 0) + answers.count
            if status != "cached":
                by_tier[tier] = by_tier.get(tier, 0) + answers.count
            met += answers.met
        return {
            "requests": self._started,
            "active": self.active,
            "answered": sum(totals.values()),
            "refused": sum(self._refusals.values()),
            "malformed": sum(self._malformed.values()),
            "stale": totals["stale"],
            "cached": totals["cached"],
            "by_tier": {str(tier): count for tier, count in by_tier.items()},
            "deadline_hits": met,
            "cost_usd": round(sum(self._costs.values()), 6),
        }

    def render(self) -> bytes:
        """The Prometheus text format, to be served as `CONTENT_TYPE`."""
        return generate_latest(self.registry)

    def _tried(self, attempts: Sequence[Attempt], cost_usd: float) -> None:
        for attempt in attempts:
            _count(self._attempts, (attempt.target, attempt.outcome))
            if attempt.hedge:
                _count(self._hedges, (attempt.target, attempt.outcome))
        if cost_usd:
            paid = [a.target for a in attempts if a.tier.is_cloud and a.outcome != TargetBusy.code] or [_OTHER]
            for lane in paid:  # an attempt does not say its price: several lanes in one request share the sum
                _count(self._costs, (lane,), cost_usd / len(paid))

    def _answers_for(self, key: _Key) -> _Answers:
        if len(self._answers) >= MAX_SERIES:
            key = (key[0], key[1], _OTHER, key[3])
        return self._answers.setdefault(key, _Answers())

    def _families(self) -> Iterator[Metric]:
        yield from self._request_families()
        yield _counter(
            "malformed", "Messages that did not become a request.", ("door", "code"), self._malformed.items()
        )
        yield _counter("attempts", "Tries on a target, by outcome.", ("target", "outcome"), self._attempts.items())
        yield _counter(
            "hedges",
            "Tries begun while another was late, by outcome; they are among the tries.",
            ("target", "outcome"),
            self._hedges.items(),
        )
        yield GaugeMetricFamily("edge_agent_active_requests", "Admitted and not yet finished.", self.active)
        yield _gauge("build_info", "Always 1.", ("version",), [((__version__,), 1)])
        status: Mapping[str, Any] = {}
        if self._status is not None:
            try:
                status = self._status()
            except Exception:  # somebody else's part is broken: the counters are worth serving all the same
                self._status_failures += 1
                _log.exception("status could not be read for a scrape")
        yield CounterMetricFamily(
            "edge_agent_status_failures", "Scrapes that could not read the state.", self._status_failures
        )
        yield from _state_families(status)
        yield from self.quality.families()
        yield from drift_families(_mapping(status, "models"))

    def _request_families(self) -> Iterator[Metric]:
        requests: dict[_Key, float] = {}
        deadlines: dict[_Key, float] = {}
        cache = {("fresh",): 0, ("stale",): 0, ("miss",): 0}
        stale = {("true",): 0, ("false",): 0}
        durations: dict[_Key, _Answers] = {}
        for (latency_class, tier, target, status), answers in self._answers.items():
            _count(requests, (tier, target, status), answers.count)
            _count(deadlines, (latency_class, "met"), answers.met)
            _count(deadlines, (latency_class, "missed"), answers.count - answers.met)
            cache[({"cached": "fresh", "stale": "stale"}.get(status, "miss"),)] += answers.count
            if status == "stale":
                stale[("false",)] += answers.other_input
                stale[("true",)] += answers.count - answers.other_input
            total = durations.setdefault((latency_class, tier), _Answers())
            total.seconds += answers.seconds
            total.buckets = [a + b for a, b in zip(total.buckets, answers.buckets, strict=True)]
        for (code, latency_class), count in self._refusals.items():
            _count(requests, ("none", "none", code), count)
            if code == DeadlineExceeded.code:
                _count(deadlines, (latency_class, "missed"), count)
        if self._abandoned:
            requests["none", "none", "abandoned"] = self._abandoned
        yield _counter(
            "requests", "Requests finished, by where and how.", ("tier", "target", "status"), requests.items()
        )
        yield _histogram(durations)
        yield _counter(
            "refusals", "Requests without an answer, by error code.", ("code", "latency_class"), self._refusals.items()
        )
        yield _counter("deadlines", "Deadlines met and missed.", ("latency_class", "result"), deadlines.items())
        yield _counter("cost_usd", "What cloud lanes charged.", ("lane",), self._costs.items())
        yield _counter("cache_results", "Answers by what the cache gave.", ("result",), cache.items())
        yield _counter(
            "stale_answers",
            "Stale answers served; same_input=false: a producer's last known answer.",
            ("same_input",),
            stale.items(),
        )


class _Families(Collector):
    def __init__(self, families: Callable[[], Iterable[Metric]]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        return self._families()


def _count(table: dict[_Key, Any], key: _Key, amount: float = 1) -> None:
    if key in table:
        table[key] += amount
    elif len(table) < MAX_SERIES:
        table[key] = amount
    else:
        other = (_OTHER,) * len(key)
        table[other] = table.get(other, 0) + amount


def _counter(name: str, text: str, labels: Sequence[str], series: Iterable[tuple[_Key, float]]) -> Metric:
    family = CounterMetricFamily(f"edge_agent_{name}", text, labels=labels)
    for key, value in series:
        family.add_metric([str(part) for part in key], value)
    return family


def _gauge(name: str, text: str, labels: Sequence[str], series: Iterable[tuple[_Key, float]]) -> Metric:
    family = GaugeMetricFamily(f"edge_agent_{name}", text, labels=labels)
    for key, value in series:
        family.add_metric([str(part) for part in key], value)
    return family


def _histogram(durations: Mapping[_Key, _Answers]) -> Metric:
    family = HistogramMetricFamily(
        "edge_agent_request_duration_seconds", "From receipt to answer.", labels=("latency_class", "tier")
    )
    bounds = [*(str(bound) for bound in BUCKETS_S), "+Inf"]
    for key, total in durations.items():
        cumulated = 0
        buckets = []
        for bound, count in zip(bounds, total.buckets, strict=True):
            cumulated += count
            buckets.append((bound, cumulated))
        family.add_metric([str(part) for part in key], buckets, total.seconds)
    return family


def _state_families(status: Mapping[str, Any]) -> Iterator[Metric]:
    """Gauges from the shape of `/status`. What is missing or of another type is left out, never an error."""
    if "ready" in status:
        yield _gauge("ready", "1: some target can be asked.", (), [((), float(bool(status["ready"])))])
    targets = [
        target for target in _list(status, "targets")[:MAX_READINGS] if isinstance(target, Mapping) and "name" in target
    ]
    for key, text in (
        ("available", "1: the target can be asked now."),
        ("in_flight", "Attempts running on the target."),
        ("max_concurrent", "Attempts the target takes at once."),
        ("limit", "Attempts the target is given at once now."),
    ):
        yield _gauge(
            f"target_{key}", text, ("target", "tier"), [(_of(t), n) for t in targets for n in _number(t.get(key))]
        )
    yield _gauge("breaker_state", "1 for the state the breaker is in.", ("target", "state"), _breakers(targets))
    yield _gauge(
        "target_service_seconds",
        "Recent service time of the target.",
        ("target", "quantile"),
        [
            ((str(t["name"]), quantile), n / 1e3)
            for t in targets
            for key, quantile in (("p50", "0.5"), ("p95", "0.95"))
            for n in _number(_mapping(t, "service_ms").get(key))
        ],
    )
    yield _gauge(
        "target_reading",
        "Numbers a target tells about itself: link counters, queues, windows.",
        ("target", "reading"),
        [((str(t["name"]), name), n) for t in targets for name, n in _numbers(_mapping(t, "detail"))],
    )
    budgets = [entry for entry in _list(status, "budgets")[:MAX_READINGS] if isinstance(entry, Mapping)]
    for name, key, text in (
        ("remaining", "left", "What a budget leaves: USD, bytes or requests. lane=all: of all lanes together."),
        ("limit", "limit", "What the budget is."),
    ):
        yield _gauge(
            f"budget_{name}",
            text,
            ("lane", "unit", "window"),
            [
                ((str(entry.get("lane") or "all"), str(entry.get("unit")), str(entry.get("window"))), n)
                for entry in budgets
                for n in _number(entry.get(key))
            ],
        )
    for section in ("cache", "outbox", "doors", "load", "overload", "security", "settings"):
        readings = [((name,), n) for name, n in _numbers(_mapping(status, section))]
        yield _gauge(section, f"Numbers of the section `{section}` of /status.", ("reading",), readings)
    yield _gauge(
        "certificate_days",
        "Days until a certificate ends; negative once it has.",
        ("certificate",),
        [
            ((str(one.get("name")),), n)
            for one in _list(status, "certificates")[:MAX_READINGS]
            if isinstance(one, Mapping)
            for n in _number(one.get("days_left"))
        ],
    )
    components = [one for one in _list(status, "components")[:MAX_READINGS] if isinstance(one, Mapping)]
    yield _gauge(
        "component_state",
        "1 for the state that the component is in.",
        ("component", "state"),
        [
            ((str(one.get("name")), state), float(one.get("state") == state))
            for one in components
            for state in ("starting", "up", "degraded", "down")
        ],
    )
    yield _gauge(
        "component_since_seconds",
        "Unix time since which the component is in its state.",
        ("component",),
        [((str(one.get("name")),), n) for one in components for n in _number(one.get("since"))],
    )
    yield _gauge(
        "component_up",
        "1: the component's state is up.",
        ("component",),
        [((str(one.get("name")),), float(one.get("state") == "up")) for one in components],
    )


def _of(target: Mapping[str, Any]) -> _Key:
    return str(target["name"]), str(target.get("tier", ""))


def _breakers(targets: Iterable[Mapping[str, Any]]) -> Iterator[tuple[_Key, float]]:
    for target in targets:
        state = str(_mapping(target, "breaker").get("state", "")).replace("-", "_")
        if state in _BREAKER_STATES:
            for known in _BREAKER_STATES:
                yield (str(target["name"]), known), float(known == state)


def _mapping(parent: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = parent.get(key)
    return value if isinstance(value, Mapping) else {}


def _list(parent: Mapping[str, Any], key: str) -> Sequence[Any]:
    value = parent.get(key)
    return value if isinstance(value, list | tuple) else ()


def _number(value: Any) -> tuple[float, ...]:
    return (float(value),) if isinstance(value, bool | int | float) else ()


def _numbers(section: Mapping[str, Any], prefix: str = "", depth: int = 0) -> list[tuple[str, float]]:
    """Every number below `section` by its dotted path, at most `MAX_READINGS`, at most five levels down. Items of a
    list are named by their `port`."""
    found: list[tuple[str, float]] = []
    for key, value in section.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            if depth < 4:
                found += _numbers(value, f"{name}.", depth + 1)
        elif isinstance(value, list | tuple):
            parts = {
                str(part.get("port", index)): part for index, part in enumerate(value) if isinstance(part, Mapping)
            }
            found += _numbers({name: parts}, prefix="", depth=depth + 1) if parts else []
        else:
            found += [(name, number) for number in _number(value)]
        if len(found) >= MAX_READINGS:
            return found[:MAX_READINGS]
    return found
