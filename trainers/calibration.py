"""How far a number can be trusted: intervals, and the judgement of reward models and policies on held-out answers.

A reward model sees a pair and says P(chosen preferred) = sigmoid(margin), margin = score(chosen) - score(rejected)
(Bradley-Terry).  Accuracy asks for the sign of the margin, calibration for its size.
Scores that are not finite (a failed reward) leave their pair out; ``n`` counts what is left.
May import: numpy.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike

CONFIDENCE = 0.95
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


@dataclass(frozen=True, slots=True)
class Estimate:
    """A number with its confidence interval; ``value`` is NaN where nothing could be counted."""

    value: float
    low: float
    high: float
    n: int  # independent observations behind it

    def __str__(self) -> str:
        return f"{self.value:.3g} [{self.low:.3g}, {self.high:.3g}]"


@dataclass(frozen=True, slots=True)
class Bin:
    """The predictions in [low, high) (the last bin is closed), and how often they came true."""

    low: float
    high: float
    predicted: float  # mean predicted probability
    observed: Estimate


@dataclass(frozen=True, slots=True)
class LengthBin:
    """The pairs whose chosen answer is longer than the rejected one by [low, high] tokens (negative: shorter)."""

    low: float
    high: float
    accuracy: Estimate


@dataclass(frozen=True, slots=True)
class PolicyCalibration:
    """What a policy's own probabilities are worth."""

    error: float  # expected calibration error
    overconfidence: float  # mean probability - accuracy
    bins: tuple[Bin, ...]


