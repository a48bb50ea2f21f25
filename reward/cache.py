"""Results by key, each computed once: asked for at the same time, all askers share one computation."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Coroutine, Hashable
from typing import Any, Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class SharedResults(Generic[K, V]):
    """Keeps the `size` results used last. Errors are raised to all who share the call, and never kept."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._kept: OrderedDict[K, V] = OrderedDict()
        self._running: dict[K, asyncio.Task[V]] = {}

    async def get(self, key: K, compute: Callable[[], Coroutine[Any, Any, V]]) -> V:
        """The kept result, that of a running computation, or that of `compute()`."""
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        if key not in self._running:
            task = asyncio.ensure_future(compute())
            self._running[key] = task
            task.add_done_callback(lambda ended: self._ended(key, ended))
        # Shielded: an asker who gives up must not take the result from the others.
        return await asyncio.shield(self._running[key])

    def close(self) -> None:
        """Cancel what still runs."""
        for task in self._running.values():
            task.cancel()

    def _ended(self, key: K, task: asyncio.Task[V]) -> None:
        del self._running[key]
        if task.cancelled() or task.exception() is not None:
            return
        self._kept[key] = task.result()
        if len(self._kept) > self._size:
            self._kept.popitem(last=False)
