"""What training watches at every evaluation besides the reward: wins against its own start, diversity, length bias.

Pure; the loop gives it the held-out completions and gets metrics (names in trainers/metrics.py).
May import: numpy, trainers.{diversity, length_bias, win_rate}.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from trainers.diversity import distinct_n, unique_fraction
from trainers.length_bias import pearson
from trainers.win_rate import win_rate


@dataclass(frozen=True, slots=True)
class FirstEvaluation:
    """What later evaluations are compared with: that of step 0, before any update.

    ``rewards`` are the totals, float64 [prompts * samples], the samples of a prompt side by side, NaN where one
    failed; later evaluations give theirs in the same order.  Keep it in the checkpoint, or a resumed run has no start
    to compare with.
    """

    rewards: tuple[float, ...]
    num_samples: int = 1  # of one prompt


def live_metrics(
    texts: Sequence[str],
    lengths: ArrayLike,
    truncated: Sequence[bool],
    rewards: ArrayLike,
    first: FirstEvaluation | None,
) -> dict[str, float]:
    """Metrics of one evaluation, all rows [prompts * samples] in one order.

    Args:
        lengths: tokens of each completion, EOS included.
        truncated: whether the token limit ended it.
        rewards: totals, NaN where there is none.
        first: None at step 0 itself; the win rate then is left out.

    Raises:
        ValueError: rows of different length, or not those of ``first``.
    """
    scores = np.asarray(rewards, dtype=np.float64)
    if not len(texts) == len(truncated) == len(scores) == len(np.asarray(lengths)):
        raise ValueError(f"{len(texts)} texts, {len(truncated)} finish reasons and {len(scores)} rewards")
    metrics = {
        "eval/distinct_2": distinct_n(texts, 2),
        "eval/unique": unique_fraction(texts),
        "eval/reward_length_correlation": pearson(scores, lengths).value,
        "eval/clipped_ratio": float(np.mean(np.asarray(truncated, dtype=bool))) if len(texts) else float("nan"),
    }
    if first is None:
        return metrics
    if len(first.rewards) != len(scores):
        raise ValueError(f"{len(scores)} rewards now and {len(first.rewards)} at step 0: not the same samples")
    start = np.asarray(first.rewards, dtype=np.float64)
    outcomes = [
        0.5 * (1.0 + float(np.sign(now - then))) if np.isfinite(now) and np.isfinite(then) else None
        for now, then in zip(scores, start, strict=True)
    ]
    rate = win_rate(outcomes, [i // first.num_samples for i in range(len(scores))])
    return metrics | {"eval/win_rate": rate.value, "eval/win_rate_low": rate.low, "eval/win_rate_high": rate.high}
