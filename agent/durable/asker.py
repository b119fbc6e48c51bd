"""Has durable requests answered: in order for each producer, several producers at once, again until they are too old.

A request stays on the disk until its answer takes its place there, in one commit. What only failed is tried again after
a growing wait; a refusal that would come again is the answer.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import random
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from agent.config import OutboxSection
from agent.core.clock import Clock
from agent.core.errors import InferenceError, InvalidRequest, NotStored, UnknownModel
from agent.core.types import InferenceRequest, InferenceResult
from agent.durable.pace import Pace
from agent.durable.records import (
    ASK,
    Expired,
    Return,
    answer_item,
    renamed,
    return_of,
    stored_request,
    tried,
    uplink_item,
)
from agent.link.backoff import Backoff
from agent.registry.catalog import Catalog
from agent.store.outbox import Item, Outbox, Receipt, Stored

log = logging.getLogger(__name__)

PAGE_ROWS = 64
"""Requests of one producer whose answers may be on their way to the disk at once."""
IDLE_S = 10.0
Regions = Callable[[str, frozenset[str]], frozenset[str]]
"""Which regions may see what a producer asks, of those that its request allows: by today's rules."""
FINAL = (InvalidRequest, UnknownModel)
"""Refusals that would be the same again."""


@dataclass(slots=True)
class _Counters:
    answered: int = 0
    refused: int = 0
    """Answered with a refusal: the request, or today's catalogue, is at fault."""
    retried: int = 0
    expired: int = 0


_Answer = tuple[str, asyncio.Future[Receipt]]
"""By which counter it counts once it is on the disk, and whether it is."""


@dataclass(slots=True)
class _Producer:
    """Who has requests. `ready`: not before then."""

    backoff: Backoff
    ready: float = 0.0
    busy: bool = False
    fresh: bool = field(default=True)
    """Something was stored since its requests were last looked for."""


