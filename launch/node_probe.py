"""What the nodes of a run are like: this one looked at from here, every other one by an actor on it.

May import: cluster.*, launch.config, launch.demands.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ray

from cluster.host import num_cpus
from cluster.layout import SMALLEST_SHARE, Layout, NodeSupply, WorkerSlot
from cluster.placement import Placement, address_to_join
from cluster.settings import ClusterSettings
from cluster.worker_group import WorkerGroup
from launch.config import RunConfig
from launch.demands import node_facts

ROLE = "preflight"
FACTS_DEADLINE_S = 120.0  # torch is imported on the node, perhaps from a shared disk


class NodeProbe:
    """Looks at the node it runs on."""

    def facts(self, model_path: str) -> dict[str, Any]:
        return node_facts(model_path)


def local_nodes(cluster: ClusterSettings) -> list[NodeSupply] | None:
    """This machine as the only node, known without starting anything; None where the run joins a Ray that is there."""
    joins = cluster.backend == "ray" and (ray.is_initialized() or address_to_join(cluster) is not None)
    if joins:
        return None
    import torch

    return [NodeSupply("this machine", num_cpus(), torch.cuda.device_count())]


async def gather_facts(config: RunConfig, model_path: str, nodes: Sequence[NodeSupply]) -> list[dict[str, Any]]:
    """``node_facts`` of every node, in the order of ``nodes``; the first one is the node of this process.

    A node without cores can hold no worker, so it is left out.  GPUs that Ray does not offer do not count.

    Raises:
        DeadlineError: a node did not answer; it is named by its place.
    """
    usable = [node for node in nodes if node.num_cpus >= 1]
    others = [node for node in usable if node is not nodes[0]]
    found = {nodes[0].node_id: node_facts(model_path)}
    if others:
        slots = tuple(WorkerSlot(ROLE, i, i, 0.0, SMALLEST_SHARE, 1, ()) for i in range(len(others)))
        layout = Layout(slots, tuple(others))
        placement = Placement.create(layout, config.cluster.placement_deadline_s)
        probes = WorkerGroup.launch(
            ROLE, NodeProbe, [{}] * len(others), placement=placement, slots=slots,
            start_deadline_s=config.cluster.start_deadline_s,
        )  # fmt: skip
        try:
            await probes.ready()
            facts = await probes.call_all("facts", model_path, deadline_s=FACTS_DEADLINE_S)
        finally:
            await probes.shutdown()
            placement.remove()
        found |= {node.node_id: fact for node, fact in zip(others, facts, strict=True)}
    return [_on(node, found[node.node_id]) for node in usable]


async def facts_of_joined(
    node: NodeSupply, placement: Placement, model_path: str, number: int, deadline_s: float
) -> dict[str, Any]:
    """``node_facts`` of a node that joined while ``placement`` stands; ``number`` is used for one node only.

    Raises:
        DeadlineError: it did not answer, or has no place for a look.
        WorkerError: it left meanwhile.
    """
    slot = WorkerSlot(ROLE, number, 0, 0.0, SMALLEST_SHARE, 1, ())
    await placement.grow(slot, deadline_s, node.node_id)
    try:
        probe = WorkerGroup.launch(
            ROLE, NodeProbe, [{}], placement=placement, slots=[slot], start_deadline_s=deadline_s
        )
        try:
            await probe.ready()
            return _on(node, await probe.call(0, "facts", model_path, deadline_s=FACTS_DEADLINE_S))
        finally:
            await probe.shutdown()
    finally:
        placement.shrink(slot)


def _on(node: NodeSupply, fact: dict[str, Any]) -> dict[str, Any]:
    """A node's facts as far as Ray offers them."""
    return fact | {"node_id": node.node_id, "num_cpus": node.num_cpus, "gpus": fact["gpus"][: node.num_gpus]}
