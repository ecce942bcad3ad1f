"""Which worker takes the next job: the least loaded one.  Pure, with one rule for every role.

A prompt group is one job, so its samples share one engine and one prefix.  A job that returns to a
prompt (the same ``affinity``) goes back to the engine that knows it, unless that engine is busier
than the idlest by more than the job itself.
May import: the standard library.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable

REMEMBERED = 4096  # affinities; older ones have left the prefix cache anyway


class Dispatcher:
    """Loads are in tokens that were handed out and have not come back."""

    def __init__(self, num_workers: int) -> None:
        self._load = [0] * num_workers
        self._home: OrderedDict[Hashable, int] = OrderedDict()

    def assign(self, cost: int, affinity: Hashable | None = None) -> int:
        """The worker for a job of ``cost`` tokens; call ``done`` with both when it is finished."""
        idlest = min(range(len(self._load)), key=lambda i: (self._load[i], i))
        home = self._home.get(affinity) if affinity is not None else None
        chosen = home if home is not None and self._load[home] - self._load[idlest] <= cost else idlest
        self._load[chosen] += cost
        if affinity is not None:
            self._home[affinity] = chosen
            self._home.move_to_end(affinity)
            if len(self._home) > REMEMBERED:
                self._home.popitem(last=False)
        return chosen

    def done(self, worker: int, cost: int) -> None:
        self._load[worker] -= cost

    @property
    def loads(self) -> tuple[int, ...]:
        return tuple(self._load)
