"""The learner's side of a push where only an adapter is trained: the adapter alone, or the merged model.

    AdapterSource   A and B in float32, with fingerprints of the base that they belong to: megabytes
    MergedSource    base + scale B A in the compute dtype, whole: for generators that do not have this base

Whole parameters are on every rank (ZeRO 0 to 2), so nothing here is a collective.
May import: torch, actors.{engine, lora, publishing}, cluster.{low_rank, weight_channel}.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from actors.engine import TrainingEngine
from actors.lora import Adapter
from actors.publishing import WeightSource
from cluster.low_rank import LowRankUpdate
from cluster.weight_channel import TensorMeta, WeightManifest, bit_sum


class AdapterSource(WeightSource):
    """A :class:`WeightSource` of the adapter's matrices."""

    def __init__(self, engine: TrainingEngine, adapter: Adapter) -> None:
        super().__init__(engine)
        self._adapter = adapter
        self._base: dict[str, dict[str, int]] = {}  # by dtype: the base is frozen, so it is summed up once

    def describe(self, dtype: str) -> tuple[TensorMeta, ...]:
        return tuple(TensorMeta(name, "float32", tuple(p.shape)) for name, p in self._adapter.matrices())

    def _gathered(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, parameter in self._adapter.matrices():
            yield name, parameter.detach()

    def _complete(self, manifest: WeightManifest, dtype: str) -> WeightManifest:
        if dtype not in self._base:
            wire = getattr(torch, dtype)
            self._base[dtype] = {name: bit_sum(tensor.to(wire)) for name, tensor in self._adapter.base()}
        return replace(manifest, low_rank=LowRankUpdate(dtype, self._base[dtype], self._adapter.deltas()))


class MergedSource(WeightSource):
    """A :class:`WeightSource` of the whole model with the adapter merged into it."""

    def __init__(self, engine: TrainingEngine, adapter: Adapter) -> None:
        super().__init__(engine)
        self._adapter = adapter

    def describe(self, dtype: str) -> tuple[TensorMeta, ...]:
        return tuple(TensorMeta(name, dtype, shape) for name, shape in self._adapter.shapes().items())

    def _gathered(self) -> Iterator[tuple[str, torch.Tensor]]:
        return self._adapter.whole()


def weight_source(engine: TrainingEngine, adapter: Adapter | None) -> WeightSource:
    """What a rank pushes from."""
    if adapter is None:
        return WeightSource(engine)
    return MergedSource(engine, adapter) if adapter.plan.merged_push else AdapterSource(engine, adapter)
