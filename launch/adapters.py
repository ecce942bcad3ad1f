"""The policy of a run that trains it, checked before anything is allocated: a whole model, or an adapter on one.

May import: actors.*, cluster.low_rank, launch.model_facts, trainers.errors.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from actors.adapted_model import TrainedModelSettings
from actors.adapter_files import adapter_shapes, base_fingerprint, is_adapter, read_config
from actors.lora_settings import LoRASettings
from actors.model_folders import resolve_model
from launch.model_facts import ModelFacts, check_model_folder
from trainers.errors import InputError

FIELD = "model.path"
UNSUPPORTED = ("use_dora", "lora_bias", "rank_pattern", "alpha_pattern", "target_parameters")  # of peft's LoraConfig


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


def check_policy(model: TrainedModelSettings, with_head: bool = False, served_from_disk: bool = False) -> PolicyFolder:
    """Check the folder of the policy, and the adapter that is to be trained on it.

    Args:
        with_head: a scalar model is made of it, whose head is trained beside the adapter.
        served_from_disk: generators merge the adapter into the base as it lies on the disk.

    Raises:
        InputError: the first thing that cannot be used, in one line.
    """
    path, start = resolve_model(model.path), None
    if is_adapter(path):
        if model.lora is None:
            remedy = "set model.lora to train it on, or merge it into its base with `burnish merge`"
            raise InputError(FIELD, path, "is an adapter, not a whole model", remedy)
        path, start = base_folder(path, model.base), path
    elif model.base is not None:
        raise InputError("model.base", model.base, "model.path is a whole model, which has no base", "leave it out")
    facts = check_model_folder(path)
    if model.lora is None:
        return PolicyFolder(path, None, facts)
    from actors.lora import num_adapter_params, target_shapes
    from actors.quantization import check_quantization

    if model.quantization is not None:
        check_quantization(model.quantization)
    linears, names = _model_names(path)
    targets = target_shapes(model.lora, linears, "model.lora")
    if start is not None:
        _check_start(start, path, model.lora, targets, with_head)
    if served_from_disk:
        _check_names(path, names)
    num = num_adapter_params(model.lora, targets) + with_head * facts.hidden
    bytes_of_base = _quantized_bytes(model, linears) if model.quantization is not None else None
    return PolicyFolder(path, start, replace(facts, num_adapter_params=num, quantized=bytes_of_base))


def _model_names(path: str) -> tuple[dict[str, tuple[int, int]], dict[str, tuple[int, ...]]]:
    """(shape of each linear layer, shape of every parameter) of the model in a folder, nothing loaded."""
    from actors.lora import linear_shapes, skeleton

    model = skeleton(path)
    return linear_shapes(model), {name: tuple(p.shape) for name, p in model.named_parameters()}


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


def _check_start(
    start: str, base: str, lora: LoRASettings, targets: dict[str, tuple[int, int]], with_head: bool
) -> None:
    """InputError where the adapter in ``start`` was not trained on ``base``, or not with these settings."""
    said, (shapes, fingerprint) = read_config(start), adapter_shapes(start)
    if fingerprint is not None and fingerprint != base_fingerprint(base):
        raise InputError(FIELD, start, f"the adapter was trained on another base than {base}",
                         "set model.base to the base it was trained on")  # fmt: skip
    ours = {
        "rank": (lora.rank, said.get("r")), "alpha": (lora.alpha, said.get("lora_alpha")),
        "rslora": (lora.rslora, bool(said.get("use_rslora"))),
    }  # fmt: skip
    for name, (asked, found) in ours.items():
        if asked != found:
            raise InputError(f"model.lora.{name}", asked, f"the adapter in model.path has {found}",
                             f"set model.lora.{name}={found}")  # fmt: skip
    odd = [name for name in UNSUPPORTED if said.get(name)]
    if odd:
        raise InputError(FIELD, start, f"the adapter uses {odd[0]}, which is not supported", "use a plain LoRA adapter")
    expected: dict[str, tuple[int, ...]] = {}
    for name, (rows, columns) in targets.items():
        expected |= {f"{name}.lora_A.weight": (lora.rank, columns), f"{name}.lora_B.weight": (rows, lora.rank)}
    found_there = {name: shape for name, shape in shapes.items() if ".lora_" in name}
    for name in sorted(expected.keys() | found_there.keys()):
        if expected.get(name) != found_there.get(name):
            has = f"has {name} of shape {found_there[name]}" if name in found_there else f"has no {name}"
            needs = f"the model needs shape {expected[name]}" if name in expected else "the model has no place for it"
            raise InputError(FIELD, start, f"the adapter {has}, {needs}",
                             "use the adapter's own base, and model.lora.target_modules as it has them")  # fmt: skip
    if with_head and "score.weight" not in shapes:
        raise InputError(FIELD, start, "the adapter has no head of a reward model", "start from its base, or from one "
                         "that a run with algorithm.name=reward exported")  # fmt: skip


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
