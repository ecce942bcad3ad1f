"""The critic's loss.  Axes: N scored tokens, laid end to end.  May import: torch."""

from __future__ import annotations

from typing import NamedTuple

import torch


class ValueLoss(NamedTuple):
    """Per-token loss of the critic and where the clip holds it back."""

    loss: torch.Tensor  # float32 [N]
    clipped: torch.Tensor  # bool [N]: the clipped branch is the larger one, so the token has no gradient


def clipped_value_loss(
    values: torch.Tensor, proximal_values: torch.Tensor, returns: torch.Tensor, clip: float | None
) -> ValueLoss:
    """``0.5 max((v - R)^2, (clip(v, v_prox - clip, v_prox + clip) - R)^2)``; ``clip=None`` is the plain square.

    The value function's trust region in PPO's own implementation (Schulman et al. 2017, arXiv:1707.06347;
    described in Engstrom et al. 2020, arXiv:2005.12729, section 3).  It is pessimistic: a value that left
    the region and is nearer to its return than the bound gets no gradient; any other feels its full error.

    Args:
        values: float32 [N], the critic now; the gradient goes here.
        proximal_values: float32 [N], the critic before the update.
        returns: float32 [N], the targets.
        clip: half the width of the region, in units of reward.
    """
    square = (values - returns) ** 2
    if clip is None:
        return ValueLoss(0.5 * square, torch.zeros_like(square, dtype=torch.bool))
    bounded = torch.clamp(values, proximal_values - clip, proximal_values + clip)
    bounded_square = (bounded - returns) ** 2
    clipped = (bounded_square > square).detach()
    return ValueLoss(0.5 * torch.maximum(square, bounded_square), clipped)
