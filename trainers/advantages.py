"""Advantages: how much better a sample did than its group.  Pure numpy, float64.

Axes: G samples of one prompt.  May import: numpy.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

STD_EPSILON = 1e-4  # keeps a nearly constant group from being blown up; the value TRL uses


def group_relative(
    rewards: np.ndarray,
    valid: np.ndarray,
    baseline: Literal["group_mean", "leave_one_out"] = "group_mean",
    scale: Literal["std", "none"] = "std",
) -> np.ndarray:
    """Group-relative advantages of one group.

    ``A_i = (r_i - b_i) / s`` over the valid samples, where ``b`` is the mean of the group (GRPO,
    arXiv:2402.03300, eq. 3) or of the *other* samples (RLOO, arXiv:2402.14740, eq. 6) and ``s`` is
    the sample standard deviation (n - 1) plus 1e-4, or 1.

    Args:
        rewards: float64 [G]; entries where ``valid`` is false are not looked at (they may be NaN).
        valid: bool [G].

    Returns:
        float64 [G], NaN where ``valid`` is false.  A group without a spread, or with fewer than two
        valid samples, says nothing about the policy: its advantages are exactly 0.
    """
    if rewards.shape != valid.shape or rewards.ndim != 1:
        raise ValueError(f"rewards {rewards.shape} and valid {valid.shape} must both be [G]")
    advantages = np.full(rewards.shape, np.nan)
    kept = rewards[valid].astype(np.float64)
    n = kept.size
    if n < 2 or np.ptp(kept) == 0.0:
        advantages[valid] = 0.0
        return advantages
    centred = kept - kept.mean()
    if baseline == "leave_one_out":
        centred = centred * (n / (n - 1))  # r_i - mean of the others, rewritten
    if scale == "std":
        centred = centred / (kept.std(ddof=1) + STD_EPSILON)
    advantages[valid] = centred
    return advantages
