"""Means of outcomes with an interval that knows which of them share a prompt.

Outcomes are in [0, 1], or None where there is nothing to count.  The prompts are the independent observations: all of
one prompt are drawn together.
May import: numpy, trainers.calibration.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence

import numpy as np

from trainers.calibration import CONFIDENCE, Estimate, wilson_interval

NUM_RESAMPLES = 1000
CHUNK_CELLS = 2_000_000  # resamples x comparisons held at once, 16 MB a float64 array


def mean_over_prompts(
    outcomes: Sequence[float | None],
    prompt_ids: Sequence[Hashable] | None = None,
    confidence: float = CONFIDENCE,
    seed: int = 0,
) -> Estimate:
    """Mean outcome [n] with a percentile interval of the bootstrap over prompts; ``n`` counts the prompts.

    Outcomes that share a prompt are drawn together.  Without ``prompt_ids`` each stands alone.  Where all prompts
    agree there is nothing to resample, and the interval is Wilson's for that many prompts.
    """
    kept, clusters, _ = counted(outcomes, prompt_ids, [0.0] * len(outcomes))
    num = int(clusters.max()) + 1 if len(kept) else 0
    if not num:
        return Estimate(math.nan, 0.0, 1.0, 0)
    totals, sizes = np.bincount(clusters, kept), np.bincount(clusters).astype(np.float64)
    value = float(kept.mean())
    if np.ptp(totals / sizes) == 0:
        return Estimate(value, *wilson_interval(value * num, num, confidence), num)
    return bootstrap(value, num, lambda draws: (draws @ totals) / (draws @ sizes), confidence, seed)


def counted(
    outcomes: Sequence[float | None], prompt_ids: Sequence[Hashable] | None, differences: Sequence[float]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(outcomes, cluster numbers, differences), float64, int64 and float64 [n], of those whose outcome is not None."""
    prompts = range(len(outcomes)) if prompt_ids is None else prompt_ids
    if not len(outcomes) == len(prompts) == len(differences):
        raise ValueError(f"{len(outcomes)} outcomes, {len(prompts)} prompts, {len(differences)} length differences")
    rows = [(o, p, d) for o, p, d in zip(outcomes, prompts, differences, strict=True) if o is not None]
    if any(not 0 <= o <= 1 for o, _, _ in rows):
        raise ValueError("an outcome is in [0, 1] or None")
    numbers: dict[Hashable, int] = {}
    clusters = [numbers.setdefault(p, len(numbers)) for _, p, _ in rows]
    return (
        np.array([o for o, _, _ in rows], dtype=np.float64),
        np.array(clusters, dtype=np.int64),
        np.array([d for _, _, d in rows], dtype=np.float64),
    )


def bootstrap(
    value: float,
    num_clusters: int,
    statistic: Callable[[np.ndarray], np.ndarray],
    confidence: float,
    seed: int,
    width: int = 0,
) -> Estimate:
    """``value`` with its percentile interval.

    ``statistic`` maps how often each cluster was drawn [B, clusters] to values [B]; ``width``: of its largest array, a
    resample.
    """
    random = np.random.default_rng(seed)
    chunk = max(1, CHUNK_CELLS // max(num_clusters, width))
    found = []
    for start in range(0, NUM_RESAMPLES, chunk):
        size = min(chunk, NUM_RESAMPLES - start)
        draws = random.multinomial(num_clusters, np.full(num_clusters, 1 / num_clusters), size=size)
        found.append(statistic(draws.astype(np.float64)))
    low, high = np.quantile(np.concatenate(found), [(1 - confidence) / 2, (1 + confidence) / 2])
    # The full sample belongs to its own interval, even where the fit's resamples are skewed.
    return Estimate(value, min(float(low), value), max(float(high), value), num_clusters)
