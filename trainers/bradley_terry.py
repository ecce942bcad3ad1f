"""Bradley-Terry: the probability that one answer is preferred to another, and the loss that learns it.

``P(a beats b) = sigmoid(r(a) - r(b))`` (Bradley and Terry 1952).  Only differences count: a reward model
is determined up to a constant for each prompt.

Axes: N pairs; P prompts.  May import: numpy, torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch.nn.functional import logsigmoid


class PreferenceLoss(NamedTuple):
    """The weighted sum over pairs, and what it was made of."""

    loss: torch.Tensor  # scalar, float32
    per_pair: torch.Tensor  # float32 [N], detached; 0 where the weight is 0
    margin: torch.Tensor  # float32 [N], detached: chosen score - rejected score


def probability(margin: torch.Tensor) -> torch.Tensor:
    """That the answer which scores higher by ``margin`` is preferred.  Any shape in and out."""
    return torch.sigmoid(margin)


def preference_loss(
    chosen_scores: torch.Tensor,
    rejected_scores: torch.Tensor,
    weights: torch.Tensor,
    margin: torch.Tensor | None = None,
    label_smoothing: float = 0.0,
    centering_coef: float = 0.0,
) -> PreferenceLoss:
    """``sum_i w_i (-(1-s) log sigmoid(d_i - m_i) - s log sigmoid(-(d_i - m_i)) + c (chosen_i + rejected_i)^2)``.

    With ``d = chosen - rejected``.  s = 0 and c = 0: InstructGPT (arXiv:2203.02155), eq. 1; m: Llama 2
    (arXiv:2307.09288), eq. 2; c: Eisenstein et al. 2023 (arXiv:2312.09244), which settles the free constant
    by drawing the scores of each pair towards sum 0.

    ``label_smoothing`` s says that annotators err: each label is taken to be flipped with probability s,
    whatever the pair.  The loss is the expected one under such flips, so it stops asking for a wider margin
    at ``log((1 - s) / s)``, where the model is as certain as the labels are, and a single wrong label costs
    no more than its share.  s = 0.5 would mean that labels say nothing.

    Args:
        chosen_scores, rejected_scores: float32 [N].
        weights: float32 [N], such as ``pair_weights`` spread over the pairs.  A pair of weight 0 (a fill-up
            pair on a rank that has no more) is not looked at: its scores may be NaN.
        margin: float32 [N], how much better the chosen answer must score.

    Raises:
        ValueError: shapes that differ, or a smoothing outside [0, 0.5).
    """
    given = [chosen_scores, rejected_scores, weights, *([] if margin is None else [margin])]
    if any(t.ndim != 1 or t.shape != chosen_scores.shape for t in given):
        raise ValueError(f"scores, weights and margin must all be [N], not {[tuple(t.shape) for t in given]}")
    if not 0.0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing = {label_smoothing} must be in [0, 0.5)")
    # Left out before anything is computed: 0 * NaN would be a NaN gradient.
    counted = torch.nonzero(weights != 0).squeeze(1)
    chosen, rejected = chosen_scores[counted], rejected_scores[counted]
    surplus = chosen - rejected if margin is None else chosen - rejected - margin[counted]
    losses = -(1.0 - label_smoothing) * logsigmoid(surplus)
    if label_smoothing:
        losses = losses - label_smoothing * logsigmoid(-surplus)
    if centering_coef:
        losses = losses + centering_coef * (chosen + rejected) ** 2
    per_pair = torch.zeros_like(chosen_scores).detach().index_copy(0, counted, losses.detach())
    return PreferenceLoss((losses * weights[counted]).sum(), per_pair, (chosen_scores - rejected_scores).detach())


def ranking_pairs(ranks: Sequence[float]) -> list[tuple[int, int]]:
    """All (better, worse) pairs of indices into a ranking of K answers, where rank 1 is the best.

    K (K - 1) / 2 pairs; ties are left out, since they say nothing about the sign of a margin, and so is
    an answer that was not ranked (NaN).
    """
    return [(i, j) for i, better in enumerate(ranks) for j, worse in enumerate(ranks) if better < worse]


def pair_weights(num_pairs_per_prompt: Sequence[int]) -> np.ndarray:
    """The weight of each single pair of each prompt, float64 [P]: 1 / (prompts with pairs x its pairs).

    Each prompt weighs once, whatever its K (InstructGPT, arXiv:2203.02155, eq. 1): the pairs of one ranking
    are not independent, and many of them would be fitted too closely.  ``np.repeat(weights, num_pairs)`` is
    the weight of every pair and sums to 1.  A prompt without a pair weighs 0 and is not counted.
    """
    counts = np.asarray(num_pairs_per_prompt, dtype=np.float64)
    weights = np.zeros_like(counts)
    has_pairs = counts > 0
    weights[has_pairs] = 1.0 / (has_pairs.sum() * counts[has_pairs])
    return weights
