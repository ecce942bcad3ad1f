"""How often policy a is preferred to policy b: by score or by a judge, raw and at equal length.

Outcomes are 1 (a wins), 0.5 (tie), 0 (b wins) or None (not judged: counted and left out).
May import: numpy, trainers.{calibration, prompt_bootstrap, verdicts}.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

from trainers.calibration import CONFIDENCE, Estimate
from trainers.prompt_bootstrap import bootstrap, counted, mean_over_prompts
from trainers.verdicts import Verdict, combine

RIDGE = 0.01  # of the logistic fit: a normal prior of variance 100, felt only where the data separate
MAX_NEWTON_STEPS = 60


@dataclass(frozen=True, slots=True)
class Comparison:
    """One answer of a against one of b to the same prompt, by ``scores`` or by ``verdicts``."""

    prompt_id: str
    length_a: int  # tokens
    length_b: int
    scores: tuple[float, float] | None = None  # of a, of b
    verdicts: tuple[Verdict | None, Verdict | None] | None = None  # shown (a, b), shown (b, a); None: not parsed

    def __post_init__(self) -> None:
        if (self.scores is None) == (self.verdicts is None):
            raise ValueError(f"comparison of {self.prompt_id!r} needs scores or verdicts, one of the two")

    @property
    def outcome(self) -> float | None:
        """1, 0.5, 0, or None where a score is not finite or a verdict was not parsed."""
        if self.verdicts is not None:
            return combine(*self.verdicts, "tie").value
        assert self.scores is not None
        a, b = self.scores
        if not (math.isfinite(a) and math.isfinite(b)):
            return None
        return 0.5 if a == b else float(a > b)


@dataclass(frozen=True, slots=True)
class WinRate:
    """What comparisons say about a against b."""

    raw: Estimate
    length_controlled: Estimate
    num_ties: int
    num_left_out: int  # no verdict, or no score
    mean_length_difference: float  # tokens, a - b, over those that count


def compare(comparisons: Sequence[Comparison], confidence: float = CONFIDENCE, seed: int = 0) -> WinRate:
    """Raw and length-controlled win rate of a over b."""
    outcomes = [c.outcome for c in comparisons]
    prompts = [c.prompt_id for c in comparisons]
    differences = [c.length_a - c.length_b for c in comparisons]
    counted = [d for d, o in zip(differences, outcomes, strict=True) if o is not None]
    return WinRate(
        raw=win_rate(outcomes, prompts, confidence, seed),
        length_controlled=length_controlled_win_rate(outcomes, differences, prompts, confidence, seed),
        num_ties=outcomes.count(0.5),
        num_left_out=len(outcomes) - len(counted),
        mean_length_difference=float(np.mean(counted)) if counted else math.nan,
    )


def win_rate(
    outcomes: Sequence[float | None],
    prompt_ids: Sequence[Hashable] | None = None,
    confidence: float = CONFIDENCE,
    seed: int = 0,
) -> Estimate:
    """Mean outcome [n] and its interval; see :func:`trainers.prompt_bootstrap.mean_over_prompts`."""
    return mean_over_prompts(outcomes, prompt_ids, confidence, seed)


def length_controlled_win_rate(
    outcomes: Sequence[float | None],
    length_differences: Sequence[float],
    prompt_ids: Sequence[Hashable] | None = None,
    confidence: float = CONFIDENCE,
    seed: int = 0,
) -> Estimate:
    """The win rate a would have at b's lengths: sigmoid(theta) of the fit outcome ~ sigmoid(theta + phi x).

    ``length_differences`` [n]: length of a - length of b.  x = tanh(difference / scale), after Dubois et al. 2024
    (arXiv:2404.04475) without their per-instruction term, which takes many models to fit.  The difference is
    scaled and not centred: zero must remain "equally long".  Their scale is the standard deviation; ours is the
    root mean square, the same where the mean difference is 0, because x of a policy that is always much longer
    would otherwise saturate at 1 and say nothing.

    The interval is the bootstrap's over prompts.  Where a is longer in every comparison (or shorter in every
    one) none of them says what happens at equal length: the value is NaN, the interval (0, 1).  Where all outcomes
    are the same, or all lengths, the rate is the raw one.
    """
    kept, clusters, differences = counted(outcomes, prompt_ids, length_differences)
    num = int(clusters.max()) + 1 if len(kept) else 0
    if not num or (differences > 0).all() or (differences < 0).all():
        return Estimate(math.nan, 0.0, 1.0, num)
    if not differences.any() or np.ptp(kept) == 0:  # no length effect to take out
        return win_rate(kept.tolist(), clusters.tolist(), confidence, seed)
    x = np.tanh(differences / math.sqrt(float(np.square(differences).mean())))
    value = float(_rate_at_zero(x, kept, np.ones((1, len(kept))))[0])
    return bootstrap(value, num, lambda draws: _rate_at_zero(x, kept, draws[:, clusters]), confidence, seed,
                     width=len(kept))  # fmt: skip


def _rate_at_zero(x: np.ndarray, outcomes: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """sigmoid(theta) of the weighted ridge fits, all rows of ``weights`` [B, n] at once, by Newton's method."""
    theta, phi = np.zeros(len(weights)), np.zeros(len(weights))
    for _ in range(MAX_NEWTON_STEPS):
        predicted = 0.5 * (1 + np.tanh(0.5 * (theta[:, None] + phi[:, None] * x)))
        residual, curvature = weights * (outcomes - predicted), weights * predicted * (1 - predicted)
        slope_0, slope_1 = residual.sum(1) - RIDGE * theta, residual @ x - RIDGE * phi
        h_00, h_01, h_11 = curvature.sum(1) + RIDGE, curvature @ x, curvature @ (x * x) + RIDGE
        determinant = h_00 * h_11 - h_01 * h_01
        step_0 = (h_11 * slope_0 - h_01 * slope_1) / determinant
        step_1 = (h_00 * slope_1 - h_01 * slope_0) / determinant
        theta, phi = theta + step_0, phi + step_1  # |x| <= 1 and the start at 0 keep whole steps from overshooting
        if max(np.abs(step_0).max(), np.abs(step_1).max()) < 1e-8:
            break
    return np.asarray(0.5 * (1 + np.tanh(0.5 * theta)))
