"""The machines of a run, whatever it does: join or start Ray, its nodes, and the device that every model is put on.

May import: torch (inside a function), actors.modeling, cluster.*, trainers.errors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from actors.modeling import compute_dtype
from cluster.host import native_bfloat16, num_cpus
from cluster.layout import NodeSupply
from cluster.placement import RayHandle, nodes_of_cluster, start_or_join
from cluster.settings import ClusterSettings
from trainers.errors import InputError

Device = Literal["cuda", "cpu"]


def connect(cluster: ClusterSettings, num_workers: int) -> tuple[RayHandle | None, list[NodeSupply]]:
    """Join or start Ray, for ``num_workers`` processes, and list its nodes; without Ray in the in-process twin.

    Raises:
        InputError: fewer nodes than ``cluster.num_nodes``; a Ray that was started is stopped then.
    """
    if cluster.backend == "in_process":
        import torch

        return None, [NodeSupply("this process", num_cpus(), torch.cuda.device_count())]
    handle = start_or_join(cluster, num_workers)
    try:
        nodes = nodes_of_cluster()
        check_num_nodes(cluster, nodes)
    except BaseException:
        handle.stop()
        raise
    return handle, nodes


def check_num_nodes(cluster: ClusterSettings, nodes: Sequence[NodeSupply]) -> None:
    """Refuse a cluster that is smaller than the run says it must be."""
    wanted = cluster.num_nodes
    if wanted is not None and len(nodes) < wanted:
        raise InputError(
            "cluster.num_nodes", wanted, f"the Ray cluster has {len(nodes)} nodes ({wanted - len(nodes)} short)",
            "start Ray on the missing nodes, or lower it",
        )  # fmt: skip


def choose_device(cluster: ClusterSettings, nodes: Sequence[NodeSupply], num_gpus: float) -> Device:
    """``cuda`` where the cluster has GPUs and the recipe does not say otherwise.

    ``num_gpus``: what the run needs when it runs on GPUs; the refusal names it.
    """
    has_gpus = any(node.num_gpus for node in nodes)
    if cluster.device == "cuda" and not has_gpus:
        raise InputError(
            "cluster.device", "cuda", f"the recipe needs {num_gpus:g} GPUs and the cluster has 0 ({num_gpus:g} short)",
            "run it on a cluster with GPUs, or set cluster.device=cpu",
        )  # fmt: skip
    return "cuda" if has_gpus and cluster.device != "cpu" else "cpu"


def torch_device(device: Device) -> str:
    """What a worker calls it: Ray shows each worker its own GPUs only."""
    return "cuda:0" if device == "cuda" else "cpu"


def dtype_name(setting: Literal["auto", "float32", "bfloat16"], device: Device) -> str:
    """``model.dtype`` on this device: "float32" or "bfloat16"."""
    return str(compute_dtype(setting, device == "cuda" or native_bfloat16())).removeprefix("torch.")
