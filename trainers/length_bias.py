"""Does the reward follow the length?  Correlations with intervals, and what a token is worth.

May import: numpy, trainers.calibration.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike

from trainers.calibration import CONFIDENCE, Estimate, t_quantile


@dataclass(frozen=True, slots=True)
class LengthBias:
    """Reward against completion length over the samples whose reward is finite."""

    pearson: Estimate
    spearman: Estimate  # blind to outliers and to the shape of the curve
    slope: Estimate  # reward a token, least squares


def length_bias(rewards: ArrayLike, lengths: ArrayLike, confidence: float = CONFIDENCE) -> LengthBias:
    """All three of rewards [n] against lengths [n] (tokens); samples without a finite reward are left out."""
    reward, length = _paired(rewards, lengths)
    return LengthBias(
        pearson(reward, length, confidence), spearman(reward, length, confidence), _slope(reward, length, confidence)
    )


def pearson(x: ArrayLike, y: ArrayLike, confidence: float = CONFIDENCE) -> Estimate:
    """Linear correlation with Fisher's interval; NaN and (-1, 1) where one of the two does not vary."""
    first, second = _paired(x, y)
    return _fisher(_correlation(first, second), len(first), 1.0, confidence)


def spearman(x: ArrayLike, y: ArrayLike, confidence: float = CONFIDENCE) -> Estimate:
    """Correlation of ranks (ties share their mean rank).

    Fisher's interval with the variance (1 + r^2 / 2) / (n - 3) of Bonett and Wright 2000, doi:10.1007/BF02294183.
    """
    first, second = _paired(x, y)
    value = _correlation(_ranks(first), _ranks(second))
    return _fisher(value, len(first), 1.0 + value * value / 2, confidence)


def _paired(x: ArrayLike, y: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    first, second = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    if first.shape != second.shape or first.ndim != 1:
        raise ValueError(f"need two rows of one length, not {first.shape} and {second.shape}")
    kept = np.isfinite(first) & np.isfinite(second)
    return first[kept], second[kept]


def _correlation(x: np.ndarray, y: np.ndarray) -> float:
    if len(x) < 2 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return math.nan
    x, y = x - x.mean(), y - y.mean()
    return float(np.clip((x @ y) / math.sqrt((x @ x) * (y @ y)), -1.0, 1.0))


def _fisher(value: float, n: int, spread: float, confidence: float) -> Estimate:
    if math.isnan(value) or n < 4:
        return Estimate(value, -1.0, 1.0, n)
    if abs(value) == 1:
        return Estimate(value, value, value, n)
    half = NormalDist().inv_cdf(0.5 + confidence / 2) * math.sqrt(spread / (n - 3))
    return Estimate(value, math.tanh(math.atanh(value) - half), math.tanh(math.atanh(value) + half), n)


def _ranks(values: np.ndarray) -> np.ndarray:
    """Mean ranks, from 0."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    return np.asarray((np.cumsum(counts) - (counts + 1) / 2)[place])


def _slope(reward: np.ndarray, length: np.ndarray, confidence: float) -> Estimate:
    n = len(reward)
    if n < 3 or np.ptp(length) == 0:
        return Estimate(math.nan, -math.inf, math.inf, n)
    centred = length - length.mean()
    value = float(centred @ reward / (centred @ centred))
    residual = reward - reward.mean() - value * centred
    half = t_quantile(confidence, n - 2) * math.sqrt(float(residual @ residual) / (n - 2) / float(centred @ centred))
    return Estimate(value, value - half, value + half, n)
