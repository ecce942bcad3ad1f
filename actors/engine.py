"""DeepSpeed, in one place: set-up, accumulation, gathering; what is saved of it stands in actors/engine_state.py.

Parameters are float32 and are themselves the master weights; bfloat16 is the *compute* dtype, by
autocast.  That costs the memory of bf16 weights + fp32 masters, accumulates gradients in float32
without further ado, and makes small learning rates count.
May import: torch, deepspeed, actors.{engine_state, settings, shards}, cluster.rendezvous.
"""

from __future__ import annotations

import gc
import logging
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from actors.engine_state import EngineState
from actors.settings import LearnerSettings
from actors.shards import ShardFolder, Snapshot, copy_to_host

NEVER = 10**9  # steps between DeepSpeed's own prints
# Elements of a gradient bucket: 80 MB.  DeepSpeed's default of 5e8 makes a buffer as large as the gradients.
REDUCE_BUCKET = 20_000_000
HEAD = "hf_model.score."  # parameters of a scalar head, as transformers' sequence classifiers name it


def deepspeed_config(settings: LearnerSettings, dtype: torch.dtype, adapter: bool = False) -> dict[str, Any]:
    """DeepSpeed's configuration; ``settings.deepspeed`` is merged over it, section by section.

    ``adapter``: only an adapter is trained.  Its gradients are few: they are reduced as the float32 that they are.
    """
    zero: dict[str, Any] = {"stage": settings.zero_stage, "reduce_bucket_size": REDUCE_BUCKET}
    for section, where in (
        ("offload_optimizer", settings.offload_optimizer),
        ("offload_param", settings.offload_param),
    ):
        if where != "none":
            zero[section] = {"device": where, "pin_memory": torch.cuda.is_available()}
            if where == "nvme":
                zero[section]["nvme_path"] = settings.nvme_path
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,  # packs vary in size: weights carry the denominator
        "gradient_accumulation_steps": 1,  # the boundary is set by hand, see forward_backward
        "gradient_clipping": settings.optimizer.max_grad_norm,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": NEVER,
        "wall_clock_breakdown": False,
    }
    if dtype == torch.bfloat16:
        config["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}
        if adapter:
            config["torch_autocast"]["lower_precision_safe_modules"] = []
    return _merge(config, settings.deepspeed)


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        known = merged.get(key)
        merged[key] = _merge(known, value) if isinstance(known, dict) and isinstance(value, dict) else value
    return merged


def parameter_groups(model: nn.Module, head_lr_factor: float) -> tuple[list[dict[str, Any]], list[float]]:
    """(what the optimizer gets, each group's factor of the learning rate): one group, or backbone and scalar head."""
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    head = [p for name, p in trained if name.startswith(HEAD)]
    if head_lr_factor == 1.0 or not head:
        return [{"params": [p for _, p in trained]}], [1.0]
    body = [p for name, p in trained if not name.startswith(HEAD)]
    return [{"params": body}, {"params": head}], [1.0, head_lr_factor]


class TrainingEngine:
    """One rank's DeepSpeed engine.  The process group exists already (cluster/rendezvous.py)."""

    def __init__(self, model: nn.Module, settings: LearnerSettings, dtype: torch.dtype, device: torch.device) -> None:
        os.environ.setdefault("DS_ACCELERATOR", device.type)
        os.environ.setdefault("LOCAL_RANK", "0")  # where the group is that of a vLLM engine of this process: no join()
        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        import deepspeed

        # On CPU DeepSpeed compiles a shared-memory all-reduce for inference, which training never calls.  The
        # build is guarded by a lock file without a deadline: a process killed during it would hang all later ones.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        self._deepspeed = deepspeed
        self.device, self.zero_stage = device, settings.zero_stage
        optimizer = settings.optimizer
        groups, self._lr_factors = parameter_groups(model, optimizer.head_lr_factor)
        self._adam = torch.optim.AdamW(
            groups,
            lr=optimizer.lr,
            betas=optimizer.betas,
            eps=optimizer.eps,
            weight_decay=optimizer.weight_decay,
            fused=True,  # one pass over the states: several times faster, on CPU too
        )
        config = deepspeed_config(settings, dtype, adapter=getattr(model, "adapter", None) is not None)
        if settings.zero_stage == 3:
            # Partitions of what lies on rank 0's host: `initialize` alone would put the whole model on every GPU first.
            deepspeed.zero.Init(module=model, config_dict_or_path=config)
            for buffer in model.buffers():
                buffer.data = buffer.data.to(device)
                torch.distributed.broadcast(buffer.data, 0)
        self.engine, *_ = deepspeed.initialize(
            model=model, optimizer=self._adam, config=config, dist_init_required=False
        )
        self._spare: tuple[torch.Tensor, ...] = ()  # the last snapshot's buffers
        self.world_size = torch.distributed.get_world_size()
        self.rank = torch.distributed.get_rank()

    # --- one update -------------------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.engine(*args, **kwargs)

    def set_boundary(self, is_last: bool) -> None:
        """Say before each forward pass whether its backward pass ends the accumulation."""
        self.engine.set_gradient_accumulation_boundary(is_last)

    def backward(self, loss: torch.Tensor) -> None:
        """Accumulate the gradient of this rank's share of the *global* loss.

        DeepSpeed averages over ranks; our token weights already sum to one over all of them, so the
        average is undone here.
        """
        self.engine.backward(loss * self.world_size, scale_wrt_gas=False)

    def step(self, lr: float) -> float:
        """Clip and apply; returns the global gradient norm before clipping."""
        for group, factor in zip(self.engine.optimizer.param_groups, self._lr_factors, strict=True):
            group["lr"] = lr * factor
        # Without ZeRO, DeepSpeed clips float32 gradients but does not tell their norm.
        norm = self._gradient_norm() if self.zero_stage == 0 else None
        self.engine.step()
        norm = self.engine.get_global_grad_norm() if norm is None else norm
        return float("nan") if norm is None else float(norm)

    def _gradient_norm(self) -> float:
        """2-norm of the accumulated gradient where every rank holds all of it (ZeRO 0)."""
        gradients = [p.grad for p in self.engine.module.parameters() if p.grad is not None]
        return float(torch.nn.utils.get_total_norm(gradients))

    # --- whole parameters -------------------------------------------------------------------

    def named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """Parameters by the name they have in a Hugging Face checkpoint, each once, in a fixed order."""
        module = cast(nn.Module, self.engine.module)
        prefix = "hf_model."
        return [(n.removeprefix(prefix), p) for n, p in module.named_parameters() if n.startswith(prefix)]

    def shape_of(self, parameter: nn.Parameter) -> tuple[int, ...]:
        """The whole shape, also where ZeRO 3 holds only a part."""
        return tuple(getattr(parameter, "ds_shape", parameter.shape))

    def whole(self, parameters: list[nn.Parameter]) -> AbstractContextManager[Any]:
        """Inside this context the parameters are whole on every rank.  A collective under ZeRO 3."""
        if self.zero_stage < 3:
            return nullcontext()
        return cast(AbstractContextManager[Any], self._deepspeed.zero.GatheredParameters(parameters))

    def gradients(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, whole gradient, float32), between backward at the boundary and step.  A collective."""
        from deepspeed.utils import safe_get_full_grad

        for name, parameter in self.named_parameters():
            if not parameter.requires_grad:  # frozen
                continue
            gradient = parameter.grad if self.zero_stage == 0 else safe_get_full_grad(parameter)
            yield name, torch.zeros(self.shape_of(parameter)) if gradient is None else gradient.detach().float().cpu()

    def discard_gradients(self) -> None:
        """Forget what was accumulated, without a step.  For checks only."""
        self.engine.optimizer.zero_grad()
        for _, parameter in self.named_parameters():
            parameter.grad = None

    # --- state ------------------------------------------------------------------------------

    def snapshot(self, rng: torch.Tensor) -> Snapshot:
        """This rank's part of weights and optimizer, copied to the host.  No collective.

        It takes the place of the snapshot before, which must not be needed any more.

        Args:
            rng: uint8, what :meth:`load` gives back.
        """
        state = self._state()
        found = copy_to_host(state.pieces(), rng, state.metadata(), self._spare)
        self._spare = found.buffers
        return found

    def load(self, directory: Path) -> torch.Tensor:
        """Restore what the ranks' snapshots held, however many they were; returns the rng.  A collective.

        The caller has verified the files' digests.
        """
        saved = ShardFolder(directory)
        self._state().load(saved)
        return saved.rng(self.rank)

    def _state(self) -> EngineState:
        def whole(parameter: nn.Parameter) -> AbstractContextManager[Any]:
            if self.zero_stage < 3:
                return nullcontext()
            gathered = self._deepspeed.zero.GatheredParameters([parameter], modifier_rank=0)
            return cast(AbstractContextManager[Any], gathered)

        module, zero = cast(nn.Module, self.engine.module), self.engine.optimizer
        return EngineState(module, zero, self._adam, self.zero_stage, self.rank, self.world_size, whole)

    def close(self) -> None:
        self.engine.destroy()
        gc.collect()
