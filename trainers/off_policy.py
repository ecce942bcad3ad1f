"""Importance weights of samples that older weights, or another engine, sampled; and how far they are off.

With ``q_t = pi_proximal / pi_behavior`` of one token and ``q = prod_t q_t`` of its whole sample:

    token_truncate     min(q_t, cap)                 decoupled    q_t
    sequence_truncate  min(q, cap)                   cispo        min(pi_t / pi_behavior_t, cap), pi: the policy now
    token_mask         q_t if low <= q_t <= high, else 0
    sequence_mask      q if low <= q <= high, else 0

Weights are constants: no gradient flows through them.  A token's weight depends on its own sample alone, whole, and
behavior log-probs are those of the weights that sampled each token, so a sample of several versions needs no more.
Axes: N tokens of S samples, laid end to end, each sample whole.
May import: torch, trainers.correction.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from trainers.correction import CorrectionSettings


class Correction(NamedTuple):
    """The weight of each token, and what was done to its ratio."""

    weights: torch.Tensor  # float64 [N], detached; 0 where masked
    truncated: torch.Tensor  # bool [N]
    masked: torch.Tensor  # bool [N]


def sample_log_ratios(log_ratios: torch.Tensor, samples: torch.Tensor, num_samples: int) -> torch.Tensor:
    """``log q`` of each sample, the sum over its tokens: float64 [S].

    Args:
        log_ratios: [N].
        samples: int64 [N], whose token each one is.
        num_samples: S; a sample without tokens has 0.
    """
    sums = torch.zeros(num_samples, dtype=torch.float64, device=log_ratios.device)
    return sums.index_add(0, samples, log_ratios.double())


def importance_correction(
    policy_logprobs: torch.Tensor,
    proximal_logprobs: torch.Tensor,
    behavior_logprobs: torch.Tensor,
    samples: torch.Tensor,
    num_samples: int,
    correction: CorrectionSettings,
) -> Correction:
    """The weights of ``correction.kind``; all 1 where it is off.

    Truncated: arXiv:2505.24298 (AReaL) and common practice; masked to a band: IcePop, arXiv:2510.18855; decoupled:
    Hilton et al. 2021, arXiv:2110.00641; CISPO: arXiv:2506.13585, eq. 4, without a lower bound as in its runs.

    Args:
        policy_logprobs, proximal_logprobs, behavior_logprobs: [N].
        samples: int64 [N], whose token each one is.
        num_samples: S.
    """
    kind = correction.kind
    nothing = torch.zeros_like(samples, dtype=torch.bool)
    if not correction.is_on:
        return Correction(torch.ones_like(samples, dtype=torch.float64), nothing, nothing)
    numerator = policy_logprobs if kind == "cispo" else proximal_logprobs
    log_ratios = numerator.detach().double() - behavior_logprobs.double()
    if kind in ("sequence_truncate", "sequence_mask"):
        log_ratios = sample_log_ratios(log_ratios, samples, num_samples)[samples]
    ratios = torch.exp(log_ratios)
    if correction.truncates:
        return Correction(ratios.clamp(max=correction.cap), ratios > correction.cap, nothing)
    if correction.masks:
        masked = (ratios < correction.low) | (ratios > correction.high)
        return Correction(torch.where(masked, 0.0, ratios), nothing, masked)
    return Correction(ratios, nothing, nothing)


# --- how far samples are off ------------------------------------------------------------------


def effective_sample_size(num: float, total: float, total_of_squares: float) -> float:
    """``(sum w)^2 / (n sum w^2)``: 1 where all weights are equal, 1 / n where one outweighs all (Kong 1992).

    The weights may share any factor; :func:`weight_sums` takes out the largest.
    """
    return total * total / (num * total_of_squares)


def weight_sums(log_weights: torch.Tensor, largest: torch.Tensor) -> torch.Tensor:
    """(n, sum w, sum w^2) of ``w = exp(log_weights - largest)``, float64 [3]: adds up over packs and ranks."""
    weights = torch.exp(log_weights - largest)
    return torch.stack([torch.ones_like(weights).sum(), weights.sum(), (weights * weights).sum()])


# The histogram's bins are equally wide in asinh(log ratio / FINEST): the error of a log ratio is below 0.4 % of it,
# or of FINEST where that is larger, from 1e-4 nats (rounding of float32) to e^9 and beyond; the middle bin is ratio 1.
FINEST = 1e-4
HALF = 2048  # bins on either side
NUM_BINS = 2 * HALF + 1
WIDTH = math.asinh(50.0 / FINEST) / HALF  # the outermost bins also hold everything farther than 50 nats


def ratio_histogram(log_ratios: torch.Tensor) -> torch.Tensor:
    """Counts, int64 [NUM_BINS], of the finite log ratios [N]: adds up over packs and ranks."""
    finite = log_ratios[torch.isfinite(log_ratios)].double()
    bins = torch.round(torch.asinh(finite / FINEST) / WIDTH).clamp(-HALF, HALF).long() + HALF
    return torch.bincount(bins, minlength=NUM_BINS)


def ratio_quantiles(counts: torch.Tensor, shares: Sequence[float]) -> list[float]:
    """For each share p the smallest binned ratio that a share p of the counted tokens does not exceed."""
    below = torch.cumsum(counts, 0)
    total = int(below[-1])
    if total == 0:
        raise ValueError("quantiles of a histogram without any count")
    ranks = torch.tensor([max(1, math.ceil(p * total)) for p in shares], device=counts.device)
    places = torch.searchsorted(below, ranks) - HALF
    return [math.exp(FINEST * math.sinh(int(k) * WIDTH)) for k in places]
