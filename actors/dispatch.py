"""Which worker takes the next job: the least loaded one.  Pure, with one rule for every role.

A prompt group is one job, so its samples share one engine and one prefix.  A job that returns to a
prompt (the same ``affinity``) goes back to the engine that knows it, unless that engine is busier
than the idlest by more than the job itself.  Workers come and go, and one that is held gets nothing new.
May import: the standard library.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable

REMEMBERED = 4096  # affinities; older ones have left the prefix cache anyway


class Dispatcher:
    """Loads are in tokens that were handed out and have not come back."""

    def __init__(self, num_workers: int = 0) -> None:
        self._load = dict.fromkeys(range(num_workers), 0)
        self._held: set[int] = set()
        self._home: OrderedDict[Hashable, int] = OrderedDict()

    def add(self, worker: int) -> None:
        """A worker that takes jobs from now on."""
        self._load[worker] = 0

    def remove(self, worker: int) -> None:
        """A worker that has gone; its jobs count no more."""
        self._load.pop(worker, None)
        self._held.discard(worker)

    def hold(self, worker: int) -> None:
        """No new jobs for this worker, until :meth:`release`."""
        if worker in self._load:
            self._held.add(worker)

    def release(self, worker: int) -> None:
        self._held.discard(worker)

    @property
    def open(self) -> tuple[int, ...]:
        """Workers that a job may be given to."""
        return tuple(worker for worker in self._load if worker not in self._held)

    def assign(self, cost: int, affinity: Hashable | None = None) -> int:
        """The worker for a job of ``cost`` tokens; call ``done`` with both when it is finished.

        Raises:
            LookupError: no worker is open.
        """
        workers = self.open
        if not workers:
            raise LookupError("no worker takes jobs")
        idlest = min(workers, key=lambda i: (self._load[i], i))
        home = self._home.get(affinity, idlest) if affinity is not None else idlest
        stays = home in workers and self._load[home] - self._load[idlest] <= cost
        chosen = home if stays else idlest
        self._load[chosen] += cost
        if affinity is not None:
            self._home[affinity] = chosen
            self._home.move_to_end(affinity)
            if len(self._home) > REMEMBERED:
                self._home.popitem(last=False)
        return chosen

    def done(self, worker: int, cost: int) -> None:
        """A job is finished or was taken back; nothing for a worker that has gone."""
        if worker in self._load:
            self._load[worker] -= cost

    @property
    def loads(self) -> tuple[int, ...]:
        return tuple(self._load.values())
