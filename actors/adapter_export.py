"""What a trained adapter leaves on the disk: in a checkpoint its own files, in an export the merged model beside them.

May import: torch, actors.{adapter_files, lora}, cluster.manifest.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from actors.adapter_files import base_fingerprint, write_adapter
from actors.lora import Adapter, empty_like
from cluster.manifest import FileEntry

FOLDER = "adapter"  # of the adapter in the export of a merged model


class AdapterCopy:
    """The adapter's tensors as they are now, on the host; called with a folder, it writes them there."""

    def __init__(self, adapter: Adapter) -> None:
        self._tensors = {name: p.detach().to("cpu", torch.float32, copy=True) for name, p in adapter.trained()}
        self._config, self._base, self._quantization = adapter.describe(), adapter.base_path, adapter.plan.quantization

    def __call__(self, folder: Path) -> dict[str, FileEntry]:
        return write_adapter(folder, self._tensors, self._config, base_fingerprint(self._base), self._quantization)


def export_adapter(adapter: Adapter, directory: Path, dtype: torch.dtype) -> None:
    """The merged model in ``dtype`` and the adapter below ``adapter/``; without ``merged_export`` the adapter alone."""
    copied = AdapterCopy(adapter)
    if not adapter.plan.merged_export:
        copied(directory)
        return
    save_merged(adapter, directory, dtype)
    copied(directory / FOLDER)


def save_merged(adapter: Adapter, directory: Path, dtype: torch.dtype) -> None:
    """A Hugging Face folder of the base with the adapter merged into it, without a tokenizer."""
    state = {name: tensor.to("cpu", dtype, copy=True) for name, tensor in adapter.whole()}
    empty: Any = empty_like(adapter.model, dtype)
    directory.mkdir(parents=True, exist_ok=True)
    empty.save_pretrained(directory, state_dict=state)
