"""Many calls, a few at a time.

May import: nothing of Burnish.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

A = TypeVar("A")
B = TypeVar("B")


async def in_lanes(num_lanes: int, items: Sequence[A], work: Callable[[A], Awaitable[B]]) -> list[B]:
    """``work`` of every item, in order, at most ``num_lanes`` at a time.  Raises what the first lane raised."""
    found: dict[int, B] = {}
    waiting = iter(enumerate(items))

    async def lane() -> None:
        for index, item in waiting:
            found[index] = await work(item)

    try:
        async with asyncio.TaskGroup() as lanes:
            for _ in range(min(num_lanes, len(items))):
                lanes.create_task(lane())
    except ExceptionGroup as failures:
        raise failures.exceptions[0] from failures  # the lanes beside it were only cancelled
    return [found[index] for index in range(len(items))]
