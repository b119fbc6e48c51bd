"""`edge-agent run`: the daemon as a process, from its configuration to its exit code."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import socket
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

from agent.app import App
from agent.core.clock import SystemClock
from agent.core.errors import ConfigError, EdgeAgentError, LinkError
from agent.sdnotify import Notifier
from agent.settings import Settings, changes, load_settings
from agent.supervisor import Component, ComponentState
from agent.telemetry import events

log = logging.getLogger(__name__)

RELOAD_LIMIT_S = 600.0
"""How long a reload may take before systemd's watchdog ends it: loading may build an engine for an accelerator."""


def run(path: Path | None) -> int:
    """Load the configuration, run until SIGTERM or SIGINT. Returns the exit code."""
    os.umask(0o077)  # state, traces and trail hold what callers asked: nobody else's to read
    settings = load_settings(path, any_file=True)  # A model file that decayed is no reason to answer nothing at all.
    _log_as(settings)
    try:
        return _loop_runner()(Service(path).serve(settings))
    finally:
        for handler in logging.getLogger().handlers:
            handler.close()


class Service:
    """One `App` after the other: SIGHUP makes the next one, if what it is to be made of is right."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._notifier = Notifier()
        self._clock = SystemClock()
        self._stop = False
        self._asked = asyncio.Event()
        """A signal came: to stop, or to reload."""
        self._broken = ""

    async def serve(self, settings: Settings) -> int:
        """Until SIGTERM or SIGINT. Returns the exit code."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._end)
        loop.add_signal_handler(signal.SIGHUP, self._asked.set)
        first = App(settings, self._clock)
        first.reloads.begin(settings)
        try:
            await self._start(first)
        except (ConfigError, LinkError) as error:
            log.error("cannot start", extra={"reason": str(error)})
            return 2 if isinstance(error, ConfigError) else 1
        settle()
        self._notifier.ready("serving")
        names = [target.traits.name for target in first.targets]
        log.info("ready", extra={"gateway": settings.config.gateway.id, "targets": names})
        app: App | None = first
        while app is not None and await self._again():
            app, settings = await self._renew(app, settings)
            settle()
        if app is None:
            return 1
        self._notifier.stopping("draining")
        log.info("stopping")
        await app.stop()
        if self._broken:
            log.critical("stopped: a part without which nothing works is broken", extra={"reason": self._broken})
            return 1
        log.info("stopped")
        return 0

    def _break(self, why: str) -> None:
        """The core of the daemon has failed: it ends as by SIGTERM, but says so, and that it failed."""
        self._broken = why
        self._end()

    def _end(self) -> None:
        self._stop = True
        self._asked.set()

    async def _again(self) -> bool:
        """Wait for a signal: True if it asks for a reload. Several that came meanwhile are one."""
        await self._asked.wait()
        self._asked.clear()
        return not self._stop

    async def _start(self, app: App, open_door: socket.socket | None = None) -> None:
        """Raises `ConfigError` or `LinkError`, and leaves nothing running."""
        app.supervisor.broken = self._break
        try:
            await app.start(None if open_door is None else open_door.dup())
        except Exception as error:
            await app.supervisor.stop()  # before its tasks have begun, and say so
            await app.stop()
            if isinstance(error, ConfigError | LinkError):
                raise
            log.exception("a part could not be started")
            raise LinkError(f"{type(error).__name__}: {error}") from None
        if self._notifier.watchdog_s:
            app.supervisor.spawn("watchdog", lambda component: _feed(self._notifier, app, component))

    async def _renew(self, app: App, old: Settings) -> tuple[App | None, Settings]:
        """The daemon with the settings that are on the disk now, or the former one as if nothing had been."""
        self._notifier.reloading()
        feeding = asyncio.create_task(self._feed_meanwhile())
        try:
            return await self._replace(app, old)
        finally:
            feeding.cancel()

    async def _feed_meanwhile(self) -> None:
        """While one daemon takes the other's place nobody else feeds systemd's watchdog."""
        if self._notifier.watchdog_s:
            for _ in range(int(RELOAD_LIMIT_S / (self._notifier.watchdog_s / 3)) + 1):
                self._notifier.watchdog()
                await asyncio.sleep(self._notifier.watchdog_s / 3)

    async def _replace(self, app: App, old: Settings) -> tuple[App | None, Settings]:
        try:
            new = await asyncio.to_thread(load_settings, self._path)
            successor = App(new, self._clock, app.heritage)
        except Exception as error:  # whatever is wrong with what is on the disk: what runs goes on
            if not isinstance(error, EdgeAgentError):
                log.exception("a reload failed in an unforeseen way")
            app.metrics.watch(app.status)
            self._refuse(app, list(error.problems) if isinstance(error, ConfigError) else [str(error)])
            return app, old
        changed = changes(old, new)
        door = app.http.hand_over()
        await app.stop()
        _log_as(new)
        same = _same_door(old, new)
        if door is not None and not same and old.config.http.port == new.config.http.port:
            door.close()  # else the same port of another address would be taken: by ourselves
            door = None
        try:
            await self._start(successor, door if same else None)
        except (ConfigError, LinkError) as error:
            return await self._go_back(successor, old, door, error)
        finally:
            if door is not None:
                door.close()
        successor.reloads.took(new)
        successor.acted("reload", changed=changed)
        log.info("reloaded", extra={"changed": changed})
        self._notifier.ready("serving")
        return successor, new

    async def _go_back(
        self, failed: App, old: Settings, door: socket.socket | None, error: ConfigError | LinkError
    ) -> tuple[App | None, Settings]:
        """The new one could not start, for a reason that only a start can tell: the former one is started again."""
        _log_as(old)
        app = App(old, self._clock, failed.heritage)
        try:
            await self._start(app, door)
        except (ConfigError, LinkError) as worse:
            log.error("cannot start again", extra={"reason": str(worse), "after": str(error)})
            return None, old
        self._refuse(app, list(error.problems) if isinstance(error, ConfigError) else [str(error)])
        return app, old

    def _refuse(self, app: App, faults: list[str]) -> None:
        app.reloads.refuse(faults)
        app.acted("reload refused")
        for fault in faults:
            log.error("reload refused", extra={"reason": fault})
        self._notifier.ready("serving; the last reload was refused")


