"""Best-of-n: what the best of n samples by one score is worth by another, from N >= n samples of each prompt.

No subset is drawn: with scores in ascending order the r-th sample is the best of C(r-1, n-1) of the C(N, n) subsets of
size n, so every expectation over subsets is a weighted mean, without bias and with less noise than one subset a prompt
(Nakano et al. 2021, arXiv:2112.09332, appendix I; as pass@k in arXiv:2107.03374).  How far it is from the model that is
sampled: trainers/kl_from_base.py.
Axes: N samples of one prompt, B samples of its opponent.  May import: numpy.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]


def subset_weights(num: int, n: int) -> Array:
    """[num]: in what share of all subsets of ``n`` of ``num`` samples the r-th from below is the best.

    Raises:
        ValueError: ``n`` is not in 1..num.
    """
    if not 1 <= n <= num:
        raise ValueError(f"the best of {n} of {num} samples is nothing")
    every = math.comb(num, n)
    return np.array([math.comb(r - 1, n - 1) / every for r in range(1, num + 1)])


def by_rank(scores: Array, values: Array) -> Array:
    """``values`` [N] in ascending order of ``scores`` [N]; equal scores share the mean of their values."""
    _, place, count = np.unique(scores, return_inverse=True, return_counts=True)
    mean = np.bincount(place, values) / count
    return np.asarray(np.repeat(mean, count))


def best_of_n(scores: ArrayLike, values: ArrayLike, n: int) -> float:
    """Expected value of the sample that ``scores`` choose among ``n`` of N; equal scores are chosen equally often.

    A sample without a score or without a value is no candidate.  NaN where fewer than ``n`` candidates are left.

    Args:
        scores, values: [N] of one prompt, NaN or infinite where there is none.
    """
    chosen_by, worth = np.asarray(scores, np.float64), np.asarray(values, np.float64)
    if chosen_by.ndim != 1 or chosen_by.shape != worth.shape:
        raise ValueError(f"scores {chosen_by.shape} and values {worth.shape} must both be [N]")
    kept = np.isfinite(chosen_by) & np.isfinite(worth)
    num = int(kept.sum())
    if num < n:
        return math.nan
    return float(by_rank(chosen_by[kept], worth[kept]) @ subset_weights(num, n))


def win_shares(values: ArrayLike, opponents: ArrayLike) -> Array:
    """[N]: share of ``opponents`` [B] that each of ``values`` [N] beats, ties as half.

    Opponents without a value are left out; NaN for a value that is not finite, and everywhere without an opponent.
    """
    ours, theirs = np.asarray(values, np.float64), np.asarray(opponents, np.float64)
    theirs = theirs[np.isfinite(theirs)]
    if not theirs.size:
        return np.full(ours.shape, np.nan)
    won = (ours[:, None] > theirs) + 0.5 * (ours[:, None] == theirs)
    return np.where(np.isfinite(ours), won.mean(axis=1), np.nan)


def top_indices(scores: Sequence[float | None], k: int) -> list[int]:
    """Indices of the ``k`` highest scores, best first, the first of equal ones before the others; None has no place."""
    scored = [i for i, score in enumerate(scores) if score is not None]
    return sorted(scored, key=lambda i: (-float(scores[i] or 0.0), i))[:k]
