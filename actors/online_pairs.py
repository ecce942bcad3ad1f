"""The pairs of one batch of online DPO as a learner rank sees them: weights, advantages and metrics of its steps.

Rewards are known to every rank, so each finds the same pairs; log-probs of whole answers come from a pass without
gradients that the ranks share before every optimizer step (trainers/online_pairs.py says why that is enough).
May import: numpy, actors.experience_batch, trainers.*.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from actors.experience_batch import ExperienceBatch
from trainers.algorithms import AlgorithmSettings
from trainers.online_pairs import pair_gradients, sampled_pairs
from trainers.preference_training import PreferenceSettings

Scored = Callable[[Sequence[int]], list[np.ndarray]]  # samples -> their log-probs, float32 [T]; a collective


class OnlinePairs:
    """``algorithm``: one that learns from pairs.  ``deadline_s``: for the payload of a group.

    ``references``: float32 [T] of each sample, where the learner is its own reference; None: the groups bring them.
    """

    def __init__(
        self, batch: ExperienceBatch, algorithm: AlgorithmSettings, deadline_s: float,
        references: Sequence[np.ndarray] | None = None,
    ) -> None:  # fmt: skip
        self._batch, self._deadline_s, self._references = batch, deadline_s, references
        self._settings = PreferenceSettings(loss=algorithm.loss, beta=algorithm.kl_coef)
        trainable = batch.trainable()
        cuts = np.cumsum([g.summary.num_samples for g in batch.groups])[:-1]
        self.pairs = sampled_pairs([g.rewards.totals for g in batch.groups], np.split(trainable, cuts))
        self.is_paired = np.zeros(batch.num_samples, dtype=bool)
        self.is_paired[self.pairs.members] = True
        # As first seen by an optimizer step; 0 for a sample in no pair, NaN for one that may not be trained on.
        self.advantages = np.where(trainable, 0.0, np.nan)
        self._seen = np.zeros(batch.num_samples, dtype=bool)
        self._sums: dict[str, float] = {}
        self._num_trained = 0  # pairs, over all optimizer steps

    def step(self, members: Sequence[int], scored: Scored) -> tuple[np.ndarray, np.ndarray]:
        """(weights, advantages), float64 [samples], of the optimizer step on ``members`` under the present weights.

        The tokens of a pair weigh 1 / number of pairs of the step, all others nothing.
        """
        weights, advantages = np.zeros(self._batch.num_samples), np.where(np.isnan(self.advantages), np.nan, 0.0)
        mine = self.pairs.of_groups([self._batch.shapes[i].group for i in members])
        if not mine.size:
            return weights, advantages
        sides = self.pairs.chosen[mine], self.pairs.rejected[mine]
        rows = scored([int(i) for i in np.concatenate(sides)])
        sums = np.array([row.sum(dtype=np.float64) for row in rows])
        found = pair_gradients(
            (sums[: mine.size], sums[mine.size :]),
            (self._reference(sides[0]), self._reference(sides[1])),
            (self._lengths(sides[0]), self._lengths(sides[1])),
            self._settings,
        )
        for side, gradient in zip(sides, (found.chosen, found.rejected), strict=True):
            weights[side], advantages[side] = 1.0 / mine.size, -gradient
        scores_margin = float(self.pairs.scores_margins[mine].mean())
        self._note(found.metrics | {"objective/scores_margin": scores_margin}, mine.size)
        fresh = ~self._seen[list(members)]
        first = np.array(members)[fresh]
        self.advantages[first] = advantages[first]
        self._seen[first] = True
        return weights, advantages

    def metrics(self) -> dict[str, float]:
        """Means over the pairs of all optimizer steps, and how many groups gave none."""
        means = {name: total / self._num_trained for name, total in self._sums.items()}
        return means | {
            "pairs/num": float(self.pairs.chosen.size),
            "pairs/num_ties": float(self.pairs.num_ties),
            "pairs/num_single": float(self.pairs.num_single),
        }

    def _note(self, metrics: dict[str, float], count: int) -> None:
        self._num_trained += count
        for name, value in metrics.items():
            self._sums[name] = self._sums.get(name, 0.0) + count * value

    def _reference(self, samples: np.ndarray) -> np.ndarray:
        """float64 [M]: log-probs of whole answers under the reference."""
        own, batch = self._references, self._batch
        rows = [batch.tokens(int(i), self._deadline_s).reference_logprobs if own is None else own[i] for i in samples]
        found = [row.sum(dtype=np.float64) for row in rows if row is not None]
        if len(found) < len(rows):
            raise ValueError(f"{len(rows) - len(found)} of {len(rows)} samples came without reference log-probs")
        return np.array(found)

    def _lengths(self, samples: np.ndarray) -> np.ndarray:
        return np.array([self._batch.shapes[int(i)].num_completion for i in samples])
