"""How far a judge agrees with people on the same pairs, with intervals.

Outcomes of one pair: 1 (a is better), 0.5 (tie), 0 (b is better), None (not judged: counted and left out).
May import: numpy, trainers.{calibration, win_rate}.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from trainers.calibration import CONFIDENCE, Estimate, wilson_interval
from trainers.win_rate import win_rate

NUM_RESAMPLES = 1000


@dataclass(frozen=True, slots=True)
class Agreement:
    """A judge against people."""

    rate: Estimate  # 1 where both say the same, 0.5 where one of them says tie, 0 where they contradict each other
    kappa: Estimate  # Cohen's: 0 of a judge that guesses, 1 of one that always agrees; NaN where nothing can be said
    num_left_out: int  # pairs that either did not judge


def agreement(
    said: Sequence[float | None], human: Sequence[float | None], prompt_ids: Sequence[Hashable] | None = None,
    confidence: float = CONFIDENCE, seed: int = 0,
) -> Agreement:  # fmt: skip
    """Agreement of ``said`` with ``human`` [n]; the prompts are the independent observations of both intervals.

    Chance is taken over both orders of each pair: a file that has the better answer always first would otherwise
    make any judge look as if it guessed.
    """
    prompts = list(range(len(said)) if prompt_ids is None else prompt_ids)
    if not len(said) == len(human) == len(prompts):
        raise ValueError(f"{len(said)} judgements, {len(human)} labels, {len(prompts)} prompts")
    kept = [(a, b, p) for a, b, p in zip(said, human, prompts, strict=True) if a is not None and b is not None]
    close = [1.0 - abs(a - b) for a, b, _ in kept]
    rate = win_rate(close, [p for *_, p in kept], confidence, seed)
    return Agreement(rate, _kappa(kept, confidence, seed), len(said) - len(kept))


def _kappa(kept: Sequence[tuple[float, float, Hashable]], confidence: float, seed: int) -> Estimate:
    """Cohen 1960 (doi:10.1177/001316446002000104), three classes, each pair in both orders; bootstrap over prompts."""
    numbers: dict[Hashable, int] = {}
    clusters = np.array([numbers.setdefault(p, len(numbers)) for *_, p in kept], dtype=np.int64)
    num = len(numbers)
    if not num:
        return Estimate(math.nan, -1.0, 1.0, 0)
    a, b = (np.array([row[i] for row in kept]) for i in (0, 1))
    same = np.bincount(clusters, (a == b).astype(float), num)
    ties = [np.bincount(clusters, (x == 0.5).astype(float), num) for x in (a, b)]
    sizes = np.bincount(clusters, minlength=num).astype(float)

    def chance_of(tie_a: Any, tie_b: Any) -> Any:
        return tie_a * tie_b + (1 - tie_a) * (1 - tie_b) / 2  # win and loss are as frequent: each pair in both orders

    def of(draws: np.ndarray) -> np.ndarray:
        total = draws @ sizes
        chance = chance_of(*(draws @ t / total for t in ties))
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.asarray((draws @ same / total - chance) / (1 - chance))

    value = float(of(np.ones((1, num)))[0])
    share = same / sizes
    if math.isfinite(value) and np.ptp(share) == 0:
        # All prompts alike: no resample of the share differs, so its interval is Wilson's, and kappa's is that one
        # counted from what chance would give.
        chance = chance_of(*(t.sum() / sizes.sum() for t in ties))
        low, high = ((end - chance) / (1 - chance) for end in wilson_interval(share[0] * num, num, confidence))
        return Estimate(value, min(float(low), value), max(float(high), value), num)
    draws = np.random.default_rng(seed).multinomial(num, np.full(num, 1 / num), size=NUM_RESAMPLES).astype(float)
    found = of(draws)
    found = found[np.isfinite(found)]
    if not (math.isfinite(value) and found.size):
        return Estimate(math.nan, -1.0, 1.0, num)
    low, high = np.quantile(found, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Estimate(value, min(float(low), value), max(float(high), value), num)
