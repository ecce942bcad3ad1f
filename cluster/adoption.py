"""Nodes that join a live cluster and leave it, and how many workers of one role follow them: pure.

    present at the start --> known: the layout has decided what is there
    joined --admit--> candidate: its room is used while fewer than ``maximum`` workers are wanted
    left: what was added for the node is wanted no more

Room that workers which are wanted and have no place yet will take is not given away twice.
May import: the modules of this room.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from cluster.layout import NodeSupply


@dataclass(frozen=True, slots=True)
class Room:
    """Of one live node: how many workers of the role it holds when full, and how many it holds now."""

    capacity: int
    num_held: int = 0


@dataclass(frozen=True, slots=True)
class Look:
    """What one look at the cluster found, in the order in which it is to be acted upon."""

    left: Mapping[str, int]  # node -> workers that are wanted no more
    joined: tuple[str, ...]
    added: Mapping[str, int]  # node -> further workers that are wanted, there


def capacity(node: NodeSupply, gpus_per_worker: float) -> int:
    """How many workers an empty node holds: by its GPUs, or one that has all its cores."""
    if gpus_per_worker >= 1:
        return int(node.num_gpus // gpus_per_worker)
    if gpus_per_worker > 0:
        return node.num_gpus * math.floor(1 / gpus_per_worker + 1e-9)
    return int(node.num_cpus >= 1)


class Adoption:
    """Nodes are known by ids that are never used again: a node that comes back is another one."""

    def __init__(self, present: Iterable[str], maximum: int | None) -> None:
        """``maximum`` workers in all; None: nodes come and go, and nothing is added for them."""
        self.maximum = maximum
        self._present = dict.fromkeys(present)
        self._added: dict[str, int] = {}  # of each candidate

    def admit(self, node: str) -> None:
        """A node that joined is fit to hold workers."""
        if node in self._present:
            self._added.setdefault(node, 0)

    def settle(self) -> None:
        """Somebody has said how many workers there are to be: nodes that are there now add and take nothing."""
        self._added.clear()

    def look(self, nodes: Mapping[str, Room], num_wanted: int) -> Look:
        """``nodes``: all that are alive; ``num_wanted``: workers that there are to be, as it is before this look."""
        left = {node: self._added.pop(node, 0) for node in self._present if node not in nodes}
        joined = tuple(node for node in nodes if node not in self._present)
        self._present = dict.fromkeys(nodes)
        num_wanted -= sum(left.values())
        num_unplaced = max(0, num_wanted - sum(room.num_held for room in nodes.values()))
        added: dict[str, int] = {}
        for node in self._added if self.maximum is not None else ():
            free = max(0, nodes[node].capacity - nodes[node].num_held)
            num_unplaced, free = max(0, num_unplaced - free), max(0, free - num_unplaced)
            number = min(free, (self.maximum or 0) - num_wanted)
            if number > 0:
                added[node] = number
                self._added[node] += number
                num_wanted += number
        return Look(left, joined, added)
