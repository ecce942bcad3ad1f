"""The learner's side of a weight push: from (possibly partitioned) parameters to bytes on their way.

``file``: rank 0 writes one sealed file.  ``nccl`` (and its test double over gloo): each serving rank
copies the weights into a staging buffer *inside* the gather and sends them *after* it, because a
receiver that stalls inside the gather would stall every rank.  That buffer is a whole model in the
served dtype: it lies on the host, and passes through the GPU a bucket at a time.  ``ipc``: the staging
buffers are shared with a process on the same GPU, and lie there.
May import: torch, actors.{engine, ipc_handles}, cluster.{weight_channel, transfer_group}.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from actors.engine import TrainingEngine
from actors.ipc_handles import ipc_handle
from cluster.transfer_group import SENDER, TransferGroup
from cluster.weight_channel import (
    TensorMeta,
    WeightFileWriter,
    WeightManifest,
    bit_sum,
    plan_buckets,
    unpack_bucket,
)

GATHER_BYTES = 512 * 2**20  # parameters gathered at once under ZeRO 3


class WeightSource:
    """One rank's view of the whole model's weights."""

    def __init__(self, engine: TrainingEngine) -> None:
        self.engine = engine
        self._staged: list[torch.Tensor] = []  # uint8 buckets of the staged version
        self._buckets: list[list[TensorMeta]] = []  # what lies in each
        self._manifest: WeightManifest | None = None
        self._groups: dict[str, TransferGroup] = {}

    def describe(self, dtype: str) -> tuple[TensorMeta, ...]:
        """Names, wire dtypes and shapes, in the order of iteration."""
        return tuple(
            TensorMeta(name, dtype, self.engine.shape_of(parameter))
            for name, parameter in self.engine.named_parameters()
        )

    def _gathered(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every parameter whole, a bucket at a time.  A collective under ZeRO 3: iterate it to the end."""
        bucket: list[tuple[str, torch.nn.Parameter]] = []
        size = 0
        named = self.engine.named_parameters()
        for i, (name, parameter) in enumerate(named):
            bucket.append((name, parameter))
            size += 4 * int(torch.Size(self.engine.shape_of(parameter)).numel())
            if size >= GATHER_BYTES or i == len(named) - 1:
                with self.engine.whole([p for _, p in bucket]):
                    for bucket_name, bucket_parameter in bucket:
                        yield bucket_name, bucket_parameter.detach()
                bucket, size = [], 0

    def whole_state(self, dtype: torch.dtype) -> dict[str, torch.Tensor] | None:
        """The whole model on the host at rank 0, None elsewhere; a collective."""
        keep = self.engine.rank == 0
        state: dict[str, torch.Tensor] = {}
        for name, tensor in self._gathered():
            if keep:
                state[name] = tensor.to(device="cpu", dtype=dtype, copy=True)
        return state if keep else None

    # --- file -------------------------------------------------------------------------------

    def publish_file(self, path: str, version: str, dtype: str) -> dict[str, Any] | None:
        """Write version ``version`` to ``path``; rank 0 returns the manifest."""
        writer = WeightFileWriter(Path(path), version, self.describe(dtype)) if self.engine.rank == 0 else None
        try:
            for name, tensor in self._gathered():
                if writer is not None:
                    writer.write(name, tensor)
            return None if writer is None else self._complete(writer.commit(), dtype).to_dict()
        except BaseException:
            if writer is not None:
                writer.abandon()
            raise

    def _complete(self, manifest: WeightManifest, dtype: str) -> WeightManifest:
        """The manifest with what a receiver must know besides its tensors; ``dtype``: what is served."""
        return manifest

    # --- collective and ipc -----------------------------------------------------------------

    def stage(
        self, version: str, dtype: str, bucket_bytes: int, serves: bool, shared: bool = False
    ) -> dict[str, Any] | None:
        """Copy the present weights into immutable buckets (serving ranks); rank 0 returns the manifest.

        ``shared``: they will be read where they are, by a process on the same GPU.
        """
        metas = self.describe(dtype)
        buckets = plan_buckets(metas, bucket_bytes)
        place: dict[str, tuple[int, int, TensorMeta]] = {}
        for b, bucket in enumerate(buckets):
            offset = 0
            for meta in bucket:
                place[meta.name] = (b, offset, meta)
                offset += meta.num_bytes
        keep = serves or self.engine.rank == 0
        if keep and not self._staged:
            on_host = self.engine.device.type == "cuda" and not shared
            self._staged = [
                torch.empty(
                    sum(m.num_bytes for m in bucket), dtype=torch.uint8, pin_memory=on_host,
                    device="cpu" if on_host else self.engine.device,
                )
                for bucket in buckets
            ]  # fmt: skip
        fingerprints: dict[str, int] = {}
        for name, tensor in self._gathered():
            if keep:
                b, offset, meta = place[name]
                served = getattr(torch, meta.dtype)
                target = self._staged[b][offset : offset + meta.num_bytes].view(served)
                value = tensor.to(served)
                target.view(meta.shape).copy_(value)
                fingerprints[name] = bit_sum(value if value.is_cuda else target)  # where adding up is fast
        if not keep:
            return None
        self._manifest = self._complete(WeightManifest(version, metas, fingerprints), dtype)
        self._buckets = buckets
        return self._manifest.to_dict() if self.engine.rank == 0 else None

    def write_staged(self, path: str) -> dict[str, Any]:
        """Write the staged version to a file and return its manifest.  Not a collective; rank 0 always has a copy."""
        if self._manifest is None:
            raise RuntimeError("write_staged before stage: no version is staged")
        writer = WeightFileWriter(Path(path), self._manifest.version, self._manifest.tensors)
        try:
            for staged, bucket in zip(self._staged, self._buckets, strict=True):
                for name, tensor in unpack_bucket(staged, bucket):
                    writer.write(name, tensor)
            return replace(writer.commit(), low_rank=self._manifest.low_rank).to_dict()
        except BaseException:
            writer.abandon()
            raise

    def open_group(self, name: str, address: str, port: int, size: int, deadline_s: float) -> None:
        """Meet the engine that this rank serves."""
        self._groups[name] = TransferGroup(name, address, port, SENDER, size, self.engine.device, deadline_s)

    def send(self, group: str) -> int:
        """Send the staged buckets; returns the bytes sent.  Not a collective of the learner's ranks."""
        if self._manifest is None:
            raise RuntimeError("send before stage: no version is staged")
        through = None
        for i, bucket in enumerate(self._staged):
            what = f"bucket {i + 1} of {len(self._staged)}, version {self._manifest.version}"
            sent = bucket
            if bucket.device.type != self.engine.device.type:
                if through is None:
                    size = max(b.numel() for b in self._staged)
                    through = torch.empty(size, dtype=torch.uint8, device=self.engine.device)
                sent = through[: bucket.numel()].copy_(bucket)
            self._groups[group].broadcast(sent, what)
        return sum(b.numel() for b in self._staged)

    def close_group(self, name: str) -> None:
        group = self._groups.pop(name, None)
        if group is not None:
            group.abort()

    def share(self) -> list[list[Any]]:
        """CUDA IPC handles of the staged buckets, for a process on the same GPU."""
        return [ipc_handle(bucket) for bucket in self._staged]

    def close(self) -> None:
        for name in list(self._groups):
            self.close_group(name)
