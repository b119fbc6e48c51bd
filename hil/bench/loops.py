"""The event loop that the daemon would run on here."""

from __future__ import annotations

import asyncio


def runner() -> asyncio.Runner:
    """On uvloop where it is installed, as the daemon."""
    try:
        import uvloop
    except ModuleNotFoundError:
        return asyncio.Runner()
    return asyncio.Runner(loop_factory=uvloop.new_event_loop)
