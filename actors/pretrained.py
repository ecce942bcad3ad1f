"""The Hugging Face model of a folder: with its weights, or for a rank that gets them from another, with their room.

May import: torch, transformers, actors.{attention, lora_settings, quantization}.
"""

from __future__ import annotations

from typing import Any

import torch

from actors import attention
from actors.lora_settings import LoRAPlan
from actors.quantization import loading_options


def pretrained(
    auto_class: Any, path: str, dtype: torch.dtype, read_weights: bool = True, lora: LoRAPlan | None = None,
    device: str = "cpu", **config: Any,
) -> Any:  # fmt: skip
    """A model with packed attention.

    Args:
        auto_class: such as ``AutoModelForCausalLM``.
        path: folder with ``config.json`` and, with ``read_weights``, safetensors.
        dtype: of the parameters.
        read_weights: False leaves the parameters as the memory is, which then is only promised by the system and not
            taken; buffers are what the architecture computes them to be.
        lora: how the weights are quantised.
        device: where a quantised base is made.
        config: values that replace those of ``config.json``.

    Raises:
        ValueError: the architecture cannot take another attention implementation, or is not of this class.
    """
    attention.register()
    if read_weights:
        return auto_class.from_pretrained(
            path, attn_implementation=attention.NAME, local_files_only=True, use_safetensors=True,
            **loading_options(lora, dtype, device), **config,
        )  # fmt: skip
    from transformers import AutoConfig
    from transformers.initialization import no_init_weights

    known = AutoConfig.from_pretrained(path, local_files_only=True, **config)
    with no_init_weights():
        model = auto_class.from_config(known, attn_implementation=attention.NAME, dtype=dtype)
    model.tie_weights()  # goes with the initialisation
    return model
