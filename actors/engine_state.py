"""What of a DeepSpeed engine must be saved, wherever ZeRO has put it: float32 weights and Adam's moments.

The only file besides actors/engine.py that knows DeepSpeed, and the only one on these internals of it (0.19):

    ZeRO 0       nothing is partitioned: every rank has all and saves an equal share
    ZeRO 1, 2    ``parameter._hp_mapping`` says which part of a parameter lies where in this rank's flat partition
    ZeRO 3       a parameter is cut into ``ds_tensor.ds_numel`` elements a rank, the last one padded

DeepSpeed's own checkpoints are pickles of whole partitions and fit one number of ranks.  Its universal checkpoint is
made of those in a second pass that loads and writes everything again, so it cannot be what a running learner saves.
May import: torch, deepspeed, actors.shards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from actors.shards import Piece, ShardFolder, cut

WEIGHT, MOMENTS = "weight", ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True, slots=True)
class _Held:
    """Elements ``start`` .. ``start + count`` of a parameter are this rank's to keep."""

    name: str
    parameter: Any  # an nn.Parameter with DeepSpeed's attributes
    start: int
    count: int


class EngineState:
    """One rank's part of the state of an engine whose optimizer is ``adam`` (torch.optim.AdamW)."""

    def __init__(
        self,
        module: nn.Module,
        zero: Any,
        adam: torch.optim.Optimizer,
        zero_stage: int,
        rank: int,
        num_ranks: int,
        whole: Callable[[nn.Parameter], AbstractContextManager[Any]],
    ) -> None:
        """``zero``: DeepSpeed's optimizer.  ``whole``: gathers a parameter, and spreads what rank 0 made of it."""
        self._zero, self._adam, self._stage = zero, adam, zero_stage
        self.rank, self.num_ranks, self._whole = rank, num_ranks, whole
        trained = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
        self._parameters: list[tuple[str, Any]] = trained

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the whole parameters."""
        return {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in self._parameters}

    # --- out ----------------------------------------------------------------------------------

    def pieces(self) -> list[Piece]:
        """Views of everything this rank saves.  No collective."""
        fields = (WEIGHT, *MOMENTS) if self.adam_step() else (WEIGHT,)
        return [
            Piece(held.name, field, held.start, self._view(held, field))
            for held in self._held(share=True)
            for field in fields
        ]

    def adam_step(self) -> float:
        """Steps that Adam has counted; 0 before the first one, when there are no moments."""
        return next((float(state["step"]) for state in self._adam.state.values() if "step" in state), 0.0)

    def metadata(self) -> dict[str, Any]:
        """JSON values; of every rank the same but for ``rank``."""
        shapes = {name: list(shape) for name, shape in self.shapes.items()}
        return {"rank": self.rank, "num_ranks": self.num_ranks, "adam_step": self.adam_step(), "shapes": shapes}

    # --- in -----------------------------------------------------------------------------------

    def load(self, saved: ShardFolder) -> None:
        """Inverse of ``pieces``, saved by any number of ranks under any ZeRO stage.  A collective.

        Raises:
            DamagedError: what was saved is not all of this model.
        """
        saved.expect(self.shapes)
        self._start_adam(saved.adam_step)
        for name, parameter in self._parameters:
            self._load_whole(name, parameter, saved)
        fields = (WEIGHT, *MOMENTS) if saved.adam_step else (WEIGHT,)
        for held in self._held(share=False):
            for field in fields:
                values = saved.read(held.name, field, held.start, held.count)
                if self._stage == 3:
                    self._set_local(held, field, values)
                else:
                    self._view(held, field).copy_(values)

    def _load_whole(self, name: str, parameter: nn.Parameter, saved: ShardFolder) -> None:
        """The weights that the forward pass reads; under ZeRO they are not the optimizer's copy."""
        with torch.no_grad(), self._whole(parameter):
            if self._stage < 3 or self.rank == 0:
                parameter.copy_(saved.read(name, WEIGHT).view(parameter.shape))

    def _start_adam(self, step: float) -> None:
        """Adam's state as ``step`` steps leave it, with moments of zero."""
        for flat in self._flats():
            state = self._adam.state[flat]
            for field in MOMENTS:
                if field in state:
                    state[field].zero_()
                else:
                    state[field] = torch.zeros_like(flat)
            # Where torch's fused AdamW keeps its counter: as float32 on the parameter's device.
            state["step"] = torch.tensor(step, dtype=torch.float32, device=flat.device)

    # --- where things lie ---------------------------------------------------------------------

    def _flats(self) -> list[torch.Tensor]:
        """The tensors that Adam steps on this rank."""
        if self._stage == 0:
            return [parameter for _, parameter in self._parameters]
        name = "fp32_partitioned_groups_flat" if self._stage == 3 else "single_partition_of_fp32_groups"
        return list(getattr(self._zero, name))

    def _held(self, share: bool) -> Iterator[_Held]:
        """What this rank keeps; where every rank keeps everything, ``share`` leaves each a part of it."""
        for name, parameter in self._parameters:
            if self._stage == 0:
                whole = (0, parameter.numel())
                start, count = cut(parameter.numel(), self.rank, self.num_ranks) if share else whole
            elif self._stage == 3:
                size: int = parameter.ds_tensor.ds_numel
                start = self.rank * size
                count = min(size, parameter.ds_numel - start)
            elif (mapping := parameter._hp_mapping) is not None:
                start, count = mapping.lp_fragment_address.start, mapping.lp_fragment_address.numel
            else:
                continue
            if count > 0:
                yield _Held(name, parameter, start, count)

    def _view(self, held: _Held, field: str) -> torch.Tensor:
        """float32 [count], this rank's elements in the optimizer; under ZeRO 3 it may be a copy."""
        parameter = held.parameter
        if self._stage == 3:
            from deepspeed.utils import safe_get_local_fp32_param, safe_get_local_optimizer_state

            local: torch.Tensor = (
                safe_get_local_fp32_param(parameter)
                if field == WEIGHT
                else safe_get_local_optimizer_state(parameter, field)
            )
            local = local.view(-1)[: held.count]
            # DeepSpeed hands an offloaded state out on the GPU, and all of it is asked for before any is copied.
            return local.cpu() if getattr(self._zero, "offload_optimizer", False) else local
        if self._stage == 0:
            tensor: torch.Tensor = parameter if field == WEIGHT else self._adam.state[parameter][field]
            return tensor.detach().view(-1)[held.start : held.start + held.count]
        mapping = parameter._hp_mapping
        flat = self._zero.single_partition_of_fp32_groups[mapping.param_group_index]
        tensor = flat if field == WEIGHT else self._adam.state[flat][field]
        return tensor.detach().narrow(0, mapping.hp_fragment_address.start, held.count)

    def _set_local(self, held: _Held, field: str, values: torch.Tensor) -> None:
        """Under ZeRO 3, write this rank's partition through DeepSpeed, which may have it elsewhere (offloaded)."""
        from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

        padded = torch.zeros(held.parameter.ds_tensor.ds_numel, dtype=torch.float32)
        padded[: held.count] = values
        if field == WEIGHT:
            safe_set_local_fp32_param(held.parameter, padded)
        else:
            safe_set_local_optimizer_state(held.parameter, padded, field)
