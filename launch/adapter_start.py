"""The adapter that training goes on from, or that is merged: a plain one, trained on this base, with these settings.

What peft can do beyond A and B is refused by name, and so is every tensor that no place is kept for: an adapter whose
other weights were left out would be another model than its files say.
May import: actors.{adapted_model, adapter_files, lora_settings}, trainers.errors.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any

from actors.adapted_model import TrainedModelSettings
from actors.adapter_files import UNQUANTIZED, AdapterHeader, base_fingerprint
from actors.lora_settings import LoRASettings
from trainers.errors import InputError

FIELD = "model.path"
MERGE_FIRST = "merge it into its base with peft (merge_and_unload) and give the merged folder"
MATRIX = re.compile(r".+\.lora_[AB]\.weight")
HEAD = ("score.weight", "score.bias")  # of a scalar model
# Options of peft's LoraConfig with which an adapter is still its base and scale B A.  The last line says which layers
# have one and how they were trained, which its tensors tell; any other option that is set is refused.
PLAIN = frozenset({
    "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "r", "lora_alpha", "use_rslora", "bias", "modules_to_save", "init_lora_weights",
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "lora_dropout", "fan_in_fan_out",
    "megatron_config", "megatron_core", "loftq_config", "eva_config", "corda_config", "lora_ga_config",
    "qalora_group_size", "ensure_weight_tying",
})  # fmt: skip
# Ways to draw the first A and B that leave the base as it is; pissa, olora, corda, loftq and lora_ga subtract from it.
INITS = (True, False, "gaussian", "orthogonal", "eva", "mica")


def check_plain(said: Mapping[str, Any], header: AdapterHeader, folder: str, with_head: bool) -> None:
    """Check that an adapter is A and B of linear layers, and the head of a reward model ``with_head``.

    Raises:
        InputError: the first option of adapter_config.json, or the first tensor, that is something else.
    """

    def refuse(what: str, remedy: str = MERGE_FIRST) -> InputError:
        return InputError(FIELD, folder, f"the adapter {what}", remedy)

    for name in sorted(said.keys() - PLAIN):
        if said[name]:
            raise refuse(f"uses {name}, which is not supported")
    if (bias := said.get("bias") or "none") != "none":
        raise refuse(f"has bias={bias}: it changes the base's biases")
    init = said.get("init_lora_weights", True)
    if (init.lower() if isinstance(init, str) else init) not in INITS:
        raise refuse(f"has init_lora_weights={init}, which changes the base")
    # peft adds both names to any adapter of a sequence classifier; a linear head is called score.
    heads = {"score", "classifier"} if said.get("task_type") == "SEQ_CLS" else {"score"}
    if other := sorted(set(said.get("modules_to_save") or ()) - heads):
        raise refuse(f"has modules_to_save={other}: weights of the base that it replaces")
    for name in sorted(header.shapes):
        if MATRIX.fullmatch(name) or (with_head and name in HEAD):
            continue
        if name in HEAD:
            raise refuse(f"holds {name}, the head of a reward model, which a policy has no place for",
                         "use the adapter of a policy")  # fmt: skip
        raise refuse(f"holds {name}, which is neither A nor B of a linear layer")
    if not any(MATRIX.fullmatch(name) for name in header.shapes):
        raise refuse("holds no matrix of a linear layer", "give the folder of a LoRA adapter")


def check_base(
    said: Mapping[str, Any], header: AdapterHeader, model: TrainedModelSettings, folder: str, base: str
) -> None:
    """InputError where the adapter in ``folder`` was not trained on the model in the folder ``base``.

    A fingerprint decides.  peft writes none: a base that was given must then be called what the adapter calls it,
    since shapes are equal in a whole family of models.
    """
    if header.base is not None:
        if header.base != base_fingerprint(base):
            raise InputError(FIELD, folder, f"the adapter was trained on another base than {base}",
                             "set model.base to the base it was trained on")  # fmt: skip
        return
    named = str(said.get("base_model_name_or_path") or "")
    if model.base is None or model.base_checked or not named:
        return
    if model_name(named) not in {model_name(model.base), model_name(base), model_name(str(Path(base).resolve()))}:
        raise InputError("model.base", model.base, f"the adapter was trained on {named}",
                         "give the folder of that model, or set model.base_checked=true where this is the same under "
                         "another name")  # fmt: skip


def model_name(path: str) -> str:
    """What a model is called: the last part of its name or folder, in lower case; of a hub's snapshot, its model."""
    parts = PurePath(path).parts or ("",)
    if len(parts) > 2 and parts[-2] == "snapshots":
        return parts[-3].rpartition("--")[2].lower()
    return parts[-1].lower()


def check_quantization_of(header: AdapterHeader, model: TrainedModelSettings) -> None:
    """InputError where the adapter was trained on its base in another precision; nothing is known of peft's."""
    if header.quantization in (None, model.quantization or UNQUANTIZED):
        return
    if header.quantization == UNQUANTIZED:
        was, remedy = "as it lies on the disk, not quantised", "leave it out"
    else:
        was, remedy = f"in {header.quantization}", f"set model.quantization={header.quantization}"
    raise InputError("model.quantization", model.quantization, f"model.path is an adapter trained on its base {was}",
                     f"{remedy}, or merge it with `burnish merge` and start a new one")  # fmt: skip


def check_settings(
    said: Mapping[str, Any], header: AdapterHeader, lora: LoRASettings, targets: Mapping[str, tuple[int, int]],
    folder: str, with_head: bool,
) -> None:  # fmt: skip
    """InputError where the adapter in ``folder`` does not fit ``lora`` and the layers ``targets`` ([out, in]) of it."""
    ours = {
        "rank": (lora.rank, said.get("r")), "alpha": (lora.alpha, said.get("lora_alpha")),
        "rslora": (lora.rslora, bool(said.get("use_rslora"))),
    }  # fmt: skip
    for name, (asked, found) in ours.items():
        if asked != found:
            raise InputError(f"model.lora.{name}", asked, f"the adapter in model.path has {found}",
                             f"set model.lora.{name}={found}")  # fmt: skip
    expected: dict[str, tuple[int, ...]] = {}
    for name, (rows, columns) in targets.items():
        expected |= {f"{name}.lora_A.weight": (lora.rank, columns), f"{name}.lora_B.weight": (rows, lora.rank)}
    found_there = {name: shape for name, shape in header.shapes.items() if name not in HEAD}
    for name in sorted(expected.keys() | found_there.keys()):
        if expected.get(name) != found_there.get(name):
            has = f"has {name} of shape {found_there[name]}" if name in found_there else f"has no {name}"
            needs = f"the model needs shape {expected[name]}" if name in expected else "the model has no place for it"
            raise InputError(FIELD, folder, f"the adapter {has}, {needs}",
                             "use the adapter's own base, and model.lora.target_modules as it has them")  # fmt: skip
    if with_head and HEAD[0] not in header.shapes:
        raise InputError(FIELD, folder, "the adapter has no head of a reward model", "start from its base, or from one "
                         "that a run with algorithm.name=reward exported")  # fmt: skip
