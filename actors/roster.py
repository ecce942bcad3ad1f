"""Who takes part in pushes: the generators that are in, each with the event of its going.

A member is in from its first completed push until it leaves or is expelled, and never again after that: a worker
started in its place is another member.  Fleet and publisher share one roster and see each change at once.
May import: asyncio.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class MemberGoneError(Exception):
    """The member that was to do the work has gone; ``reason`` says why."""

    def __init__(self, name: str, reason: str) -> None:
        self.name, self.reason = name, reason
        super().__init__(name, reason)

    def __str__(self) -> str:
        return f"{self.name} has gone: {self.reason}"


class Member:
    """One generator.  ``reason`` is empty until it goes."""

    def __init__(self, index: int, name: str) -> None:
        self.index, self.name, self.reason = index, name, ""
        self.silent_s = 0.0  # since its last sign of life, when it was found dead
        self.num_running = 0  # groups that it samples
        self.idle = asyncio.Event()
        self.idle.set()
        self._gone = asyncio.Event()

    @property
    def gone(self) -> bool:
        return self._gone.is_set()

    def go(self, reason: str) -> None:
        """Ends every wait in :meth:`during`.  The first reason stays."""
        if not self.gone:
            self.reason = reason
            self._gone.set()

    async def during(self, call: Coroutine[Any, Any, T]) -> T:
        """Result of ``call``.  MemberGoneError as soon as the member goes; the call is then cancelled."""
        task, gone = asyncio.ensure_future(call), asyncio.ensure_future(self._gone.wait())
        try:
            await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                return task.result()
            raise MemberGoneError(self.name, self.reason)
        finally:
            for waiting in (task, gone):
                waiting.cancel()
            await asyncio.gather(task, gone, return_exceptions=True)


class Roster:
    """``expel`` is set by whoever owns the members; until then it only strikes them off."""

    def __init__(self) -> None:
        self._members: dict[int, Member] = {}
        self.on_expel: Callable[[Member], None] | None = None
        self.last_reason = ""  # why the last one was expelled

    def __len__(self) -> int:
        return len(self._members)

    @property
    def members(self) -> tuple[Member, ...]:
        """Those that are in, by index."""
        return tuple(self._members[index] for index in sorted(self._members))

    def admit(self, member: Member) -> None:
        self._members[member.index] = member

    def strike(self, member: Member, reason: str) -> None:
        """It went as it was asked to."""
        self._members.pop(member.index, None)
        member.go(reason)

    def expel(self, member: Member, reason: str) -> None:
        """It failed: its work is taken back at once.  Nothing when it has gone already."""
        if member.gone:
            return
        self.strike(member, reason)
        self.last_reason = f"{member.name}: {reason}"
        if self.on_expel is not None:
            self.on_expel(member)
