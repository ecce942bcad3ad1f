"""Waiting calls become one call: what arrives while every worker computes is served together by the next free one.

No timer and no wish to wait: an idle worker takes what is there, a busy one lets a batch grow up to its budget.
A batch whose worker is lost goes to the next free one.
May import: asyncio.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


class LostError(Exception):
    """The worker of a call is lost, and cares for itself: ``put_back`` follows, or ``give_up``.

    ``cause``: what is raised when the batch is not tried again.
    """

    def __init__(self, cause: BaseException) -> None:
        self.cause = cause
        super().__init__(cause)


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
            occupied for ever; whatever it raises is raised by the ``submit`` of every item of the batch, but a
            LostError sends the batch to the next worker, ``max_attempts`` workers in all.
        budget: highest total cost of a batch; an item that costs more is a batch of its own.
    """

    def __init__(
        self,
        num_workers: int,
        budget: int,
        call: Callable[[int, list[Item]], Awaitable[Sequence[Result]]],
        max_attempts: int = 1,
    ) -> None:
        self._call, self._budget, self._max_attempts = call, budget, max_attempts
        self._num_workers = num_workers
        self._free: asyncio.Queue[int | BaseException] = asyncio.Queue()
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

    def put_back(self, worker: int) -> None:
        """A lost worker is there again."""
        self._free.put_nowait(worker)

    def give_up(self, error: BaseException) -> None:
        """A lost worker does not come back; with the last one every batch fails."""
        self._num_workers -= 1
        if not self._num_workers:
            self._free.put_nowait(error)

    async def _serve(self, batch: _Batch[Item, Result]) -> Sequence[Result]:
        tries = 0
        while True:
            # First come, first served; it ends because every call has a deadline, and every restart.
            worker = await self._free.get()
            if self._open is batch:
                self._open = None
            if isinstance(worker, BaseException):
                self._free.put_nowait(worker)
                raise worker
            is_lost = False
            try:
                return await self._call(worker, batch.items)
            except LostError as lost:
                is_lost = True
                tries += 1
                if tries == self._max_attempts:
                    raise lost.cause from lost
            finally:
                if not is_lost:
                    self._free.put_nowait(worker)
