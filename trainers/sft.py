"""Supervised fine-tuning: its settings, and its loss.  May import: torch, pydantic, trainers.settings."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from trainers.settings import Settings

if TYPE_CHECKING:
    import torch


class SFTSettings(Settings):
    """Cross-entropy on the tokens that a trained model should write itself."""

    name: Literal["sft"] = Field("sft", description="sft: supervised fine-tuning")
    truncate: bool = Field(False, description="cut an example that is too long at its end, instead of leaving it out")


def cross_entropy_sum(logprobs: torch.Tensor, num_targets: int) -> torch.Tensor:
    """A pack's share of the batch's mean cross-entropy; the shares of all packs and ranks add up to it.

    Args:
        logprobs: float32 [N] of the pack's target tokens.
        num_targets: target tokens of the whole batch, over all ranks.
    """
    return -logprobs.sum() / num_targets
