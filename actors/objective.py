"""The loss of one pack, and the sums that its metrics are made of.

Pure: tensors in, tensors out.  The engine, the ranks and the packing are somebody else's.
Axes: N scored tokens of one pack.  May import: torch, trainers.algorithms, trainers.losses.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from trainers.algorithms import AlgorithmSettings
from trainers.losses import clipped_surrogate, kl_estimate


@dataclass(frozen=True, slots=True)
class TokenTerms:
    """What the loss needs to know of each scored token, besides the policy's own log-prob."""

    weights: torch.Tensor  # float32 [N], global: they sum to 1 (or less) over the whole minibatch
    advantages: torch.Tensor  # float32 [N]
    behavior_logprobs: torch.Tensor  # float32 [N]
    proximal_logprobs: torch.Tensor | None  # float32 [N]; None: the policy itself (first and only update)
    reference_logprobs: torch.Tensor | None  # float32 [N]; None: no KL term


# Sums over tokens; everything is added over packs and ranks, then divided by "tokens".
SUMS = ("tokens", "loss", "entropy", "ratio", "clip_low", "clip_high", "kl", "mismatch")
MAXIMA = ("ratio", "ratio_deviation", "mismatch")


@dataclass(frozen=True, slots=True)
class PackOutcome:
    """The pack's share of the global loss and its metric sums."""

    loss: torch.Tensor  # scalar
    sums: torch.Tensor  # float64 [len(SUMS)]
    maxima: torch.Tensor  # float64 [len(MAXIMA)]


def pack_loss(
    logprobs: torch.Tensor, entropy: torch.Tensor, terms: TokenTerms, algorithm: AlgorithmSettings
) -> PackOutcome:
    """Clipped surrogate + beta * KL - coefficient * entropy, weighted token by token."""
    # Tokens of weight 0 are left out before anything is computed: they may carry NaN (a masked sample
    # has no advantage), and 0 * NaN would come back as a NaN gradient even where the loss is finite.
    counted = torch.nonzero(terms.weights > 0).squeeze(1)
    logprobs, entropy, weights = logprobs[counted], entropy[counted], terms.weights[counted]
    proximal = logprobs.detach() if terms.proximal_logprobs is None else terms.proximal_logprobs[counted]
    surrogate = clipped_surrogate(
        logprobs, proximal, terms.advantages[counted], algorithm.clip_low, algorithm.clip_high
    )
    per_token = surrogate.loss
    kl = torch.zeros_like(logprobs)
    if terms.reference_logprobs is not None:
        kl = kl_estimate(logprobs, terms.reference_logprobs[counted], algorithm.kl_estimator)
        if algorithm.kl_placement == "loss":
            per_token = per_token + algorithm.kl_coef * kl
    if algorithm.entropy_coef:
        per_token = per_token - algorithm.entropy_coef * entropy
    loss = (per_token * weights).sum()
    with torch.no_grad():
        mismatch = (proximal - terms.behavior_logprobs[counted]).abs()
        ratio = surrogate.ratio
        columns = (
            torch.ones_like(ratio), per_token * weights, entropy, ratio,
            surrogate.clipped_low, surrogate.clipped_high, kl, mismatch,
        )  # fmt: skip
        sums = torch.stack([c.double().sum() for c in columns])
        none = torch.zeros((), dtype=torch.float64, device=logprobs.device)
        peaks = (ratio, (ratio - 1).abs(), mismatch)
        maxima = torch.stack([p.double().max() if p.numel() else none for p in peaks])
    return PackOutcome(loss, sums, maxima)
