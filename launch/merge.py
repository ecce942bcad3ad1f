"""``burnish merge``: an adapter and its base as one Hugging Face folder, which any tool loads.

May import: torch, transformers, actors.*, trainers.errors, launch.{adapter_start, adapters}.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any, cast

import torch

from actors.adapted_model import TrainedModelSettings
from actors.adapter_export import save_merged
from actors.adapter_files import UNQUANTIZED, AdapterHeader, is_adapter, read_config, read_header
from actors.lora_settings import QUANTIZED_BYTES, LoRAPlan, LoRASettings, Quantization
from actors.model_folders import resolve_model
from actors.modeling import load_policy, load_tokenizer
from actors.scalar_model import load_scalar, scalar_pad_token_id
from launch.adapter_start import FIELD, MERGE_FIRST, check_plain
from launch.adapters import PolicyFolder, check_policy
from trainers.errors import InputError

ADAPTER = "adapter"
BESIDE = ("reward_stats.json", "reward_report.json", "reward_report.svg")  # what a reward model's export holds


def merge_adapter(
    adapter: str, out: Path, base: str | None, quantization: str | None = None, base_checked: bool = False
) -> list[str]:
    """Write ``adapter`` (of an export, a checkpoint's ``learner`` folder, or peft) merged to ``out``; lines to show.

    Args:
        base: folder of the base model; None: the one that the adapter names.
        quantization: what the base is quantised with before the adapter is merged into it, dequantised again; ``none``:
            the base as it lies on the disk; None: what the adapter was trained on, where it says so.
        base_checked: ``base`` is right though the adapter calls it by another name.

    Raises:
        InputError: it is no LoRA adapter of this base, ``out`` exists, or bitsandbytes is needed and not installed.
    """
    if not is_adapter(adapter):
        raise InputError(ADAPTER, adapter, "holds no adapter_config.json, or a whole model", "give an adapter's folder")
    if out.exists():
        raise InputError("out", str(out), "exists already", "name another folder or remove it")
    if base_checked and base is None:
        raise InputError("--base-checked", True, "no base is given", "give --base, or leave it out")
    said, header = read_config(adapter, ADAPTER), read_header(adapter, ADAPTER)
    with_head = said.get("task_type") == "SEQ_CLS"
    used = quantization or header.quantization or UNQUANTIZED
    if used not in (UNQUANTIZED, *QUANTIZED_BYTES):
        raise InputError(ADAPTER, adapter, f"it was trained on a base in {used}, which is not known here",
                         "merge it with the version of Burnish that wrote it")  # fmt: skip
    kind = cast("Quantization | None", None if used == UNQUANTIZED else used)
    found, settings = _checked(adapter, base, kind, base_checked, with_head, said, header)
    plan, dtype = LoRAPlan(settings, kind, start=adapter), _dtype_of(found.path)
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
    return [
        f"adapter: {adapter}, {len(model.adapter.deltas())} layers, rank {settings.rank}, scale {settings.scale:g}"
        f"{', with the head of a reward model' if with_head else ''}",
        f"base:    {found.path}, {_known_by(header, said)}; {_precision(used, header.quantization)}",
        f"wrote {out}: the merged model in {str(dtype).removeprefix('torch.')}",
    ]


def _checked(
    adapter: str, base: str | None, kind: Quantization | None, base_checked: bool, with_head: bool,
    said: dict[str, Any], header: AdapterHeader,
) -> tuple[PolicyFolder, LoRASettings]:  # fmt: skip
    """What :func:`launch.adapters.check_policy` finds, its errors in the words of this command."""
    try:
        check_plain(said, header, adapter, with_head)
        settings = settings_of(said, header)
        model = TrainedModelSettings.model_validate(
            {"path": adapter, "base": base, "base_checked": base_checked, "lora": settings, "quantization": kind}
        )
        return check_policy(model, with_head, any_precision=True), settings
    except InputError as error:
        if error.field == "model.lora.target_modules":
            raise InputError(ADAPTER, adapter, f"it changes {error.value}, which is no linear layer of the base or its "
                             "output", MERGE_FIRST) from error  # fmt: skip
        field = {FIELD: ADAPTER, "model.base": "--base", "model.quantization": "--quantization"}.get(
            error.field, error.field
        )
        remedy = error.remedy.replace("set model.base to", "give --base")
        remedy = remedy.replace("set model.base_checked=true", "add --base-checked")
        if field == "--quantization":
            remedy = "pip install 'burnish[qlora]'; --quantization none merges into the base as it lies on the disk, "
            remedy += "which is another model than the one that was trained"
        raise InputError(field, error.value, error.reason, remedy) from error


def _known_by(header: AdapterHeader, said: dict[str, Any]) -> str:
    if header.base is not None:
        return "by its fingerprint the one that the adapter was trained on"
    return f"which the adapter calls {said.get('base_model_name_or_path')!r} (it has no fingerprint of it)"


def _precision(used: str, trained: str | None) -> str:
    how = "as it lies on the disk" if used == UNQUANTIZED else f"quantised to {used} and dequantised"
    if trained is None:
        return f"{how} (the adapter does not say in which precision it was trained)"
    if trained == used:
        return f"{how}, as it was trained on"
    was = "an unquantised base" if trained == UNQUANTIZED else f"a base in {trained}"
    return f"{how}, WHICH IS ANOTHER MODEL: the adapter was trained on {was}"


def settings_of(said: dict[str, Any], header: AdapterHeader) -> LoRASettings:
    """The settings that an adapter_config.json describes; its layers are those it has tensors for."""
    layers = {name.rpartition(".lora_")[0] for name in header.shapes if ".lora_" in name}
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
