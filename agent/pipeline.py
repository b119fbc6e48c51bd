"""The whole story of one request: admit, look in the cache, rank and run, remember, record."""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict, deque
from collections.abc import Callable
from copy import copy
from dataclasses import dataclass

from agent.config import AccuracySection, RoutingSection
from agent.core.clock import Clock
from agent.core.errors import DeadlineExceeded, InferenceError, InvalidRequest, Overloaded, Unavailable
from agent.core.types import AccuracyMode, Attempt, InferenceRequest, InferenceResult, Tier
from agent.registry.catalog import Catalog, Family
from agent.registry.confidence import Classified, classified
from agent.routing.attempt import AccuracyOf
from agent.routing.cascade import Answered, Cascade
from agent.routing.queue import RequestQueue
from agent.routing.router import NoAnswer, Router, of_the_catalogue
from agent.routing.shadow import Shadow
from agent.store.cache import CacheKey, Freshness, Hit, ResultCache, cache_key
from agent.telemetry.metrics import Metrics
from agent.telemetry.story import Stories

log = logging.getLogger(__name__)

MAX_REMEMBERED_KEYS = 4096
"""Idempotency keys whose answers are kept; the least recent is forgotten first."""
MAX_RECENT = 50
"""Answers kept for the status page."""
RETRY_AFTER_S = 1.0
"""What a caller is told who found every place taken."""


@dataclass(slots=True)
class _Kept:
    """What was asked under an idempotency key, and its answer, perhaps still to come."""

    question: tuple[CacheKey, AccuracyMode]
    answer: asyncio.Future[InferenceResult]
    answered: float = 0.0

    def void(self) -> bool:
        """It ended without an answer, so the same may be asked again."""
        return self.answer.done() and (self.answer.cancelled() or self.answer.exception() is not None)


