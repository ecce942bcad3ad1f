"""Loading policies and scoring packs with them.  May import: torch, transformers, actors.*, trainers.errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import nn

from actors.logprobs import chunked_logprobs
from actors.lora import Adapter
from actors.lora_settings import LoRAPlan
from actors.packing import Pack
from actors.pretrained import pretrained
from trainers.errors import InputError


def compute_dtype(setting: Literal["auto", "float32", "bfloat16"], native_bfloat16: bool) -> torch.dtype:
    """``auto`` is bfloat16 where the processor multiplies it natively.

    Emulated bfloat16 is many times slower than float32 on a CPU without AVX512-BF16 or AMX.
    """
    if setting == "auto":
        return torch.bfloat16 if native_bfloat16 else torch.float32
    return cast(torch.dtype, getattr(torch, setting))


def trained_dtype(compute: str, lora: LoRAPlan | None) -> torch.dtype:
    """Of the weights that a trained rank loads: float32 masters, but a frozen base is held as it is computed with."""
    return torch.float32 if lora is None else cast(torch.dtype, getattr(torch, compute))


class ScoringHead(nn.Module):
    """Holds the output embedding and scores targets in chunks.

    It is a module of its own so that ZeRO 3, which gathers parameters around module calls, gathers
    the embedding around this one.
    """

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight

    def forward(
        self, hidden: torch.Tensor, targets: torch.Tensor, temperature: float, chunk: int, with_entropy: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return chunked_logprobs(hidden, self.weight, targets, temperature, chunk, with_entropy)


class PackedPolicy(nn.Module):
    """A causal language model that maps a pack to the log-probs and entropies of its completion tokens."""

    scoring_head: ScoringHead
    chunk: int
    adapter: Adapter | None = None  # of hf_model, whose other weights are then frozen

    def __init__(self, hf_model: nn.Module, chunk: int) -> None:
        super().__init__()
        self.hf_model = hf_model
        output = cast(nn.Linear, cast(Any, hf_model).get_output_embeddings())
        if output.bias is not None:
            raise NotImplementedError("an output embedding with a bias is not supported")
        self.scoring_head = ScoringHead(cast(nn.Parameter, output.weight))
        self.chunk = chunk

    def forward(self, pack: Pack, temperature: float, with_entropy: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
        """(log-probs, entropies), float32 [N], of ``pack.targets`` under the model at ``temperature``."""
        backbone = cast(Any, self.hf_model).base_model
        hidden = backbone(
            input_ids=pack.input_ids,
            position_ids=pack.position_ids,
            attention_mask=None,
            use_cache=False,
            pack_layout=pack.layout,
        ).last_hidden_state
        rows = hidden[0].index_select(0, pack.predict_index)
        return cast(
            "tuple[torch.Tensor, torch.Tensor]",
            self.scoring_head(rows, pack.targets, temperature, self.chunk, with_entropy),
        )


def without_padding(model: Any) -> None:
    """Give every row of the input embedding a gradient: packs have no padding, and where pad is EOS, EOS is learned."""
    model.get_input_embeddings().padding_idx = None


def load_policy(
    path: str, chunk: int, dtype: torch.dtype = torch.float32, checkpointing: bool = False,
    lora: LoRAPlan | None = None, device: str = "cpu", read_weights: bool = True,
) -> PackedPolicy:  # fmt: skip
    """The model of a Hugging Face folder, with packed attention.

    Args:
        path: folder with ``config.json`` and safetensors.
        chunk: see :func:`actors.logprobs.chunked_logprobs`.
        dtype: of the parameters (float32 for a learner: they are the master weights; with ``lora`` the compute dtype).
        lora: freeze it and put an adapter into it.
        device: where a quantised base is made.
        read_weights: False where another rank's are put in; see :func:`actors.pretrained.pretrained`.

    Raises:
        InputError: the architecture cannot take another attention implementation.
    """
    from transformers import AutoModelForCausalLM

    try:
        model = pretrained(AutoModelForCausalLM, path, dtype, read_weights, lora, device)
    except ValueError as error:
        raise InputError(
            "model.path", path, f"transformers cannot load it with packed attention ({error})",
            "use a decoder model whose attention is pluggable (Llama, Qwen, Mistral, Gemma, ...)",
        ) from error  # fmt: skip
    model.config.use_cache = False
    without_padding(model)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    policy = PackedPolicy(model, chunk)
    policy.adapter = None if lora is None else Adapter(model, lora, path)
    return policy


def load_tokenizer(path: str) -> Any:
    """The tokenizer of a model folder, with a pad token (EOS when the model has none of its own)."""
    from transformers import AutoTokenizer

    if not any((Path(path) / name).exists() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        raise InputError("model.path", path, "no tokenizer in this folder", "add tokenizer.json next to config.json")
    tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer
