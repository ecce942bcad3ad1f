"""Two ways of training side by side: the gold reward that each reaches at equal distance from the start.

A run is a row of policies, each with its KL from the start and its gold.  Its gold at any distance d = sqrt(KL) is read
off the law of Gao, Schulman and Hilton 2022 (arXiv:2210.10760) fitted to that run alone, never beyond the largest d it
was at; so a noisy step weighs no more than the others, and runs, which are independent, give the interval.
May import: numpy, trainers.{calibration, errors, overoptimisation}.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from trainers.calibration import Estimate, mean_estimate
from trainers.errors import InputError
from trainers.overoptimisation import RL, fit


@dataclass(frozen=True, slots=True)
class KLRun:
    """One run: KL in nats and mean gold of each of its policies, both [points]."""

    kl: np.ndarray
    gold: np.ndarray


@dataclass(frozen=True, slots=True)
class AtDistance:
    """Gold of both at one distance.  ``difference`` is second - first over the pairs of runs that both got there."""

    d: float  # sqrt(nats)
    first: Estimate
    second: Estimate
    difference: Estimate

    @property
    def verdict(self) -> str:
        if self.difference.low > 0:
            return "higher"
        return "lower" if self.difference.high < 0 else "not told apart"


def gold_curves(runs: Sequence[KLRun], distances: Sequence[float], start: float) -> np.ndarray:
    """float64 [runs, distances]: the gold by each run's own law; NaN beyond where it was, or where no law fits it.

    ``start`` is the gold at d = 0, common to all.
    """
    wanted = np.asarray(distances, dtype=np.float64)
    rows = []
    for run in runs:
        try:
            law = fit(RL, run.kl, run.gold, start)
        except InputError:  # it hardly moved: nothing is known of it at any distance
            rows.append(np.full(wanted.shape, np.nan))
            continue
        reached = np.sqrt(max(float(run.kl.max()), 0.0))
        rows.append(np.where(wanted <= reached, law.predict(wanted**2), np.nan))
    return np.stack(rows) if rows else np.zeros((0, wanted.size))


def compare(
    first: Sequence[KLRun], second: Sequence[KLRun], distances: Sequence[float], start: float
) -> list[AtDistance]:
    """Both at each distance.  ``first[i]`` and ``second[i]`` share what they can (seed, prompts): they are a pair.

    Raises:
        ValueError: unequal numbers of runs.
    """
    if len(first) != len(second):
        raise ValueError(f"{len(first)} runs against {len(second)}: runs are compared in pairs")
    a, b = gold_curves(first, distances, start), gold_curves(second, distances, start)
    return [
        AtDistance(float(d), mean_of(a[:, i]), mean_of(b[:, i]), mean_of(b[:, i] - a[:, i]))
        for i, d in enumerate(distances)
    ]


def mean_of(values: np.ndarray) -> Estimate:
    """Mean over the runs that have a value, with Student's interval; n counts them."""
    return mean_estimate(values[np.isfinite(values)])
