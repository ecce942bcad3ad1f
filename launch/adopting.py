"""Nodes that join the Ray cluster of a live run or leave it, and what becomes of the generators there.

    joined    with health.adopt_up_to it is looked at as every node was before the run began; when nothing speaks
              against it, generators are started on it through the same path as `burnish scale`
    left      its generators are dead, those that start too; what was added for the node is wanted no more

cluster/adoption.py decides, this file looks and acts.  May import: actors.{generator_fleet, membership}, cluster.*,
launch.{config, node_probe, preflight}.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from typing import Any

from actors.generator_fleet import GeneratorFleet
from actors.membership import Event
from cluster.adoption import Adoption, Room, capacity
from cluster.errors import DeadlineError, WorkerError
from cluster.layout import Layout, NodeSupply
from cluster.placement import Placement, nodes_of_cluster
from cluster.places import Places
from launch.config import RunConfig
from launch.node_probe import facts_of_joined
from launch.preflight import PreflightReport, check_nodes

POLL_S = 2.0  # between two looks at the cluster


class NodeWatch:
    """Watches the nodes of one run.  Whoever changes the number of generators by hand does it here.

    ``present``: the nodes at the start.  ``node_of``: of a worker's index.  ``unfit``: what speaks against a node
    that joined; empty when nothing does.
    """

    def __init__(
        self,
        fleet: GeneratorFleet,
        places: Places,
        present: Sequence[NodeSupply],
        maximum: int | None,
        gpus_per_worker: float,
        node_of: Callable[[int], str],
        unfit: Callable[[NodeSupply], Awaitable[str]],
        event: Event,
        list_nodes: Callable[[], Sequence[NodeSupply]] = nodes_of_cluster,
    ) -> None:
        self.nodes = tuple(present)  # as of the last look
        self._fleet, self._places, self._gpus_per_worker = fleet, places, gpus_per_worker
        self._node_of, self._unfit, self._event, self._list_nodes = node_of, unfit, event, list_nodes
        self._adoption = Adoption((node.node_id for node in present), maximum)
        self._judging: set[asyncio.Task[None]] = set()

    @property
    def num_wanted(self) -> int:
        return self._fleet.num_wanted

    def scale(self, num_workers: int) -> None:
        """See :meth:`GeneratorFleet.scale`; nodes that are there now neither add to this number nor take from it."""
        self._adoption.settle()
        self._fleet.scale(num_workers)

    async def run(self, poll_s: float = POLL_S) -> None:
        """Until cancelled."""
        try:
            while True:
                await self.look()
                await asyncio.sleep(poll_s)
        finally:
            for task in self._judging:
                task.cancel()
            await asyncio.gather(*self._judging, return_exceptions=True)

    async def look(self) -> None:
        """One look at the cluster, and what follows from it."""
        before = {node.node_id: node for node in self.nodes}
        self.nodes = tuple(await asyncio.to_thread(self._list_nodes))  # Ray is asked over the network
        now = {node.node_id: node for node in self.nodes}
        place = {index: self._node_of(index) for index in self._fleet.workers.indices}
        held = Counter(place.values())
        rooms = {name: Room(capacity(node, self._gpus_per_worker), held[name]) for name, node in now.items()}
        found = self._adoption.look(rooms, self._fleet.num_wanted)
        for name, num_fewer in found.left.items():
            lost = [index for index, node in place.items() if node == name]
            self._tell("node_left", before[name], num_generators=len(lost), num_nodes=len(now))
            self._places.forget(name)
            self._fleet.lose(lost, f"its node {before[name].address} left the Ray cluster", num_fewer)
        for name in found.joined:
            node = now[name]
            self._tell("node_joined", node, num_cpus=node.num_cpus, num_gpus=node.num_gpus, num_nodes=len(now))
            if self._adoption.maximum is not None and rooms[name].capacity:
                self._spawn(self._judge(node))
        for name, number in found.added.items():
            self._tell("node_adopted", now[name], num_generators=number)
            self._places.adopt(name, number)
            self._fleet.scale(self._fleet.num_wanted + number)

    async def _judge(self, node: NodeSupply) -> None:
        reason = await self._unfit(node)
        if reason:
            self._tell("node_refused", node, reason=reason)
        else:
            self._adoption.admit(node.node_id)

    def _tell(self, kind: str, node: NodeSupply, **fields: Any) -> None:
        self._event(kind, node=node.node_id, address=node.address, **fields)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._judging.add(task)
        task.add_done_callback(self._judging.discard)


def node_watch(
    config: RunConfig, model_path: str, fleet: GeneratorFleet, placement: Placement, places: Places, layout: Layout,
    facts: Sequence[Mapping[str, Any]], event: Event,
) -> NodeWatch:  # fmt: skip
    """The watch of a run.  ``facts``: of its nodes at the start, as ``gather_facts`` gave them."""
    numbers = itertools.count()

    async def unfit(node: NodeSupply) -> str:
        deadline_s = config.cluster.start_deadline_s
        try:
            fact = await facts_of_joined(node, placement, model_path, next(numbers), deadline_s)
        except (DeadlineError, WorkerError) as error:
            return str(error)
        report = PreflightReport()
        check_nodes(report, config, [*facts, fact])
        return "; ".join(str(problem) for problem in report.problems)

    return NodeWatch(
        fleet, places, layout.nodes, config.health.adopt_up_to, layout.of("generator")[0].gpus,
        lambda index: placement.node_of(fleet.workers.slot(index)), unfit, event,
    )  # fmt: skip
