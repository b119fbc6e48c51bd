"""`within` is `asyncio.timeout` around an await, whether or not anything is waited for."""

import asyncio

import pytest

from agent.core.within import within


async def at_once() -> int:
    return 7


async def fails_at_once() -> int:
    raise ValueError("at once")


async def later(seconds: float = 0.001) -> int:
    for _ in range(3):
        await asyncio.sleep(seconds)
    return 7


async def fails_later() -> int:
    await asyncio.sleep(0)
    raise ValueError("later")


async def test_results_and_errors_pass() -> None:
    assert await within(5, at_once()) == 7
    assert await within(5, later()) == 7
    assert await within(5, later(0)) == 7
    assert await within(-1, at_once()) == 7
    for failing in (fails_at_once(), fails_later()):
        with pytest.raises(ValueError, match=r"at once|later"):
            await within(5, failing)


async def test_what_waits_too_long_is_cancelled() -> None:
    cancelled = False

    async def waits() -> None:
        nonlocal cancelled
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            cancelled = True
            raise

    with pytest.raises(TimeoutError):
        await within(0.001, waits())
    assert cancelled


async def test_a_future_that_is_awaited_first() -> None:
    future: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    asyncio.get_running_loop().call_soon(future.set_result, 7)
    assert await within(5, future) == 7


async def test_the_callers_own_cancellation_passes_through() -> None:
    async def stubborn() -> int:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            await asyncio.sleep(0)
            return 7
        return 0

    task = asyncio.ensure_future(within(60, later(60)))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    task = asyncio.ensure_future(within(60, stubborn()))
    await asyncio.sleep(0)
    task.cancel()
    assert await task == 7


async def test_closing_what_is_suspended_closes_what_it_waits_for() -> None:
    closed = False

    async def waits() -> None:
        nonlocal closed
        try:
            await asyncio.sleep(60)
        finally:
            closed = True

    task = asyncio.ensure_future(within(60, waits()))
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait([task])
    assert closed
