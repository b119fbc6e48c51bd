"""Where requests wait while every place they could take is taken: the daemon's own, or those of the targets.

A request waits in its class's part of the line (`routing.line`) until a place is free for it, somebody more urgent
takes its place in the line, or its deadline cannot be met any more; in the last two cases it is refused at once, with a
reason and with the time after which asking again makes sense.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Hashable
from typing import Any, Final, TypeVar

from agent.config import OverloadSection
from agent.core.clock import Clock
from agent.core.errors import Overloaded
from agent.core.types import InferenceRequest
from agent.routing.limits import Shares
from agent.routing.line import Line, Ticket
from agent.routing.walk import NoAnswer

T = TypeVar("T")

RATE_WINDOW: Final = 64
"""Finished requests from which the rate of the daemon is taken."""
RETRY_MIN_S: Final = 0.1
RETRY_MAX_S: Final = 30.0

NEVER: Final = -1


class RequestQueue:
    """The daemon's places, and the line before them."""

    def __init__(self, settings: OverloadSection, max_in_flight: int, clock: Clock) -> None:
        self._clock = clock
        self._places = max_in_flight
        self._shares = Shares(settings.shares)
        self._line = Line(settings.waiting)
        self._finished: deque[float] = deque(maxlen=RATE_WINDOW)
        self._in_service = 0
        self._events = 0
        """Times that something became free."""
        self._letting_in = False
        self._counts = {"waited": 0, "refused_full": 0, "refused_evicted": 0, "refused_deadline": 0}

    async def run(
        self,
        request: InferenceRequest,
        ask: Callable[[], Awaitable[T]],
        *,
        full: Callable[[], bool],
        needed_s: Callable[[], float],
    ) -> tuple[T, float]:
        """What `ask` returns, once there is a place for it; and the seconds waited for one.

        `full` says that nothing but full targets stands in its way now; `needed_s` is the least that an answer takes:
        waiting ends that much before the deadline. Raises `Overloaded`, and what `ask` raises.
        """
        began = self._clock.monotonic()
        if self._free(request) and not self._line.precedes(request.latency_class, request.priority):
            self._in_service += 1
        else:
            await self._wait(request, full, needed_s(), began, NEVER)
        placed, waited_s = True, self._clock.monotonic() - began
        try:
            while True:
                try:
                    return await ask(), waited_s
                except NoAnswer as failure:
                    if failure.attempts or not failure.busy:
                        raise
                self._in_service -= 1
                placed = False
                try:
                    await self._wait(request, full, needed_s(), began, self._events)
                except Overloaded:
                    self._let_in()  # the place that was given up may be somebody's who waits for one only
                    raise
                placed, waited_s = True, self._clock.monotonic() - began
        finally:
            if placed:
                self._in_service -= 1
                self._finished.append(self._clock.monotonic())
                self.room()

    def room(self) -> None:
        """Something may have become free, here or on a target: let in whoever it is free for."""
        self._events += 1
        self._let_in()

    def _let_in(self) -> None:
        """One after the other: only when the last one has begun to ask can be told whether there is room for more."""
        if self._letting_in or not len(self._line):
            return
        ticket = self._line.take(lambda ticket: self._fits(ticket.holder))
        if ticket is not None:
            holder: _Holder = ticket.holder
            self._letting_in = True
            self._in_service += 1
            holder.granted.set_result(None)

    def _came_in(self) -> None:
        self._letting_in = False
        asyncio.get_running_loop().call_soon(self._let_in)

    @property
    def waiting(self) -> int:
        """Requests in line."""
        return len(self._line)

    def status(self) -> dict[str, Any]:
        """For `/status`: plain JSON types."""
        return {"in_service": self._in_service, "places": self._places, "waiting": self._line.counts(), **self._counts}

    async def _wait(
        self, request: InferenceRequest, full: Callable[[], bool], needed_s: float, began: float, tried: int
    ) -> None:
        """Until there is a place, and it is taken. `tried`: what had happened when there was none for it at last."""
        patience_s = request.deadline - needed_s - self._clock.monotonic()
        if patience_s <= 0.0:
            raise self._refusal("deadline", "every place is taken, and the deadline leaves no time to wait")
        holder = _Holder(request, full, tried, asyncio.get_running_loop().create_future())
        ticket, evicted = self._line.join(request.latency_class, request.priority, holder, _question(request))
        if evicted is not None and not evicted.holder.granted.done():
            evicted.holder.granted.set_exception(
                self._refusal("evicted", "gave its place in the line to a more urgent request")
            )
        if ticket is None:
            raise self._refusal(
                "full", f"every place is taken, and so is the line of {request.latency_class} requests that wait"
            )
        self._counts["waited"] += 1
        self._let_in()
        try:
            async with asyncio.timeout(patience_s):
                await holder.granted
        except TimeoutError:
            self._gave_up(ticket, holder)
            waited_ms = (self._clock.monotonic() - began) * 1e3
            raise self._refusal(
                "deadline", f"waited {waited_ms:.1f} ms for a place; the deadline cannot be met any more"
            ) from None
        except asyncio.CancelledError:
            self._gave_up(ticket, holder)
            raise
        self._came_in()

    def _gave_up(self, ticket: Ticket, holder: _Holder) -> None:
        """Leaves nothing behind: neither a ticket nor a place that it was just given."""
        granted = holder.granted
        if self._line.leave(ticket) or not granted.done() or granted.cancelled() or granted.exception() is not None:
            return
        self._in_service -= 1
        self._came_in()

    def _fits(self, holder: _Holder) -> bool:
        if holder.granted.done() or holder.tried == self._events:
            return False
        return self._free(holder.request) and not holder.full()

    def _free(self, request: InferenceRequest) -> bool:
        return self._in_service < self._shares.places(request.latency_class, self._places)

    def _refusal(self, why: str, text: str) -> Overloaded:
        self._counts[f"refused_{why}"] += 1
        return Overloaded(text, retry_after_s=self._retry_after_s())

    def _retry_after_s(self) -> float:
        """When those who wait now will have been served, at the rate of late."""
        finished = self._finished
        span_s = self._clock.monotonic() - finished[0] if len(finished) > 1 else 0.0
        ahead_s = (len(self._line) + 1) * span_s / len(finished) if span_s > 0.0 else 1.0
        return round(max(RETRY_MIN_S, min(RETRY_MAX_S, ahead_s)), 3)


class _Holder:
    """Whose ticket it is, and what it waits for."""

    __slots__ = ("full", "granted", "request", "tried")

    def __init__(
        self, request: InferenceRequest, full: Callable[[], bool], tried: int, granted: asyncio.Future[None]
    ) -> None:
        self.request = request
        self.full = full
        self.tried = tried
        self.granted = granted


def _question(request: InferenceRequest) -> Hashable:
    """Equal for requests of one class that find the same targets full."""
    return request.model, request.variant, request.accuracy, request.priority, request.allowed_regions, request.avoid
