"""A backbone with a scalar head: the reward model and the critic.

Both are a standard ``AutoModelForSequenceClassification`` with one label, run over packs.  A reward model reads
its score at the last token of a text, a critic its values at the state before each completion token; which hidden
states are read stands in the pack (``predict_index``).
May import: torch, transformers, actors.*, trainers.errors.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self, cast

import torch
from torch import nn

from actors.lora import Adapter
from actors.lora_settings import LoRAPlan
from actors.modeling import without_padding
from actors.packing import Pack
from actors.pretrained import pretrained
from trainers.errors import InputError


class ScoreHead(nn.Linear):
    """A linear head that computes in float32 whatever the compute dtype is.

    bfloat16 has 8 bits of mantissa: near 3 its numbers lie 1/64 apart, and answers that differ by less would tie.
    A module, and a Linear, so that ZeRO 3 gathers it like any other and a saved folder is the standard one.
    """

    @classmethod
    def around(cls, linear: nn.Linear) -> Self:
        """The same parameters; nothing is allocated."""
        head = cls(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
        head.weight, head.bias = linear.weight, linear.bias
        return head

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """float32 [..., out] of [..., in] in any dtype."""
        with torch.autocast(input.device.type, enabled=False):
            bias = None if self.bias is None else self.bias.float()
            return nn.functional.linear(input.float(), self.weight.float(), bias)


class PackedScalar(nn.Module):
    """Maps a pack to one float32 number for each of its ``predict_index`` positions."""

    adapter: Adapter | None = None  # of hf_model, whose other weights but the head's are then frozen

    def __init__(self, hf_model: nn.Module) -> None:
        super().__init__()
        self.hf_model = hf_model

    def forward(self, pack: Pack) -> torch.Tensor:
        """float32 [N]: the head's output at ``pack.predict_index``."""
        model = cast(Any, self.hf_model)
        hidden = model.base_model(
            input_ids=pack.input_ids,
            position_ids=pack.position_ids,
            attention_mask=None,
            use_cache=False,
            pack_layout=pack.layout,
        ).last_hidden_state
        rows = hidden[0].index_select(0, pack.predict_index)
        return cast(torch.Tensor, model.score(rows).squeeze(-1))


def load_scalar(
    path: str, field: str, dtype: torch.dtype = torch.float32, checkpointing: bool = False,
    lora: LoRAPlan | None = None, device: str = "cpu", read_weights: bool = True,
) -> PackedScalar:  # fmt: skip
    """The scalar model of a folder: a saved one, or a causal language model's backbone with a new head.

    A new head starts at zero: every score is 0 and the first Bradley-Terry loss is ln 2, whatever the backbone.

    Args:
        path: folder of a sequence classifier with one label, or of a causal language model.
        field: the configuration key that named it, for errors.
        dtype: of the parameters.
        lora: freeze all but the head and put an adapter into it.
        device: where a quantised base is made.
        read_weights: False where another rank's are put in; see :func:`actors.pretrained.pretrained`.

    Raises:
        InputError: the head has another width, or the architecture has no classifier with pluggable attention.
    """
    from transformers import AutoConfig, AutoModelForSequenceClassification

    config = AutoConfig.from_pretrained(path, local_files_only=True)
    is_scalar = any("SequenceClassification" in name for name in config.architectures or ())
    if is_scalar and config.num_labels != 1:
        raise InputError(
            field, path, f"its head gives {config.num_labels} numbers", "use a reward model with one score per text"
        )
    try:
        model = pretrained(AutoModelForSequenceClassification, path, dtype, read_weights, lora, device, num_labels=1)
    except ValueError as error:
        raise InputError(
            field, path, f"transformers has no sequence classifier for it ({error})", "use another backbone"
        ) from error
    if not isinstance(getattr(model, "score", None), nn.Linear):
        raise InputError(field, path, "its classification head is not a linear `score`", "use a decoder backbone")
    if not is_scalar:
        nn.init.zeros_(model.score.weight)
    model.score = ScoreHead.around(model.score)
    model.config.use_cache = False
    without_padding(model)
    model.config.problem_type = "regression"
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    scalar = PackedScalar(model)
    scalar.adapter = None if lora is None else Adapter(model, lora, path)
    return scalar


def scalar_pad_token_id(tokenizer: Any, field: str, path: str) -> int:
    """A pad token that is not EOS.

    transformers scores a padded row at its last token that is not the pad token.  With pad equal to EOS that is
    the token *before* the end of the text, and a padded score would differ from the score we trained.

    Raises:
        InputError: no special token is left to pad with.
    """
    eos = tokenizer.eos_token_id
    candidates = [tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.bos_token_id, *tokenizer.all_special_ids]
    for token in candidates:
        if token is not None and token != eos:
            return int(token)
    raise InputError(field, path, "its only special token is EOS, which cannot be padding too",
                     "add a pad token to the tokenizer")  # fmt: skip


def is_scalar_folder(path: str) -> bool:
    """Whether ``path`` holds a sequence classifier already (a reward model or a critic)."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(Path(path), local_files_only=True)
    return any("SequenceClassification" in name for name in config.architectures or ())
