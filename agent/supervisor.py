"""Keeps background tasks alive and knows the state of every component.

A task that raises is restarted alone, after a back-off; the daemon stops only when its core does: a task without which
it would be of no use, and that failed `CORE_FAILURES` times in a row. The systemd watchdog is fed only while no
supervised task is overdue.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from agent.core.clock import Clock
from agent.core.component import ComponentState, Reading, shown
from agent.link.backoff import Backoff

__all__ = ["Component", "ComponentState", "Reading", "Supervisor"]

log = logging.getLogger(__name__)

RESTART_INITIAL_S = 0.5
RESTART_MAX_S = 60.0
"""A task that ran for so long begins with the shortest back-off again."""
CORE_FAILURES = 5
STARTING_S = 30.0
"""A part that is read and has never worked yet is starting for so long; after that it is down."""


class Component:
    """State of one part of the daemon, and since when."""

    def __init__(self, name: str, clock: Clock) -> None:
        self.name = name
        self.state = ComponentState.STARTING
        self.reason = ""
        self._clock = clock
        self._stall_s: float | None = None
        self._since = self._beaten = self._made = clock.monotonic()
        self._resting = False
        self._worked = False

    def set(self, state: ComponentState, reason: str = "") -> None:
        """Change the state; the same state again keeps `since`."""
        if state is not self.state:
            self._since = self._clock.monotonic()
            log.info("component", extra={"component": self.name, "state": state.value, "reason": reason})
        self.state, self.reason = state, reason
        self.beat()

    def read(self, found: Reading) -> None:
        """Take over what was read; a part that is down and has not worked yet may still be starting."""
        state = found.state
        self._worked = self._worked or state in (ComponentState.UP, ComponentState.DEGRADED)
        if state is ComponentState.DOWN and not self._worked and self._clock.monotonic() - self._made < STARTING_S:
            state = ComponentState.STARTING
        self.set(state, found.reason)

    def beat(self) -> None:
        """The component is alive: it went once round its loop."""
        self._beaten = self._clock.monotonic()

    def rest(self, *, resting: bool) -> None:
        """It waits to be restarted, which is no stall; or it runs again."""
        self._resting = resting
        self.beat()

    def may_stall(self, stall_s: float) -> None:
        """How long it may go without a beat."""
        self._stall_s = stall_s

    def overdue(self) -> bool:
        """Whether it runs and has not beaten for longer than it may."""
        silent_s = self._clock.monotonic() - self._beaten
        return self._stall_s is not None and not self._resting and silent_s > self._stall_s

    def to_dict(self) -> dict[str, Any]:
        return shown(self.name, self.state, self.reason, self._since, self._clock)


class Supervisor:
    """Owns the background tasks of the daemon. `broken` is told once, in words, when its core has failed."""

    def __init__(self, clock: Clock, chance: Callable[[], float] = random.random) -> None:
        self._clock = clock
        self._chance = chance
        self._components: dict[str, Component] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self._watched: dict[str, Callable[[], bool]] = {}
        self._parts: Callable[[], Mapping[str, Reading]] = dict
        self._read: dict[str, Component] = {}
        self._is_broken = False
        self.broken: Callable[[str], None] = lambda why: None

    def component(self, name: str, stall_s: float | None = None) -> Component:
        """The component of that name, made at its first mention. `stall_s`: how long it may go without a beat."""
        component = self._components.get(name)
        if component is None:
            component = self._components[name] = Component(name, self._clock)
        if stall_s is not None:
            component.may_stall(stall_s)
        return component

    def spawn(
        self,
        name: str,
        work: Callable[[Component], Awaitable[None]],
        stall_s: float | None = None,
        *,
        core: bool = False,
    ) -> None:
        """Run `work(component)` until `stop`; when it raises or returns, run it again after a back-off. `core`: without
        it the daemon is of no use."""
        component = self.component(name, stall_s)
        self._tasks.append(asyncio.create_task(self._run(component, work, core), name=name))

    def reads(self, parts: Callable[[], Mapping[str, Reading]]) -> None:
        """Parts that are no tasks of this supervisor, by name: `parts` reads their states whenever they are wanted."""
        self._parts = parts

    def watch(self, name: str, alive: Callable[[], bool]) -> None:
        """A part that looks after its own background work: `alive` says whether that still runs."""
        self._watched[name] = alive

    def overdue(self) -> list[str]:
        """Names of the components that have stalled, and of the watched parts whose work has ended."""
        stalled = [component.name for component in self._components.values() if component.overdue()]
        return stalled + [name for name, alive in self._watched.items() if not alive()]

    def look(self) -> list[Component]:
        """Read the parts. Done now and then, or a change would be noticed, and logged, only when somebody asks."""
        found = self._parts()
        for name, reading in found.items():
            component = self._read.get(name)
            if component is None:
                component = self._read[name] = Component(name, self._clock)
            component.read(reading)
        return [self._read[name] for name in found]

    def status(self) -> list[dict[str, Any]]:
        """`components` of `/status`."""
        return [component.to_dict() for component in (*self._components.values(), *self.look())]

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks.clear()

    async def _run(self, component: Component, work: Callable[[Component], Awaitable[None]], core: bool) -> None:
        backoff = Backoff(RESTART_INITIAL_S, RESTART_MAX_S, self._chance)
        while True:
            started = self._clock.monotonic()
            try:
                await work(component)
                reason = "ended"
            except asyncio.CancelledError as error:
                task = asyncio.current_task()
                if task is None or task.cancelling():
                    raise
                reason = f"{type(error).__name__}: what it waited for was cancelled"
            except Exception as error:  # the one place where any fault of a task is caught: it is named and restarted
                log.exception("task failed", extra={"component": component.name})
                reason = f"{type(error).__name__}: {error}"
            now = self._clock.monotonic()
            if now - started > RESTART_MAX_S:
                backoff.succeeded()
            component.set(ComponentState.DOWN, reason)
            component.rest(resting=True)
            wait_s = backoff.failed(now)
            if core and backoff.failures >= CORE_FAILURES and not self._is_broken:
                self._is_broken = True
                self.broken(f"{component.name} failed {CORE_FAILURES} times in a row: {reason}")
            await asyncio.sleep(wait_s)
            component.rest(resting=False)
