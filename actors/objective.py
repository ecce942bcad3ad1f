"""The loss of one pack, and the sums that its metrics are made of.

Pure: tensors in, tensors out.  The engine, the ranks and the packing are somebody else's.
Axes: N scored tokens of one pack, S samples.  May import: torch,
trainers.{algorithms, losses, off_policy, sequence_ratio}.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from trainers.algorithms import AlgorithmSettings
from trainers.losses import clipped_ratio, kl_estimate, score_function_loss
from trainers.off_policy import importance_correction, sample_log_ratios
from trainers.sequence_ratio import policy_log_ratio


@dataclass(frozen=True, slots=True)
class TokenTerms:
    """What the loss needs to know of each scored token, besides the policy's own log-prob."""

    weights: torch.Tensor  # float32 [N], global: they sum to 1 (or less) over the whole minibatch
    advantages: torch.Tensor  # float32 [N]
    behavior_logprobs: torch.Tensor  # float32 [N]
    proximal_logprobs: torch.Tensor | None  # float32 [N]; None: the policy itself (first and only update)
    reference_logprobs: torch.Tensor | None  # float32 [N]; None: no KL term
    lengths: tuple[int, ...]  # [S] scored tokens of each sample, all of them in this pack; they sum to N

    def samples(self) -> torch.Tensor:
        """int64 [N]: whose token each one is."""
        lengths = torch.tensor(self.lengths)
        return torch.repeat_interleave(torch.arange(len(lengths)), lengths).to(self.weights.device)


# Sums over tokens; everything is added over packs and ranks, then divided by "tokens".
SUMS = (
    "tokens", "loss", "entropy", "ratio", "clip_low", "clip_high", "kl", "mismatch", "mismatch_k1", "mismatch_k3",
    "truncated", "masked",
)  # fmt: skip
MAXIMA = ("ratio", "ratio_deviation", "mismatch", "sampling_ratio")


@dataclass(frozen=True, slots=True)
class PackOutcome:
    """The pack's share of the global loss and its metric sums."""

    loss: torch.Tensor  # scalar
    sums: torch.Tensor  # float64 [len(SUMS)]
    maxima: torch.Tensor  # float64 [len(MAXIMA)]
    log_ratios: torch.Tensor  # float64, proximal_ - behavior_ log-prob of each counted token
    sample_log_ratios: torch.Tensor  # float64, its sum over each counted sample


def pack_loss(
    logprobs: torch.Tensor, entropy: torch.Tensor, terms: TokenTerms, algorithm: AlgorithmSettings
) -> PackOutcome:
    """Clipped surrogate + beta * KL - coefficient * entropy, weighted token by token.

    An off-policy correction weighs all three, since all three are estimated from the same samples; the denominators
    in ``terms.weights`` stay as they are, so what it masks or truncates is missing and nothing is scaled up.
    """
    # Tokens of weight 0 are left out before anything is computed: they may carry NaN (a masked sample
    # has no advantage), and 0 * NaN would come back as a NaN gradient even where the loss is finite.
    counted = torch.nonzero(terms.weights > 0).squeeze(1)
    logprobs, entropy, weights = logprobs[counted], entropy[counted], terms.weights[counted]
    proximal = logprobs.detach() if terms.proximal_logprobs is None else terms.proximal_logprobs[counted]
    behavior, advantages = terms.behavior_logprobs[counted], terms.advantages[counted]
    samples, num_samples = terms.samples()[counted], len(terms.lengths)
    correction = importance_correction(logprobs, proximal, behavior, samples, num_samples, algorithm.correction)
    if algorithm.correction.kind == "cispo":
        surrogate = score_function_loss(logprobs, proximal, advantages)
    else:
        log_ratio = policy_log_ratio(logprobs, proximal, samples, num_samples, algorithm.ratio)
        surrogate = clipped_ratio(log_ratio, advantages, algorithm.clip_low, algorithm.clip_high)
    per_token = surrogate.loss
    kl = torch.zeros_like(logprobs)
    if terms.reference_logprobs is not None:
        kl = kl_estimate(logprobs, terms.reference_logprobs[counted], algorithm.kl_estimator)
        if algorithm.kl_placement == "loss":
            per_token = per_token + algorithm.kl_coef * kl
    if algorithm.entropy_coef:
        per_token = per_token - algorithm.entropy_coef * entropy
    if algorithm.correction.is_on:
        per_token = per_token * correction.weights.to(per_token.dtype)
    loss = (per_token * weights).sum()
    with torch.no_grad():
        log_ratios = proximal.double() - behavior.double()
        mismatch, ratio = log_ratios.abs(), surrogate.ratio
        mismatch_kl = (kl_estimate(behavior.double(), proximal.double(), k) for k in ("k1", "k3"))
        columns = (
            torch.ones_like(ratio), per_token * weights, entropy, ratio,
            surrogate.clipped_low, surrogate.clipped_high, kl, mismatch,
            *mismatch_kl, correction.truncated, correction.masked,
        )  # fmt: skip
        sums = torch.stack([c.double().sum() for c in columns])
        none = torch.zeros((), dtype=torch.float64, device=logprobs.device)
        peaks = (ratio, (ratio - 1).abs(), mismatch, log_ratios.exp())
        maxima = torch.stack([p.double().max() if p.numel() else none for p in peaks])
        present = torch.bincount(samples, minlength=num_samples) > 0
        of_samples = sample_log_ratios(log_ratios, samples, num_samples)[present]
    return PackOutcome(loss, sums, maxima, log_ratios, of_samples)
