"""The mean over training seeds and held-out prompts, with an interval that knows of both.

Runs of several seeds are judged on the same prompts, so their answers are crossed: what a seed did differs from seed to
seed, and a hard prompt is hard for all of them.  An interval over prompts alone forgets the first, one over seeds alone
forgets the second.  With mean squares of a two-way table without replication (Scheffe 1959, chapter 7),

    Var(mean) = (MS_seeds + MS_prompts - MS_rest) / (seeds x prompts)

where a component of variance that comes out below 0 is taken as 0, with Satterthwaite's degrees of freedom
(doi:10.2307/3002019).  With two seeds that differ it is wide, as it has to be, and still covers the truth in about 90 %
of cases in the place of 95: their spread is itself an estimate of one degree of freedom.  Five seeds come to 95.
May import: numpy, trainers.calibration.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike

from trainers.calibration import CONFIDENCE, Estimate, mean_estimate, t_quantile


def crossed_mean(values: ArrayLike, confidence: float = CONFIDENCE) -> Estimate:
    """Mean of ``values`` [seeds, prompts]; a prompt without a finite value under every seed is left out.

    One seed: the interval is over prompts alone, and says nothing of other seeds.  ``n`` counts the values.
    ValueError where ``values`` is no table.
    """
    table = np.asarray(values, dtype=np.float64)
    if table.ndim != 2:
        raise ValueError(f"need a row a seed and a column a prompt, not {table.shape}")
    table = table[:, np.isfinite(table).all(axis=0)]
    seeds, prompts = table.shape
    if not table.size:
        return Estimate(math.nan, -math.inf, math.inf, 0)
    if seeds == 1 or prompts == 1:
        return mean_estimate(table.ravel(), confidence=confidence)
    mean, by_seed, by_prompt = float(table.mean()), table.mean(axis=1), table.mean(axis=0)
    rest = table - by_seed[:, None] - by_prompt[None, :] + mean
    freedom = (seeds - 1, prompts - 1, (seeds - 1) * (prompts - 1))
    sums = (
        prompts * float(np.square(by_seed - mean).sum()),
        seeds * float(np.square(by_prompt - mean).sum()),
        float(np.square(rest).sum()),
    )
    of_seeds, of_prompts, of_rest = (total / free for total, free in zip(sums, freedom, strict=True))
    used = (float(of_seeds > of_rest), float(of_prompts > of_rest))
    terms = (used[0] * of_seeds, used[1] * of_prompts, (1 - sum(used)) * of_rest)
    scaled = math.fsum(terms)
    if scaled <= 0:
        return Estimate(mean, mean, mean, table.size)
    free = scaled**2 / math.fsum(term**2 / f for term, f in zip(terms, freedom, strict=True))
    half = _t_quantile(confidence, max(1.0, free)) * math.sqrt(scaled / table.size)
    return Estimate(mean, mean - half, mean + half, table.size)


def _t_quantile(confidence: float, freedom: float) -> float:
    """For a fraction of a degree of freedom too: on the straight line between its neighbours, which lies above."""
    whole = int(freedom)
    below, above = t_quantile(confidence, whole), t_quantile(confidence, whole + 1)
    return below + (freedom - whole) * (above - below)
