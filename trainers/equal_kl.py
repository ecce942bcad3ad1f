"""Two ways of training side by side: the gold reward that each reaches at equal distance from the start.

A run is a row of policies, each with its KL from the start and its gold.  Its gold at any distance d = sqrt(KL) is read
off the law of Gao, Schulman and Hilton 2022 (arXiv:2210.10760) fitted to that run alone, never outside the distances it
was at; so a noisy step weighs no more than the others, and runs, which are independent, give the interval.

One number decides, :func:`overall`, fixed before anything is seen: the mean difference over all distances that every
run was at.  Differences at single distances describe it: of ten, one is soon told apart by chance.
May import: numpy, trainers.{calibration, errors, overoptimisation}.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from trainers.calibration import Estimate, mean_estimate
from trainers.errors import InputError
from trainers.overoptimisation import RL, fit

MOVED = 0.05  # sqrt(nats): nearer to the start is the start, measured with rounding


@dataclass(frozen=True, slots=True)
class KLRun:
    """One run: KL in nats and mean gold of each of its policies, both [points]."""

    kl: np.ndarray
    gold: np.ndarray

    @property
    def reach(self) -> tuple[float, float] | None:
        """(least, largest) distance from the start of a policy that had left it; None: none had."""
        d = np.sqrt(np.maximum(self.kl, 0.0))
        moved = d[d > MOVED]
        return (float(moved.min()), float(moved.max())) if moved.size else None


@dataclass(frozen=True, slots=True)
class AtDistance:
    """Gold of both at one distance, over the pairs of runs that were both there; ``difference`` is second - first."""

    d: float  # sqrt(nats)
    first: Estimate
    second: Estimate
    difference: Estimate

    @property
    def verdict(self) -> str:
        return verdict(self.difference)


def verdict(difference: Estimate) -> str:
    """Which way an interval lies from 0."""
    if difference.low > 0:
        return "higher"
    return "lower" if difference.high < 0 else "not told apart"


def gold_curves(runs: Sequence[KLRun], distances: Sequence[float], start: float) -> np.ndarray:
    """float64 [runs, distances]: the gold by each run's own law; NaN outside where it was, or where no law fits it.

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
        least, largest = run.reach or (np.inf, -np.inf)
        rows.append(np.where((wanted >= least) & (wanted <= largest), law.predict(wanted**2), np.nan))
    return np.stack(rows) if rows else np.zeros((0, wanted.size))


def compare(
    first: Sequence[KLRun], second: Sequence[KLRun], distances: Sequence[float], start: float
) -> list[AtDistance]:
    """Both at each distance.  ``first[i]`` and ``second[i]`` share what they can (seed, prompts): they are a pair.

    Raises:
        ValueError: unequal numbers of runs.
    """
    a, b = _paired(first, second, distances, start)
    return [
        AtDistance(float(d), mean_of(a[:, i]), mean_of(b[:, i]), mean_of(b[:, i] - a[:, i]))
        for i, d in enumerate(distances)
    ]


def overall(
    first: Sequence[KLRun], second: Sequence[KLRun], distances: Sequence[float], start: float
) -> tuple[tuple[float, ...], Estimate]:
    """(distances that every run was at, mean over them of second - first with its interval over pairs of runs).

    Without such a distance the estimate is of no pairs.  As :func:`compare`.
    """
    a, b = _paired(first, second, distances, start)
    common = np.isfinite(b - a).all(axis=0) if len(a) else np.zeros(len(distances), dtype=bool)
    each = (b - a)[:, common].mean(axis=1) if common.any() else np.array([])
    return tuple(float(d) for d, is_common in zip(distances, common, strict=True) if is_common), mean_of(each)


def _paired(
    first: Sequence[KLRun], second: Sequence[KLRun], distances: Sequence[float], start: float
) -> tuple[np.ndarray, np.ndarray]:
    """Curves of both, [pairs, distances]; where one of a pair was not there, neither is."""
    if len(first) != len(second):
        raise ValueError(f"{len(first)} runs against {len(second)}: runs are compared in pairs")
    a, b = gold_curves(first, distances, start), gold_curves(second, distances, start)
    both = np.isfinite(a) & np.isfinite(b)
    return np.where(both, a, np.nan), np.where(both, b, np.nan)


def mean_of(values: np.ndarray) -> Estimate:
    """Mean over the runs that have a value, with Student's interval; n counts them."""
    return mean_estimate(values[np.isfinite(values)])
