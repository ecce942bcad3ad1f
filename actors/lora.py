"""Low-rank adapters on a frozen model, through peft: the only file that imports it.

The layers are put into the Hugging Face model in place (no ``PeftModel`` around it), so everything that runs the model
goes on to.  The base is frozen in the compute dtype, or quantised; the adapter's matrices are float32 master weights.
May import: torch, peft, transformers, actors.{adapter_files, lora_settings, quantization}, cluster.low_rank,
trainers.errors.
"""

from __future__ import annotations

import importlib.util
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from actors.adapter_files import read_adapter
from actors.lora_settings import ALL_LINEAR, LoRAPlan, LoRASettings
from actors.quantization import dequantised, is_packed
from cluster.low_rank import Delta, merge
from trainers.errors import InputError

FUSED_SHARE = 0.05  # of all parameters; routers, convolutions and learned positions stay far below it
NAME = "default"  # peft's name of an adapter that is alone
HEAD = "score"  # of a scalar model: trained whole beside the adapter
Shape = tuple[int, int]  # [out, in]


def linear_shapes(model: nn.Module) -> dict[str, Shape]:
    """Name -> [out, in] of every linear layer that can be adapted: all but the heads."""
    output = getattr(model, "get_output_embeddings", lambda: None)()
    heads = {id(output), id(getattr(model, HEAD, None))}
    return {
        name: (module.out_features, module.in_features)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and id(module) not in heads
    }


def target_shapes(settings: LoRASettings, linears: Mapping[str, Shape], field: str) -> dict[str, Shape]:
    """Those of ``linears`` that get an adapter.  ``field``: the section of the settings, for errors.

    Raises:
        InputError: a target that no linear layer is called, or a model without any.
    """
    there = sorted({name.rpartition(".")[2] for name in linears})
    if settings.target_modules == ALL_LINEAR:
        if not linears:
            raise InputError(field, ALL_LINEAR, "the model has no linear layers", "train it whole: leave lora out")
        return dict(linears)
    chosen: dict[str, Shape] = {}
    for target in settings.target_modules:
        found = {name: shape for name, shape in linears.items() if name == target or name.endswith(f".{target}")}
        if not found:
            reason = "the model has no linear layer of this name that can be adapted"
            remedy = f"use all-linear, or some of {', '.join(there)}"
            raise InputError(f"{field}.target_modules", target, reason, remedy)
        chosen |= found
    return {name: shape for name, shape in linears.items() if name in chosen}


