"""Pure arithmetic: roles -> nodes, GPUs, cores.  Imports nothing but the errors of this room.

    with GPUs      every role has GPUs of its own, node by node, a worker's GPUs never spanning two
    colocated      worker i of every role shares one set of GPUs, each role with an equal fraction
    without GPUs   roles work in turns, so every role divides all cores of a node among its workers there;
                   roles that ask for cores of their own divide them among all of theirs
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from cluster.errors import ShortfallError

# (role, index) -> (node, GPUs, number of the GPU when it is a part of one)
_Places = dict[tuple[str, int], tuple[int, float, int | None]]

DRIVER_CPUS = 0.1  # of Ray's accounting, on every node: room for the controller beside a full layout
SMALLEST_SHARE = 0.01  # CPUs; Ray counts to 0.0001, and a share of 0 would land anywhere


@dataclass(frozen=True)
class RoleDemand:
    """What one role needs: ``gpus_per_worker`` is whole, or a fraction below 1, or 0 on CPU."""

    name: str
    num_workers: int
    gpus_per_worker: float
    own_cores: bool = False  # without GPUs: cores that no worker of another such role uses


@dataclass(frozen=True)
class NodeSupply:
    """What one node of the cluster has."""

    node_id: str
    num_cpus: int
    num_gpus: int
    address: str = field(default="", compare=False)  # for people


@dataclass(frozen=True)
class WorkerSlot:
    """The place of one worker."""

    role: str
    index: int  # of the worker in its role
    node: int  # position in the nodes that were planned for
    gpus: float
    cpus: float  # Ray's accounting
    threads: int  # of its OpenMP pool
    cpu_ids: tuple[int, ...]  # cores of its node that no other worker of the role uses; () with GPUs
    shared_gpu: int | None = None  # number, on its node, of the GPU a worker has only a part of


@dataclass(frozen=True)
class Layout:
    """A place for every worker of every role, roles in the order they were asked for."""

    slots: tuple[WorkerSlot, ...]
    nodes: tuple[NodeSupply, ...] = ()

    def of(self, role: str) -> tuple[WorkerSlot, ...]:
        """The slots of one role by worker index."""
        return tuple(slot for slot in self.slots if slot.role == role)

    def table(self) -> list[dict[str, Any]]:
        """One row a slot, to print or to log."""
        return [
            {
                "role": slot.role,
                "index": slot.index,
                "node": self.nodes[slot.node].node_id if self.nodes else slot.node,
                "gpus": slot.gpus,
                "cpus": slot.cpus,
                "threads": slot.threads,
                "cpu_ids": ",".join(map(str, slot.cpu_ids)),
            }
            for slot in self.slots
        ]


def plan_layout(demands: Sequence[RoleDemand], nodes: Sequence[NodeSupply], colocate: bool) -> Layout:
    """A slot for every worker, or ShortfallError naming the role's field and how much is missing."""
    if not nodes:
        raise ShortfallError("cluster.num_nodes", 0, "the cluster has no live node", "start or join a cluster")
    seen: set[str] = set()
    for demand in demands:
        if demand.num_workers < 0 or demand.gpus_per_worker < 0 or demand.name in seen:
            raise ValueError(f"not a demand, or asked twice: {demand}")
        if demand.gpus_per_worker > 1 and demand.gpus_per_worker != int(demand.gpus_per_worker):
            raise ValueError(f"{demand.name}: a worker has a part of one GPU or several whole ones")
        seen.add(demand.name)
    if colocate and any(demand.gpus_per_worker for demand in demands):
        gpus = _shared_gpus(demands, nodes)
    else:
        gpus = _own_gpus(demands, nodes)
    if any(demand.gpus_per_worker for demand in demands):
        return _with_gpus(gpus, demands, nodes)
    return _without_gpus(demands, nodes)


def _own_gpus(demands: Sequence[RoleDemand], nodes: Sequence[NodeSupply]) -> _Places:
    """GPUs of one's own; the widest workers choose first, so that a node still has room for them."""
    places: _Places = {}
    # One number a GPU: the part of it that is free.  A fraction must fit one GPU, as Ray places it.
    free = [[1.0] * node.num_gpus for node in nodes]
    for demand in sorted(demands, key=lambda demand: -demand.gpus_per_worker):
        if demand.gpus_per_worker == 0:
            continue
        for index in range(demand.num_workers):
            for node, gpus in enumerate(free):
                taken = _take(gpus, demand.gpus_per_worker)
                if taken:
                    shared = taken[0] if demand.gpus_per_worker < 1 else None
                    places[demand.name, index] = (node, demand.gpus_per_worker, shared)
                    break
            else:
                raise _gpu_shortfall(demand, index, nodes, demands)
    return places


def _take(gpus: list[float], wanted: float) -> list[int]:
    """Take ``wanted`` from the free parts of one node's GPUs; the numbers of those GPUs, [] if they do not suffice."""
    if wanted < 1:
        # The fullest GPU that still has room keeps whole GPUs whole.
        fitting = sorted((part, number) for number, part in enumerate(gpus) if part + 1e-9 >= wanted)
        taken = [number for _, number in fitting[:1]]
    else:
        taken = [number for number, part in enumerate(gpus) if part == 1.0][: int(wanted)]
        taken = taken if len(taken) == int(wanted) else []
    for number in taken:
        gpus[number] -= min(wanted, 1.0)
    return taken


