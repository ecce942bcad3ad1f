"""PPO-ptx: the policy's loss plus the cross-entropy of texts that it should not forget.

InstructGPT (arXiv:2203.02155), equation 2, maximises E[reward] + gamma * E[log p(text)].  Here the second term is
a mean over tokens, as the first one may be: ``algorithm.ppo.pretrain_coef`` weighs one nat a token.
May import: numpy, torch, actors.{engine, example_files, sft_learner}, trainers.algorithms.
"""

from __future__ import annotations

import numpy as np
import torch

from actors.engine import TrainingEngine
from actors.example_files import ExampleFile
from actors.sft_learner import accumulate_examples
from trainers.algorithms import AlgorithmSettings


class PretrainingTerm:
    """Draws texts from a mapped file and accumulates their gradient.

    The draw is the same on every rank: a new shuffle each epoch, no text twice in one.  It depends on the number of
    the optimizer step alone, so a resumed run needs no state to go on.
    """

    def __init__(self, path: str, algorithm: AlgorithmSettings, seed: int) -> None:
        self._file, self._algorithm, self._seed = ExampleFile(path), algorithm, seed
        self._epoch, self._order = -1, np.zeros(0, np.int64)

    def drawn(self, step: int, index: int) -> list[int]:
        """Numbers of the texts for the ``index``-th optimizer step on the batch of ``step``; both count from 0."""
        size = self._algorithm.ppo.pretrain_batch_size
        start = (step * self._algorithm.num_updates + index) * size
        return [self._text_at(position) for position in range(start, start + size)]

    def accumulate(self, engine: TrainingEngine, token_budget: int, step: int, index: int) -> torch.Tensor:
        """Backward of the term, which ends the accumulation of the optimizer step.

        Returns:
            This rank's share of the mean cross-entropy, float64 [], without the coefficient.
        """
        texts = [self._file[number] for number in self.drawn(step, index)]
        return accumulate_examples(engine, texts, token_budget, self._algorithm.ppo.pretrain_coef)[0]

    def _text_at(self, position: int) -> int:
        epoch, place = divmod(position, len(self._file))
        if epoch != self._epoch:
            self._epoch = epoch
            self._order = np.random.default_rng([self._seed, epoch]).permutation(len(self._file))
        return int(self._order[place])
