"""Training state in a form that does not depend on how many ranks hold it: pieces of named, flattened tensors.

    rank-0000.safetensors    {"model.embed.weight@0|exp_avg": float32 [n], ...}, metadata: shapes and counters
    rank-0001.safetensors    ...

A piece is a range of one flattened parameter in one field: the weight itself or one of Adam's moments.  Each rank
writes what it holds; whoever loads asks for the ranges that it will hold, whichever files they lie in.
May import: numpy, torch, safetensors, cluster.{errors, manifest}.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cluster.errors import DamagedError
from cluster.manifest import FileEntry, new_digest

WRITE_BYTES = 16 * 2**20  # written and hashed at a time; both release the interpreter lock
# 256 MiB: a power of two, which is what torch rounds pinned memory up to.
BUFFER_ELEMENTS = 64 * 2**20
RNG = "rng"  # the random state of the rank, uint8


@dataclass(frozen=True, slots=True)
class Piece:
    """A range of one flattened parameter.  ``tensor`` is a view, float32 [n]."""

    name: str
    field: str
    start: int
    tensor: torch.Tensor

    @property
    def key(self) -> str:
        return f"{self.name}@{self.start}|{self.field}"


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One rank's state, copied to the host: nothing that happens to the model afterwards changes it."""

    keys: tuple[str, ...]
    sizes: tuple[int, ...]  # elements of each piece, in the order in which they fill the buffers
    buffers: tuple[torch.Tensor, ...]  # float32, together [sum(sizes)]
    rng: torch.Tensor  # uint8
    metadata: Mapping[str, Any]  # JSON values

    @property
    def num_bytes(self) -> int:
        return sum(buffer.nbytes for buffer in self.buffers) + self.rng.nbytes


def copy_to_host(
    pieces: Sequence[Piece], rng: torch.Tensor, metadata: Mapping[str, Any], spare: Sequence[torch.Tensor] = ()
) -> Snapshot:
    """Copy every piece to the host, which is all that training has to wait for.  A piece may become several.

    ``spare``: buffers of an earlier snapshot, to be overwritten: fresh memory costs more than the copy.
    """
    on_device = any(piece.tensor.is_cuda for piece in pieces)
    left = sum(piece.tensor.numel() for piece in pieces)
    keys, sizes, buffers, room = list[str](), list[int](), list[torch.Tensor](), 0
    for piece in pieces:
        values, done = piece.tensor.detach().view(-1), 0
        while done < values.numel():
            if not room:
                room = min(BUFFER_ELEMENTS, left)
                old = spare[len(buffers)] if len(buffers) < len(spare) else None
                if old is None or old.numel() != room or old.is_pinned() != on_device:
                    old = torch.empty(room, dtype=torch.float32, pin_memory=on_device)
                buffers.append(old)
            size = min(room, values.numel() - done)
            place = buffers[-1].narrow(0, buffers[-1].numel() - room, size)
            place.copy_(values.narrow(0, done, size), non_blocking=on_device)
            keys.append(replace(piece, start=piece.start + done).key)
            sizes.append(size)
            done, room, left = done + size, room - size, left - size
    if on_device:
        torch.cuda.synchronize()
    return Snapshot(tuple(keys), tuple(sizes), tuple(buffers), rng, metadata)


def shard_name(rank: int) -> str:
    return f"rank-{rank:04d}.safetensors"


