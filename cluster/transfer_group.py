"""A process group of one sender and its receivers, apart from every other group.

Engine e is served by rank e mod R over a group of its own, so adding or losing an engine rebuilds
no other group and a stalled receiver stalls nobody else.  The same code runs over NCCL between
GPUs and over gloo between processes without one, which is how it is tested.
May import: torch.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from cluster.errors import DeadlineError

SENDER = 0
WATCHDOG_FACTOR = 10  # of the deadline of one operation


class TransferGroup:
    """Rank 0 sends, the others receive.  Every operation has a deadline and names who is missing."""

    def __init__(
        self, name: str, address: str, port: int, rank: int, size: int, device: torch.device, deadline_s: float
    ) -> None:
        """Meet the other members.

        Raises:
            DeadlineError: they did not all come.
        """
        self.name, self.rank, self.size = name, rank, size
        self.device, self.deadline_s = device, deadline_s
        timeout = timedelta(seconds=deadline_s)
        who = f"{size - 1} other members of group {name} at {address}:{port} (I am rank {rank})"
        try:
            # torch exports both stores; its stubs do not say so.
            store = dist.TCPStore(  # type: ignore[attr-defined]
                address, port, size, is_master=rank == SENDER, timeout=timeout, wait_for_workers=True
            )
            prefixed = dist.PrefixStore(name, store)  # type: ignore[attr-defined]
            if device.type == "cuda":
                options = dist.ProcessGroupNCCL.Options()
                # The only way to set it on a group outside the default one.  Later than the deadlines that are waited
                # for: NCCL's own watchdog ends the whole process, and then there is nobody left to expel the peer.
                options._timeout = WATCHDOG_FACTOR * timeout
                with torch.cuda.device(device):
                    self._group: Any = dist.ProcessGroupNCCL(prefixed, rank, size, options)
            else:
                self._group = dist.ProcessGroupGloo(prefixed, rank, size, timeout)
        except (dist.DistStoreError, dist.DistNetworkError) as error:
            raise DeadlineError("rendezvous", who, deadline_s) from error
        self._store = store  # the sender's store serves the group as long as it lives

    def broadcast(self, buffer: torch.Tensor, what: str) -> None:
        """Send ``buffer`` (rank 0) or fill it (others); returns when it is there.

        Raises:
            DeadlineError: a peer did not take part in time; the group is aborted and cannot be used again.
        """
        peers = f"group {self.name}, rank {self.rank} of {self.size}"
        try:
            work = self._group.broadcast([buffer], self._root())
            work.wait(timedelta(seconds=self.deadline_s))
            if buffer.is_cuda:
                torch.cuda.synchronize(buffer.device)
        except (dist.DistBackendError, RuntimeError) as error:
            self.abort()
            raise DeadlineError(what, peers, self.deadline_s) from error

    @staticmethod
    def _root() -> dist.BroadcastOptions:
        options = dist.BroadcastOptions()
        options.rootRank = SENDER
        options.rootTensor = 0
        return options

    def abort(self) -> None:
        """Leave at once, whatever is in flight."""
        abort = getattr(self._group, "abort", None)
        if abort is not None:
            abort()
