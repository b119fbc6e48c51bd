"""`edge-agent run`: the daemon as a process, from its configuration to its exit code."""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

from agent.app import App
from agent.config import Config
from agent.config_load import load_config
from agent.core.clock import SystemClock
from agent.core.errors import ConfigError, LinkError
from agent.registry.catalog import Catalog, load_catalog
from agent.registry.locate import catalog_path
from agent.sdnotify import Notifier
from agent.supervisor import Component, ComponentState
from agent.telemetry import events

log = logging.getLogger(__name__)


def run(path: Path | None) -> int:
    """Load the configuration, run until SIGTERM or SIGINT. Returns the exit code."""
    config = load_config(path)
    catalog = load_catalog(catalog_path(config.models.catalog))
    handler = events.setup(config.monitoring.log_level, config.monitoring.log_format)
    try:
        return _loop_runner()(_serve(config, catalog))
    finally:
        handler.close()


async def _serve(config: Config, catalog: Catalog) -> int:
    notifier = Notifier()
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    app = App(config, catalog, SystemClock())
    try:
        await app.start()
    except (ConfigError, LinkError) as error:
        log.error("cannot start", extra={"reason": str(error)})
        await app.stop()
        return 2 if isinstance(error, ConfigError) else 1
    if notifier.watchdog_s:
        app.supervisor.spawn("watchdog", lambda component: _feed(notifier, app, component))
    notifier.ready("serving")
    log.info("ready", extra={"gateway": config.gateway.id, "targets": [target.traits.name for target in app.targets]})
    await stop.wait()
    notifier.stopping("draining")
    log.info("stopping")
    await app.stop()
    log.info("stopped")
    return 0


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
