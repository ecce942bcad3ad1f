"""Low-rank updates of tensors that both sides hold: what travels is small, what is served is whole and proven.

    sender    base (frozen), down, up ----- down, up, fingerprints of all three -----> receiver
    receiver  its own copy of the base, each tensor's fingerprint compared; base + scale * up @ down

The sum is always taken anew from the base, never added to the sum before, so that rounding does not build up.
May import: torch, safetensors, cluster.errors.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cluster.errors import DamagedError

INDEX = "model.safetensors.index.json"


@dataclass(frozen=True, slots=True)
class Delta:
    """``weight`` is to become ``weight + scale * up @ down``; three names of tensors."""

    weight: str  # [out, in], of the base
    down: str  # [r, in], sent
    up: str  # [out, r], sent
    scale: float


@dataclass(frozen=True, slots=True)
class LowRankUpdate:
    """What a version is made of besides the tensors that are sent."""

    dtype: str  # of the base and of the result, a torch dtype's name
    base: Mapping[str, int]  # fingerprint (cluster.weight_channel.bit_sum) of every tensor of the base in ``dtype``
    deltas: tuple[Delta, ...]

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> LowRankUpdate:
        """Inverse of ``dataclasses.asdict``."""
        return cls(data["dtype"], dict(data["base"]), tuple(Delta(**delta) for delta in data["deltas"]))


@torch.no_grad()
def merge(base: torch.Tensor, down: torch.Tensor, up: torch.Tensor, scale: float) -> torch.Tensor:
    """``base + scale * up @ down``, summed in float32, in base's dtype and on its device.

    Args:
        base: [out, in], of any floating dtype.
        down: [r, in].
        up: [out, r].
    """
    device = base.device
    with torch.autocast(device.type, enabled=False):
        up, down = up.to(device, torch.float32), down.to(device, torch.float32)
        return torch.addmm(base.float(), up, down, alpha=scale).to(base.dtype)


def tensor_files(folder: Path) -> dict[str, Path]:
    """Name of every tensor of a model folder -> the safetensors file it is in.

    Raises:
        DamagedError: there is none, or the index cannot be read.
    """
    from safetensors import safe_open

    index = folder / INDEX
    if index.is_file():
        try:
            return {name: folder / file for name, file in json.loads(index.read_text())["weight_map"].items()}
        except (ValueError, KeyError, AttributeError) as error:
            raise DamagedError(f"{index}: cannot be read ({error}); copy the model again") from error
    found: dict[str, Path] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(str(file), framework="pt", device="cpu") as opened:
            found |= dict.fromkeys(opened.keys(), file)
    if not found:
        raise DamagedError(f"{folder}: holds no safetensors; give the folder of the base model")
    return found


def base_tensors(folder: Path, names: Sequence[str]) -> Iterator[tuple[str, torch.Tensor]]:
    """The named tensors of a model folder, one at a time, in the order of ``names``.

    Raises:
        DamagedError: one of them is not there.
    """
    from safetensors import safe_open

    files = tensor_files(folder)
    opened: dict[Path, Any] = {}
    for name in names:
        if name not in files:
            raise DamagedError(f"{folder}: holds no tensor {name}, which the learner's base has")
        file = files[name]
        if file not in opened:
            opened[file] = safe_open(str(file), framework="pt", device="cpu")
        yield name, opened[file].get_tensor(name)
