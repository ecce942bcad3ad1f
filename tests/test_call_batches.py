"""Calls that wait for the same worker become one, and each caller gets its own answer."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from actors.call_batches import CallBatches

DEADLINE_S = 10.0


class Workers:
    """Records its calls and answers each when it is told to."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, list[int]]] = []
        self.arrived = asyncio.Condition()
        self.gate = asyncio.Semaphore(0)
        self.failing: set[int] = set()

    async def __call__(self, worker: int, items: list[int]) -> list[int]:
        async with self.arrived:
            self.calls.append((worker, list(items)))
            self.arrived.notify_all()
        await self.gate.acquire()
        if self.failing & set(items):
            raise ConnectionError("lost")
        return [10 * item for item in items]

    async def called(self, times: int) -> None:
        async with self.arrived:
            await self.arrived.wait_for(lambda: len(self.calls) >= times)


def bounded(law: Callable[[], Awaitable[None]]) -> None:
    async def run() -> None:
        async with asyncio.timeout(DEADLINE_S):
            await law()

    asyncio.run(run())


def test_what_waits_for_a_busy_worker_is_one_call_and_everyone_gets_its_own_result() -> None:
    async def law() -> None:
        workers = Workers()
        batches = CallBatches(1, 100, workers)
        first = asyncio.create_task(batches.submit(1, 10))
        await workers.called(1)
        others = [asyncio.create_task(batches.submit(i, 10)) for i in (2, 3, 4)]
        workers.gate.release()
        await workers.called(2)
        workers.gate.release()
        assert [await task for task in (first, *others)] == [10, 20, 30, 40]
        assert workers.calls == [(0, [1]), (0, [2, 3, 4])]

    bounded(law)


def test_a_batch_never_costs_more_than_the_budget_unless_it_is_a_single_item() -> None:
    async def law() -> None:
        workers = Workers()
        for _ in range(10):
            workers.gate.release()
        batches = CallBatches(1, 25, workers)
        assert await asyncio.gather(*(batches.submit(i, cost) for i, cost in enumerate((10, 10, 10, 99, 10)))) == [
            0, 10, 20, 30, 40,
        ]  # fmt: skip
        assert [items for _, items in workers.calls] == [[0, 1], [2], [3], [4]]

    bounded(law)


def test_idle_workers_take_calls_at_the_same_time() -> None:
    async def law() -> None:
        workers = Workers()
        batches = CallBatches(2, 100, workers)
        first = asyncio.create_task(batches.submit(1, 1))
        await workers.called(1)
        second = asyncio.create_task(batches.submit(2, 1))
        await workers.called(2)  # before the first one has its answer
        assert workers.calls == [(0, [1]), (1, [2])]
        for _ in range(2):
            workers.gate.release()
        assert await asyncio.gather(first, second) == [10, 20]

    bounded(law)


def test_a_call_that_fails_fails_every_item_of_its_batch_and_frees_the_worker() -> None:
    async def law() -> None:
        workers = Workers()
        workers.failing = {3}
        batches = CallBatches(1, 100, workers)
        for _ in range(3):
            workers.gate.release()
        found = await asyncio.gather(*(batches.submit(i, 1) for i in (2, 3)), return_exceptions=True)
        assert all(isinstance(error, ConnectionError) for error in found)
        assert await batches.submit(4, 1) == 40

    bounded(law)


def test_a_submitter_that_is_cancelled_leaves_its_batch_alone() -> None:
    async def law() -> None:
        workers = Workers()
        batches = CallBatches(1, 100, workers)
        leaving, staying = (asyncio.create_task(batches.submit(i, 1)) for i in (1, 2))
        await workers.called(1)
        leaving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await leaving
        workers.gate.release()
        assert await staying == 20

    bounded(law)
