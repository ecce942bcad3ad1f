"""Frozen layers in 4 or 8 bits (arXiv:2305.14314, arXiv:2208.07339): the only file that knows bitsandbytes.

May import: torch, transformers, bitsandbytes, actors.lora_settings, trainers.errors.
"""

from __future__ import annotations

import importlib.util
from typing import Any, cast

import torch
from torch import nn

from actors.lora_settings import LoRAPlan, Quantization
from trainers.errors import InputError

FOUR_BIT, EIGHT_BIT = "Params4bit", "Int8Params"  # bitsandbytes' parameters, whose shape is not the layer's


def check_quantization(kind: Quantization, field: str = "model.quantization") -> None:
    """InputError where bitsandbytes is not installed."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise InputError(field, kind, "bitsandbytes is not installed", "pip install 'burnish[qlora]', or leave it out")


def loading_options(plan: LoRAPlan | None, dtype: torch.dtype, device: str) -> dict[str, Any]:
    """Arguments of ``from_pretrained`` for the base of a plan: its dtype, and how it is quantised.

    ``device``: where it is quantised; a model that is not quantised is made on the CPU.
    """
    if plan is None or plan.quantization is None:
        return {"dtype": dtype}
    from transformers import BitsAndBytesConfig

    check_quantization(plan.quantization)
    if plan.quantization == "int8":
        quantized = BitsAndBytesConfig(load_in_8bit=True)
    else:
        quantized = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type=plan.quantization, bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype, bnb_4bit_quant_storage=torch.uint8,
        )  # fmt: skip
    return {"dtype": dtype, "quantization_config": quantized, "device_map": {"": device}}


def is_packed(parameter: nn.Parameter) -> bool:
    """Whether a parameter is quantised."""
    return type(parameter).__name__ in (FOUR_BIT, EIGHT_BIT)


@torch.no_grad()
def dequantised(module: Any) -> torch.Tensor:
    """[out, in]: the weight that a quantised layer computes with."""
    weight = module.weight
    if type(weight).__name__ == EIGHT_BIT:  # one scale a row, kept by the layer from its first pass on
        scales = module.state.SCB if module.state.SCB is not None else weight.SCB
        return cast(torch.Tensor, weight.data.float() * scales.float()[:, None] / 127)
    from bitsandbytes.functional import dequantize_4bit

    return cast(torch.Tensor, dequantize_4bit(weight.data, weight.quant_state))
