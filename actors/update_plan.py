"""UpdatePlan: what all updates of one batch have in common, computed before the first.

May import: numpy, actors.{experience_batch, online_pairs}, trainers.algorithms.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from actors.experience_batch import ExperienceBatch, contributing
from actors.online_pairs import OnlinePairs
from trainers.algorithms import AlgorithmSettings


@dataclass(frozen=True, slots=True)
class UpdatePlan:
    """One batch, and what its updates take from it."""

    batch: ExperienceBatch
    algorithm: AlgorithmSettings
    trainable: np.ndarray  # bool [samples]
    advantages: np.ndarray  # float64 [samples], NaN where masked; the mean over a sample's tokens where they differ
    token_advantages: Sequence[np.ndarray] | None  # float32 [T] a sample; None: one for all tokens of a sample
    proximal: Sequence[np.ndarray] | None  # float32 [T] a sample; None: the policy itself, in its only update
    references: Sequence[np.ndarray] | None  # float32 [T] a sample, by this model as it started; None: see the groups
    pairs: OnlinePairs | None = None  # online DPO: weights and advantages are of one optimizer step
    sample_weights: np.ndarray | None = None  # float64 [samples], of each token; None: the batch's own

    def weights(self, members: Sequence[int]) -> np.ndarray:
        """Token weights of one minibatch, float64 [members]."""
        if self.sample_weights is not None:
            return self.sample_weights[list(members)]
        return self.batch.weights(members, self.trainable)

    def chosen(self, members: Sequence[int], weights: np.ndarray) -> list[int]:
        """The members whose gradient can be nonzero."""
        largest, rows = self.advantages, self.token_advantages
        if rows is not None:
            largest = np.array([np.abs(row).max(initial=0.0) for row in rows])
        return contributing(members, weights, largest, self.algorithm)


def means(rows: Sequence[np.ndarray]) -> np.ndarray:
    """Mean of each row, float64 [rows], NaN for an empty one."""
    return np.array([row.mean(dtype=np.float64) if row.size else np.nan for row in rows])
