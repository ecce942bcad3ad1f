"""The learner's math: surrogate, KL estimators, token weights, exact and packed.

Every loss here is a sum of per-token terms times per-token weights.  The weights are computed from
the whole batch before any backward pass, so a loss does not depend on how samples are packed into
micro-batches or spread over ranks.

Axes: N completion tokens of any number of samples, laid end to end.  May import: numpy, torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch


class Surrogate(NamedTuple):
    """Per-token policy-gradient loss and what the clipping did."""

    loss: torch.Tensor  # float32 [N]
    ratio: torch.Tensor  # float32 [N], detached
    clipped_low: torch.Tensor  # bool [N]
    clipped_high: torch.Tensor  # bool [N]


def clipped_surrogate(
    policy_logprobs: torch.Tensor,
    proximal_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    clip_low: float,
    clip_high: float,
) -> Surrogate:
    """``-min(r A, clip(r, 1 - clip_low, 1 + clip_high) A)`` with ``r = pi / pi_proximal``.

    PPO, Schulman et al. 2017 (arXiv:1707.06347), eq. 7; with its two bounds apart as in DAPO
    (arXiv:2503.14476), eq. 10.  All arguments are float32 [N].
    """
    return clipped_ratio(policy_logprobs - proximal_logprobs, advantages, clip_low, clip_high)


def clipped_ratio(log_ratio: torch.Tensor, advantages: torch.Tensor, clip_low: float, clip_high: float) -> Surrogate:
    """The same for any ratio, such as that of a whole sequence (trainers/sequence_ratio.py); float32 [N]."""
    ratio = torch.exp(log_ratio)
    bounded = torch.clamp(ratio, 1.0 - clip_low, 1.0 + clip_high)
    loss = -torch.minimum(ratio * advantages, bounded * advantages)
    seen = ratio.detach()
    return Surrogate(
        loss,
        seen,
        (seen < 1.0 - clip_low) & (advantages < 0),
        (seen > 1.0 + clip_high) & (advantages > 0),
    )


def score_function_loss(
    policy_logprobs: torch.Tensor, proximal_logprobs: torch.Tensor, advantages: torch.Tensor
) -> Surrogate:
    """``-A log pi``: REINFORCE's term, which CISPO (arXiv:2506.13585, eq. 4) multiplies by a constant weight.

    Nothing is clipped; the ratio to the proximal policy is only measured.  All arguments are float32 [N].
    """
    ratio = torch.exp(policy_logprobs.detach() - proximal_logprobs)
    nothing = torch.zeros_like(ratio, dtype=torch.bool)
    return Surrogate(-advantages * policy_logprobs, ratio, nothing, nothing)


def kl_estimate(
    policy_logprobs: torch.Tensor, reference_logprobs: torch.Tensor, estimator: Literal["k1", "k2", "k3"]
) -> torch.Tensor:
    """Per-token estimate of KL(policy || reference) from samples of the policy (Schulman 2020,
    http://joschu.net/blog/kl-approx.html).  With ``d = log pi - log pi_ref``:

    k1 = d                 unbiased, high variance; its *gradient* has mean zero, so only for rewards
    k2 = d^2 / 2           its gradient is an unbiased gradient of the KL: the right one in a loss
    k3 = exp(-d) - 1 + d   unbiased and positive; its gradient is that of KL(ref || policy)

    float32 [N] in and out.
    """
    d = policy_logprobs - reference_logprobs
    if estimator == "k1":
        return d
    if estimator == "k2":
        return 0.5 * d * d
    return torch.expm1(-d) + d


def token_weights(
    num_tokens: Sequence[int],
    included: Sequence[bool],
    aggregation: Literal["token", "sequence", "constant"],
    max_tokens: int,
) -> np.ndarray:
    """The weight of each token of each sample, float64 [samples]; excluded samples weigh 0.

    token     1 / (all tokens of included samples)
    sequence  1 / (included samples x this sample's tokens)
    constant  1 / (included samples x max_tokens), arXiv:2503.20783, which removes the length bias

    ``included`` marks the samples that count in the denominator.  A zero-advantage sample is
    included: it is a real sample whose policy-gradient term happens to be zero.
    """
    lengths = np.asarray(num_tokens, dtype=np.float64)
    keep = np.asarray(included, dtype=bool) & (lengths > 0)
    weights = np.zeros_like(lengths)
    if not keep.any():
        return weights
    if aggregation == "token":
        weights[keep] = 1.0 / lengths[keep].sum()
    elif aggregation == "sequence":
        weights[keep] = 1.0 / (keep.sum() * lengths[keep])
    else:
        weights[keep] = 1.0 / (keep.sum() * float(max_tokens))
    return weights