def write_shard(path: Path, snapshot: Snapshot) -> FileEntry:
    """One safetensors file; its bytes are on the disk on return.

    Raises:
        OSError: the disk refuses; what it took so far is left there.
    """
    header: dict[str, Any] = {"__metadata__": {"burnish": json.dumps(dict(snapshot.metadata))}}
    offset = 0
    for key, size in zip(snapshot.keys, snapshot.sizes, strict=True):
        header[key] = {"dtype": "F32", "shape": [size], "data_offsets": [offset, offset + 4 * size]}
        offset += 4 * size
    rng = snapshot.rng.numpy()
    header[RNG] = {"dtype": "U8", "shape": [rng.size], "data_offsets": [offset, offset + rng.size]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 64)
    head = np.frombuffer(struct.pack("<Q", len(text)) + text, np.uint8)
    parts: list[np.ndarray] = [head, *(buffer.numpy().view(np.uint8) for buffer in snapshot.buffers), rng]
    digest, size = new_digest(), 0
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb", buffering=0) as file:
        for part in parts:
            for begin in range(0, part.size, WRITE_BYTES):
                chunk = memoryview(part[begin : begin + WRITE_BYTES].data)
                digest.update(chunk)
                while chunk:  # a write may take less than it was given
                    taken = file.write(chunk)
                    size, chunk = size + taken, chunk[taken:]
        os.fsync(file.fileno())
    return FileEntry(size, digest.hexdigest())


class ShardFolder:
    """What all ranks wrote, to be read by any number of them.  Verifying the bytes is for the caller.

    Raises:
        FileNotFoundError: there is no shard in ``folder``.
        DamagedError: shards are missing.
    """

    def __init__(self, folder: Path) -> None:
        from safetensors import safe_open

        self.folder = folder
        paths = sorted(folder.glob(shard_name(0).replace("0000", "*")))
        if not paths:
            raise FileNotFoundError(f"{folder}: there is no training state in this folder")
        self._files = [safe_open(str(path), framework="pt", device="cpu") for path in paths]
        metadata = [json.loads(file.metadata()["burnish"]) for file in self._files]
        self.num_ranks: int = metadata[0]["num_ranks"]
        if [m["rank"] for m in metadata] != list(range(self.num_ranks)):
            raise DamagedError(f"{folder}: holds shards of ranks {[m['rank'] for m in metadata]} of {self.num_ranks}")
        self.adam_step = float(metadata[0]["adam_step"])
        self.shapes: dict[str, tuple[int, ...]] = {
            name: tuple(shape) for m in metadata for name, shape in m["shapes"].items()
        }
        self._pieces: dict[tuple[str, str], list[tuple[int, int, str]]] = {}  # (start, file, key)
        for index, file in enumerate(self._files):
            for key in file.keys():  # noqa: SIM118 - not a mapping
                if key != RNG:
                    place, _, field = key.rpartition("|")
                    name, _, start = place.rpartition("@")
                    self._pieces.setdefault((name, field), []).append((int(start), index, key))

    def read(self, name: str, field: str, start: int = 0, count: int | None = None) -> torch.Tensor:
        """float32 [count]: elements ``start`` .. of the flattened parameter, by default all of them.

        Raises:
            DamagedError: an element is in no shard.
        """
        if count is None:
            count = math.prod(self.shapes[name]) - start
        out = torch.empty(count, dtype=torch.float32)
        filled = 0
        for first, index, key in sorted(self._pieces.get((name, field), ())):
            part = self._files[index].get_slice(key)
            begin, end = max(start, first), min(start + count, first + part.get_shape()[0])
            if begin < end:
                out[begin - start : end - start] = part[begin - first : end - first]
                filled += end - begin
        if filled != count:
            raise DamagedError(f"{self.folder}: {count - filled} of {count} elements of {name} ({field}) are missing")
        return out

    def rng(self, rank: int) -> torch.Tensor:
        """The random state to go on with, uint8: the rank's own, where there was such a rank."""
        state: torch.Tensor = self._files[rank % self.num_ranks].get_tensor(RNG)
        return state

    def expect(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """DamagedError unless these are the parameters that were saved."""
        for name in (*shapes, *self.shapes):
            here, there = shapes.get(name, "none"), self.shapes.get(name, "none")
            if here != there:
                raise DamagedError(f"{self.folder}: {name} has shape {there}, the model's has {here}")


def cut(numel: int, part: int, num_parts: int) -> tuple[int, int]:
    """(start, count) of one of ``num_parts`` almost equal ranges that together are all of ``numel`` elements."""
    start, end = numel * part // num_parts, numel * (part + 1) // num_parts
    return start, end - start

