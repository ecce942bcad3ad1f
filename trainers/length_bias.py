"""Does the reward follow the length?  Correlations with intervals, and what a token is worth.

Where samples share a prompt the prompts are the independent observations, and the intervals are of the bootstrap over
them.
May import: numpy, trainers.{calibration, prompt_bootstrap}.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike

from trainers.calibration import CONFIDENCE, Estimate, t_quantile
from trainers.prompt_bootstrap import bootstrap

NOISE = 1e-9  # of a variance: below that it is rounding


@dataclass(frozen=True, slots=True)
class LengthBias:
    """Reward against completion length over the samples whose reward is finite."""

    pearson: Estimate
    spearman: Estimate  # blind to outliers and to the shape of the curve
    slope: Estimate  # reward a token, least squares


def length_bias(
    rewards: ArrayLike, lengths: ArrayLike, prompt_ids: Sequence[Hashable] | None = None,
    confidence: float = CONFIDENCE, seed: int = 0,
) -> LengthBias:  # fmt: skip
    """All three of rewards [n] against lengths [n] (tokens); samples without a finite reward are left out.

    Without ``prompt_ids`` [n], or where no two samples share one, each stands alone; else ``n`` counts the prompts.
    """
    reward, length = _paired(rewards, lengths)
    alone = LengthBias(
        pearson(reward, length, confidence), spearman(reward, length, confidence), _slope(reward, length, confidence)
    )
    if prompt_ids is None:
        return alone
    there = np.isfinite(np.asarray(rewards, dtype=np.float64)) & np.isfinite(np.asarray(lengths, dtype=np.float64))
    numbers: dict[Hashable, int] = {}
    clusters = [numbers.setdefault(p, len(numbers)) for p, kept in zip(prompt_ids, there, strict=True) if kept]
    if len(numbers) == len(clusters):
        return alone
    over = _OverPrompts(np.array(clusters), len(numbers), confidence, seed)
    return LengthBias(
        over.interval(alone.pearson.value, reward, length, _correlations),
        over.interval(alone.spearman.value, _ranks(reward), _ranks(length), _correlations),
        over.interval(alone.slope.value, reward, length, _slopes),
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
    value, n = _correlation(_ranks(first), _ranks(second)), len(first)
    if abs(value) == 1 and n >= 4:
        # Few samples stand in one order by chance: the open end is that of the next order, with two neighbours changed.
        near = 1 - 12 / (n * (n * n - 1))
        low, high = sorted((value, value * _fisher(near, n, 1.0 + near * near / 2, confidence).low))
        return Estimate(value, low, high, n)
    return _fisher(value, n, 1.0 + value * value / 2, confidence)


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


Moments = tuple[np.ndarray, np.ndarray, np.ndarray]  # [B] of each resample: variances of x and y, covariance


def _correlations(moments: Moments) -> np.ndarray:
    of_x, of_y, both = moments
    return np.asarray(both / np.sqrt(of_x * of_y))


def _slopes(moments: Moments) -> np.ndarray:
    """Of x on y."""
    _, of_y, both = moments
    return np.asarray(both / of_y)


@dataclass(frozen=True, slots=True)
class _OverPrompts:
    """Intervals by the bootstrap over prompts: a resample's moments are sums over the prompts that it drew."""

    clusters: np.ndarray  # int64 [n], of each sample
    num: int
    confidence: float
    seed: int

    def interval(
        self, value: float, x: np.ndarray, y: np.ndarray, statistic: Callable[[Moments], np.ndarray]
    ) -> Estimate:
        """``value`` of x and y [n] with its interval; a resample in which one of them is constant counts as 0."""
        wide = math.inf if statistic is _slopes else 1.0
        if math.isnan(value) or self.num < 4:
            return Estimate(value, -wide, wide, self.num)
        x, y = x - x.mean(), y - y.mean()
        rows = np.ones_like(x), x, y, x * x, y * y, x * y
        sums = np.stack([np.bincount(self.clusters, row, self.num) for row in rows], axis=1)

        def of(draws: np.ndarray) -> np.ndarray:
            n, sx, sy, sxx, syy, sxy = (draws @ sums).T
            of_x, of_y, both = sxx - sx * sx / n, syy - sy * sy / n, sxy - sx * sy / n
            is_flat = (of_x <= NOISE * (x @ x)) | (of_y <= NOISE * (y @ y))
            with np.errstate(invalid="ignore", divide="ignore"):
                return np.where(is_flat, 0.0, np.clip(statistic((of_x, of_y, both)), -wide, wide))

        return bootstrap(value, self.num, of, self.confidence, self.seed)


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
