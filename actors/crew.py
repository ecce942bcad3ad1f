"""Workers that hold no state of the run: one that dies is started again in its place, and its work is done again.

May import: actors.membership, cluster.*.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from actors.membership import Event, no_event
from cluster.errors import WorkerError
from cluster.outcomes import outcome
from cluster.places import Places
from cluster.settings import HealthSettings
from cluster.worker_group import WorkerGroup

GRANT_DEADLINE_S = 60.0  # for a place on another node when a worker's own has died


class Crew:
    """Restarts lost workers of one group in the background.

    ``on_back`` hears of a worker that is there again; ``on_gone`` of one that could not be started
    ``health.max_attempts`` times in a row, with the error.
    """

    def __init__(
        self,
        workers: WorkerGroup,
        on_back: Callable[[int], None],
        on_gone: Callable[[int, WorkerError], None],
        health: HealthSettings | None = None,
        event: Event = no_event,
    ) -> None:
        self.workers, self.health, self.event = workers, health or HealthSettings(), event
        self._on_back, self._on_gone = on_back, on_gone
        self._places = Places([workers.slot(i) for i in workers.indices], workers.placement, GRANT_DEADLINE_S)
        self._starts = dict.fromkeys(workers.indices, 0)  # how often each was started again
        self._mending: dict[int, asyncio.Task[None]] = {}
        self._closed = False

    def start_of(self, worker: int) -> int:
        """Which start of the worker a call made now speaks to; for :meth:`lost`."""
        return self._starts[worker]

    def lost(self, worker: int, start: int, error: BaseException, num_groups: int) -> bool:
        """A call found that start of the worker dead; others may have before.  Whether it is being mended now."""
        if self._closed:  # it is ended with its group; calls that nobody waits for any more may still be under way
            return False
        name = f"{self.workers.name}-{worker}"
        if start == self._starts[worker] and worker not in self._mending:
            self.event("worker_died", role=self.workers.name, worker=name, reason=str(error))
            task = self._mending[worker] = asyncio.create_task(self._mend(worker, name))
            task.add_done_callback(lambda _: self._mending.pop(worker, None))
        self.event("call_failed", role=self.workers.name, worker=name, num_groups=num_groups, reason=str(error))
        return worker in self._mending

    async def close(self) -> None:
        """No more restarts: the group is about to be shut down."""
        self._closed = True
        tasks = list(self._mending.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _restart(self, worker: int) -> None:
        """In its own place while that node is alive, else wherever there is room."""
        slot = await self._places.take()
        try:
            await self.workers.restart(worker, slot)
        except BaseException:
            self.workers.end(worker)
            self._places.give_back(slot)
            raise

    async def _mend(self, worker: int, name: str) -> None:
        started = time.perf_counter()
        self.workers.end(worker)
        self._places.give_back(self.workers.slot(worker))
        for attempt in range(1, self.health.max_attempts + 1):
            restarted = await outcome(self._restart(worker))
            if restarted.error is None:
                self._starts[worker] += 1
                took_s = round(time.perf_counter() - started, 3)
                self.event("worker_replaced", role=self.workers.name, worker=name, by=name, recover_s=took_s)
                self._on_back(worker)
                return
            reason = f"{type(restarted.error).__name__}: {restarted.error}"
            self.event("start_failed", role=self.workers.name, worker=name, reason=reason, attempt=attempt)
        self._on_gone(worker, WorkerError(f"{name} could not be started {attempt} times in a row, the last: {reason}"))
