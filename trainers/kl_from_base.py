"""How far a policy has moved from its base: sampled, exact on an enumerable policy, and of best-of-n.  In nats.

May import: numpy, trainers.calibration.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from trainers.calibration import CONFIDENCE, Estimate, mean_estimate

ROUNDING = 1e-3  # engines round log-probs of near-certain tokens to a little above 0


@dataclass(frozen=True, slots=True)
class SequenceKL:
    """KL(policy || base) from completions sampled from the policy; n counts sequences."""

    sequence: Estimate  # nats a sequence, by k1: unbiased, a single sequence may be negative
    sequence_k3: Estimate  # the same quantity by k3 of each token: unbiased, never negative, usually less noisy
    token: Estimate  # nats a token: sum of k1 / number of tokens


def sequence_kl(
    policy_logprobs: Sequence[ArrayLike], base_logprobs: Sequence[ArrayLike], confidence: float = CONFIDENCE
) -> SequenceKL:
    """KL from base of completions sampled from the policy: rows of log-probs [T_i] of the same tokens, EOS included.

    With d = policy - base of a token: k1 = d and k3 = exp(-d) - 1 + d (joschu.net/blog/kl-approx.html).  Both
    have the KL of the token's distribution as mean under the policy, and these add up to the KL of the sequence.
    That holds for samples of the distribution that is scored: temperature 1, no top-p, or both processed alike.
    The intervals take sequences as independent.  ValueError for rows of different length, NaN, or log-probs > 0.
    """
    if len(policy_logprobs) != len(base_logprobs):
        raise ValueError(f"{len(policy_logprobs)} policy rows and {len(base_logprobs)} base rows")
    k1, k3, lengths = [], [], []
    for number, (policy_row, base_row) in enumerate(zip(policy_logprobs, base_logprobs, strict=True)):
        policy, base = np.asarray(policy_row, dtype=np.float64), np.asarray(base_row, dtype=np.float64)
        if policy.shape != base.shape or policy.ndim != 1:
            raise ValueError(f"row {number}: {policy.shape} policy and {base.shape} base log-probs")
        top = max(policy.max(initial=0.0), base.max(initial=0.0))  # NaN where base has one
        if not (np.isfinite(policy).all() and top <= ROUNDING):
            raise ValueError(f"row {number} has values that are no log-probabilities of sampled tokens")
        d = policy - base
        k1.append(d.sum())
        k3.append((np.expm1(-d) + d).sum())
        lengths.append(len(d))
    return SequenceKL(
        sequence=mean_estimate(k1, confidence=confidence),
        sequence_k3=mean_estimate(k3, confidence=confidence),
        token=mean_estimate(k1, lengths, confidence),
    )


def exact_kl(p: ArrayLike, q: ArrayLike) -> float:
    """KL(p || q) of two distributions [A]; infinite where p has mass and q none.  ValueError for others."""
    first, second = np.asarray(p, dtype=np.float64), np.asarray(q, dtype=np.float64)
    if first.shape != second.shape or first.ndim != 1:
        raise ValueError(f"need two distributions over the same outcomes, not {first.shape} and {second.shape}")
    for name, row in (("p", first), ("q", second)):
        if not (row >= 0).all() or abs(row.sum() - 1) > 1e-6:
            raise ValueError(f"{name} is no distribution: it sums to {row.sum()}, its least entry is {row.min()}")
    held = first > 0
    if (second[held] == 0).any():
        return math.inf
    return float((first[held] * np.log(first[held] / second[held])).sum())


def best_of_n_kl(n: int) -> float:
    """KL from base of the best of ``n`` samples: ln n - (n - 1) / n.

    Exact where no two samples tie in reward, an upper bound otherwise (arXiv:2401.01879).
    """
    if n < 1:
        raise ValueError(f"best of {n} samples is nothing")
    return math.log(n) - (n - 1) / n


def best_of_n_kl_of(rewards: ArrayLike, n: int) -> float:
    """KL from base of the best of ``n`` answers to one prompt, estimated from the rewards [K] of other answers to it.

    Of equals any may be the best.  With F the distribution of rewards, a value v of mass p = F(v) - F(v-) is picked
    with w = F(v)^n - F(v-)^n and brings w ln(w / p); where rewards do not tie the density n F^(n-1) brings its own
    integral, and all of it is :func:`best_of_n_kl`.  Values that more than one of the K have count as ties, F is that
    of the K.  A reward that is not finite ranks lowest.
    """
    if n < 1:
        raise ValueError(f"best of {n} samples is nothing")
    values = np.asarray(rewards, dtype=np.float64)
    if values.ndim != 1 or not values.size:
        raise ValueError(f"need the rewards of one prompt's answers, not {values.shape}")
    _, counts = np.unique(np.where(np.isfinite(values), values, -np.inf), return_counts=True)
    edges = np.concatenate([[0.0], np.cumsum(counts) / values.size])
    low, high = edges[:-1], edges[1:]
    picked = high**n - low**n
    tied = picked * np.log(picked / (high - low))
    untied = _integral(high, n) - _integral(low, n)
    return float(np.where(counts > 1, tied, untied).sum())


def _integral(u: np.ndarray, n: int) -> np.ndarray:
    """Of n x^(n-1) ln(n x^(n-1)) over x from 0 to ``u``."""
    logs = np.log(np.where(u > 0, u, 1.0))
    return np.asarray(u**n * (math.log(n) + (n - 1) * logs - (n - 1) / n))