class Asker:
    """`infer` and `regions` are the core's. `uplink_topic` says where the answer to a request is passed on to; None:
    nowhere."""

    def __init__(
        self,
        outbox: Outbox,
        infer: Callable[[InferenceRequest], Awaitable[InferenceResult]],
        catalog: Catalog,
        settings: OutboxSection,
        clock: Clock,
        *,
        uplink_topic: Callable[[InferenceRequest], str | None] = lambda request: None,
        regions: Regions = lambda producer, asked: asked,
        chance: Callable[[], float] = random.random,
    ) -> None:
        self.counters = _Counters()
        self._outbox = outbox
        self._infer = infer
        self._catalog = catalog
        self._settings = settings
        self._clock = clock
        self._uplink_topic = uplink_topic
        self._regions = regions
        self._chance = chance
        self._pace = Pace(settings.drain_per_s)
        self._producers: dict[str, _Producer] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._wake = asyncio.Event()
        self._closing = False
        self._all = True

    def stored(self, producer: str | None) -> None:
        """A producer has a new request; None: anybody may have."""
        if producer is None:
            self._all = True
        else:
            self._mention(producer)
        self._wake.set()

    def nudge(self) -> None:
        """Something can be asked that could not before: try again now."""
        for producer in self._producers.values():
            producer.ready = 0.0
        self._wake.set()

    def status(self) -> dict[str, Any]:
        """For `/status`: plain JSON types."""
        counters = {key: getattr(self.counters, key) for key in _Counters.__slots__}
        waiting = {"producers": len(self._producers), "being_asked": len(self._tasks)}
        return {"rows": self._outbox.rows(ASK), **waiting, **counters}

    async def work(self, beat: Callable[[], None] = lambda: None) -> None:
        """Until cancelled. `beat` is called each time round."""
        while True:
            beat()
            self._wake.clear()
            if self._all:
                await self._find_all()
            wait_s = self._begin()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(min(wait_s, IDLE_S)):
                    await self._wake.wait()

    def pause(self) -> None:
        """Begin nothing more."""
        self._closing = True

    async def close(self, timeout_s: float) -> None:
        """Let what is being asked end; what does not end stays on the disk."""
        self.pause()
        if self._tasks:
            _, late = await asyncio.wait(self._tasks, timeout=timeout_s)
            for task in late:
                task.cancel()

    def _mention(self, name: str) -> None:
        producer = self._producers.get(name)
        if producer is None:
            producer = self._producers[name] = _Producer(self._backoff())
        producer.fresh = True

    def _backoff(self) -> Backoff:
        longest_s = self._settings.retry_max_s
        return Backoff(min(0.5, longest_s), longest_s, self._chance)

    async def _find_all(self) -> None:
        try:
            names = await asyncio.to_thread(self._outbox.producers)
        except NotStored:
            return  # `stored(None)` comes when the file is there
        self._all = False
        for name in names:
            self._mention(name)

    def _begin(self) -> float:
        """Begin with whoever may be asked for, longest waiting first. Returns how long to wait before the next look."""
        now = self._clock.monotonic()
        wait_s = IDLE_S
        for name, producer in list(self._producers.items()):
            if self._closing or len(self._tasks) >= self._settings.max_asked:
                break
            if producer.busy:
                continue
            if producer.ready > now:
                wait_s = min(wait_s, producer.ready - now)
                continue
            del self._producers[name]  # Its turn comes again after everybody else's.
            self._producers[name] = producer
            producer.busy, producer.fresh = True, False
            task = asyncio.get_running_loop().create_task(self._serve(name, producer))
            self._tasks.add(task)
            task.add_done_callback(self._ended)
        return wait_s

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        self._wake.set()  # only now is its place free

    async def _serve(self, name: str, producer: _Producer) -> None:
        """A page of one producer's requests, in order, up to the first that cannot be answered now."""
        more = True
        try:
            rows = await asyncio.to_thread(self._outbox.page, ASK, 0, PAGE_ROWS, producer=name)
            more = bool(rows)
            answers: list[_Answer] = []
            try:
                all_asked = await self._ask_each(rows, answers)
            finally:
                await self._committed(answers)
            if answers:
                producer.backoff.succeeded()
            if not all_asked:
                self.counters.retried += 1
                producer.ready = self._clock.monotonic() + producer.backoff.failed(self._clock.monotonic())
        except NotStored as error:
            log.warning("durable requests cannot be answered now", extra={"error": str(error)})
            producer.ready = self._clock.monotonic() + producer.backoff.failed(self._clock.monotonic())
        except Exception:
            log.exception("a durable request could not be answered", extra={"producer": name})
            producer.ready = self._clock.monotonic() + producer.backoff.failed(self._clock.monotonic())
        finally:
            producer.busy = False
            if not more and not producer.fresh:
                self._producers.pop(name, None)

    async def _ask_each(self, rows: Sequence[Stored], answers: list[_Answer]) -> bool:
        """Nobody waits for the disk between two requests: their answers go there together, and `in_turn` keeps them in
        order if it takes some and not others. False: one cannot be answered now."""
        for stored in rows:
            if self._closing:
                break
            await self._paced()
            if not await self._ask(stored, answers):
                return False
        return True

    async def _committed(self, answers: list[_Answer]) -> None:
        """Raises `NotStored` if one of them is not on the disk."""
        if not answers:
            return
        outcomes = await asyncio.gather(*(told for _, told in answers), return_exceptions=True)
        for (what, _), outcome in zip(answers, outcomes, strict=True):
            if isinstance(outcome, BaseException):
                raise outcome
            setattr(self.counters, what, getattr(self.counters, what) + 1)

    async def _paced(self) -> None:
        while not self._pace.take(self._clock.monotonic()):  # noqa: ASYNC110  time is what it waits for
            await asyncio.sleep(self._pace.wait_s())

    async def _ask(self, stored: Stored, answers: list[_Answer]) -> bool:
        """False: to be tried again."""
        now = self._clock.monotonic()
        request: InferenceRequest | None = None
        outcome: InferenceResult | InferenceError
        try:
            if not stored.whole:
                raise InvalidRequest("(stored request): its checksum is wrong")
            request, back = stored_request(stored, self._catalog, now)
            request = dataclasses.replace(
                request, allowed_regions=self._regions(request.producer, request.allowed_regions)
            )
        except FINAL as error:
            found = return_of(stored)
            if found is None:
                log.error("a stored request is damaged", extra={"id": stored.id, "producer": stored.producer})
                self._outbox.remove(stored.seq, "damaged")
                return True
            outcome, back = error, found
        else:
            tried_outcome = await self._try(stored, request)
            if tried_outcome is None:
                return False
            outcome = tried_outcome
        answers.append(self._finish(stored, request, back, outcome))
        return True

    async def _try(self, stored: Stored, request: InferenceRequest) -> InferenceResult | InferenceError | None:
        """None: no answer now, and it is young enough to be asked again."""
        try:
            result = await self._infer(tried(request))
            if not result.stale:
                return renamed(result, request)
            why = "only an earlier answer is known"
        except FINAL as error:
            return error
        except InferenceError as error:
            why = error.message
        age_s = self._outbox.age_s(stored)
        if age_s < self._settings.max_age_s:
            return None
        expired = Expired(f"not answered within {self._settings.max_age_s:g} s (outbox.max_age_s); last: {why}")
        expired.request_id = request.id
        return expired

    def _finish(
        self, stored: Stored, request: InferenceRequest | None, back: Return, outcome: InferenceResult | InferenceError
    ) -> _Answer:
        items = [answer_item(stored, back, outcome)]
        topic = None if request is None else self._uplink_topic(request)
        if request is not None and topic is not None:
            items.append(uplink_item(request, outcome, topic, self._clock.wall(), stored.id))
        what = "answered"
        if isinstance(outcome, InferenceError):
            what = "expired" if isinstance(outcome, Expired) else "refused"
        # What was dropped meanwhile stays dropped.
        return what, begin_put(self._outbox, items, stored.seq)


async def put(outbox: Outbox, items: list[Item]) -> Receipt:
    """`Outbox.put`, awaited. For an outbox that delivers to this loop. Raises `OutboxFull`, `NotStored` and
    `InvalidRequest`."""
    return await begin_put(outbox, items)


def begin_put(outbox: Outbox, items: list[Item], replaces: int | None = None) -> asyncio.Future[Receipt]:
    """As `put`; awaited by whoever is told. `replaces`: in its producer's order."""
    told: asyncio.Future[Receipt] = asyncio.get_running_loop().create_future()

    def done(result: Receipt | InferenceError) -> None:
        if told.done():
            return
        if isinstance(result, InferenceError):
            told.set_exception(result)
        else:
            told.set_result(result)

    outbox.put(items, done, replaces=replaces, in_turn=replaces is not None)
    return told
