"""Where the ranks of a process group meet: address, port, environment, and a join with a deadline.

May import: ray, torch (inside functions) and the errors of this room.
"""

from __future__ import annotations

import datetime
import os
import socket
from dataclasses import dataclass

from cluster.errors import DeadlineError, WorkerError


@dataclass(frozen=True)
class Rendezvous:
    """One meeting point; every rank of a group gets the same."""

    address: str  # of the node that hosts rank 0
    port: int  # free on that node when the meeting was arranged
    world_size: int

    def __str__(self) -> str:
        return f"{self.address}:{self.port}"


def free_port(host: str = "127.0.0.1") -> int:
    """A TCP port nobody listens on at ``host`` (ask on the node that will listen; use it soon)."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def node_address() -> str:
    """The address under which every rank reaches this node: the loopback where there is no other node."""
    import ray

    if not ray.is_initialized() or sum(1 for node in ray.nodes() if node["Alive"]) == 1:
        return "127.0.0.1"
    return str(ray.util.get_node_ip_address())


def process_group_environment(rendezvous: Rendezvous, rank: int, local_rank: int) -> dict[str, str]:
    """The variables that torch's ``env://`` and DeepSpeed read."""
    return {
        "MASTER_ADDR": rendezvous.address,
        "MASTER_PORT": str(rendezvous.port),
        "RANK": str(rank),
        "WORLD_SIZE": str(rendezvous.world_size),
        "LOCAL_RANK": str(local_rank),
    }


def join(rendezvous: Rendezvous, rank: int, backend: str, deadline_s: float, local_rank: int = 0) -> None:
    """Initialise ``torch.distributed``; returns when every rank is there.

    ``deadline_s`` bounds this meeting and every later collective of the default group.  The variables of
    ``process_group_environment`` are set too, for libraries that read them.  DeadlineError names the rank
    that waited and the address; WorkerError says that rank 0 found its port taken.
    """
    import torch.distributed as dist

    if not 0 <= rank < rendezvous.world_size:
        raise ValueError(f"rank {rank} is not one of the {rendezvous.world_size} of {rendezvous}")
    os.environ.update(process_group_environment(rendezvous, rank, local_rank))
    if backend == "gloo" and rendezvous.address in ("127.0.0.1", "localhost"):
        # gloo advertises the address of the host name, which on a laptop may resolve to nothing reachable.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", _loopback())
    timeout = datetime.timedelta(seconds=deadline_s)
    try:
        store = dist.TCPStore(  # type: ignore[attr-defined]  # exported, but its stubs do not say so
            rendezvous.address, rendezvous.port, rendezvous.world_size, is_master=rank == 0, timeout=timeout
        )
        dist.init_process_group(
            backend, store=store, rank=rank, world_size=rendezvous.world_size, timeout=timeout
        )
    except (dist.DistError, TimeoutError) as error:
        if "EADDRINUSE" in str(error):
            raise WorkerError(f"rank {rank} cannot listen on {rendezvous}: the port was taken meanwhile") from error
        awaited = f"the {rendezvous.world_size} ranks of a {backend} group, as rank {rank}"
        raise DeadlineError(awaited, f"{rendezvous} ({' '.join(str(error).split())[:200]})", deadline_s) from error


def _loopback() -> str:
    names = [name for _, name in socket.if_nameindex()]
    return next((name for name in names if name in ("lo", "lo0")), names[0])
