"""Over-optimisation of a proxy reward: how the gold reward moves with the distance from the start.

With d = sqrt(KL(policy || start)) in sqrt(nats) and R the gold reward less its value at d = 0, the laws of
Gao, Schulman and Hilton 2022 (arXiv:2210.10760, section 3.1) are

    best-of-n   R = d (alpha - beta d)
    RL          R = d (alpha - beta ln d)

Both are linear in (alpha, beta), so least squares has a closed form.
May import: numpy, trainers.{best_of_n, errors, kl_from_base}.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from trainers.best_of_n import by_rank, subset_weights
from trainers.errors import InputError
from trainers.kl_from_base import best_of_n_kl

BEST_OF_N, RL = "best-of-n", "RL"
CURVES: dict[str, Callable[[NDArray[np.float64]], NDArray[np.float64]]] = {
    BEST_OF_N: lambda d: d,
    RL: lambda d: np.log(d),
}


@dataclass(frozen=True)
class Fit:
    """R = d (alpha - beta c(d)), c(d) = d for best-of-n and ln d for RL.

    ``start`` is the gold at d = 0; ``r_squared`` is about the mean of the fitted R, NaN where they do not differ;
    ``num_points`` counts the points with d > 0.
    """

    method: str
    alpha: float
    beta: float
    start: float
    r_squared: float
    num_points: int

    def predict(self, kl: ArrayLike) -> NDArray[np.float64]:
        """The gold (not relative to the start) at these KLs, in nats; ``start`` where KL <= 0."""
        d = _distance(kl)
        inside = np.where(d > 0, d, 1.0)  # no ln 0: the factor d makes that term 0
        return np.asarray(self.start + d * (self.alpha - self.beta * CURVES[self.method](inside)))

    @property
    def peak(self) -> float | None:
        """The d where the law is highest: alpha / 2 beta, or exp(alpha / beta - 1); None where it only rises."""
        if self.beta <= 0:
            return None
        if self.method == BEST_OF_N:
            return max(self.alpha / (2 * self.beta), 0.0)
        return math.exp(min(self.alpha / self.beta - 1, 700.0))


def fit(method: str, kl: ArrayLike, gold: ArrayLike, start: float | None = None) -> Fit:
    """Least squares of the law of ``method`` (BEST_OF_N or RL) on points (KL in nats, mean gold), both [points].

    Points with KL <= 0 (an estimate may fall a little below) stand at d = 0: every law passes through them, so they
    fix only the start, as the mean of their gold where ``start`` is not given.

    Raises:
        InputError: shapes differ, a value is not finite, the start is unknown, or fewer than two different d > 0.
    """
    d, value = _distance(kl), np.asarray(gold, np.float64)
    if d.ndim != 1 or d.shape != value.shape:
        raise InputError("gold", value.shape, f"KL has shape {d.shape}", "give one gold and one KL a point")
    if not (np.isfinite(d).all() and np.isfinite(value).all()):
        raise InputError("points", "not finite", "a KL or a gold is NaN or infinite", "leave such points out")
    moved = d > 0
    if start is None:
        if moved.all():
            raise InputError("start", None, "no point has KL 0", "give the gold of the starting policy as start")
        start = float(value[~moved].mean())
    d, relative = d[moved], value[moved] - start
    if len(np.unique(d)) < 2:
        raise InputError("points", len(d), "two coefficients need two different KL above 0", "give more points")
    design = np.stack([d, -d * CURVES[method](d)], axis=1)
    coefficients = np.linalg.lstsq(design, relative, rcond=None)[0]
    residual = float(np.square(relative - design @ coefficients).sum())
    spread = float(np.square(relative - relative.mean()).sum())
    return Fit(
        method, float(coefficients[0]), float(coefficients[1]), start,
        1 - residual / spread if spread > 0 else math.nan, len(d),
    )  # fmt: skip


def _distance(kl: ArrayLike) -> NDArray[np.float64]:
    return np.asarray(np.sqrt(np.maximum(np.asarray(kl, np.float64), 0.0)))


@dataclass(frozen=True)
class BestOf:
    """Best-of-``n``: KL from the sampled policy in nats, mean proxy and mean gold of the sample chosen by proxy."""

    n: int
    kl: float
    proxy: float
    gold: float


def bon_estimate(scores: ArrayLike, gold: ArrayLike, ns: Sequence[int]) -> list[BestOf]:
    """Best-of-n for each n, from N samples a prompt: ``scores`` (proxy) and ``gold`` are [prompts, N].

    Unbiased and without resampling: the sample ranked r-th from below is the best of C(r-1, n-1) of the C(N, n)
    subsets of size n (arXiv:2112.09332, appendix I).  Samples with equal scores are chosen equally often.
    KL = ln n - (n-1)/n holds when samples of a prompt are all different; otherwise it is an upper bound.

    Raises:
        InputError: shapes differ or are not [prompts, N], a value is not finite, or n outside 1..N.
    """
    proxy, true = np.asarray(scores, np.float64), np.asarray(gold, np.float64)
    if proxy.ndim != 2 or proxy.size == 0 or proxy.shape != true.shape:
        raise InputError("gold", true.shape, f"scores have shape {proxy.shape}", "give both as [prompts, N]")
    if not (np.isfinite(proxy).all() and np.isfinite(true).all()):
        raise InputError("scores", "not finite", "a score or a gold is NaN or infinite", "leave such prompts out")
    num = proxy.shape[1]
    outside = [n for n in ns if not 1 <= n <= num]
    if outside:
        raise InputError("ns", outside, f"there are {num} samples a prompt", f"choose n from 1 to {num}")
    ranked = np.sort(proxy, axis=1)
    ranked_gold = np.stack([by_rank(s, g) for s, g in zip(proxy, true, strict=True)])
    estimates = []
    for n in ns:
        weights, kl = subset_weights(num, n), best_of_n_kl(n)
        estimates.append(BestOf(n, kl, float((ranked @ weights).mean()), float((ranked_gold @ weights).mean())))
    return estimates
