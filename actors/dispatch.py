"""Which worker takes the next job: the least loaded one with room.  Pure, with one rule for every role.

A prompt group is one job, so its samples share one engine and one prefix.  A job that returns to a
prompt (the same ``affinity``) goes back to the engine that knows it, unless that engine is busier
than the idlest by more than the job itself.  Workers come and go, and one that is held gets nothing new.

A job is bound late: where there is a limit, what no worker has room for waits outside, so that it can go to a worker
that is faster than expected, or that has only just come.
May import: the standard library.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable

REMEMBERED = 4096  # affinities; older ones have left the prefix cache anyway


class Dispatcher:
    """Loads are in tokens that were handed out and have not come back.

    Args:
        room: samples that one worker may have at a time; a larger job has a worker for itself.  None: any number.
    """

    def __init__(self, num_workers: int = 0, room: int | None = None) -> None:
        self._room = room
        self._load = dict.fromkeys(range(num_workers), 0)
        self._size = dict.fromkeys(range(num_workers), 0)  # samples
        self._held: set[int] = set()
        self._home: OrderedDict[Hashable, int] = OrderedDict()

    def add(self, worker: int) -> None:
        """A worker that takes jobs from now on."""
        self._load[worker] = self._size[worker] = 0

    def remove(self, worker: int) -> None:
        """A worker that has gone; its jobs count no more."""
        self._load.pop(worker, None)
        self._size.pop(worker, None)
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

    def with_room(self, size: int = 1) -> tuple[int, ...]:
        """Open workers that have room for a job of ``size`` samples."""
        if self._room is None:
            return self.open
        return tuple(w for w in self.open if not self._size[w] or self._size[w] + size <= self._room)

    def assign(self, cost: int, affinity: Hashable | None = None, size: int = 1) -> int:
        """The worker for a job of ``cost`` tokens and ``size`` samples; call ``done`` with these when it is finished.

        Raises:
            LookupError: no worker is open and has room.
        """
        workers = self.with_room(size)
        if not workers:
            raise LookupError("no worker takes jobs")
        idlest = min(workers, key=lambda i: (self._load[i], i))
        home = self._home.get(affinity, idlest) if affinity is not None else idlest
        stays = home in workers and self._load[home] - self._load[idlest] <= cost
        chosen = home if stays else idlest
        self._load[chosen] += cost
        self._size[chosen] += size
        if affinity is not None:
            self._home[affinity] = chosen
            self._home.move_to_end(affinity)
            if len(self._home) > REMEMBERED:
                self._home.popitem(last=False)
        return chosen

    def done(self, worker: int, cost: int, size: int = 1) -> None:
        """A job is finished or was taken back; nothing for a worker that has gone."""
        if worker in self._load:
            self._load[worker] -= cost
            self._size[worker] -= size

    @property
    def loads(self) -> tuple[int, ...]:
        return tuple(self._load.values())
