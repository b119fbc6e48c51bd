"""One serial port and the microcontroller behind it: kept open, watched, and opened again."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Any, Final

from agent.core.clock import Clock
from agent.core.errors import EdgeAgentError, LinkError, ProtocolError
from agent.link.backoff import Backoff
from agent.link.calls import RemoteError
from agent.link.session import Session
from agent.link.transport import Transport
from agent.registry.catalog import Catalog, Variant
from agent.targets.mcu_stream import StreamKeeper
from agent.targets.mcu_trial import settle_trial
from agent.wire.codes import Capability, LogLevel, Rollback, SlotState, name_of
from agent.wire.messages import Hello, Log

log = logging.getLogger(__name__)

Connect = Callable[[str, int], Awaitable[Transport]]

OPEN_TIMEOUT_S: Final = 5.0
"""For the first HELLO: opening the port resets many boards, and their boot loaders wait for about 2 s."""
RECONNECT_INITIAL_S: Final = 0.1
"""First wait after a lost port: a re-enumerating USB device is back within a few tenths of a second."""
RECONNECT_MAX_S: Final = 2.0
"""Longest wait: a board that was plugged in again is found within this, and looking for it costs one open()."""
PRESENCE_POLL_S: Final = 0.1
"""How soon a port that has come back is tried: a look at the file system costs a few microseconds."""
STABLE_S: Final = 10.0
"""A line that lived this long begins its back-off anew; one that flaps does not."""
PING_TIMEOUT_S: Final = 1.0
"""A healthy MCU answers once its current run is over: 43 ms for keyword spotting on a Cortex-M4."""
SYNC_PINGS: Final = 16
"""At the beginning, one after the other: together they bound the clock's offset."""
PING_FAILURES: Final = 2
"""Unanswered PINGs in a row that mean the board is gone: one may fall to line noise."""
LOG_LEVELS: Final[Mapping[int, int]] = {
    LogLevel.DEBUG: logging.DEBUG,
    LogLevel.INFO: logging.INFO,
    LogLevel.WARNING: logging.WARNING,
    LogLevel.ERROR: logging.ERROR,
}


class BoardState(StrEnum):
    """Where the supervision of a port stands."""

    STOPPED = "stopped"
    CONNECTING = "connecting"
    CONNECTED = "connected"
    WAITING = "waiting"
    """For the next try to open the port."""


