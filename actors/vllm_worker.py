"""The weight receiver inside vLLM's workers: the only code that touches vLLM's internals.

One engine is registered in vLLM's weight-transfer registry under the name ``burnish``.  It takes an
update in any of three ways, chosen per call: from a file, bucket by bucket over a process group
(NCCL, or gloo for its test double), or from CUDA IPC handles.  vLLM's own ``nccl`` and ``ipc``
backends changed their trainer side between 0.26 and 0.33 and have no deadline and no twin that runs
without a GPU; the receiving contract used here is the same in all of these versions.

vLLM imports this module in each of its workers because ``WORKER_EXTENSION`` names a class in it.
May import: torch, vllm, cluster.{low_rank, merged_tensors, transfer_group, weight_channel}.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

from actors.ipc_handles import shared_bucket
from cluster.errors import DamagedError
from cluster.low_rank import LowRankUpdate
from cluster.merged_tensors import MergedTensors
from cluster.transfer_group import TransferGroup
from cluster.weight_channel import TensorMeta, bit_sum, plan_buckets, read_weight_file, unpack_bucket

BACKEND = "burnish"
WORKER_EXTENSION = f"{__name__}.BurnishWorkerExtension"


@dataclass
class BurnishInitInfo(WeightTransferInitInfo):
    """Nothing for files and IPC; for a process group, where its members meet."""

    group: str = ""
    address: str = ""
    port: int = 0
    rank_offset: int = 1
    size: int = 0
    deadline_s: float = 300.0


@dataclass
class BurnishUpdateInfo(WeightTransferUpdateInfo):
    """One update: all of a file, all buckets of a group, or all shared buckets."""

    transport: Literal["file", "group", "ipc"] = "file"
    version: str = ""
    path: str = ""
    tensors: list[dict[str, Any]] = field(default_factory=list)
    fingerprints: dict[str, int] = field(default_factory=dict)
    bucket_bytes: int = 0
    handles: list[Any] = field(default_factory=list)
    low_rank: dict[str, Any] | None = None  # the tensors change the model in ``base``: see cluster/low_rank.py
    base: str = ""


class BurnishWeightTransferEngine(WeightTransferEngine[BurnishInitInfo, BurnishUpdateInfo]):
    """Receives checkpoint-format tensors and loads them through vLLM's layer-wise reload."""

    init_info_cls = BurnishInitInfo
    update_info_cls = BurnishUpdateInfo

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._groups: dict[str, TransferGroup] = {}
        self._current = ""
        self.served: dict[str, tuple[int, int]] = {}  # of the last low-rank update: see MergedTensors

    def init_transfer_engine(self, init_info: BurnishInitInfo) -> None:
        if init_info.size == 0:
            return
        before = self._groups.pop(init_info.group, None)
        if before is not None:  # its other side is gone: a serving rank that was started again meets us anew
            before.abort()
        parallel = self.parallel_config
        rank = init_info.rank_offset + int(getattr(parallel, "rank", 0))
        self._groups[init_info.group] = TransferGroup(
            init_info.group, init_info.address, init_info.port, rank, init_info.size, self.device, init_info.deadline_s
        )
        self._current = init_info.group

    def start_weight_update(self) -> None:
        from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

        initialize_layerwise_reload(self.model)

    def finish_weight_update(self) -> None:
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        finalize_layerwise_reload(self.model, self.model_config)

    def receive_weights(self, update_info: BurnishUpdateInfo) -> None:
        try:
            self.model.load_weights(self._whole(update_info))
        except BaseException:
            self.finish_weight_update()  # half a version is in, but the layers can compute and take the next one
            raise

    def _whole(self, info: BurnishUpdateInfo) -> Iterator[tuple[str, torch.Tensor]]:
        """The tensors of a version; where only an adapter came, merged into this side's base, one after the other.

        vLLM could serve an adapter beside its base (``enable_lora``), at a price in every token: two more products a
        layer, which on a CPU gather B once a token.  Merged, sampling costs what it costs without an adapter, and the
        weights can be proven where they lie.
        """
        if info.low_rank is None:
            yield from self._tensors(info)
            return
        sent = dict(self._tensors(info))
        merged = MergedTensors(LowRankUpdate.from_dict(info.low_rank), Path(info.base), sent)
        yield from merged.tensors(self.device)
        self.served = merged.served

    def _tensors(self, info: BurnishUpdateInfo) -> Iterator[tuple[str, torch.Tensor]]:
        if info.transport == "file":
            version, tensors = read_weight_file(Path(info.path))
            if version != info.version:
                raise RuntimeError(f"{info.path} holds version {version}, announced was {info.version}")
            for name, tensor in tensors:
                yield name, tensor if self.device.type == "cpu" else tensor.to(self.device)
            return
        metas = [TensorMeta(t["name"], t["dtype"], tuple(t["shape"])) for t in info.tensors]
        for i, bucket in enumerate(plan_buckets(metas, info.bucket_bytes)):
            if info.transport == "group":
                buffer = torch.empty(sum(m.num_bytes for m in bucket), dtype=torch.uint8, device=self.device)
                self._groups[self._current].broadcast(buffer, f"bucket {i + 1}, version {info.version}")
            else:
                buffer = shared_bucket(info.handles[i], self.device.index)
            for name, tensor in unpack_bucket(buffer, bucket):
                if bit_sum(tensor) != info.fingerprints[name]:
                    raise DamagedError(f"{name} of version {info.version} was damaged on its way ({info.transport})")
                yield name, tensor

    def shutdown(self) -> None:
        for group in self._groups.values():
            group.abort()
        self._groups.clear()


class BurnishWorkerExtension:
    """Methods that vLLM adds to each of its workers; called by name through ``collective_rpc``."""

    model_runner: Any
    weight_transfer_engine: Any

    def burnish_fingerprints(self) -> dict[str, tuple[int, int]]:
        """name -> (bit sum, elements) of this worker's parameters, as they lie in memory now."""
        model = self.model_runner.get_model()
        return {name: (bit_sum(p.data), p.numel()) for name, p in model.named_parameters()}

    def burnish_served(self) -> dict[str, tuple[int, int]]:
        """name -> (bit sum, elements) of the whole tensors that this worker made of the last low-rank update."""
        engine: Any = self.weight_transfer_engine
        return dict(engine.served)

    def burnish_fused_names(self) -> dict[str, list[str]]:
        """fused module name -> the checkpoint's module names that vLLM loads into it."""
        model = self.model_runner.get_model()
        return {k: list(v) for k, v in (getattr(model, "packed_modules_mapping", None) or {}).items()}


def register() -> None:
    """Put the receiver into vLLM's registry.  Safe to call twice."""
    try:
        WeightTransferEngineFactory.register_engine(BACKEND, BurnishWeightTransferEngine)
    except ValueError:  # registered already: by this very module in this process
        return


register()
