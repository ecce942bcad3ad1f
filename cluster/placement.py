"""Layout -> one Ray placement group, and the Ray it lives in.

May import: ray and the modules of this room.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import sysconfig
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import GetTimeoutError
from ray.util.placement_group import (
    PlacementGroup,
    placement_group,
    placement_group_table,
    remove_placement_group,
)
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cluster.errors import DeadlineError, ShortfallError
from cluster.host import num_cpus, worker_environment
from cluster.layout import Layout, NodeSupply, WorkerSlot
from cluster.settings import ClusterSettings

logger = logging.getLogger("burnish.cluster")

# Ray's own: without it an actor that asks for no GPU is started with CUDA_VISIBLE_DEVICES="".
_ACCELERATOR = "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"
# With it Ray ends what an actor has started when the actor is killed: vLLM's engine would go on and keep its GPU.
_CLEANUP = "RAY_process_group_cleanup_enabled"

KNOCK_TIMEOUT_S = 10.0  # for a TCP connection to the head node, which is up or is not


@dataclass(frozen=True)
class RayHandle:
    """The Ray this process is connected to."""

    address: str
    started_here: bool

    def stop(self) -> None:
        """End a Ray that was started here; one that was joined goes on."""
        if self.started_here and ray.is_initialized():
            ray.shutdown()


def address_to_join(settings: ClusterSettings) -> str | None:
    """Where a Ray that runs already is to be joined; None when one will be started here."""
    address = settings.address if settings.address != "auto" else os.environ.get("RAY_ADDRESS")
    return address if address and address != "local" else None


def start_or_join(settings: ClusterSettings, num_slots: int) -> RayHandle:
    """Connect to ``settings.address``, to RAY_ADDRESS, or to a Ray started here.

    A Ray started here has the cores and GPUs of this machine and no dashboard; ``num_slots`` is only reported.
    """
    os.environ[_ACCELERATOR] = "0"
    if ray.is_initialized():
        return RayHandle(ray.get_runtime_context().gcs_address, started_here=False)
    address = address_to_join(settings)
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.WARNING}
    if address is not None:
        try:
            _knock(address)
            ray.init(address=address, **quiet)
        except (OSError, ValueError) as error:
            raise ShortfallError(
                "cluster.address", address, f"no Ray answers there ({' '.join(str(error).split())[:200]})",
                "start one with `ray start --head`, or leave cluster.address and RAY_ADDRESS unset",
            ) from error
        return RayHandle(address, started_here=False)
    os.environ.setdefault(_CLEANUP, "true")  # read by the Ray that is started here; who says otherwise is obeyed
    ray.init(
        address="local",
        num_cpus=max(1, num_cpus()),
        object_store_memory=settings.object_store_bytes,
        include_dashboard=False,
        **quiet,
    )
    handle = RayHandle(ray.get_runtime_context().gcs_address, started_here=True)
    logger.info("started Ray at %s for %d workers", handle.address, num_slots)
    return handle


def _knock(address: str) -> None:
    """OSError when nothing listens at HOST:PORT: Ray itself would go on trying for minutes."""
    host, _, port = address.rpartition(":")
    if host and port.isdigit() and "/" not in host:
        socket.create_connection((host.strip("[]"), int(port)), timeout=KNOCK_TIMEOUT_S).close()


def nodes_of_cluster() -> list[NodeSupply]:
    """The live nodes, the one of this process first (rank 0 beside the controller), then by id."""
    here = ray.get_runtime_context().get_node_id()
    alive = sorted((node for node in ray.nodes() if node["Alive"]), key=lambda n: (n["NodeID"] != here, n["NodeID"]))
    return [
        NodeSupply(
            node["NodeID"], int(node["Resources"].get("CPU", 0)), int(node["Resources"].get("GPU", 0)),
            node["NodeManagerAddress"],
        )
        for node in alive
    ]  # fmt: skip


class Placement:
    """One granted placement group that holds every slot of a layout, and one for each slot granted since."""

    def __init__(self, group: PlacementGroup, layout: Layout) -> None:
        self._group, self._layout = group, layout
        self._bundle_of = {
            (slot.role, slot.index): number
            for number, slots in enumerate(_bundle_keys(layout).values())
            for slot in slots
        }
        self._extra: dict[tuple[str, int], PlacementGroup] = {}
        self._extra_nodes: dict[tuple[str, int], str] = {}

    @classmethod
    def create(cls, layout: Layout, deadline_s: float) -> Placement:
        """Reserve every slot or none; DeadlineError says what was asked for and what is free."""
        sharing = list(_bundle_keys(layout).values())
        bundles = [_bundle(slots) for slots in sharing]
        nodes = [layout.nodes[slots[0].node].node_id for slots in sharing]
        # The layout has chosen the nodes; Ray only grants the bundles there, all or none.
        group = placement_group(
            bundles, strategy="PACK", bundle_label_selector=[{"ray.io/node-id": node} for node in nodes]
        )
        try:
            ray.get(group.ready(), timeout=deadline_s)
        except GetTimeoutError:
            free = ray.available_resources()
            remove_placement_group(group)
            asked = {kind: round(sum(b.get(kind, 0) for b in bundles), 2) for kind in ("CPU", "GPU")}
            missing = ", ".join(
                f"{asked[kind]:g} {kind}s ({free.get(kind, 0):g} free)" for kind in asked if asked[kind]
            )
            raise DeadlineError(f"{len(layout.slots)} worker slots: {missing}", "the Ray cluster", deadline_s) from None
        return cls(group, layout)

    async def grow(self, slot: WorkerSlot, deadline_s: float, node_id: str | None = None) -> None:
        """Reserve one more slot on this node, or on whichever has room for it; ``slot.node`` is not looked at.

        Raises:
            DeadlineError: there was no room in time; nothing stays reserved.
        """
        where = None if node_id is None else [{"ray.io/node-id": node_id}]
        group = placement_group([_bundle([slot])], strategy="STRICT_PACK", bundle_label_selector=where)
        try:
            async with asyncio.timeout(deadline_s):
                await group.ready()
        except TimeoutError:
            remove_placement_group(group)
            asked = f"{slot.gpus:g} GPUs and {slot.cpus:g} CPUs" if slot.gpus else f"{slot.cpus:g} CPUs"
            node = "one node" if node_id is None else f"node {node_id}"
            awaited = f"{asked} on {node} for one more {slot.role}"
            raise DeadlineError(awaited, "the Ray cluster", deadline_s) from None
        except BaseException:  # cancelled, too: nobody would give it back
            remove_placement_group(group)
            raise
        self._extra[slot.role, slot.index] = group
        self._extra_nodes[slot.role, slot.index] = node_id or placement_group_table(group)["bundles_to_node_id"][0]

    def shrink(self, slot: WorkerSlot) -> None:
        """Give a slot of :meth:`grow` back; the actor in it is killed by Ray."""
        self._extra_nodes.pop((slot.role, slot.index))
        remove_placement_group(self._extra.pop((slot.role, slot.index)))

    def node_of(self, slot: WorkerSlot) -> str:
        """Id of the node that a slot of the layout or of :meth:`grow` is on."""
        return self._extra_nodes.get((slot.role, slot.index)) or self._layout.nodes[slot.node].node_id

    def stands(self, slot: WorkerSlot) -> bool:
        """Whether the node of a slot of the layout is alive."""
        return self.is_alive(self._layout.nodes[slot.node].node_id)

    @staticmethod
    def is_alive(node_id: str) -> bool:
        """Whether Ray holds a node to be alive, which for one that is cut off it does until its own timeout."""
        return any(node["NodeID"] == node_id and node["Alive"] for node in ray.nodes())

    def options(self, slot: WorkerSlot) -> dict[str, Any]:
        """Options of the actor that fills ``slot``."""
        threads_on = slot.cpu_ids or None
        extra = self._extra.get((slot.role, slot.index))
        return {
            "num_cpus": slot.cpus,
            "num_gpus": slot.gpus,
            "scheduling_strategy": PlacementGroupSchedulingStrategy(
                placement_group=extra or self._group,
                placement_group_bundle_index=0 if extra else self._bundle_of[slot.role, slot.index],
                placement_group_capture_child_tasks=True,
            ),
            "runtime_env": {"env_vars": worker_environment(slot.threads, threads_on) | _import_path(os.environ)},
        }

    def remove(self) -> None:
        """Give every slot back; the actors in them are killed by Ray."""
        if ray.is_initialized():
            for group in (*self._extra.values(), self._group):
                remove_placement_group(group)


def _bundle_keys(layout: Layout) -> dict[tuple[object, ...], list[WorkerSlot]]:
    """Slots by bundle: one each, except that workers which share a GPU share the bundle that holds it."""
    bundles: dict[tuple[object, ...], list[WorkerSlot]] = {}
    for slot in layout.slots:
        key = (slot.role, slot.index) if slot.shared_gpu is None else (slot.node, slot.shared_gpu)
        bundles.setdefault(key, []).append(slot)
    return bundles


def _bundle(slots: list[WorkerSlot]) -> dict[str, float]:
    bundle = {"CPU": round(sum(slot.cpus for slot in slots), 2)}
    gpus = 1.0 if slots[0].shared_gpu is not None else slots[0].gpus
    return bundle | ({"GPU": gpus} if gpus else {})


def _import_path(environment: Mapping[str, str]) -> dict[str, str]:
    """PYTHONPATH for workers: with this checkout's folder in front when Burnish is not installed."""
    folder = Path(__file__).resolve().parent.parent
    parts = [part for part in environment.get("PYTHONPATH", "").split(os.pathsep) if part]
    installed = folder in (Path(sysconfig.get_path("purelib")), Path(sysconfig.get_path("platlib")))
    if not installed and str(folder) not in parts:
        parts.insert(0, str(folder))
    return {"PYTHONPATH": os.pathsep.join(parts)} if parts else {}
