"""Advantages of single tokens, from a critic: GAE, whitening, and what each token is paid.

Axes: T completion tokens of one sample, which is one whole episode: nothing follows the last token.
May import: numpy.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

WHITEN_EPSILON = 1e-8  # added to the variance: a constant batch becomes 0 instead of its own rounding error


def token_rewards(total: float, penalties: np.ndarray | None, num_tokens: int) -> np.ndarray:
    """What each token is paid, float64 [T]: minus its penalty, and the sample's reward at the last one.

    Args:
        total: the reward of the whole sample; NaN (a masked sample) makes the last entry NaN.
        penalties: [T], such as ``beta * k1``; None charges nothing.
        num_tokens: T.

    Raises:
        ValueError: there is no token to put the reward on, or the penalties are not [T].
    """
    if num_tokens < 1:
        raise ValueError("a sample without tokens has no last token to be rewarded")
    if penalties is not None and penalties.shape != (num_tokens,):
        raise ValueError(f"penalties {penalties.shape} must be [{num_tokens}]")
    rewards = np.zeros(num_tokens) if penalties is None else -penalties.astype(np.float64)
    rewards[-1] += total
    return rewards


def gae(rewards: np.ndarray, values: np.ndarray, gamma: float, lam: float) -> tuple[np.ndarray, np.ndarray]:
    """Generalised advantage estimates of one episode, and the returns that its values should meet.

    ``A_t = sum_k (gamma lam)^k delta_{t+k}`` with ``delta_t = r_t + gamma V_{t+1} - V_t``: Schulman et
    al. 2015 (arXiv:1506.02438), eq. 16.  The episode ends after T, so ``V_T = 0``.  ``lam = 1`` is the
    return-to-go minus the value, ``lam = 0`` the TD error.

    Args:
        rewards: [T], what each token is paid.
        values: [T], the critic's value of the state in which the token is chosen.

    Returns:
        advantages and returns (advantages + values), float64 [T] each.
    """
    if rewards.shape != values.shape or rewards.ndim != 1:
        raise ValueError(f"rewards {rewards.shape} and values {values.shape} must both be [T]")
    values = values.astype(np.float64)
    deltas = rewards + gamma * np.append(values[1:], 0.0)[: values.size] - values
    advantages = np.empty_like(values)
    following = 0.0
    for t in range(values.size - 1, -1, -1):
        following = float(deltas[t]) + gamma * lam * following
        advantages[t] = following
    return advantages, advantages + values


def whiten(rows: Sequence[np.ndarray], included: Sequence[bool], shift_mean: bool = True) -> list[np.ndarray]:
    """Scale all tokens of the included samples together to standard deviation 1 and mean 0.

    ``(x - mean) / sqrt(variance + 1e-8)``, over tokens and not over samples, with the variance of the
    population.  The sums are exact, so no bit depends on the order of the samples, and every rank that
    holds the whole batch finds the same numbers.  ``shift_mean=False`` puts the mean back afterwards,
    which is for rewards: a shift of a reward that is paid once per token would pay for length.

    Args:
        rows: [T_i] for each sample of the global batch.
        included: [samples]; excluded samples are not looked at (they may be NaN).

    Returns:
        float64 [T_i] for each sample; excluded ones are NaN throughout.

    Raises:
        ValueError: an included row holds a value that is not finite; it would spoil every other one.
    """
    mean, scale = token_moments(rows, included)
    shift = 0.0 if shift_mean else mean
    return [
        (row.astype(np.float64) - mean) * scale + shift if keep else np.full(row.shape, np.nan)
        for row, keep in zip(rows, included, strict=True)
    ]


def token_moments(rows: Sequence[np.ndarray], included: Sequence[bool]) -> tuple[float, float]:
    """Mean of all tokens of the included samples, and ``1 / sqrt(variance + 1e-8)``; arguments as in :func:`whiten`."""
    for i, (row, keep) in enumerate(zip(rows, included, strict=True)):
        if keep and not np.isfinite(row).all():
            raise ValueError(f"row {i} is included and not finite")
    kept = [row.astype(np.float64) for row, keep in zip(rows, included, strict=True) if keep]
    tokens = np.concatenate([*kept, np.empty(0)])
    count = max(1, tokens.size)
    mean = math.fsum(tokens) / count
    return mean, 1.0 / math.sqrt(math.fsum((tokens - mean) ** 2) / count + WHITEN_EPSILON)


def explained_variance(returns: np.ndarray, values: np.ndarray) -> float:
    """``1 - Var(returns - values) / Var(returns)``: 1 for a perfect critic, 0 for a constant one.

    Any shapes that are equal.  Negative when the values are worse than none; NaN when the returns do
    not vary, which leaves nothing to explain.
    """
    if returns.shape != values.shape:
        raise ValueError(f"returns {returns.shape} and values {values.shape} must have one shape")
    if returns.size == 0 or np.ptp(returns) == 0.0:
        return math.nan
    return float(1.0 - np.var(returns.astype(np.float64) - values) / np.var(returns.astype(np.float64)))
