"""Waiting calls become one call: what arrives while every worker computes is served together by the next free one.

No timer and no wish to wait: an idle worker takes what is there, a busy one lets a batch grow up to its budget.
May import: asyncio.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


class _Batch(Generic[Item, Result]):
    """Items that will be served by one call; the task is that call, the wait for a worker included."""

    def __init__(self) -> None:
        self.items: list[Item] = []
        self.cost = 0
        self.task: asyncio.Task[Sequence[Result]]


class CallBatches(Generic[Item, Result]):
    """``submit`` gives the item's own result.

    Args:
        call: worker, items -> one result for each item, in their order.  It has a deadline, so that no worker is
            occupied for ever; whatever it raises is raised by the ``submit`` of every item of the batch.
        budget: highest total cost of a batch; an item that costs more is a batch of its own.
    """

    def __init__(
        self, num_workers: int, budget: int, call: Callable[[int, list[Item]], Awaitable[Sequence[Result]]]
    ) -> None:
        self._call, self._budget = call, budget
        self._free: asyncio.Queue[int] = asyncio.Queue()
        for worker in range(num_workers):
            self._free.put_nowait(worker)
        self._open: _Batch[Item, Result] | None = None

    async def submit(self, item: Item, cost: int) -> Result:
        """The result of ``item``.  A submitter that is cancelled leaves the rest of its batch alone."""
        batch = self._open
        if batch is None or batch.cost + cost > self._budget:
            batch = self._open = _Batch()
            batch.task = asyncio.create_task(self._serve(batch))
        place = len(batch.items)
        batch.items.append(item)
        batch.cost += cost
        results = await asyncio.shield(batch.task)
        return results[place]

    async def _serve(self, batch: _Batch[Item, Result]) -> Sequence[Result]:
        worker = await self._free.get()  # first come, first served; it ends because every call has a deadline
        if self._open is batch:
            self._open = None
        try:
            return await self._call(worker, batch.items)
        finally:
            self._free.put_nowait(worker)
