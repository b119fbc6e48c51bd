"""A time limit that costs nothing where nothing is waited for."""

from __future__ import annotations

import asyncio
import types
from collections.abc import Awaitable, Generator
from typing import Any, TypeVar

T = TypeVar("T")


async def within(seconds: float, awaitable: Awaitable[T]) -> T:
    """`async with asyncio.timeout(seconds): return await awaitable`, without a timer if it ends before it waits.

    A timer of the event loop costs more than many of the things that it limits. Raises `TimeoutError`.
    """
    steps: Generator[Any, Any, T] = awaitable.__await__()
    try:
        first = next(steps)
    except StopIteration as done:
        result: T = done.value
        return result
    async with asyncio.timeout(seconds):
        return await _rest(steps, first)


@types.coroutine
def _rest(steps: Generator[Any, Any, T], step: Any) -> Generator[Any, Any, T]:
    """`yield from steps`, of which the first was taken already."""
    while True:
        try:
            yield step
        except BaseException as error:
            try:
                step = steps.throw(error)
            except StopIteration as done:
                result: T = done.value
                return result
        else:
            return (yield from steps)
