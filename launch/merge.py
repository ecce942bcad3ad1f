"""``burnish merge``: an adapter and its base as one Hugging Face folder, which any tool loads.

May import: torch, transformers, actors.*, trainers.errors, launch.adapters.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch

from actors.adapted_model import TrainedModelSettings
from actors.adapter_export import save_merged
from actors.adapter_files import adapter_shapes, is_adapter, read_config
from actors.lora_settings import LoRAPlan, LoRASettings
from actors.model_folders import resolve_model
from actors.modeling import load_policy, load_tokenizer
from actors.scalar_model import load_scalar, scalar_pad_token_id
from launch.adapters import FIELD, check_policy
from trainers.errors import InputError

ADAPTER = "adapter"
BESIDE = ("reward_stats.json", "reward_report.json", "reward_report.svg")  # what a reward model's export holds


def merge_adapter(adapter: str, out: Path, base: str | None) -> list[str]:
    """Write ``adapter`` (of an export, a checkpoint's ``learner`` folder, or peft) merged to ``out``; lines to show.

    Args:
        base: folder of the base model; None: the one that the adapter names.

    Raises:
        InputError: it is no LoRA adapter of this base, or ``out`` exists.
    """
    if not is_adapter(adapter):
        raise InputError(ADAPTER, adapter, "holds no adapter_config.json, or a whole model", "give an adapter's folder")
    if out.exists():
        raise InputError("out", str(out), "exists already", "name another folder or remove it")
    said = read_config(adapter, ADAPTER)
    with_head = said.get("task_type") == "SEQ_CLS"
    settings = settings_of(said, adapter)
    try:
        found = check_policy(TrainedModelSettings(path=adapter, base=base, lora=settings), with_head)  # type: ignore[call-arg]
    except InputError as error:
        field = {FIELD: ADAPTER, "model.base": "--base"}.get(error.field, error.field)
        remedy = error.remedy.replace("set model.base to", "give --base")
        raise InputError(field, error.value, error.reason, remedy) from error
    plan, dtype = LoRAPlan(settings, start=adapter), _dtype_of(found.path)
    tokenizer = load_tokenizer(adapter if (Path(adapter) / "tokenizer.json").is_file() else found.path)
    model: Any
    if not with_head:
        model = load_policy(found.path, 1, dtype, lora=plan)
    else:
        model = load_scalar(found.path, ADAPTER, dtype, lora=plan)
        pad = scalar_pad_token_id(tokenizer, ADAPTER, adapter)
        model.hf_model.config.pad_token_id = pad
        tokenizer.pad_token, tokenizer.padding_side = tokenizer.convert_ids_to_tokens(pad), "right"
    out.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}."))
    try:
        scratch.chmod(0o755)
        save_merged(model.adapter, scratch, dtype)
        tokenizer.save_pretrained(scratch)
        for name in BESIDE:
            if (Path(adapter) / name).is_file():
                shutil.copy2(Path(adapter) / name, scratch / name)
        os.rename(scratch, out)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise
    return [f"{found.facts.num_adapter_params} elements of {adapter} merged into {found.path}", f"wrote {out}"]


def settings_of(said: dict[str, Any], folder: str) -> LoRASettings:
    """The settings that an adapter_config.json describes; its layers are those it has tensors for."""
    shapes, _ = adapter_shapes(folder, ADAPTER)
    layers = {name.rpartition(".lora_")[0] for name in shapes if ".lora_" in name}
    return LoRASettings(
        rank=int(said["r"]), alpha=float(said["lora_alpha"]), rslora=bool(said.get("use_rslora")),
        target_modules=tuple(sorted(layers)),
    )  # type: ignore[call-arg]  # fmt: skip


def _dtype_of(folder: str) -> torch.dtype:
    """Of the weights of a model folder, as its config.json says it; float32 where it says nothing."""
    config = json.loads((Path(resolve_model(folder)) / "config.json").read_text())
    dtype = getattr(torch, str(config.get("dtype") or config.get("torch_dtype") or "float32"))
    assert isinstance(dtype, torch.dtype)
    return dtype
