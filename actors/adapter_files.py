"""Adapter folders in peft's format: adapter_model.safetensors and adapter_config.json.

They also say which base they belong to and in which precision it was: a fingerprint and the kind of quantisation stand
in the metadata of the safetensors file, where other readers pass them over.
May import: torch, safetensors, cluster.{low_rank, manifest}, trainers.errors.
"""

from __future__ import annotations

import functools
import hashlib
import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cluster.low_rank import tensor_files
from cluster.manifest import FileEntry, digest_of, sync
from trainers.errors import InputError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."  # that peft puts before the names of the model it wraps
BASE = "burnish_base"  # key of the base's fingerprint in the metadata of WEIGHTS
QUANTIZATION, UNQUANTIZED = "burnish_quantization", "none"  # key and value beside it: how the base was quantised
READ_BYTES = 4096  # of each tensor that go into the fingerprint of a base


@dataclass(frozen=True, slots=True)
class AdapterHeader:
    """What the header of an adapter's weights says; None: nothing, as of an adapter that another tool wrote."""

    shapes: dict[str, tuple[int, ...]]  # of every tensor, by its name in the model
    base: str | None  # fingerprint of the base
    quantization: str | None  # of the base while the adapter was trained, or UNQUANTIZED


def is_adapter(folder: str | Path) -> bool:
    """Whether a folder holds an adapter, and no whole model.

    Some tools write the base's config.json beside an adapter: weights tell, not that file.
    """
    here = Path(folder)
    is_whole = (here / "config.json").is_file() and any(here.glob("model*.safetensors*"))
    return (here / CONFIG).is_file() and not is_whole


@functools.lru_cache(maxsize=8)
def base_fingerprint(folder: str) -> str:
    """Digest of a model folder by its tensors' names, dtypes, shapes and first bytes: 32 hexadecimal digits.

    Training changes almost every weight, so a few thousand bytes of each tensor tell two models apart, and 100 GB need
    not be read.  Which files the tensors lie in does not matter.
    """
    digest = hashlib.blake2b(digest_size=16)
    files = tensor_files(Path(folder))
    headers = {file: _header(file) for file in set(files.values())}
    for name in sorted(files):
        start, header = headers[files[name]]
        entry = header[name]
        digest.update(json.dumps([name, entry["dtype"], entry["shape"]]).encode())
        begin, end = entry["data_offsets"]
        with files[name].open("rb") as file:
            file.seek(start + begin)
            digest.update(file.read(min(READ_BYTES, end - begin)))
    return digest.hexdigest()


def _header(path: Path) -> tuple[int, dict[str, Any]]:
    """(where the data begin, entries by name) of a safetensors file."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        if length > path.stat().st_size:
            raise ValueError("it is cut short, or not safetensors")
        return 8 + length, json.loads(file.read(length))


def write_adapter(
    folder: Path, tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any], base: str,
    quantization: str | None = None,
) -> dict[str, FileEntry]:  # fmt: skip
    """Write an adapter that peft loads; its files by name, on the disk on return.

    Args:
        tensors: by their name in the model, ``LAYER.lora_A.weight`` and so on; on the host.
        config: of adapter_config.json.
        base: :func:`base_fingerprint` of the base.
        quantization: of the base that it was trained on; None: as it lies on the disk.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    named = {PREFIX + name: tensor.contiguous() for name, tensor in tensors.items()}
    try:
        known = {"format": "pt", BASE: base, QUANTIZATION: quantization or UNQUANTIZED}
        save_file(named, str(folder / WEIGHTS), metadata=known)
    except SafetensorError as error:  # how it says that the disk is full
        raise OSError(f"{folder / WEIGHTS} cannot be written: {error}") from error
    (folder / CONFIG).write_text(json.dumps(dict(config), indent=2, sort_keys=True, default=str) + "\n")
    entries = {}
    for name in (WEIGHTS, CONFIG):
        sync(folder / name)
        entries[name] = FileEntry((folder / name).stat().st_size, digest_of(folder / name))
    return entries


def read_adapter(folder: str | Path) -> dict[str, torch.Tensor]:
    """The tensors of an adapter, by their name in the model."""
    from safetensors.torch import load_file

    return {name.removeprefix(PREFIX): t for name, t in load_file(str(Path(folder) / WEIGHTS)).items()}


def read_header(folder: str | Path, field: str = "model.path") -> AdapterHeader:
    """The header of an adapter's weights; no tensor is read.

    Raises:
        InputError: the file is missing or cannot be read.
    """
    path = Path(folder) / WEIGHTS
    try:
        _, header = _header(path)
        shapes = {n.removeprefix(PREFIX): tuple(e["shape"]) for n, e in header.items() if n != "__metadata__"}
    except (OSError, ValueError, KeyError, TypeError, struct.error) as error:
        reason = f"its {WEIGHTS} cannot be read ({error})"
        raise InputError(field, str(folder), reason, "copy the adapter again") from error
    known = header.get("__metadata__") or {}
    return AdapterHeader(shapes, known.get(BASE), known.get(QUANTIZATION))


def read_config(folder: str | Path, field: str = "model.path") -> dict[str, Any]:
    """adapter_config.json.

    Raises:
        InputError: it cannot be read, or is not that of a LoRA adapter.
    """
    try:
        found = json.loads((Path(folder) / CONFIG).read_text())
        kind = found["peft_type"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = f"its {CONFIG} cannot be read ({error})"
        raise InputError(field, str(folder), reason, "copy the adapter again") from error
    if kind != "LORA":
        raise InputError(field, str(folder), f"is an adapter of kind {kind}", "use a LoRA adapter")
    if missing := [name for name in ("r", "lora_alpha") if not isinstance(found.get(name), int | float)]:
        raise InputError(field, str(folder), f"its {CONFIG} says no {missing[0]}", "copy the adapter again")
    return dict(found)