def _shared_gpus(demands: Sequence[RoleDemand], nodes: Sequence[NodeSupply]) -> _Places:
    """Worker i of every role on GPU i, each with an equal fraction of it."""
    sharing = [demand for demand in demands if demand.gpus_per_worker]
    for demand in sharing:
        if demand.gpus_per_worker > 1:
            raise ShortfallError(
                f"{demand.name}.gpus_per_worker", demand.gpus_per_worker, "roles that share GPUs hold a part of one",
                "set it to 1, or cluster.colocate to false",
            )
    fraction = math.floor(1e4 / len(sharing)) / 1e4  # Ray counts to 0.0001
    gpus = [(n, number) for n, node in enumerate(nodes) for number in range(node.num_gpus)]
    for demand in sharing:
        if demand.num_workers > len(gpus):
            raise _gpu_shortfall(demand, len(gpus), nodes, [demand])
    return {
        (demand.name, index): (gpus[index][0], fraction, gpus[index][1])
        for demand in sharing
        for index in range(demand.num_workers)
    }


def _gpu_shortfall(
    demand: RoleDemand, placed: int, nodes: Sequence[NodeSupply], demands: Sequence[RoleDemand]
) -> ShortfallError:
    missing = demand.num_workers - placed
    gpus = sum(node.num_gpus for node in nodes)
    asked = sum(other.num_workers * other.gpus_per_worker for other in demands)
    return ShortfallError(
        f"{demand.name}.num_workers",
        demand.num_workers,
        f"{placed} of them fit: the cluster has {gpus} GPUs on {len(nodes)} nodes, all roles together ask for "
        f"{asked:g}, and a worker's {demand.gpus_per_worker:g} must be on one node",
        f"ask for {missing} fewer or add {missing * demand.gpus_per_worker:g} GPUs",
    )


def _with_gpus(places: _Places, demands: Sequence[RoleDemand], nodes: Sequence[NodeSupply]) -> Layout:
    """Cores follow the GPUs; workers without one get a core each, on the nodes with cores in turn."""
    hosts = _nodes_with_cores(nodes)
    turn = 0
    for demand in demands:
        for index in range(demand.num_workers):
            if (demand.name, index) not in places:
                places[demand.name, index] = (hosts[turn % len(hosts)], 0.0, None)
                turn += 1
    slots = []
    for demand in demands:
        for index in range(demand.num_workers):
            node, gpus, shared = places[demand.name, index]
            beside = sum(1 for place in places.values() if place[0] == node)
            usable = nodes[node].num_cpus - DRIVER_CPUS
            cpus = _round_down(usable / beside)  # an equal share always fits
            if cpus >= 1:
                # One core for certain, and of the remaining ones the share of the node's GPUs.
                cpus = 1.0 + (math.floor((usable - beside) * gpus / nodes[node].num_gpus) if gpus else 0)
            _refuse_no_cpu(cpus, demand, beside, nodes[node])
            slots.append(WorkerSlot(demand.name, index, node, gpus, cpus, max(1, int(cpus)), (), shared))
    return Layout(tuple(slots), tuple(nodes))


def _without_gpus(demands: Sequence[RoleDemand], nodes: Sequence[NodeSupply]) -> Layout:
    """Every role has all cores of a node to itself for its turn; Ray's accounting divides them among all."""
    hosts = _nodes_with_cores(nodes)
    spread = {demand.name: _spread(demand.num_workers, len(hosts)) for demand in demands}
    crowd = [sum(counts[turn] for counts in spread.values()) for turn in range(len(hosts))]
    apart = [sum(spread[demand.name][turn] for demand in demands if demand.own_cores) for turn in range(len(hosts))]
    placed = [0] * len(hosts)  # of those that divide a node's cores among all of them
    slots = []
    for demand in demands:
        for index in range(demand.num_workers):
            position, turn = divmod(index, len(hosts))
            node, beside = hosts[turn], spread[demand.name][turn]
            if demand.own_cores:
                position, beside = placed[turn], apart[turn]
                placed[turn] += 1
            cores = nodes[node].num_cpus
            cpus = _round_down((cores - DRIVER_CPUS) / crowd[turn])
            _refuse_no_cpu(cpus, demand, crowd[turn], nodes[node])
            cpu_ids = _cores_of(position, beside, cores)
            slots.append(WorkerSlot(demand.name, index, node, 0.0, cpus, max(1, cores // beside), cpu_ids))
    return Layout(tuple(slots), tuple(nodes))


def _nodes_with_cores(nodes: Sequence[NodeSupply]) -> list[int]:
    """A head node is often started with 0 CPUs to keep workers away."""
    hosts = [n for n, node in enumerate(nodes) if node.num_cpus >= 1]
    if not hosts:
        raise ShortfallError("cluster.num_nodes", len(nodes), "none of these nodes has a CPU", "add a node that has")
    return hosts


def _spread(num_workers: int, num_nodes: int) -> list[int]:
    return [num_workers // num_nodes + (n < num_workers % num_nodes) for n in range(num_nodes)]


def _cores_of(position: int, beside: int, cores: int) -> tuple[int, ...]:
    """Equal, disjoint runs of cores; none where there are more workers than cores (the system shares them)."""
    each = cores // beside
    return tuple(range(position * each, (position + 1) * each))


def _round_down(cpus: float) -> float:
    return math.floor(cpus * 100 + 1e-9) / 100  # the small term undoes binary dust: 0.29 stays 0.29


def _refuse_no_cpu(cpus: float, demand: RoleDemand, beside: int, node: NodeSupply) -> None:
    if cpus < SMALLEST_SHARE:
        most = max(0, math.floor((node.num_cpus - DRIVER_CPUS) / SMALLEST_SHARE))
        raise ShortfallError(
            f"{demand.name}.num_workers",
            demand.num_workers,
            f"node {node.node_id} with {node.num_cpus} CPUs would hold {beside} workers of all roles, at most {most}",
            f"ask for {beside - most} fewer or add a node",
        )