class Board:
    """Supervises one port."""

    def __init__(
        self,
        port: str,
        baud: int,
        *,
        catalog: Catalog,
        clock: Clock,
        connect: Connect,
        max_concurrent: int,
        health_check_interval: float,
        signed_only: bool = False,
        random: Callable[[], float],
        streams: Sequence[StreamKeeper] = (),
    ) -> None:
        self.port = port
        self.in_flight = 0
        self._variant: Variant | None = None
        self._reason = f"{port}: not started"
        self._baud = baud
        self._catalog = catalog
        self._clock = clock
        self._connect = connect
        self._streams = tuple(streams)
        self._streaming: StreamKeeper | None = None
        self._max_concurrent = max_concurrent
        self._health_check_interval = health_check_interval
        self._signed_only = signed_only
        self._backoff = Backoff(RECONNECT_INITIAL_S, RECONNECT_MAX_S, random)
        self._session: Session | None = None
        self._hello: Hello | None = None
        self._state = BoardState.STOPPED
        self._since = clock.wall()
        self._connects = 0
        self._connected = False
        """The line was opened, so that its end is a loss."""
        self._task: asyncio.Task[None] | None = None
        self._round_trip_s: float | None = None
        self._mcu_counters: Mapping[str, int] = {}
        self._refreshing: asyncio.Task[None] | None = None
        self._settling: asyncio.Task[None] | None = None
        self._rolled_back: tuple[object, ...] = ()
        """What was told already: the board goes on saying it."""

    @property
    def variant(self) -> Variant | None:
        """The catalogue's variant that INFER runs there; None while it cannot be asked."""
        return self._variant if self._session is not None and self._session.error is None else None

    @property
    def reason(self) -> str:
        """Why it cannot be asked; empty when it can."""
        lost = self._session.error if self._session is not None else None
        return str(lost) if lost is not None else self._reason

    @property
    def session(self) -> Session:
        """Only while `variant` is not None."""
        assert self._session is not None, f"{self.port} is not connected"
        return self._session

    @property
    def provider(self) -> str:
        """What runs there: `host tflite-micro 1.0`."""
        return f"{self._hello.board} {self._hello.engine}" if self._hello is not None else ""

    @property
    def alive(self) -> bool:
        """Whether somebody looks after the port."""
        return self._task is not None and not self._task.done()

    def start(self) -> None:
        self._task = asyncio.create_task(self._supervise(), name=f"mcu {self.port}")
        self._task.add_done_callback(self._ended)

    async def stop(self) -> None:
        for task in (self._task, self._refreshing, self._settling):
            if task is not None:
                task.cancel()
                await asyncio.wait([task])
        self._task = self._refreshing = self._settling = None
        self._enter(BoardState.STOPPED, f"{self.port}: stopped")

    def refresh(self) -> None:
        """Ask for HELLO in the background: the board runs another model than we thought."""
        if self._session is not None and (self._refreshing is None or self._refreshing.done()):
            self._refreshing = asyncio.create_task(self._refresh(self._session))

    def status(self) -> dict[str, Any]:
        """Plain JSON types; times in milliseconds."""
        hello, session = self._hello, self._session
        active = hello.active if hello is not None else None
        return {
            "port": self.port,
            "state": self._state.value,
            "reason": self.reason,
            "since": self._since,
            "connects": self._connects,
            "in_flight": self.in_flight,
            "board": hello.board if hello is not None else None,
            "build": hello.build if hello is not None else None,
            "engine": hello.engine if hello is not None else None,
            "reset_cause": name_of(hello.reset_cause).lower() if hello is not None else None,
            "window": hello.window if hello is not None else None,
            "model": self.variant.name if self.variant is not None else None,
            "model_sha256": active.sha256.hex() if active is not None else None,
            "in_trial": hello is not None and hello.trial is not None,
            "rollback": name_of(hello.rollback).lower() if hello is not None and hello.rollback else None,
            "round_trip_ms": None if self._round_trip_s is None else round(self._round_trip_s * 1e3, 3),
            **self._clock_status(),
            "stream": self._streaming.status() if self._streaming is not None else None,
            "counters": session.status() if session is not None else {},
            "mcu_counters": dict(self._mcu_counters),
        }

    def _clock_status(self) -> dict[str, Any]:
        """The board's clock less the gateway's monotonic one, how wrong that may be, and how fast it changes."""
        sync = self._session.clock_sync if self._session is not None else None
        known = sync.estimate(self._clock.monotonic()) if sync is not None else None
        if sync is None or known is None:
            return {"clock_offset_s": None, "clock_error_ms": None, "clock_drift_ppm": None}
        return {
            "clock_offset_s": round(known.offset_s, 6),
            "clock_error_ms": round(known.bound_s * 1e3, 3),
            "clock_drift_ppm": round(sync.drift * 1e6, 1),
        }

    def _ended(self, task: asyncio.Task[None]) -> None:
        """Supervision ends by `stop` only; anything else is a defect that must not look like a board that is there."""
        error = None if task.cancelled() else task.exception()
        if error is not None:
            log.critical("supervision of a board ended", extra={"port": self.port}, exc_info=error)
            self._enter(BoardState.STOPPED, f"{self.port}: supervision ended: {error!r}")

    async def _supervise(self) -> None:
        while True:
            self._enter(BoardState.CONNECTING, self._reason if self._backoff.failures else f"{self.port}: connecting")
            began = self._clock.monotonic()
            try:
                error = await self._converse()
            except LinkError as lost:
                error = lost
            except ProtocolError as senseless:
                error = LinkError(f"{self.port}: {senseless}")
            except Exception as defect:  # the port is opened again, whatever it was
                log.exception("task failed", extra={"component": f"board {self.port}"})
                error = LinkError(f"{self.port}: {type(defect).__name__}: {defect}")
            if self._clock.monotonic() - began >= STABLE_S:
                self._backoff.succeeded()
            wait_s = self._backoff.failed(self._clock.monotonic(), permanent=error.permanent)
            self._lost(str(error))
            await self._pause(wait_s)

    async def _pause(self, wait_s: float) -> None:
        """Wait, but not for a port that was gone and has come back: it was plugged in again."""
        end = self._clock.monotonic() + wait_s
        gone = not self._present()
        while (left := end - self._clock.monotonic()) > 0 and not (gone and self._present()):  # noqa: ASYNC110 no event
            await asyncio.sleep(min(left, PRESENCE_POLL_S))

    def _present(self) -> bool:
        return Path(self.port).exists()

    async def _converse(self) -> LinkError:
        """One connection, from opening the port to its end."""
        transport = await self._connect(self.port, self._baud)
        session = Session(
            transport,
            self._clock,
            max_in_flight=self._max_concurrent,
            on_hello=self._on_hello,
            on_log=self._on_log,
        )
        try:
            await session.open(self._clock.monotonic() + OPEN_TIMEOUT_S)
            self._session = session
            self._connects += 1
            self._connected = True
            self._enter(BoardState.CONNECTED, "")
            self._adopt(session.hello)
            return await self._served(session)
        finally:
            self._session = self._hello = self._variant = None
            self._round_trip_s = None
            self._mcu_counters = {}
            session.close()

    async def _served(self, session: Session) -> LinkError:
        """Watched, and streaming if a stream is configured for this board, until the line is lost."""
        wanted = (keeper for keeper in self._streams if keeper.wants(self.port, session.hello))
        self._streaming = next(wanted, None)
        task = None
        if self._streaming is not None:
            running = self._streaming.run(session, lambda: self.variant, lambda: self.provider)
            task = asyncio.create_task(running, name=f"stream {self._streaming.section.name}")
        try:
            return await self._watch(session)
        finally:
            if task is not None:
                task.cancel()
                await asyncio.wait([task])

    async def _watch(self, session: Session) -> LinkError:
        """Until the line is lost. A PING that is not answered counts only if nothing else came either."""
        lost = asyncio.create_task(session.wait_lost())
        failures = 0 if await self._healthy(session, SYNC_PINGS) else 1
        try:
            while True:
                done, _ = await asyncio.wait([lost], timeout=self._health_check_interval)
                if done:
                    return lost.result()
                asked = self._clock.monotonic()
                healthy = await self._healthy(session)
                failures = 0 if healthy or session.last_received >= asked else failures + 1
                if failures >= PING_FAILURES:
                    return LinkError(f"{self.port}: no answer to {failures} PINGs")
        finally:
            lost.cancel()

    async def _healthy(self, session: Session, pings: int = 1) -> bool:
        try:
            for _ in range(pings):
                pinged = await session.ping(b"", self._clock.monotonic() + PING_TIMEOUT_S)
                self._round_trip_s = pinged.round_trip_s
            self._mcu_counters = (await session.stats(self._clock.monotonic() + PING_TIMEOUT_S)).by_name()
        except (TimeoutError, EdgeAgentError) as error:
            log.warning("board did not answer a health check", extra=self._about(str(error)))
            return False
        return True

    async def _refresh(self, session: Session) -> None:
        try:
            await session.refresh(self._clock.monotonic() + PING_TIMEOUT_S)
        except (LinkError, ProtocolError, RemoteError) as error:
            log.warning("board did not say what it runs", extra=self._about(str(error)))

    def _on_hello(self, hello: Hello) -> None:
        if self._session is not None:
            self._adopt(hello)

    def _adopt(self, hello: Hello) -> None:
        rolled_back = (hello.rollback, *(slot.sha256 for slot in hello.slots if slot.state == SlotState.BAD))
        if hello.rollback and rolled_back != self._rolled_back:
            why = hello.rollback.words if isinstance(hello.rollback, Rollback) else str(hello.rollback)
            log.warning("board took its last model back", extra=self._about(why))
        self._rolled_back = rolled_back
        self._hello = hello
        if hello.trial is not None and self._session is not None and not self._is_settling():
            settling = settle_trial(
                self.port, self._session, hello.trial, self._catalog, self._clock, signed_only=self._signed_only
            )
            self._settling = asyncio.create_task(settling, name=f"trial {self.port}")
        self._variant, self._reason = self._usable(hello)
        about = {"board": hello.board, "build": hello.build, "engine": hello.engine}
        if self._variant is not None:
            log.info("board ready", extra={"port": self.port, "model": self._variant.name, **about})
        else:
            log.warning("board cannot be asked", extra={**self._about(self._reason), **about})

    def _is_settling(self) -> bool:
        return self._settling is not None and not self._settling.done()

    def _usable(self, hello: Hello) -> tuple[Variant | None, str]:
        """What the board runs, or why it is of no use."""
        active = hello.active
        if not hello.capabilities & Capability.ENGINE:
            return None, f"{self.port}: its firmware was built without an engine"
        if active is None:
            return None, f"{self.port}: no model is active: push one with edge-agent mcu push"
        if hello.trial is not None:
            return None, f"{self.port}: its model {active.sha256.hex()[:12]} is in trial, not confirmed yet"
        variant = self._catalog.by_sha256(active.sha256.hex())
        if variant is None:
            return None, f"{self.port}: its model {active.sha256.hex()[:12]} is not in the catalogue"
        return variant, ""

    def _on_log(self, line: Log) -> None:
        level = LOG_LEVELS.get(line.level, logging.INFO)
        log.log(level, "board says", extra={"port": self.port, "text": line.text})

    def _lost(self, reason: str) -> None:
        """The line ended, or could not be opened: told once, and again for another reason than before."""
        if self._connected:
            log.warning("board lost", extra=self._about(reason))
        elif reason != self._reason:
            log.warning("board not reached", extra=self._about(reason))
        self._connected = False
        self._enter(BoardState.WAITING, reason)

    def _about(self, reason: str) -> dict[str, Any]:
        """Fields of an event; errors begin with the port, which is a field of its own."""
        return {"port": self.port, "reason": reason.removeprefix(f"{self.port}: ")}

    def _enter(self, state: BoardState, reason: str) -> None:
        if state is not self._state:
            self._state = state
            self._since = self._clock.wall()
        self._reason = reason