def settle() -> None:
    """Have the garbage collector pass over what is here to stay. Looking through all that was imported and loaded holds
    up the event loop each time, for 20 to 50 ms on a PC and longer on a small board."""
    gc.unfreeze()
    gc.collect()
    gc.freeze()


def _same_door(old: Settings, new: Settings) -> bool:
    """Whether the HTTP door stays where it is: who knocks meanwhile then waits, and is not sent away."""
    ours, theirs = old.config.http, new.config.http
    return theirs.enabled and (ours.host, ours.port) == (theirs.host, theirs.port)


def _log_as(settings: Settings) -> None:
    events.setup(settings.config.monitoring.log_level, settings.config.monitoring.log_format)


async def _feed(notifier: Notifier, app: App, component: Component) -> None:
    """Feed systemd's watchdog while no supervised task is overdue."""
    assert notifier.watchdog_s is not None
    while True:
        overdue = app.supervisor.overdue()
        if overdue:
            component.set(ComponentState.DEGRADED, f"not fed: {', '.join(overdue)} stalled")
        else:
            component.set(ComponentState.UP)
            notifier.watchdog()
        await asyncio.sleep(notifier.watchdog_s / 3)


def _loop_runner() -> Callable[[Coroutine[Any, Any, int]], int]:
    """uvloop where it is installed."""
    try:
        import uvloop
    except ModuleNotFoundError:
        return asyncio.run
    runner: Callable[[Coroutine[Any, Any, int]], int] = uvloop.run
    return runner
