"""Places of a role whose workers come and go: the slots of its layout, those of nodes that were adopted, and further
ones while the cluster has room.

May import: the modules of this room.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace

from cluster.layout import SMALLEST_SHARE, WorkerSlot
from cluster.placement import Placement


class Places:
    """``slots``: of the layout, all taken.  ``placement`` None: in this process there is always room."""

    def __init__(self, slots: Sequence[WorkerSlot], placement: Placement | None, deadline_s: float) -> None:
        self._planned = {slot.index for slot in slots}
        self._model, self._placement, self._deadline_s = slots[0], placement, deadline_s
        self._adopted: dict[int, str] = {}  # slot -> the node it is bound to
        self._free: list[WorkerSlot] = []
        self._growing: dict[int, asyncio.Future[None]] = {}  # slots of adopted nodes that wait for their room
        self._next = max(self._planned) + 1

    async def take(self) -> WorkerSlot:
        """A free slot of the layout or of an adopted node, if that node is alive, else a new one where there is room.

        A new one has GPUs of its own as the others have, and next to nothing of Ray's count of CPUs, which the
        layout has divided up already; its threads may run on every core of the node.

        Raises:
            DeadlineError: the cluster has no room.
        """
        while True:
            slot = next((slot for slot in self._free if self._stands(slot)), None)
            if slot is None:
                slot = self._new()
            else:
                self._free.remove(slot)
                if slot.index in self._planned:
                    return slot
            if self._placement is None or await self._grown(self._placement, slot):
                return slot

    async def _grown(self, placement: Placement, slot: WorkerSlot) -> bool:
        """Whether there is room for ``slot`` now; no when its node is forgotten meanwhile, which Ray would wait for."""
        node_id = self._adopted.get(slot.index)
        growing = asyncio.ensure_future(placement.grow(slot, self._deadline_s, node_id))
        if node_id is not None:
            self._growing[slot.index] = growing
        try:
            await growing
        except BaseException as error:
            if slot.index in self._adopted:
                self._free.append(slot)
            task = asyncio.current_task()
            if isinstance(error, asyncio.CancelledError) and task is not None and not task.cancelling():
                return False  # it was the wait alone that was cancelled
            raise
        finally:
            self._growing.pop(slot.index, None)
        return True

    def give_back(self, slot: WorkerSlot) -> None:
        """The worker of ``slot`` has ended."""
        if slot.index not in self._planned and self._placement is not None:
            self._placement.shrink(slot)
        if slot.index in self._planned or slot.index in self._adopted:
            self._free.append(slot)

    def adopt(self, node_id: str, number: int) -> None:
        """``number`` more slots, free and on this node only."""
        for _ in range(number):
            slot = self._new()
            self._adopted[slot.index] = node_id
            self._free.append(slot)

    def forget(self, node_id: str) -> None:
        """An adopted node has gone: its slots are not used again, and who waits for one is given another.  The workers
        in them end by themselves.
        """
        for index, growing in self._growing.items():
            if self._adopted.get(index) == node_id:
                growing.cancel()
        self._adopted = {index: node for index, node in self._adopted.items() if node != node_id}
        self._free = [slot for slot in self._free if slot.index in self._planned or slot.index in self._adopted]

    def _new(self) -> WorkerSlot:
        self._next += 1
        return replace(self._model, index=self._next - 1, cpus=SMALLEST_SHARE, cpu_ids=(), shared_gpu=None)

    def _stands(self, slot: WorkerSlot) -> bool:
        if self._placement is None:
            return True
        node_id = self._adopted.get(slot.index)
        return self._placement.stands(slot) if node_id is None else self._placement.is_alive(node_id)