def wilson_interval(k: float, n: int, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Score interval of a proportion, ``k`` successes (ties may count half) of ``n``; (0, 1) for n = 0.

    Wilson 1927, doi:10.1080/01621459.1927.10502953.
    """
    if n < 0 or not 0 <= k <= n:
        raise ValueError(f"need 0 <= k <= n, not k={k}, n={n}")
    if n == 0:
        return 0.0, 1.0
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    share, shrink = k / n, 1 + z * z / n
    middle = (share + z * z / (2 * n)) / shrink
    half = z / shrink * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    # At the ends the interval touches 0 or 1 exactly; rounding must not leave the rate outside it.
    return (0.0 if k == 0 else max(0.0, middle - half)), (1.0 if k == n else min(1.0, middle + half))


def proportion(k: float, n: int, confidence: float = CONFIDENCE) -> Estimate:
    """``k / n`` with its Wilson interval."""
    return Estimate(k / n if n else math.nan, *wilson_interval(k, n, confidence), n)


def unless_certain(found: Estimate, num: int, confidence: float = CONFIDENCE) -> Estimate:
    """``found`` of ``num`` observations; where all are 0, or all are 1, with Wilson's interval, not without one.

    Twenty right answers do not prove that the next one is right, though nothing varied from which to see it.
    """
    if found.low < found.high or found.value not in (0.0, 1.0):
        return found
    return Estimate(found.value, *wilson_interval(found.value * num, num, confidence), found.n)


def t_quantile(confidence: float, freedom: int) -> float:
    """Two-sided quantile of Student's t, by its expansion in 1 / ``freedom`` (Abramowitz and Stegun, 26.7.5).

    Within 0.3 % of the exact value from 4 degrees of freedom on, at 95 %; exact at 1 and 2, which have a closed form.
    """
    if freedom == 1:
        return math.tan(math.pi * confidence / 2)
    if freedom == 2:
        return confidence * math.sqrt(2 / (1 - confidence**2))
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    terms = (
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return math.fsum(term / freedom**power for power, term in enumerate(terms))


def mean_estimate(totals: ArrayLike, sizes: ArrayLike | None = None, confidence: float = CONFIDENCE) -> Estimate:
    """Mean of ``totals`` [n]; with ``sizes`` [n] (tokens, say) the ratio sum(totals) / sum(sizes).

    The rows are the independent observations, so a ratio's interval (delta method, Student's t) knows that the
    tokens of one sequence hang together.  One row has no interval: it is (-inf, inf).
    """
    sums = np.asarray(totals, dtype=np.float64)
    weights = np.ones_like(sums) if sizes is None else np.asarray(sizes, dtype=np.float64)
    if sums.shape != weights.shape or sums.ndim != 1:
        raise ValueError(f"totals and sizes must be rows of one length, not {sums.shape} and {weights.shape}")
    n = len(sums)
    if weights.sum() == 0:
        return Estimate(math.nan, -math.inf, math.inf, n)
    value = float(sums.sum() / weights.sum())
    if n < 2 or not math.isfinite(value):
        return Estimate(value, -math.inf, math.inf, n)
    error = math.sqrt(float(np.square(sums - value * weights).sum()) / (n - 1) / n) / float(weights.mean())
    half = t_quantile(confidence, n - 1) * error
    return Estimate(value, value - half, value + half, n)


def pair_accuracy(chosen_scores: ArrayLike, rejected_scores: ArrayLike, confidence: float = CONFIDENCE) -> Estimate:
    """Share of pairs [n] whose chosen answer has the higher score, ties as half, with a Wilson interval.

    The interval takes pairs as independent: of several pairs of one prompt, :func:`trainers.win_rate.win_rate`
    makes the clustered one.
    """
    margins = _margins(chosen_scores, rejected_scores)
    return _accuracy(margins[np.isfinite(margins)], confidence)


def reliability(margins: ArrayLike, num_bins: int = 10, confidence: float = CONFIDENCE) -> tuple[Bin, ...]:
    """Reliability diagram of pairs with score margins (chosen - rejected) [n]; empty bins are left out.

    "The chosen answer wins" is true of every pair by construction, so taken alone it would call any doubt a
    mistake.  Each pair therefore enters in both orientations: P(chosen beats rejected) = p, which came true, and
    P(rejected beats chosen) = 1 - p, which did not.  That is the expectation over a random orientation, without
    its noise.  The diagram is point-symmetric about (1/2, 1/2) and a pair is in two bins, hence in none twice
    but for the middle one of an odd number.
    """
    kept = np.asarray(margins, dtype=np.float64)
    kept = kept[np.isfinite(kept)]
    probabilities = np.concatenate([_sigmoid(kept), _sigmoid(-kept)])
    return _bins(probabilities, np.repeat([1.0, 0.0], len(kept)), num_bins, confidence)


def expected_calibration_error(bins: Sequence[Bin]) -> float:
    """Mean of |predicted - observed| over bins, weighted by their numbers; NaN without any (arXiv:1706.04599, eq. 3).

    A perfectly calibrated model has about sqrt(bins / n) / 3 and not 0: compare at equal n.
    """
    total = sum(b.observed.n for b in bins)
    return sum(b.observed.n * abs(b.predicted - b.observed.value) for b in bins) / total if total else math.nan


def accuracy_by_length_difference(
    chosen_scores: ArrayLike,
    rejected_scores: ArrayLike,
    chosen_lengths: ArrayLike,
    rejected_lengths: ArrayLike,
    num_bins: int = 5,
) -> tuple[LengthBin, ...]:
    """Pair accuracy in bins of equal numbers of pairs over ``chosen_lengths - rejected_lengths`` (tokens).

    A model that merely likes long answers is right where the chosen answer is longer and wrong where it is
    shorter.  Equal differences stay in one bin, so there may be fewer than ``num_bins``.
    """
    margins = _margins(chosen_scores, rejected_scores)
    differences = _margins(chosen_lengths, rejected_lengths)
    if margins.shape != differences.shape:
        raise ValueError(f"{margins.shape[0]} pairs of scores and {differences.shape[0]} of lengths")
    kept = np.isfinite(margins)
    margins, differences = margins[kept], differences[kept]
    if not len(margins):
        return ()
    edges = np.unique(np.quantile(differences, np.arange(1, num_bins) / num_bins))
    place = np.searchsorted(edges, differences, side="left")
    return tuple(
        LengthBin(float(differences[inside].min()), float(differences[inside].max()), _accuracy(margins[inside]))
        for inside in (place == number for number in np.unique(place))
    )


def score_summary(scores: ArrayLike) -> dict[str, float]:
    """Count, mean, standard deviation, extremes and quantiles of finite scores; ``num_failed`` counts the others."""
    values = np.asarray(scores, dtype=np.float64).ravel()
    kept = values[np.isfinite(values)]
    summary = {"num": float(len(kept)), "num_failed": float(len(values) - len(kept))}
    if not len(kept):
        return summary
    summary |= {"mean": float(kept.mean()), "std": float(kept.std(ddof=1)) if len(kept) > 1 else 0.0}
    summary |= {"min": float(kept.min())}
    summary |= {f"q{round(100 * q):02d}": float(np.quantile(kept, q)) for q in QUANTILES}
    return summary | {"max": float(kept.max())}


def policy_calibration(probabilities: ArrayLike, correct: ArrayLike, num_bins: int = 10) -> PolicyCalibration:
    """A policy's probabilities [n] of its answers, stated in words or of the sequence, against their correctness [n].

    ``correct`` is 0 or 1, or partial credit in between.  No symmetry is needed here: answers are right and wrong.
    """
    stated, right = np.asarray(probabilities, dtype=np.float64), np.asarray(correct, dtype=np.float64)
    if stated.shape != right.shape or stated.ndim != 1:
        raise ValueError(f"need one probability an answer, not {stated.shape} for {right.shape}")
    if not (np.all((stated >= 0) & (stated <= 1)) and np.all((right >= 0) & (right <= 1))):
        raise ValueError("probabilities and correctness must be in [0, 1]")
    bins = _bins(stated, right, num_bins, CONFIDENCE)
    over = float(stated.mean() - right.mean()) if len(stated) else math.nan
    return PolicyCalibration(expected_calibration_error(bins), over, bins)


def _margins(first: ArrayLike, second: ArrayLike) -> np.ndarray:
    a, b = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if a.shape != b.shape or a.ndim != 1:
        raise ValueError(f"pairs need two rows of one length, not {a.shape} and {b.shape}")
    # An infinite score is a failure; inf - inf is NaN anyway, and inf - 1 must not count as a win.
    return np.asarray(np.where(np.isfinite(a), a, np.nan) - np.where(np.isfinite(b), b, np.nan))


def _accuracy(margins: np.ndarray, confidence: float = CONFIDENCE) -> Estimate:
    wins = float((margins > 0).sum() + 0.5 * (margins == 0).sum())
    return proportion(wins, len(margins), confidence)


def _sigmoid(values: np.ndarray) -> np.ndarray:
    return 0.5 * (1.0 + np.tanh(0.5 * values))  # cannot overflow


def _bins(probabilities: np.ndarray, outcomes: np.ndarray, num_bins: int, confidence: float) -> tuple[Bin, ...]:
    place = np.minimum((probabilities * num_bins).astype(np.int64), num_bins - 1)
    found = []
    for number in np.unique(place):
        inside = place == number
        observed = proportion(float(outcomes[inside].sum()), int(inside.sum()), confidence)
        found.append(Bin(number / num_bins, (number + 1) / num_bins, float(probabilities[inside].mean()), observed))
    return tuple(found)
