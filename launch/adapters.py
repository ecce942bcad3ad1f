"""The policy of a run that trains it, checked before anything is allocated: a whole model, or an adapter on one.

May import: actors.*, cluster.low_rank, launch.{adapter_start, model_facts}, trainers.errors.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from actors.adapted_model import TrainedModelSettings
from actors.adapter_files import base_fingerprint, is_adapter, read_config, read_header
from actors.lora_settings import LoRASettings
from actors.model_folders import resolve_model
from launch.adapter_start import FIELD, check_base, check_plain, check_quantization_of, check_settings
from launch.model_facts import ModelFacts, check_model_folder
from trainers.errors import InputError


@dataclass(frozen=True, slots=True)
class PolicyFolder:
    """Where a policy's weights lie."""

    path: str  # the whole model; with an adapter, its base
    adapter: str | None  # the adapter that training goes on from
    facts: ModelFacts


def base_folder(adapter: str, base: str | None, field: str = FIELD) -> str:
    """The folder of an adapter's base: ``base`` where it is given, else the one that the adapter names.

    Raises:
        InputError: it is not on this machine.
    """
    named = base or str(read_config(adapter, field).get("base_model_name_or_path") or "")
    folder = resolve_model(named) if named else ""
    if not (Path(folder) / "config.json").is_file() or not named:
        reason = f"its base {named!r} is no model folder on this machine"
        raise InputError("model.base" if base else field, base or adapter, reason,
                         "set model.base to the folder of the base model")  # fmt: skip
    return folder


def check_policy(
    model: TrainedModelSettings, with_head: bool = False, served_from_disk: bool = False, any_precision: bool = False
) -> PolicyFolder:
    """Check the folder of the policy, and the adapter that is to be trained on it.

    Args:
        with_head: a scalar model is made of it, whose head is trained beside the adapter.
        served_from_disk: generators merge the adapter into the base as it lies on the disk.
        any_precision: the adapter may have been trained on its base in another precision than ``model`` says.

    Raises:
        InputError: the first thing that cannot be used, in one line.
    """
    path, start = resolve_model(model.path), None
    if is_adapter(path):
        if model.lora is None:
            remedy = "set model.lora to train it on, or merge it into its base with `burnish merge`"
            raise InputError(FIELD, path, "is an adapter, not a whole model", remedy)
        said, header = read_config(path), read_header(path)
        check_plain(said, header, path, with_head)
        path, start = base_folder(path, model.base), path
        check_base(said, header, model, start, path)
        if not any_precision:
            check_quantization_of(header, model)
    elif model.base is not None:
        raise InputError("model.base", model.base, "model.path is a whole model, which has no base", "leave it out")
    facts = check_model_folder(path)
    if model.lora is None:
        return PolicyFolder(path, None, facts)
    from actors.lora import linear_shapes, num_adapter_params, skeleton
    from actors.quantization import check_quantization

    if model.quantization is not None:
        check_quantization(model.quantization)
    bare = skeleton(path)
    linears = linear_shapes(bare)
    targets = checked_targets(model.lora, bare, "model.lora")
    if start is not None:
        check_settings(said, header, model.lora, targets, start, with_head)
    if served_from_disk:
        _check_names(path, {name: tuple(p.shape) for name, p in bare.named_parameters()})
    num = num_adapter_params(model.lora, targets) + with_head * facts.hidden
    bytes_of_base = _quantized_bytes(model, linears) if model.quantization is not None else None
    return PolicyFolder(path, start, replace(facts, num_adapter_params=num, quantized=bytes_of_base))


def checked_targets(lora: LoRASettings, bare: Any, field: str) -> dict[str, tuple[int, int]]:
    """[out, in] of each layer of the model ``bare`` (:func:`actors.lora.skeleton`) that gets an adapter.

    Raises:
        InputError: a target that the model does not have, or all-linear where that is not what the model consists of.
    """
    from actors.lora import check_all_linear, linear_shapes, target_shapes

    linears = linear_shapes(bare)
    targets = target_shapes(lora, linears, field)
    check_all_linear(lora, bare, linears, field)
    return targets


def _quantized_bytes(model: TrainedModelSettings, linears: dict[str, tuple[int, int]]) -> tuple[int, int]:
    """(parameters that are quantised, their bytes)."""
    from actors.lora_settings import QUANTIZED_BYTES

    assert model.quantization is not None
    num = sum(rows * columns for rows, columns in linears.values())
    return num, int(num * QUANTIZED_BYTES[model.quantization])


def _check_names(path: str, names: dict[str, tuple[int, ...]]) -> None:
    from cluster.low_rank import tensor_files

    there = tensor_files(Path(path))
    if missing := [name for name in names if name not in there]:
        reason = f"{path} has its weights under other names than the model ({missing[0]} is not among them), so "
        reason += "generators cannot merge an adapter into them"
        raise InputError("push.lora", "adapter", reason, "set push.lora=merged")


def adapter_identity(model: TrainedModelSettings) -> dict[str, Any] | None:
    """What a checkpoint of an adapter belongs to, besides its algorithm; None where the whole model is trained."""
    if model.lora is None:
        return None
    path = resolve_model(model.path)
    base = base_folder(path, model.base) if is_adapter(path) else path
    shape = model.lora.model_dump(mode="json", include={"rank", "alpha", "rslora", "target_modules"})
    return {"lora": shape, "quantization": model.quantization, "base": base_fingerprint(base)}


def check_identity(saved: dict[str, Any] | None, model: TrainedModelSettings, step: int) -> None:
    """InputError where the checkpoint of ``step``, made with ``saved``, is not one of this model's adapter."""
    now = adapter_identity(model)
    if saved == now:
        return
    if saved is None or now is None:
        was, remedy = "the whole model", "leave it out"
        if saved is not None:
            was, remedy = "an adapter", "resume with the model.lora it had"
        raise InputError("model.lora", None if now is None else now["lora"],
                         f"the checkpoint of step {step} holds {was}", remedy)  # fmt: skip
    if saved["lora"] != now["lora"]:
        name = next(key for key in now["lora"] if saved["lora"].get(key) != now["lora"][key])
        before = saved["lora"].get(name)
        reason = f"the checkpoint of step {step} was made with {before}"
        raise InputError(f"model.lora.{name}", now["lora"][name], reason, f"resume with model.lora.{name}={before}")
    if saved["base"] != now["base"]:
        raise InputError(FIELD, model.path, f"the adapter in the checkpoint of step {step} was trained on another base",
                         "resume with the base it was trained on")  # fmt: skip
    raise InputError("model.quantization", now["quantization"],
                     f"the checkpoint of step {step} was made with {saved['quantization']}",
                     f"resume with model.quantization={saved['quantization']}")  # fmt: skip
