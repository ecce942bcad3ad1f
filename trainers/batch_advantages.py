"""Advantages token by token without a critic: REINFORCE, ReMax, and what is scaled by the deviation of the batch.

    reward - baseline of the sample --(minus the KL that follows)--> a number a token --> scaled over the batch

Pure numpy, float64.  Axes: T completion tokens of one sample, S samples of the global batch.
May import: numpy, trainers.gae.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from trainers.gae import token_moments, whiten


def reward_to_go(advantage: float, penalties: np.ndarray | None, num_tokens: int) -> np.ndarray:
    """``A_t = advantage - sum_{k >= t} penalty_k``, float64 [T]: what came before a token cannot be its doing.

    REINFORCE++, arXiv:2501.03262, and ReMax, arXiv:2310.10505, with the KL in the reward.

    Args:
        advantage: of the whole sample: its reward minus its baseline.
        penalties: [T], ``beta * k1`` of each token; None charges nothing.
        num_tokens: T; with 0 the result is empty.

    Raises:
        ValueError: the penalties are not [T].
    """
    if penalties is None:
        return np.full(num_tokens, advantage, dtype=np.float64)
    if penalties.shape != (num_tokens,):
        raise ValueError(f"penalties {penalties.shape} must be [{num_tokens}]")
    following: np.ndarray = np.cumsum(penalties[::-1].astype(np.float64))[::-1]
    return advantage - following


def scaled_over_batch(rows: Sequence[np.ndarray], included: Sequence[bool], has_baseline: bool) -> list[np.ndarray]:
    """To deviation 1 over all tokens of the included samples; float64 [T] of each sample, NaN where not included.

    REINFORCE++, arXiv:2501.03262: ``(A - mean A) / deviation A`` over the global batch.  The batch's mean is the
    baseline there.  Where a sample was compared with its group already (``has_baseline``: REINFORCE++-baseline)
    nothing more is subtracted: the samples' mean is 0 as it is, and a group without a spread stays at exactly 0,
    which the mean over *tokens* (0 only if length and advantage have nothing to do with each other) would move.

    Args:
        rows: [T] for each sample of the global batch; those not included are not looked at (they may be NaN).
        included: [S].

    Raises:
        ValueError: an included row holds a value that is not finite.
    """
    if not has_baseline:
        return whiten(rows, included)
    _, scale = token_moments(rows, included)
    return [
        row.astype(np.float64) * scale if keep else np.full(row.shape, np.nan)
        for row, keep in zip(rows, included, strict=True)
    ]
