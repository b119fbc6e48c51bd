"""Asks some of the edge's answers again of the cloud, in the background, to see whether the edge is still right.

Every fresh edge answer of a request that permits it is drawn with the same chance, sure or not. A drawn one takes a
place in the budget and its turn in the queue whether or not the cloud has still to be asked (what the cascade escalated
is answered already), so that what is dropped or not affordable is not mostly one kind, and the samples are a fair
picture of the edge's answers. Real requests come first: one sample at a time, only while at most half of a lane is
taken, and given up as soon as a request finds a lane full.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from agent.config import ShadowSection
from agent.core.clock import Clock
from agent.core.types import AccuracyMode, InferenceRequest, LatencyClass
from agent.registry.accuracy import Accuracies
from agent.registry.catalog import Family, Variant
from agent.registry.confidence import classified
from agent.routing.cascade import Answered
from agent.routing.router import NoAnswer, Router
from agent.targets.base import TargetTraits

log = logging.getLogger(__name__)

HOUR_S, DAY_S = 3600.0, 86_400.0
PAUSE_S = 0.2
"""Before looking again whether a lane has room."""
LOWEST = 1


@dataclass(slots=True)
class _Spent:
    """An allowance that comes back steadily: at most `limit` at once, and as much again in each `period_s`."""

    limit: float
    period_s: float
    left: float
    at: float

    def take(self, amount: float, now: float) -> bool:
        self.left = min(self.limit, self.left + max(0.0, now - self.at) * self.limit / self.period_s)
        self.at = now
        if amount > self.left:
            return False
        self.left -= amount
        return True


@dataclass(frozen=True, slots=True)
class _Sample:
    request: InferenceRequest
    family: Family
    variant: Variant
    reference: Variant
    label: str
    known: str | None
    """What the reference has answered already, for the request itself."""


class Shadow:
    """`random_` gives numbers in [0, 1)."""

    def __init__(
        self,
        router: Router,
        accuracies: Accuracies,
        settings: ShadowSection,
        clock: Clock,
        random_: Callable[[], float] = random.random,
    ) -> None:
        self._router = router
        self._accuracies = accuracies
        self._settings = settings
        self._clock = clock
        self._random = random_
        now = clock.monotonic()
        self._draws = _Spent(settings.per_hour, HOUR_S, settings.per_hour, now)
        self._money = _Spent(settings.usd_per_day, DAY_S, settings.usd_per_day, now)
        self._waiting: deque[_Sample] = deque()
        self._arrived = asyncio.Event()
        self._asking: asyncio.Task[None] | None = None
        self.counters = dict.fromkeys(
            ("drawn", "free", "asked", "answered", "failed", "not_drawn", "dropped", "gave_way"), 0
        )
        self.cost_usd = 0.0

    def consider(self, request: InferenceRequest, family: Family, answered: Answered) -> None:
        """Perhaps draw this answer. Never waits, never raises."""
        variant = answered.first_variant
        calibration = variant.calibration
        if not self._settings.rate or not request.shadow or calibration is None or calibration.cascade is None:
            return
        if self._random() >= self._settings.rate:
            return
        now = self._clock.monotonic()
        if not self._affordable(now) or not self._draws.take(1, now):
            self.counters["not_drawn"] += 1
            return
        self.counters["drawn"] += 1
        if len(self._waiting) >= self._settings.max_queued:
            self.counters["dropped"] += 1
            return
        reference = family.variants[calibration.cascade.reference]
        known = answered.classified.label if answered.routed.variant is reference else None
        self._waiting.append(_Sample(request, family, variant, reference, answered.first.label, known))
        self._arrived.set()

    def _room(self) -> bool:
        return any(_half_free(in_flight, limit) for _, in_flight, limit in self._router.lanes(LatencyClass.BATCH))

    def _affordable(self, now: float) -> bool:
        self._money.take(0.0, now)
        return any(traits.cost_usd <= self._money.left for traits, _, _ in self._router.lanes(LatencyClass.BATCH))

    async def make_way(self, latency_class: LatencyClass) -> None:
        """Give up the sample that is being asked if it takes a place that a request of that class may need."""
        task = self._asking
        if task is None or all(in_flight < limit for _, in_flight, limit in self._router.lanes(latency_class)):
            return
        self.counters["gave_way"] += 1
        task.cancel()
        await asyncio.wait([task])

    async def work(self) -> None:
        """Ask what was drawn, one after the other, until cancelled."""
        while True:
            await self.next()

    async def next(self) -> None:
        """Wait for a sample, and for room where it has still to be asked, and observe it."""
        await self._turn()
        sample = self._waiting.popleft()
        if sample.known is None:
            await self._asked(sample)
        else:
            self.counters["free"] += 1
            self._accuracies.observe(sample.variant, sample.known == sample.label)
        pending = self._accuracies.pending()
        if pending is not None:
            await asyncio.to_thread(self._accuracies.write, pending)

    async def _turn(self) -> None:
        while True:
            if not self._waiting:
                self._arrived.clear()
                await self._arrived.wait()
            elif self._waiting[0].known is not None or self._room():
                return
            else:
                await asyncio.sleep(PAUSE_S)

    async def _asked(self, sample: _Sample) -> None:
        self._asking = asyncio.create_task(self._ask(sample), name="shadow")
        try:
            await asyncio.wait([self._asking])
        finally:
            self._asking.cancel()
            self._asking = None

    async def _ask(self, sample: _Sample) -> None:
        now = self._clock.monotonic()
        self._money.take(0.0, now)
        free = {
            traits.name: traits.cost_usd
            for traits, in_flight, limit in self._router.lanes(LatencyClass.BATCH)
            if _half_free(in_flight, limit) and traits.cost_usd <= self._money.left
        }

        def among(traits: TargetTraits, variant: Variant) -> bool:
            return traits.name in free and variant.id == sample.reference.id

        question = replace(
            sample.request,
            id=f"{sample.request.id[:100]}-shadow",
            latency_class=LatencyClass.BATCH,
            received=now,
            deadline=now + self._settings.timeout_ms / 1e3,
            priority=LOWEST,
            max_retries=0,
            timeout_ms=None,
            variant=sample.reference.id,
            idempotency_key=None,
            accuracy=AccuracyMode.HIGH,
            explain=False,
        )
        self.counters["asked"] += 1
        try:
            routed = await self._router.run(question, sample.family, among=among, further=True)
        except asyncio.CancelledError:
            self._pay(max(free.values(), default=0.0))  # the lane may charge for it all the same
            raise
        except NoAnswer as failure:
            self._pay(failure.cost_usd)
            self.counters["failed"] += 1
            return
        except Exception:
            log.exception("a shadow request failed inside the daemon")
            self.counters["failed"] += 1
            return
        self._pay(routed.cost_usd)
        self.counters["answered"] += 1
        found = classified(routed.answer.outputs, sample.family, routed.variant)
        self._accuracies.observe(sample.variant, found.label == sample.label)

    def _pay(self, cost_usd: float) -> None:
        self.cost_usd += cost_usd
        self._money.left -= cost_usd

    def status(self) -> dict[str, Any]:
        """For `/status`."""
        return {"rate": self._settings.rate, "waiting": len(self._waiting), "cost_usd": round(self.cost_usd, 6)} | (
            self.counters
        )


def _half_free(in_flight: int, limit: int) -> bool:
    return 2 * (in_flight + 1) <= max(2, limit)
