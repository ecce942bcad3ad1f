"""Named tensors with a version, from one process to another: what is sent, and proof that it came.

* ``bit_sum``: a fingerprint that adds up over fused and sharded parts.
* ``WeightFileWriter`` / ``read_weight_file``: one flat safetensors file per version, written in
  place through a memory map (casting on the way), sealed with its fingerprints and renamed into
  sight, so that a reader sees a whole file or none.
* ``plan_buckets``: which tensors share one transfer.

Transport over process groups is in ``transfer_group.py``.
May import: numpy, torch, safetensors, cluster.{errors, low_rank}.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cluster.errors import DamagedError
from cluster.low_rank import LowRankUpdate

MASK = (1 << 64) - 1
_SAFETENSORS_DTYPE = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
_WORD = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_HEX_DIGITS = 16


@dataclass(frozen=True, slots=True)
class TensorMeta:
    """Name, wire dtype and whole shape of one tensor."""

    name: str
    dtype: str  # a torch dtype's name: "float32"
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        itemsize: int = getattr(torch, self.dtype).itemsize
        return math.prod(self.shape) * itemsize


@dataclass(frozen=True, slots=True)
class WeightManifest:
    """What one version consists of."""

    version: str
    tensors: tuple[TensorMeta, ...]
    fingerprints: Mapping[str, int]
    low_rank: LowRankUpdate | None = None  # the tensors are not served themselves: they change a base that is there

    @property
    def num_bytes(self) -> int:
        return sum(t.num_bytes for t in self.tensors)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> WeightManifest:
        tensors = tuple(TensorMeta(t["name"], t["dtype"], tuple(t["shape"])) for t in data["tensors"])
        update = data.get("low_rank")
        low_rank = None if update is None else LowRankUpdate.from_dict(update)
        return cls(data["version"], tensors, dict(data["fingerprints"]), low_rank)


def bit_sum(tensor: torch.Tensor) -> int:
    """Sum of the elements' bit patterns, read as signed integers, modulo 2^64.

    Any single changed bit changes it; it is additive over parts (fused or tensor-parallel) and
    blind to their order, which is why it is taken per tensor and not once for a model.
    """
    flat = tensor.detach().contiguous().view(-1)
    if flat.numel() == 0:
        return 0
    return int(flat.view(_WORD[flat.element_size()]).sum(dtype=torch.int64).item()) & MASK


def plan_buckets(tensors: Sequence[TensorMeta], bucket_bytes: int) -> list[list[TensorMeta]]:
    """Consecutive tensors of at most ``bucket_bytes`` together; one larger tensor has a bucket of its own."""
    buckets: list[list[TensorMeta]] = []
    used = 0
    for tensor in tensors:
        if not buckets or used + tensor.num_bytes > bucket_bytes:
            buckets.append([])
            used = 0
        buckets[-1].append(tensor)
        used += tensor.num_bytes
    return buckets


def unpack_bucket(buffer: torch.Tensor, bucket: Sequence[TensorMeta]) -> list[tuple[str, torch.Tensor]]:
    """Views of a uint8 buffer as the tensors packed into it, in order."""
    parts = buffer.split([t.num_bytes for t in bucket])
    return [
        (t.name, part.view(getattr(torch, t.dtype)).view(t.shape)) for t, part in zip(bucket, parts, strict=True)
    ]


class WeightFileWriter:
    """Writes one version: ``write`` every tensor, then ``commit``.  Without commit nothing is visible."""

    def __init__(self, path: Path, version: str, tensors: Sequence[TensorMeta]) -> None:
        self.path, self.version, self.tensors = path, version, tuple(tensors)
        self._partial = path.with_name(f".{path.name}.partial")
        header = self._header({t.name: 0 for t in self.tensors})
        self._data_start = 8 + len(header)
        size = self._data_start + sum(t.num_bytes for t in self.tensors)
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(self._partial, "wb") as file:
            os.posix_fallocate(file.fileno(), 0, size)  # a full disk is found here, not as a SIGBUS later
        self._map = np.memmap(self._partial, dtype=np.uint8, mode="r+", shape=(size,))
        self._offsets: dict[str, tuple[int, TensorMeta]] = {}
        offset = self._data_start
        for tensor in self.tensors:
            self._offsets[tensor.name] = (offset, tensor)
            offset += tensor.num_bytes
        self.fingerprints: dict[str, int] = {}

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Copy one tensor into its place, cast to the wire dtype, and take its fingerprint."""
        offset, meta = self._offsets[name]
        if tuple(tensor.shape) != meta.shape:
            raise DamagedError(f"{name}: shape {tuple(tensor.shape)} is not the announced {meta.shape}")
        place = torch.from_numpy(self._map[offset : offset + meta.num_bytes]).view(getattr(torch, meta.dtype))
        place.view(meta.shape).copy_(tensor.detach())
        self.fingerprints[name] = bit_sum(place)

    def commit(self) -> WeightManifest:
        """Seal the header and rename the file into sight."""
        missing = [t.name for t in self.tensors if t.name not in self.fingerprints]
        if missing:
            raise DamagedError(f"{self.path}: {len(missing)} tensors were never written, the first is {missing[0]}")
        header = self._header(self.fingerprints)
        self._map[8 : 8 + len(header)] = np.frombuffer(header, dtype=np.uint8)
        self._map[:8] = np.frombuffer(struct.pack("<Q", len(header)), dtype=np.uint8)
        self._map.flush()
        os.replace(self._partial, self.path)
        return WeightManifest(self.version, self.tensors, dict(self.fingerprints))

    def abandon(self) -> None:
        """Remove what was written."""
        self._partial.unlink(missing_ok=True)

    def _header(self, fingerprints: Mapping[str, int]) -> bytes:
        # Fixed-width fingerprints: the header's size is known before the data is.
        sums = "".join(f"{fingerprints[t.name]:0{_HEX_DIGITS}x}" for t in self.tensors)
        entries: dict[str, Any] = {"__metadata__": {"version": self.version, "bit_sums": sums}}
        offset = 0
        for t in self.tensors:
            entries[t.name] = {
                "dtype": _SAFETENSORS_DTYPE[getattr(torch, t.dtype)],
                "shape": list(t.shape),
                "data_offsets": [offset, offset + t.num_bytes],
            }
            offset += t.num_bytes
        text = json.dumps(entries, separators=(",", ":")).encode()
        return text + b" " * (-len(text) % 64)


def read_weight_file(path: Path) -> tuple[str, Iterator[tuple[str, torch.Tensor]]]:
    """(version, tensors) of a weight file, mapped and verified tensor by tensor.

    Raises:
        DamagedError: a tensor's bits do not add up to the fingerprint that was written with it.
    """
    from safetensors import safe_open

    with open(path, "rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    metadata = header.pop("__metadata__")
    sums = metadata["bit_sums"]
    expected = {n: int(sums[i * _HEX_DIGITS : (i + 1) * _HEX_DIGITS], 16) for i, n in enumerate(header)}

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        with safe_open(str(path), framework="pt", device="cpu") as opened:
            for name in header:
                tensor = opened.get_tensor(name)
                found = bit_sum(tensor)
                if found != expected[name]:
                    raise DamagedError(
                        f"{path}: {name} has fingerprint {found:016x}, written was {expected[name]:016x}; push again"
                    )
                yield name, tensor

    return metadata["version"], tensors()


def free_bytes(directory: Path) -> int:
    """What is left on the file system that holds ``directory``."""
    stats = os.statvfs(directory)
    return stats.f_bavail * stats.f_frsize


