"""A thread that goes on: what its work raises is named, and the work is begun again."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

log = logging.getLogger(__name__)

AGAIN_S = 1.0
"""Between a failure and the next try."""


def lasting_thread(name: str, work: Callable[[], None], again_s: float = AGAIN_S) -> threading.Thread:
    """Start a daemon thread that ends when `work` returns. `work` must bear being called again after it raised."""

    def run() -> None:
        while True:
            try:
                return work()
            except Exception:  # the one place where any fault of a thread is caught: it is named, and the work goes on
                log.exception("thread failed", extra={"component": name})
            threading.Event().wait(again_s)

    thread = threading.Thread(target=run, name=name, daemon=True)
    thread.start()
    return thread
