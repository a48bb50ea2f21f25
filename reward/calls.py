"""Running somebody else's code from an event loop without ever waiting for it beyond a limit."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class _Returned(Generic[T]):
    value: T


@dataclass(frozen=True, slots=True)
class _Raised:
    error: BaseException


async def in_thread(function: Callable[[], T]) -> T:
    """The result of a blocking function, run in a new daemon thread. Raises what it raises.

    Not a thread pool: calls that hang would fill the pool, and Python waits for pool threads before it ends.
    """
    loop = asyncio.get_running_loop()
    outcome: asyncio.Future[_Returned[T] | _Raised] = loop.create_future()

    def deliver(found: _Returned[T] | _Raised) -> None:
        if not outcome.done():  # done when the caller has stopped waiting
            outcome.set_result(found)

    def run() -> None:
        found: _Returned[T] | _Raised
        try:
            found = _Returned(function())
        except BaseException as error:  # noqa: BLE001 - raised again where the result is awaited
            found = _Raised(error)
        if not loop.is_closed():
            loop.call_soon_threadsafe(deliver, found)

    threading.Thread(target=run, daemon=True, name="reward call").start()
    found = await outcome
    if isinstance(found, _Returned):
        return found.value
    if isinstance(found.error, Exception):
        raise found.error
    # SystemExit and the like would end the whole worker's event loop.
    raise RuntimeError(f"{type(found.error).__name__} raised by the reward: {found.error}") from found.error


async def within(seconds: float, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, or TimeoutError after `seconds`.

    Unlike asyncio.wait_for it does not wait for the cancelled work to end, which may refuse to.
    """
    task = asyncio.ensure_future(work)
    try:
        done, _ = await asyncio.wait({task}, timeout=seconds)
    finally:
        task.cancel()
    if not done:
        raise TimeoutError(f"no answer within {seconds:g} s")
    if task.cancelled():  # passed on as it is, it would look as if our own caller had been cancelled
        raise RuntimeError("the call cancelled itself")
    return task.result()


async def together(works: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """All results in order, computed at the same time. The first error cancels the others and is raised.

    Unlike a task group it does not wait for the cancelled ones to end, and raises the error itself.
    """
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
