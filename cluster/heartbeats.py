"""Heartbeats: drives a :class:`cluster.health.Health` with real time and real questions.

One task for any number of members: it sleeps until the machine wants to be asked, sends the probes it asks for and
tells its owner of every change.  May import: asyncio and the modules of this room.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Callable

from cluster.errors import DeadlineError, WorkerError
from cluster.health import Dead, Health, Probe, Suspect


class Heartbeats:
    """``ping(member)`` asks a member; ``on_change`` hears of suspects, deaths and (a number) recoveries.

    ``ping`` may raise WorkerError (the member is dead) or DeadlineError (it said nothing, which ``health`` notices).
    """

    def __init__(
        self,
        health: Health,
        ping: Callable[[int], Awaitable[object]],
        on_change: Callable[[Suspect | Dead | int], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.health, self.clock = health, clock
        self._ping, self._on_change = ping, on_change
        self._woken = asyncio.Event()
        self._probes: set[asyncio.Task[None]] = set()

    def join(self, member: int, start_s: float) -> None:
        self.health.join(member, self.clock(), start_s)
        self._woken.set()

    def started(self, member: int) -> None:
        self.health.started(member, self.clock())
        self._woken.set()

    def heard(self, member: int) -> None:
        """Any answer of a member is a heartbeat."""
        if self.health.heard(member, self.clock()):
            self._on_change(member)

    def failed(self, member: int, reason: str) -> None:
        """The member has certainly ended."""
        dead = self.health.failed(member, self.clock(), reason)
        if dead is not None:
            self._on_change(dead)

    async def run(self) -> None:
        """Until cancelled."""
        try:
            while True:
                for action in self.health.tick(self.clock()):
                    if isinstance(action, Probe):
                        probe = asyncio.create_task(self._ask(action.member))
                        self._probes.add(probe)
                        probe.add_done_callback(self._probes.discard)
                    else:
                        self._on_change(action)
                self._woken.clear()
                due = self.health.next_wake()
                try:
                    async with asyncio.timeout(None if math.isinf(due) else max(0.0, due - self.clock())):
                        await self._woken.wait()
                except TimeoutError:
                    continue
        finally:
            for probe in set(self._probes):
                probe.cancel()

    async def _ask(self, member: int) -> None:
        try:
            await self._ping(member)
        except DeadlineError:
            return
        except WorkerError as error:
            self.failed(member, str(error))
        else:
            self.heard(member)