class Memory:
    """What one pipeline leaves to the next after a reload: answers under idempotency keys, and the latest of all."""

    def __init__(self) -> None:
        self.by_key: OrderedDict[tuple[str, str, str], _Kept] = OrderedDict()
        self.recent: deque[tuple[float, InferenceResult | InferenceError]] = deque(maxlen=MAX_RECENT)


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
        stories: Stories | None = None,
        *,
        accuracy: AccuracySection | None = None,
        accuracy_of: AccuracyOf = of_the_catalogue,
        shadow: Shadow | None = None,
        memory: Memory | None = None,
    ) -> None:
        self._catalog = catalog
        self._router = router
        self._cascade = Cascade(router, accuracy or AccuracySection(), clock, accuracy_of)
        self._shadow = shadow
        self._cache = cache
        self._metrics = metrics
        self._clock = clock
        self._stories = stories or Stories(0, clock)
        self.queue = RequestQueue(settings.overload, settings.max_in_flight, clock)
        router.on_free(self.queue.room)
        memory = memory or Memory()
        self._by_key, self.recent = memory.by_key, memory.recent
        self._idle = asyncio.Event()
        self._idle.set()
        self.in_flight = 0
        self.listeners: list[Callable[[InferenceRequest, InferenceResult | InferenceError], None]] = []

    async def infer(self, request: InferenceRequest) -> InferenceResult:
        """Answer by the request's deadline, once for each idempotency key. Raises `InferenceError` and nothing else."""
        if request.idempotency_key is None:
            return await self._recorded(request)
        key = (request.producer, request.model, request.idempotency_key)
        question = cache_key(request.model, request.variant, request.inputs), request.accuracy
        while (known := self._by_key.get(key)) is not None and not known.void():
            self._by_key.move_to_end(key)
            again = await self._again(request, question, known)
            if again is not None:
                return again
        self._by_key[key] = kept = _Kept(question, asyncio.get_running_loop().create_future())
        self._by_key.move_to_end(key)
        if len(self._by_key) > MAX_REMEMBERED_KEYS:
            self._by_key.popitem(last=False)
        try:
            result = await self._recorded(request)
        except BaseException as error:
            if isinstance(error, InferenceError):
                kept.answer.set_exception(error)
                kept.answer.exception()  # nobody may be waiting: it is not to be reported as unseen
            else:
                kept.answer.cancel()
            raise
        kept.answered = self._clock.monotonic()
        kept.answer.set_result(result)
        return result

    async def _again(
        self, request: InferenceRequest, question: tuple[CacheKey, AccuracyMode], known: _Kept
    ) -> InferenceResult | None:
        """The answer to the same request under another id; None if whoever asked for it went away before it came."""
        if question != known.question:
            reuse = InvalidRequest("idempotency_key: was used for another question before", field="idempotency_key")
            raise _addressed(reuse, request)
        try:
            async with asyncio.timeout(max(0.0, request.deadline - self._clock.monotonic())):
                result = await asyncio.shield(known.answer)
        except InferenceError as error:
            raise _addressed(copy(error), request) from None
        except TimeoutError:
            late = DeadlineExceeded("the same request, asked before, is not answered yet")
            raise _addressed(late, request) from None
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if known.void() and task is not None and not task.cancelling():
                return None
            raise
        now = self._clock.monotonic()
        return result._replace(
            request_id=request.id,
            cached=True,
            age_s=result.age_s + now - known.answered,
            total_s=now - request.received,
            deadline_met=now <= request.deadline,
            cost_usd=0.0,
            reasons=("daemon: answered before under the same idempotency key", *result.reasons),
        )

    def observed(self, result: InferenceResult) -> None:
        """Count and show an answer that nobody asked for: a board's own."""
        self._metrics.started()
        self._metrics.answered(result)
        self.recent.append((self._clock.wall(), result))

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
        self._stories.begin(request)
        self.in_flight += 1
        self._idle.clear()
        try:
            result = await self._answer(request)
        except InferenceError as error:
            self._refused(request, error)
            raise
        except Exception as defect:
            log.exception("a request failed inside the daemon", extra={"request_id": request.id})
            internal = InferenceError(f"{type(defect).__name__} inside the daemon; its log says more")
            self._refused(request, internal)
            raise internal from defect
        except BaseException:
            self._metrics.abandoned()
            self._stories.abandoned(request)
            raise
        finally:
            self.in_flight -= 1
            if self.in_flight == 0:
                self._idle.set()
        self._metrics.answered(result)
        if request.out_of_range:
            self._metrics.quality.out_of_range(request.model)
        story = self._stories.ended(request, result)
        if request.explain and story is not None:
            result = result._replace(explanation=story.to_dict())
        self._record(request, result)
        return result

    async def _answer(self, request: InferenceRequest) -> InferenceResult:
        """Fresh from the cache, else from a target, else stale from the cache."""
        family = self._catalog.family(request.model)
        key = cache_key(request.model, request.variant, request.inputs)
        hit = self._cache.get(key)
        if hit is not None and hit.state is Freshness.FRESH and self._wanted(request, hit):
            known = self._known(family, hit)
            if known is not None and self._cascade.enough(request, family, family.variants[hit.entry.variant], known):
                why = "cache: the same input was answered before"
                return self._remembered(request, hit, known, (*request.notes, why))
        try:
            if self._shadow is not None:
                await self._shadow.make_way(request.latency_class)
            answered, waited_s = await self.queue.run(
                request,
                lambda: self._cascade.run(request, family),
                full=lambda: self._router.full(request, family),
                needed_s=lambda: self._router.quickest_s(request, family),
            )
        except Overloaded as refusal:
            hit = self._cache.again(key)
            return self._fallback(request, hit, refusal, (), (f"daemon: {refusal.message}",))
        except NoAnswer as failure:
            hit = self._cache.again(key)  # by now it is older, perhaps too old, or there is a newer one
            return self._fallback(request, hit, _refusal(failure), failure.attempts, failure.reasons, failure.cost_usd)
        result = self._fresh(request, answered, waited_s)
        self._cache.put(key, request.producer, result)
        self._watch(request, family, answered)
        return result

    def _watch(self, request: InferenceRequest, family: Family, answered: Answered) -> None:
        """How sure the model was, and whether to compare it with a better one. No fault of that costs the answer."""
        try:
            self._metrics.quality.observe(answered.first_variant, answered.first, answered.escalation)
            if self._shadow is not None:
                self._shadow.consider(request, family, answered)
        except Exception:
            log.exception("an answer could not be watched", extra={"request_id": request.id})

    @staticmethod
    def _wanted(request: InferenceRequest, hit: Hit) -> bool:
        """Whether a fresh answer will do: not where it is from a tier whose answer is to be improved on."""
        return request.use_cache and hit.entry.tier not in request.avoid

    def _known(self, family: Family, hit: Hit) -> Classified | None:
        """What a remembered answer says, by today's labels and calibration; None if its variant has changed since, or
        the catalogue calls its outputs by other names."""
        variant = family.variants.get(hit.entry.variant)
        if variant is None or variant.sha256 != hit.entry.model_sha256:
            return None
        outputs = hit.entry.outputs
        scores = outputs.get(family.outputs[0].name)
        if scores is None or scores.size != len(family.labels):
            return None
        return classified(outputs, family, variant)

    def _fresh(self, request: InferenceRequest, answered: Answered, waited_s: float) -> InferenceResult:
        routed = answered.routed
        answer, traits, variant = routed.answer, routed.traits, routed.variant
        now = self._clock.monotonic()
        return InferenceResult(
            request_id=request.id,
            model=request.model,
            variant=variant.id,
            model_sha256=variant.sha256,
            outputs=answer.outputs,
            label=answered.classified.label,
            confidence=answered.classified.confidence,
            tier=traits.tier,
            origin_tier=traits.tier,
            target=traits.name,
            provider=answer.provider,
            latency_class=request.latency_class,
            queue_s=waited_s + answer.queue_s,
            link_s=answer.link_s,
            compute_s=answer.compute_s,
            total_s=now - request.received,
            deadline_met=now <= request.deadline,
            cost_usd=routed.cost_usd,
            cached=False,
            stale=False,
            age_s=0.0,
            attempts=routed.attempts,
            reasons=request.notes + routed.reasons,
            calibrated=answered.classified.calibrated,
            escalation=answered.escalation,
            out_of_range=request.out_of_range,
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
        why = "cache: no target answered; an earlier answer to the same input"
        same_input = True
        if hit is None:
            hit = self._cache.last_known(request.producer, request.model, request.variant)
            why = f"cache: no target answered; the last known answer of producer {request.producer}"
            same_input = False
        if hit is None:
            refusal.attempts, refusal.reasons = attempts, (*reasons, "cache: no earlier answer")
            refusal.cost_usd = cost_usd
            raise refusal
        known = self._known(self._catalog.family(request.model), hit)
        answer = self._remembered(request, hit, known, (*request.notes, *reasons, why))
        return answer._replace(
            tier=Tier.FALLBACK,
            stale=True,
            same_input=same_input,
            confidence=answer.confidence if same_input else None,
            attempts=attempts,
            cost_usd=cost_usd,
        )

    def _remembered(
        self, request: InferenceRequest, hit: Hit, known: Classified | None, reasons: tuple[str, ...]
    ) -> InferenceResult:
        """A fresh cached answer to the same input."""
        entry = hit.entry
        now = self._clock.monotonic()
        return InferenceResult(
            request_id=request.id,
            model=request.model,
            variant=entry.variant,
            model_sha256=entry.model_sha256,
            outputs=entry.outputs,
            label=entry.label if known is None else known.label,
            confidence=entry.confidence if known is None else known.confidence,
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
            calibrated=known is not None and known.calibrated,
            out_of_range=request.out_of_range,
        )

    def _refused(self, request: InferenceRequest, error: InferenceError) -> None:
        self._metrics.refused(_addressed(error, request), request.latency_class)
        story = self._stories.ended(request, error)
        if request.explain and story is not None:
            error.explanation = story.to_dict()
        self._record(request, error)

    def _record(self, request: InferenceRequest, outcome: InferenceResult | InferenceError) -> None:
        self.recent.append((self._clock.wall(), outcome))
        for listener in self.listeners:
            try:
                listener(request, outcome)
            except Exception:  # who listens must not take the answer from who asked
                log.exception("a listener failed", extra={"request_id": request.id})


def _addressed(error: InferenceError, request: InferenceRequest) -> InferenceError:
    error.request_id = request.id
    return error


def _refusal(failure: NoAnswer) -> InferenceError:
    if failure.busy:
        return Overloaded("every target that could answer is busy", retry_after_s=RETRY_AFTER_S)
    if failure.late:
        return DeadlineExceeded("no target could answer by the deadline, and no earlier answer is known")
    return Unavailable("no target could answer, and no earlier answer is known", retry_after_s=RETRY_AFTER_S)
