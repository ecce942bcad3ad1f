"""What became of a call, as a value.  May import: asyncio."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Outcome(Generic[T]):
    """A result, or the error that came instead."""

    result: T | None
    error: BaseException | None

    def value(self) -> T:
        """The result; the error is raised."""
        if self.error is not None:
            raise self.error
        return self.result  # type: ignore[return-value]


async def outcome(call: Coroutine[Any, Any, T]) -> Outcome[T]:
    """What became of ``call``, whose failure concerns whoever reads it; being cancelled, it cancels the call."""
    task = asyncio.ensure_future(call)
    try:
        await asyncio.wait((task,))
    finally:
        task.cancel()
    error = task.exception()
    return Outcome(None, error) if error is not None else Outcome(task.result(), None)
