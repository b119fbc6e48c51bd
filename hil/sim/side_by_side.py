"""Runs that do not depend on each other, one for each processor."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Sequence
from typing import TypeVar

T = TypeVar("T")

_jobs: Sequence[Callable[[], object]] = ()


def side_by_side(jobs: Sequence[Callable[[], T]]) -> list[T]:
    """What each job returns, in order. They run in forks of this process: what they read need not be sent to them, and
    what they change is lost."""
    global _jobs
    _jobs = jobs
    try:
        workers = min(len(jobs), os.cpu_count() or 1)
        with multiprocessing.get_context("fork").Pool(workers, _quiet) as pool:
            return pool.map(_run, range(len(jobs)), chunksize=1)  # type: ignore[arg-type]
    finally:
        _jobs = ()


def _quiet() -> None:
    """Ctrl-C reaches every process of a terminal: the one that started us ends us, with SIGTERM."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _run(number: int) -> object:
    return _jobs[number]()
