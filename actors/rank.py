"""EngineRank: what every trained model has, policy, critic, reward model or SFT student.

One data-parallel rank of a DeepSpeed engine: it joins its process group, holds the weights, and saves, loads
and exports them.  Every method is called on all ranks at once.  What is learned stands in the subclasses.
May import: torch, actors.*, cluster.{manifest, rendezvous}.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from actors.adapter_export import AdapterCopy, export_adapter
from actors.adapter_source import weight_source
from actors.engine import TrainingEngine
from actors.lora import Adapter
from actors.modeling import load_tokenizer
from actors.settings import LearnerSettings
from actors.shards import shard_name
from actors.state_saving import SaveBegun, SaveOutcome, StateWriter
from cluster.rendezvous import Rendezvous, free_port, join, node_address


class EngineRank:
    """A rank.  Constructed on every rank at once, because DeepSpeed's set-up is a collective.

    Args:
        load: builds the model on the CPU in float32 (master weights), called with whether the weights' files are to
            be read; its Hugging Face model is the attribute ``hf_model``, and ``adapter`` is what is trained of it,
            None: all.
        dtype: the compute dtype's name.
        device: ``cpu`` or ``cuda:N``.
        tokenizer_path: folder whose tokenizer goes into an export.
    """

    adapter: Adapter | None = None

    def __init__(
        self,
        rank: int,
        rendezvous: Rendezvous,
        load: Callable[[bool], nn.Module],
        settings: LearnerSettings,
        dtype: str,
        device: str,
        seed: int,
        tokenizer_path: str,
    ) -> None:
        self.rank, self.settings, self.tokenizer_path = rank, settings, tokenizer_path
        self.device = torch.device(device)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        torch.manual_seed(seed)
        # One process is in one group: in the in-process twin policy and critic share it.
        if not dist.is_initialized():
            join(rendezvous, rank, "nccl" if self.device.type == "cuda" else "gloo", settings.start_deadline_s)
        elif (dist.get_rank(), dist.get_world_size()) != (rank, rendezvous.world_size):
            there = f"{dist.get_rank()} of {dist.get_world_size()}"
            raise ValueError(f"rank {rank} of {rendezvous.world_size}: this process is rank {there} already")
        # With ZeRO 3 DeepSpeed deals out what rank 0 has, a parameter at a time: the whole may not fit on a device,
        # nor the wholes of all ranks into the memory of their host.
        dealt = settings.zero_stage == 3
        model = load(rank == 0 or not dealt).train()
        if not dealt:
            model = model.to(self.device)
        self.dtype = cast(torch.dtype, getattr(torch, dtype))
        self.adapter = cast("Adapter | None", getattr(model, "adapter", None))
        self.engine = TrainingEngine(model, settings, self.dtype, self.device)
        self.weights = weight_source(self.engine, self.adapter)
        self._writer = StateWriter()

    # --- weights ------------------------------------------------------------------------------

    def weights_call(self, method: str, *args: Any) -> Any:
        """A method of this rank's :class:`actors.publishing.WeightSource`."""
        return getattr(self.weights, method)(*args)

    def stage_weights(
        self, serves: bool, version: str, dtype: str, bucket_bytes: int, shared: bool
    ) -> dict[str, Any] | None:
        """See :meth:`actors.publishing.WeightSource.stage`; a collective."""
        return self.weights.stage(version, dtype, bucket_bytes, serves, shared)

    def meeting_point(self) -> tuple[str, int]:
        """(address, free port) of this rank's node."""
        address = node_address()
        return address, free_port(address)

    def export(self, directory: str) -> None:
        """A Hugging Face folder (safetensors, config, tokenizer) in the compute dtype.

        Of an adapter, see :func:`actors.adapter_export.export_adapter`.
        """
        if self.adapter is not None:
            if self.rank == 0:
                export_adapter(self.adapter, Path(directory), self.dtype)
                load_tokenizer(self.tokenizer_path).save_pretrained(directory)
            dist.barrier()
            return
        state = self.weights.whole_state(self.dtype)  # a collective
        if self.rank == 0 and state is not None:
            model = cast(Any, self.engine.engine.module.hf_model)
            Path(directory).mkdir(parents=True, exist_ok=True)
            model.config.dtype = self.dtype
            model.save_pretrained(directory, state_dict=state)
            load_tokenizer(self.tokenizer_path).save_pretrained(directory)
        dist.barrier()

    # --- state --------------------------------------------------------------------------------

    def begin_save(self, directory: str) -> SaveBegun:
        """Copy this rank's state to the host and begin to write it below ``directory``; training may go on.

        Raises:
            RuntimeError: the outcome of the save before has not been asked for.
        """
        started = time.perf_counter()
        path, rng = Path(directory) / shard_name(self.rank), torch.get_rng_state()
        copied = AdapterCopy(self.adapter) if self.adapter is not None and self.rank == 0 else None
        snapshot = self._writer.begin(path, lambda: self.engine.snapshot(rng), copied)
        return SaveBegun(time.perf_counter() - started, snapshot.num_bytes)

    def save_outcome(self, wait_s: float = 0.0) -> SaveOutcome | None:
        """What came of ``begin_save``; None while it is being written."""
        return self._writer.outcome(wait_s)

    def load(self, directory: str) -> None:
        """Restore what ``begin_save`` wrote, on however many ranks and under whichever ZeRO stage."""
        torch.set_rng_state(self.engine.load(Path(directory)))

    def peak_memory_bytes(self) -> int:
        """Highest memory of this rank so far: the device's on CUDA, else the process's resident set."""
        if self.device.type == "cuda":
            return int(torch.cuda.max_memory_allocated(self.device))
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

    def close(self) -> None:
        self._writer.close()
        self.weights.close()
        self.engine.close()
        # A group of one has nobody to leave; in the in-process twin the critic and vLLM may still be in it.
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.destroy_process_group()

    # --- for subclasses -----------------------------------------------------------------------

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Inside, an adapter's dropout is off: what is measured is the model that is sampled.

        May be nested: a reference is asked for inside an evaluation.
        """
        module = cast(nn.Module, self.engine.engine.module)
        was = module.training
        module.eval()
        try:
            yield
        finally:
            module.train(was)

    def tensor(self, values: Any) -> torch.Tensor:
        """float32, on this rank's device."""
        return torch.as_tensor(np.asarray(values, dtype=np.float32), device=self.device)

    def everyone(self, mine: dict[int, Any]) -> dict[int, Any]:
        """The union of every rank's ``mine``; a collective."""
        parts: list[Any] = [None] * self.engine.world_size
        dist.all_gather_object(parts, mine)
        return {index: row for part in parts for index, row in part.items()}
