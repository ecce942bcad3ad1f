"""The Hugging Face model of a folder: with its weights, or for a rank that gets them from another, with their room.

May import: torch, transformers, actors.{attention, lora_settings, quantization}.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from actors import attention
from actors.lora_settings import LoRAPlan
from actors.quantization import loading_options


def pretrained(
    auto_class: Any, path: str, dtype: torch.dtype, read_weights: bool = True, lora: LoRAPlan | None = None,
    device: str = "cpu", **config: Any,
) -> Any:  # fmt: skip
    """A model with packed attention and without dropout of its own.

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
        model = auto_class.from_pretrained(
            path, attn_implementation=attention.NAME, local_files_only=True, use_safetensors=True,
            **loading_options(lora, dtype, device), **config,
        )  # fmt: skip
        return without_dropout(model)
    from transformers import AutoConfig
    from transformers.initialization import no_init_weights

    known = AutoConfig.from_pretrained(path, local_files_only=True, **config)
    with no_init_weights():
        model = auto_class.from_config(known, attn_implementation=attention.NAME, dtype=dtype)
    model.tie_weights()  # goes with the initialisation
    return without_dropout(model)


def without_dropout(model: nn.Module) -> nn.Module:
    """``model`` with every dropout that its architecture has (GPT-2, OPT) at 0; its ``config`` keeps what it says.

    What is trained is then what was sampled: the ratio of a first minibatch is 1, the first loss of DPO ln 2, and no
    gradient depends on how a batch was cut up.  Dropped layers are dropout too, and so is the noise that a mixture of
    experts puts on its router's inputs.  An adapter, which is put in afterwards, has its own (``lora.dropout``).
    """
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in list(vars(module).items()):
            if ("drop" in name or "jitter" in name) and isinstance(value, float):
                setattr(module, name, 0.0)
    return model
