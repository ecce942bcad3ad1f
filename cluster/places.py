"""Places of a role whose workers come and go: the slots of its layout, and further ones while the cluster has room.

May import: the modules of this room.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from cluster.layout import SMALLEST_SHARE, WorkerSlot
from cluster.placement import Placement


class Places:
    """``slots``: of the layout, all taken.  ``placement`` None: in this process there is always room."""

    def __init__(self, slots: Sequence[WorkerSlot], placement: Placement | None, deadline_s: float) -> None:
        self._planned = {slot.index for slot in slots}
        self._model, self._placement, self._deadline_s = slots[0], placement, deadline_s
        self._free: list[WorkerSlot] = []
        self._next = max(self._planned) + 1

    async def take(self) -> WorkerSlot:
        """A free slot of the layout whose node is alive, else a new one like them, on any node that has room.

        A new one has GPUs of its own as the others have, and next to nothing of Ray's count of CPUs, which the
        layout has divided up already; its threads may run on every core of the node.

        Raises:
            DeadlineError: the cluster has no room.
        """
        for slot in self._free:
            if self._placement is None or self._placement.stands(slot):
                self._free.remove(slot)
                return slot
        slot = replace(self._model, index=self._next, cpus=SMALLEST_SHARE, cpu_ids=(), shared_gpu=None)
        self._next += 1
        if self._placement is not None:
            await self._placement.grow(slot, self._deadline_s)
        return slot

    def give_back(self, slot: WorkerSlot) -> None:
        """The worker of ``slot`` has ended."""
        if slot.index in self._planned:
            self._free.append(slot)
        elif self._placement is not None:
            self._placement.shrink(slot)
