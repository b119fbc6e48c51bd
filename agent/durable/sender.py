"""Drains one route of the outbox to a broker: publish, wait for the PUBACK, delete. In order, bounded, paced.

Everything runs in the event loop but reading the file. A page of rows is in memory at a time, and what is on its way.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from agent.config import OutboxSection
from agent.core.clock import Clock
from agent.core.errors import LinkError, NotStored
from agent.durable.pace import Pace
from agent.durable.records import message_of
from agent.link.backoff import Backoff
from agent.link.mqtt import LinkFull, LinkState, MessageTooLarge, MqttLink
from agent.store.outbox import Outbox, Stored

log = logging.getLogger(__name__)

PAGE_ROWS = 256
BURST = 16
"""Messages published before other work of the loop has its turn."""
HOUSEKEEPING_S = 10.0
"""Between two looks for messages that have become too old, and after a page that could not be read."""
NOT_HEARD = 0x10
NEVER = frozenset({0x90, 0x99})
"""Reason codes of a PUBACK after which the same message would fail for ever: its topic or its payload is at fault."""


@dataclass(slots=True)
class _Counters:
    published: int = 0
    delivered: int = 0
    unheard: int = 0
    """Taken by the broker, which had nobody to pass it on to."""
    refused: int = 0
    """By the broker, for a reason that may pass: tried again."""
    undeliverable: int = 0
    """Given up: damaged, too large for the broker, or refused for what it is."""


class Sender:
    """`expiry_s`: the message expiry of what is sent, from the age of the row. `step` is told each step."""

    def __init__(
        self,
        route: str,
        outbox: Outbox,
        link: MqttLink,
        settings: OutboxSection,
        clock: Clock,
        *,
        expiry_s: Callable[[float], float] | None = None,
        step: Callable[[str], None] = lambda name: None,
        chance: Callable[[], float] = random.random,
    ) -> None:
        self.route = route
        self.link = link
        self.counters = _Counters()
        self._outbox = outbox
        self._settings = settings
        self._clock = clock
        self._expiry_s = expiry_s or (lambda age_s: settings.max_age_s - age_s)
        self._step = step
        self._pace = Pace(settings.drain_per_s)
        self._backoff = Backoff(min(0.5, settings.retry_max_s), settings.retry_max_s, chance)
        self._page: deque[Stored] = deque()
        self._in_flight: dict[int, int] = {}
        self._after = 0
        self._era = 0
        self._hold_until = 0.0
        self._closing = False
        self._wake = asyncio.Event()
        self._settled = asyncio.Event()
        self._expired_at = clock.monotonic()
        link.on_state(self._on_link)

    def wake(self) -> None:
        """There may be something to do."""
        self._wake.set()

    @property
    def in_flight(self) -> int:
        return len(self._in_flight)

    def status(self) -> dict[str, Any]:
        """For `/status`: plain JSON types."""
        counters = {key: getattr(self.counters, key) for key in _Counters.__slots__}
        return {"rows": self._outbox.rows(self.route), "in_flight": self.in_flight, **counters}

    async def work(self, beat: Callable[[], None] = lambda: None) -> None:
        """Until cancelled. `beat` is called each time round."""
        self._restart()
        while True:
            beat()
            self._wake.clear()
            wait_s = await self._burst()
            self._housekeeping()
            if wait_s is None or wait_s > 0:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(HOUSEKEEPING_S if wait_s is None else min(wait_s, HOUSEKEEPING_S)):
                        await self._wake.wait()
            else:
                await asyncio.sleep(0)

    async def close(self, timeout_s: float) -> bool:
        """Send no more, and wait until nothing is on its way. False: something still is."""
        self._closing = True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while self._in_flight and self.link.connected:
                    self._settled.clear()
                    await self._settled.wait()
        return not self._in_flight

    async def _burst(self) -> float | None:
        """Send some. Returns how long to wait before the next, None until something happens."""
        for _ in range(BURST):
            if self._closing or not self.link.connected:
                return None
            now = self._clock.monotonic()
            if now < self._hold_until:
                return self._hold_until - now
            if len(self._in_flight) >= self._settings.max_in_flight:
                return None
            if not self._page and not await self._read():
                return None
            if not self._page or not self.link.connected:  # lost while the file was read
                return None
            if not self._pace.take(now):
                return self._pace.wait_s()
            if not self._send(self._page[0]):
                return None
        return 0.0

    async def _read(self) -> bool:
        """The next page. False: there is none."""
        if not self._outbox.rows(self.route):
            return False
        era = self._era
        try:
            rows = await asyncio.to_thread(self._outbox.page, self.route, self._after, PAGE_ROWS)
        except NotStored as error:
            log.warning("outbox cannot be drained", extra={"route": self.route, "error": str(error)})
            return False
        if era == self._era:
            self._page.extend(stored for stored in rows if stored.seq not in self._in_flight)
        return bool(self._page)

    def _send(self, stored: Stored) -> bool:
        """False: not now."""
        try:
            if not stored.whole:
                raise ValueError("its checksum is wrong")
            topic, properties = message_of(stored, self._expiry_s(self._outbox.age_s(stored)))
            era = self._era
            self._step("publishing")
            self.link.publish(
                topic,
                stored.body,
                qos=1,
                properties=properties,
                acknowledged=lambda result: self._acknowledged(stored, era, result),
            )
        except (ValueError, KeyError, TypeError, MessageTooLarge) as error:
            self._give_up(stored, str(error))
        except LinkFull:
            return False  # room is made by an acknowledgement, which wakes
        except LinkError:
            return False
        else:
            self._in_flight[stored.seq] = era
            self.counters.published += 1
            self._step("published")
        self._page.popleft()
        self._after = stored.seq
        return True

    def _acknowledged(self, stored: Stored, era: int, result: int | LinkError) -> None:
        if isinstance(result, LinkError):
            return  # `_on_link` has it sent again
        if self._in_flight.get(stored.seq) == era:
            del self._in_flight[stored.seq]
        self._wake.set()
        self._settled.set()
        if result < 0x80:
            self._step("acknowledged by the broker")
            self.counters.delivered += 1
            self.counters.unheard += result == NOT_HEARD
            log.debug("delivered", extra={"route": self.route, "id": stored.id, "monotonic_s": self._clock.monotonic()})
            self._backoff.succeeded()
            self._outbox.remove(stored.seq, "delivered")
        elif result in NEVER:
            self._give_up(stored, f"the broker refused it (reason {result:#04x})")
        else:
            self.counters.refused += 1
            now = self._clock.monotonic()
            self._hold_until = now + self._backoff.failed(now)
            log.warning("broker refuses messages", extra={"route": self.route, "reason_code": result})
            self._restart(from_seq=stored.seq)

    def _give_up(self, stored: Stored, why: str) -> None:
        self.counters.undeliverable += 1
        log.error("message given up", extra={"route": self.route, "id": stored.id, "error": why})
        self._outbox.remove(stored.seq, "undeliverable" if stored.whole else "damaged")

    def _on_link(self, state: LinkState) -> None:
        if not state.connected:
            self._restart()
            self._settled.set()
        self._wake.set()

    def _restart(self, from_seq: int | None = None) -> None:
        """Go on with the first that is not acknowledged, or with `from_seq`."""
        first = min(self._in_flight, default=None) if from_seq is None else from_seq
        if first is not None:
            self._after = min(self._after, first - 1)
        self._era += 1
        if from_seq is None:
            self._in_flight.clear()
        self._page.clear()

    def _housekeeping(self) -> None:
        now = self._clock.monotonic()
        if now - self._expired_at >= HOUSEKEEPING_S:
            self._expired_at = now
            self._outbox.expire()
