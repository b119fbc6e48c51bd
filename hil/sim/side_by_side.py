"""Runs that do not depend on each other, one for each processor."""

from __future__ import annotations

import multiprocessing
import os
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
        with multiprocessing.get_context("fork").Pool(min(len(jobs), os.cpu_count() or 1)) as pool:
            return pool.map(_run, range(len(jobs)), chunksize=1)  # type: ignore[arg-type]
    finally:
        _jobs = ()


def _run(number: int) -> object:
    return _jobs[number]()