def fused_weights(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Name -> shape of what is multiplied with and is no layer: parameters of two or more axes outside of linear layers
    and embeddings, such as the experts of a mixture in one tensor.
    """
    return {
        f"{at}.{name}" if at else name: tuple(parameter.shape)
        for at, module in model.named_modules()
        if not isinstance(module, nn.Linear | nn.Embedding)
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.ndim >= 2
    }


def check_all_linear(settings: LoRASettings, model: nn.Module, linears: Mapping[str, Shape], field: str) -> None:
    """InputError where all-linear would leave much of a model as it is, without a word.  ``model``: not quantised."""
    if settings.target_modules != ALL_LINEAR:
        return
    fused = fused_weights(model)
    share = sum(math.prod(shape) for shape in fused.values()) / sum(p.numel() for p in model.parameters())
    if share < FUSED_SHARE:
        return
    kinds = list(dict.fromkeys(re.sub(r"\d+", "N", name) for name in fused))
    there = sorted({name.rpartition(".")[2] for name in linears})
    reason = f"{share:.0%} of the parameters are in no linear layer and would get no adapter: {', '.join(kinds[:4])}"
    raise InputError(f"{field}.target_modules", ALL_LINEAR, reason,
                     f"name what to adapt, of {', '.join(there)}, or train it whole: leave lora out")  # fmt: skip


def short_names(targets: Iterable[str], linears: Iterable[str]) -> list[str]:
    """What peft is told to adapt: the last parts of the names, or whole names where a part means others too."""
    chosen = set(targets)
    parts = {name.rpartition(".")[2] for name in chosen}
    meant = {name for name in linears if name.rpartition(".")[2] in parts}
    return sorted(parts if meant == chosen else chosen)


def num_adapter_params(settings: LoRASettings, targets: Mapping[str, Shape]) -> int:
    """Elements of all A and B: rank (in + out) a layer."""
    return sum(settings.rank * (rows + columns) for rows, columns in targets.values())


def skeleton(path: str) -> nn.Module:
    """The causal language model of a folder without its weights: names and shapes, nothing allocated."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(path, local_files_only=True)
    with torch.device("meta"):
        model: nn.Module = AutoModelForCausalLM.from_config(config)
    return model


class Adapter:
    """The adapter of one model, put into it here.  The random A of a new one come from torch's generator.

    Args:
        hf_model: is changed: everything in it is frozen but the adapter, and the head of a scalar model.
        base_path: folder that ``hf_model`` was loaded from.

    Raises:
        InputError: peft is not installed, or a target that the model does not have.
    """

    def __init__(self, hf_model: nn.Module, plan: LoRAPlan, base_path: str) -> None:
        if importlib.util.find_spec("peft") is None:
            raise InputError("model.lora", plan.settings.rank, "peft is not installed", "run `make install`")
        from peft import LoraConfig, inject_adapter_in_model
        from peft.tuners.lora import LoraLayer

        self.model, self.plan, self.base_path = hf_model, plan, base_path
        settings = plan.settings
        linears = linear_shapes(hf_model)
        self.targets = target_shapes(settings, linears, "model.lora")
        self._has_head = isinstance(getattr(hf_model, HEAD, None), nn.Linear)
        alpha = settings.alpha
        self.config = LoraConfig(
            r=settings.rank,
            lora_alpha=int(alpha) if alpha == int(alpha) else alpha,  # type: ignore[arg-type]
            lora_dropout=settings.dropout,
            target_modules=short_names(self.targets, linears),
            use_rslora=settings.rslora,
            task_type="SEQ_CLS" if self._has_head else "CAUSAL_LM",
            base_model_name_or_path=base_path,
        )
        inject_adapter_in_model(self.config, hf_model)
        if self._has_head:
            self.config.modules_to_save = [HEAD]  # for peft; here it is an ordinary layer
            getattr(hf_model, HEAD).float().requires_grad_(True)
        self._layers: dict[str, Any] = {}  # by the name of the weight that it changes
        for name, module in hf_model.named_modules():
            if isinstance(module, LoraLayer):
                module.lora_A.float()
                module.lora_B.float()
                # The input goes in as it is: autocast casts it once, as for the base's own product.
                module.cast_input_dtype_enabled = False
                self._layers[f"{name}.weight"] = module
        if plan.start is not None:
            self._read(plan.start)
        # What the run started from, where that is no update of 0.
        self._start = [p.detach().clone() for _, p in self.matrices()] if plan.start and plan.reference else None

    # --- what there is ------------------------------------------------------------------------

    def matrices(self) -> list[tuple[str, nn.Parameter]]:
        """A [rank, in] and B [out, rank] of every adapted layer, float32, as ``LAYER.lora_A.weight``; a fixed order."""
        found = []
        for weight, layer in self._layers.items():
            stem = weight.removesuffix(".weight")
            found += [(f"{stem}.lora_{ab}.weight", getattr(layer, f"lora_{ab}")[NAME].weight) for ab in "AB"]
        return found

    def trained(self) -> list[tuple[str, nn.Parameter]]:
        """The matrices, and the head where there is one."""
        head = getattr(self.model, HEAD).named_parameters() if self._has_head else ()
        return [*self.matrices(), *((f"{HEAD}.{name}", parameter) for name, parameter in head)]

    def deltas(self) -> tuple[Delta, ...]:
        """What :meth:`matrices` change."""
        found = []
        for weight, layer in self._layers.items():
            stem = weight.removesuffix(".weight")
            found.append(Delta(weight, f"{stem}.lora_A.weight", f"{stem}.lora_B.weight", float(layer.scaling[NAME])))
        return tuple(found)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of every tensor of :meth:`base`, by its name in a Hugging Face checkpoint."""
        return {
            name: (module.out_features, module.in_features) if is_packed(p) else tuple(p.shape)
            for name, p, module in self._unadapted()
        }

    def base(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every tensor of the model but the adapter's, in the compute dtype; what is quantised, as it is computed with.

        The head of a scalar model is among them.
        """
        dtype: torch.dtype = self.model.get_input_embeddings().weight.dtype  # type: ignore[operator]
        for name, parameter, module in self._unadapted():
            yield name, dequantised(module).to(dtype) if is_packed(parameter) else parameter.detach()

    def whole(self) -> Iterator[tuple[str, torch.Tensor]]:
        """:meth:`base` with the adapter merged into it."""
        for name, tensor in self.base():
            layer = self._layers.get(name)
            if layer is None:
                yield name, tensor
                continue
            down, up = layer.lora_A[NAME].weight.detach(), layer.lora_B[NAME].weight.detach()
            yield name, merge(tensor, down, up, layer.scaling[NAME])

    def _unadapted(self) -> Iterator[tuple[str, nn.Parameter, Any]]:
        """(name in a checkpoint, parameter, its module)."""
        for name, parameter in self.model.named_parameters():
            if ".lora_" not in name:
                module = self.model.get_submodule(name.rpartition(".")[0])
                yield name.replace(".base_layer.", "."), parameter, module

    # --- switching ----------------------------------------------------------------------------

    @contextmanager
    def as_started(self) -> Iterator[None]:
        """Inside, the model is the one that the run began with: its own reference.  For passes without gradients."""
        if self._start is None:
            with self.off():
                yield
            return
        now = [p.detach().clone() for _, p in self.matrices()]
        self._put(self._start)
        try:
            yield
        finally:
            self._put(now)

    @contextmanager
    def off(self) -> Iterator[None]:
        """Inside, the model is its base.  peft's own switch also touches ``requires_grad``, on which engines hook."""
        self._disable(True)
        try:
            yield
        finally:
            self._disable(False)

    def _disable(self, is_off: bool) -> None:
        for layer in self._layers.values():
            layer._disable_adapters = is_off

    @torch.no_grad()
    def _put(self, values: list[torch.Tensor]) -> None:
        for (_, parameter), value in zip(self.matrices(), values, strict=True):
            parameter.copy_(value)

    # --- files --------------------------------------------------------------------------------

    @torch.no_grad()
    def _read(self, folder: str) -> None:
        tensors = read_adapter(folder)
        if foreign := sorted(tensors.keys() - {name for name, _ in self.trained()}):
            raise InputError("model.path", folder, f"the adapter holds {foreign[0]}, which the model has no place for",
                             "merge it into its base with peft and give the merged folder")  # fmt: skip
        for name, parameter in self.trained():
            if name not in tensors or tensors[name].shape != parameter.shape:
                found = tuple(tensors[name].shape) if name in tensors else None
                raise InputError("model.path", folder, f"{name} is {found}, the model needs {tuple(parameter.shape)}",
                                 "use the adapter's own base and model.lora")  # fmt: skip
            parameter.copy_(tensors[name])

    def describe(self) -> dict[str, Any]:
        """adapter_config.json, as peft reads it."""
        said = self.config.to_dict() | {"inference_mode": True}
        return {key: sorted(value) if isinstance(value, set) else value for key, value in said.items()}


def empty_like(model: Any, dtype: torch.dtype) -> Any:
    """A model of the same class and configuration without weights or adapters, to save a merged state by."""
    import copy

    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        empty = type(model)(config).to(dtype)
    if hasattr(model, "generation_config"):
        empty.generation_config = model.generation_config
    return empty
