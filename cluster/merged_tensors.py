"""The receiver's side of a low-rank update: every tensor of a version, made of its own base and what was sent.

May import: torch, cluster.{errors, low_rank, weight_channel}.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from cluster.errors import DamagedError
from cluster.low_rank import LowRankUpdate, base_tensors, merge
from cluster.weight_channel import bit_sum


class MergedTensors:
    """The receiver's side of one update.  ``served`` fills while the tensors are iterated over."""

    def __init__(self, update: LowRankUpdate, folder: Path, sent: Mapping[str, torch.Tensor]) -> None:
        """``folder``: this side's copy of the base.  ``sent``: compared already with the sender's fingerprints."""
        self._update, self._folder, self._sent = update, folder, sent
        self.served: dict[str, tuple[int, int]] = {}  # name -> (bit sum, elements) of what was handed on

    def tensors(self, device: torch.device) -> Iterator[tuple[str, torch.Tensor]]:
        """Every tensor of the version, whole, in the update's dtype, on ``device``.

        Raises:
            DamagedError: a tensor of the base is not the sender's, or one that was announced was not sent.
        """
        update, dtype = self._update, getattr(torch, self._update.dtype)
        deltas = {delta.weight: delta for delta in update.deltas}
        if strangers := sorted(deltas.keys() - update.base.keys()):
            raise DamagedError(f"{strangers[0]} is to be changed and is no tensor of the base")
        for name, tensor in base_tensors(self._folder, list(update.base)):
            here = tensor.to(device, dtype)
            found = bit_sum(here)
            if found != update.base[name]:
                raise DamagedError(
                    f"{self._folder}: {name} has fingerprint {found:016x} as {update.dtype}, the learner's base has "
                    f"{update.base[name]:016x}: it is another base; copy the learner's there, or set push.lora=merged"
                )
            delta = deltas.get(name)
            if delta is not None:
                if missing := [part for part in (delta.down, delta.up) if part not in self._sent]:
                    raise DamagedError(f"{missing[0]} was announced for {name} and did not come")
                here = merge(here, self._sent[delta.down], self._sent[delta.up], delta.scale)
                found = bit_sum(here)
            self.served[name] = (found, here.numel())
            yield name, here
