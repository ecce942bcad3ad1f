"""Configuration of low-rank adapters (LoRA), importable without torch.  May import: pydantic, trainers.settings."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from trainers.settings import Settings

Quantization = Literal["nf4", "fp4", "int8"]
ALL_LINEAR: Literal["all-linear"] = "all-linear"
QUANTIZED_BYTES = {"nf4": 0.5, "fp4": 0.5, "int8": 1.0}  # of one weight of a linear layer, without its scales


class LoRASettings(Settings):
    """A low-rank adapter on a frozen model (arXiv:2106.09685): W' = W + scale B A, A [rank, in], B [out, rank]."""

    rank: Annotated[int, Field(ge=1)] = Field(16, description="r of peft: columns of B and rows of A")
    alpha: float = Field(32.0, gt=0, description="lora_alpha of peft: the update is scaled by alpha / rank")
    dropout: float = Field(
        0.0, ge=0, lt=1, description="lora_dropout of peft: of an adapter's input; 0 where the policy is sampled, "
        "which is trained under the weights that it was sampled with"
    )  # fmt: skip
    target_modules: Literal["all-linear"] | tuple[str, ...] = Field(
        ALL_LINEAR, description="names of linear layers, such as [q_proj, v_proj]; all-linear: all but the head"
    )
    rslora: bool = Field(
        False, description="use_rslora of peft: scale by alpha / sqrt(rank), for high ranks (arXiv:2312.03732)"
    )

    @property
    def scale(self) -> float:
        """What B A is multiplied with."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


@dataclass(frozen=True, slots=True)
class LoRAPlan:
    """What a trained rank is told of its adapter; everything in it was checked before it started."""

    settings: LoRASettings
    quantization: Quantization | None = None
    start: str | None = None  # folder of the adapter to go on from; None: a new one, whose update is 0
    merged_push: bool = False  # the whole merged model goes to the generators, not the adapter alone
    merged_export: bool = True  # an export is the merged model with the adapter beside it, not the adapter alone
    reference: bool = False  # this rank computes the reference's log-probs, with the adapter as it started
