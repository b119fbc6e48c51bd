"""The whole story of one request: admit, look in the cache, rank and run, remember, record."""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import replace

from agent.config import RoutingSection
from agent.core.clock import Clock
from agent.core.errors import DeadlineExceeded, InferenceError, Overloaded, Unavailable
from agent.core.types import Attempt, InferenceRequest, InferenceResult, Tier
from agent.registry.catalog import Catalog, Family
from agent.registry.tensors import classify
from agent.routing.router import NoAnswer, Routed, Router
from agent.store.cache import Freshness, Hit, ResultCache, cache_key
from agent.telemetry.metrics import Metrics

MAX_REMEMBERED_KEYS = 4096
"""Idempotency keys whose answers are kept; the least recent is forgotten first."""
MAX_RECENT = 50
"""Answers kept for the status page."""
RETRY_AFTER_S = 1.0
"""What a caller is told who found every place taken."""


class Pipeline:
    """Answers requests. One for each daemon; every door calls `infer`."""

    def __init__(
        self,
        catalog: Catalog,
        router: Router,
        cache: ResultCache,
        metrics: Metrics,
        clock: Clock,
        settings: RoutingSection,
    ) -> None:
        self._catalog = catalog
        self._router = router
        self._cache = cache
        self._metrics = metrics
        self._clock = clock
        self._max_in_flight = settings.max_in_flight
        self._by_key: OrderedDict[tuple[str, str, str], asyncio.Future[InferenceResult]] = OrderedDict()
        self._idle = asyncio.Event()
        self._idle.set()
        self.in_flight = 0
        self.recent: deque[tuple[float, InferenceResult | InferenceError]] = deque(maxlen=MAX_RECENT)
        self.listeners: list[Callable[[InferenceRequest, InferenceResult | InferenceError], None]] = []

    async def infer(self, request: InferenceRequest) -> InferenceResult:
        """Answer by the request's deadline, once for each idempotency key. Raises `InferenceError`."""
        if request.idempotency_key is None:
            return await self._recorded(request)
        key = (request.producer, request.model, request.idempotency_key)
        known = self._by_key.get(key)
        if known is not None and not (known.done() and (known.cancelled() or known.exception())):
            self._by_key.move_to_end(key)
            result = await asyncio.shield(known)
            return replace(
                result, request_id=request.id, reasons=("answered before under the same key", *result.reasons)
            )
        self._by_key[key] = future = asyncio.get_running_loop().create_future()
        future.add_done_callback(_retrieve)
        if len(self._by_key) > MAX_REMEMBERED_KEYS:
            self._by_key.popitem(last=False)
        try:
            result = await self._recorded(request)
        except BaseException as error:
            future.set_exception(error) if isinstance(error, InferenceError) else future.cancel()
            raise
        future.set_result(result)
        return result

    async def drained(self, timeout_s: float) -> bool:
        """Wait until nothing is in flight, at most `timeout_s`. False if something still is."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()
        except TimeoutError:
            return False
        return True

    async def _recorded(self, request: InferenceRequest) -> InferenceResult:
        """Count it, answer it, record what came of it."""
        self._metrics.started()
        self.in_flight += 1
        self._idle.clear()
        try:
            result = await self._answer(request)
        except InferenceError as error:
            error.request_id = request.id
            self._metrics.refused(error, request.latency_class)
            self._record(request, error)
            raise
        except BaseException:
            self._metrics.abandoned()
            raise
        finally:
            self.in_flight -= 1
            if self.in_flight == 0:
                self._idle.set()
        self._metrics.answered(result)
        self._record(request, result)
        return result

    async def _answer(self, request: InferenceRequest) -> InferenceResult:
        """Fresh from the cache, else from a target, else stale from the cache."""
        family = self._catalog.family(request.model)
        key = cache_key(request.model, request.variant, request.inputs)
        hit = self._cache.get(key)
        if hit is not None and hit.state is Freshness.FRESH and request.use_cache:
            return self._remembered(request, hit, ("cache: the same input was answered before",))
        if self.in_flight > self._max_in_flight:
            refusal = Overloaded(
                f"{self._max_in_flight} requests are in flight (routing.max_in_flight)", retry_after_s=RETRY_AFTER_S
            )
            return self._fallback(request, hit, refusal, (), ("daemon: every place is taken",))
        try:
            routed = await self._router.run(request, family)
        except NoAnswer as failure:
            return self._fallback(request, hit, _refusal(failure), failure.attempts, failure.reasons, failure.cost_usd)
        result = self._fresh(request, family, routed)
        self._cache.put(key, request.producer, result)
        return result

    def _fresh(self, request: InferenceRequest, family: Family, routed: Routed) -> InferenceResult:
        answer, traits, variant = routed.answer, routed.traits, routed.variant
        label, confidence = classify(answer.outputs, family)
        now = self._clock.monotonic()
        return InferenceResult(
            request_id=request.id,
            model=request.model,
            variant=variant.id,
            model_sha256=variant.sha256,
            outputs=answer.outputs,
            label=label,
            confidence=confidence,
            tier=traits.tier,
            origin_tier=traits.tier,
            target=traits.name,
            provider=answer.provider,
            latency_class=request.latency_class,
            queue_s=answer.queue_s,
            link_s=answer.link_s,
            compute_s=answer.compute_s,
            total_s=now - request.received,
            deadline_met=now <= request.deadline,
            cost_usd=routed.cost_usd,
            cached=False,
            stale=False,
            age_s=0.0,
            attempts=routed.attempts,
            reasons=routed.reasons,
        )

    def _fallback(
        self,
        request: InferenceRequest,
        hit: Hit | None,
        refusal: InferenceError,
        attempts: tuple[Attempt, ...],
        reasons: tuple[str, ...],
        cost_usd: float = 0.0,
    ) -> InferenceResult:
        """The same input's cached answer, else the producer's last one, labelled; else the refusal, raised."""
        why = "cache: nothing could be asked; an earlier answer to the same input"
        same_input = True
        if hit is None:
            hit = self._cache.last_known(request.producer, request.model, request.variant)
            why = f"cache: nothing could be asked; the last known answer of producer {request.producer}"
            same_input = False
        if hit is None:
            refusal.attempts, refusal.reasons = attempts, (*reasons, "cache: no earlier answer")
            refusal.cost_usd = cost_usd
            raise refusal
        answer = self._remembered(request, hit, (*reasons, why))
        return replace(
            answer, tier=Tier.FALLBACK, stale=True, same_input=same_input, attempts=attempts, cost_usd=cost_usd
        )

    def _remembered(self, request: InferenceRequest, hit: Hit, reasons: tuple[str, ...]) -> InferenceResult:
        """A fresh cached answer to the same input."""
        entry = hit.entry
        now = self._clock.monotonic()
        return InferenceResult(
            request_id=request.id,
            model=request.model,
            variant=entry.variant,
            model_sha256=entry.model_sha256,
            outputs=entry.outputs,
            label=entry.label,
            confidence=entry.confidence,
            tier=entry.tier,
            origin_tier=entry.tier,
            target="cache",
            provider=entry.provider,
            latency_class=request.latency_class,
            queue_s=0.0,
            link_s=0.0,
            compute_s=0.0,
            total_s=now - request.received,
            deadline_met=now <= request.deadline,
            cost_usd=0.0,
            cached=True,
            stale=False,
            age_s=hit.age_s,
            attempts=(),
            reasons=reasons,
        )

    def _record(self, request: InferenceRequest, outcome: InferenceResult | InferenceError) -> None:
        self.recent.append((self._clock.wall(), outcome))
        for listener in self.listeners:
            listener(request, outcome)


def _retrieve(future: asyncio.Future[InferenceResult]) -> None:
    """Nobody may be waiting for a duplicate's answer: its error is not to be reported as unseen."""
    if not future.cancelled():
        future.exception()


def _refusal(failure: NoAnswer) -> InferenceError:
    if failure.busy:
        return Overloaded("every target that could answer is busy", retry_after_s=RETRY_AFTER_S)
    if failure.late:
        return DeadlineExceeded("no target could answer by the deadline, and no earlier answer is known")
    return Unavailable("no target could answer, and no earlier answer is known", retry_after_s=RETRY_AFTER_S)
