"""What a reward model is worth on comparisons it has not seen: the judgement, as numbers.

The tools are those of trainers/calibration.py; here they meet comparisons and their scores.
Axes: C comparisons, K answers of one, N pairs.  May import: numpy, trainers.{bradley_terry, calibration, comparisons}.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from trainers.bradley_terry import pair_weights
from trainers.calibration import (
    Bin,
    Estimate,
    LengthBin,
    accuracy_by_length_difference,
    expected_calibration_error,
    mean_estimate,
    pair_accuracy,
    reliability,
    score_summary,
)
from trainers.comparisons import Comparison


@dataclass(frozen=True, slots=True)
class RewardReport:
    """Of held-out comparisons; ``chosen`` and ``rejected`` are float64 [N], the scores of each pair."""

    num_comparisons: int
    num_prompts: int
    loss: float  # Bradley-Terry, without smoothing, margin or centring; each comparison weighs once
    accuracy: Estimate  # over pairs; n is the number of prompts, whose pairs hang together
    calibration_error: float
    bins: tuple[Bin, ...]
    by_length: tuple[LengthBin, ...]
    chosen: np.ndarray
    rejected: np.ndarray
    all_scores: np.ndarray  # float64 [answers], each once

    def metrics(self) -> dict[str, float]:
        """For the metric dictionary."""
        return {
            "eval/pair_loss": self.loss,
            "eval/pair_accuracy": self.accuracy.value,
            "eval/pair_accuracy_low": self.accuracy.low,
            "eval/pair_accuracy_high": self.accuracy.high,
            "eval/ece": self.calibration_error,
            "eval/margin": float((self.chosen - self.rejected).mean()),
            "eval/mean_reward": float(self.all_scores.mean()),
            "eval/std_reward": float(self.all_scores.std()),
            "eval/num_pairs": float(self.chosen.size),
        }

    def to_json(self) -> dict[str, Any]:
        """Every number of it, as JSON values."""
        return {
            "num_comparisons": self.num_comparisons,
            "num_prompts": self.num_prompts,
            "num_pairs": int(self.chosen.size),
            "loss": self.loss,
            "accuracy": asdict(self.accuracy),
            "expected_calibration_error": self.calibration_error,
            "reliability": [asdict(b) for b in self.bins],
            "accuracy_by_length_difference": [asdict(b) for b in self.by_length],
            "scores": {
                "all": score_summary(self.all_scores),
                "chosen": score_summary(self.chosen),
                "rejected": score_summary(self.rejected),
                "margin": score_summary(self.chosen - self.rejected),
            },
        }


def judge(comparisons: Sequence[Comparison], scores: Sequence[np.ndarray], num_bins: int = 10) -> RewardReport:
    """The report on ``comparisons`` [C], each with its ``scores`` [K].

    Raises:
        ValueError: no pair, or scores that do not fit.
    """
    if [len(c.completion_ids) for c in comparisons] != [len(s) for s in scores]:
        raise ValueError("a report needs one score for each answer")
    rows = [(c, np.asarray(s, dtype=np.float64)) for c, s in zip(comparisons, scores, strict=True)]
    flat = [(c, s, better, worse) for c, s in rows for better, worse in c.pairs]
    if not flat:
        raise ValueError("a report needs at least one pair")
    chosen = np.array([s[better] for _, s, better, _ in flat])
    rejected = np.array([s[worse] for _, s, _, worse in flat])
    lengths = np.array([[c.completion_ids[i].shape[0] for i in pair] for c, _, *pair in flat], dtype=np.float64)
    counts = [len(c.pairs) for c in comparisons]
    weights = np.repeat(pair_weights(counts), counts)
    bins = reliability(chosen - rejected, num_bins)
    return RewardReport(
        num_comparisons=len(comparisons),
        num_prompts=len({c.prompt_id for c in comparisons}),
        loss=float((weights * np.logaddexp(0.0, rejected - chosen)).sum()),
        accuracy=_accuracy(chosen, rejected, [c.prompt_id for c, *_ in flat]),
        calibration_error=expected_calibration_error(bins),
        bins=bins,
        by_length=accuracy_by_length_difference(chosen, rejected, lengths[:, 0], lengths[:, 1]),
        chosen=chosen,
        rejected=rejected,
        all_scores=np.concatenate([s for _, s in rows]),
    )


def _accuracy(chosen: np.ndarray, rejected: np.ndarray, prompts: Sequence[str]) -> Estimate:
    """The pairs of one prompt share its difficulty, so where prompts have several the interval is over prompts."""
    plain = pair_accuracy(chosen, rejected)
    names, place = np.unique(prompts, return_inverse=True)
    if len(names) == len(prompts):
        return plain
    wins = (chosen > rejected) + 0.5 * (chosen == rejected)
    clustered = mean_estimate(np.bincount(place, wins), np.bincount(place).astype(np.float64))
    # Prompts that are all right or all wrong have no spread; then the plain interval is the honest one.
    low, high = min(plain.low, clustered.low), max(plain.high, clustered.high)
    return Estimate(plain.value, max(0.0, low), min(1.0, high), len(names))
