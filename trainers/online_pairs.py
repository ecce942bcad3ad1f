"""Online DPO: the pairs of a batch of sampled groups, and what the loss of the pairs asks of every sample.

    groups with rewards --best_and_worst--> (chosen, rejected) of each prompt, or no pair
    log-probs of both   --pair_gradients--> dL / d log pi(y) of every sample --> its advantage

A policy samples n answers to a prompt; the one of the highest reward is chosen, that of the lowest rejected (Guo et al.
2024, arXiv:2402.04792, has n = 2).  The loss is DPO's (arXiv:2305.18290, eq. 7) or IPO's (arXiv:2310.12036, eq. 17).
It looks at two whole answers at once, which may lie in different micro-batches and on different ranks.  By the chain
rule that is no matter: with S samples

    dL / d theta = sum over samples y of  (dL / d log pi(y)) (d log pi(y) / d theta),

and the first factor is a number a sample that takes no more than the log-probs of whole answers under the present
weights.  Of DPO it is -(beta / N) sigmoid(-beta margin) of the chosen sample of each of the N pairs, and plus that of
the rejected one.  So a sample enters the learner like any other, with the weight 1 / N and the advantage
-N dL / d log pi(y).  The number holds for these weights alone: log-probs are taken anew before every optimizer step.

Pure.  Axes: G samples of a prompt, S samples of a batch, N pairs.
May import: numpy, torch, trainers.{preference_losses, preference_training}.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from trainers.preference_losses import AnswerLogps, paired_outcome
from trainers.preference_training import PreferenceSettings


@dataclass(frozen=True, slots=True)
class SampledPairs:
    """The pairs of a batch, at most one a group; samples are counted through the whole batch."""

    groups: np.ndarray  # int64 [N], index of the group of each pair
    chosen: np.ndarray  # int64 [N], index of a sample
    rejected: np.ndarray  # int64 [N]
    scores_margins: np.ndarray  # float64 [N], reward of the chosen minus that of the rejected sample
    num_ties: int  # groups of two or more samples, all of the same reward
    num_single: int  # groups with fewer than two samples that may be trained on

    @property
    def members(self) -> np.ndarray:
        """int64 [2 N]: chosen samples, then rejected ones."""
        return np.concatenate([self.chosen, self.rejected])

    def of_groups(self, groups: Sequence[int]) -> np.ndarray:
        """int64 [M]: the pairs of these groups, in order."""
        return np.flatnonzero(np.isin(self.groups, list(groups)))


@dataclass(frozen=True, slots=True)
class PairGradients:
    """What N pairs ask of their samples, and what is told about them."""

    chosen: np.ndarray  # float64 [N], N dL / d log pi of the chosen samples, L the mean over the pairs
    rejected: np.ndarray  # float64 [N]
    metrics: dict[str, float]  # means over the pairs, TRL's names


def best_and_worst(totals: np.ndarray, kept: np.ndarray) -> tuple[int, int] | None:
    """(sample with the highest, sample with the lowest reward) of a group; the first of equal ones.

    None where fewer than two samples count, or where all that count have one reward: a tie prefers nobody.

    Args:
        totals: float64 [G]; entries where ``kept`` is false are not looked at (they may be NaN).
        kept: bool [G], samples that may be trained on.
    """
    if totals.shape != kept.shape or totals.ndim != 1:
        raise ValueError(f"totals {totals.shape} and kept {kept.shape} must both be [G]")
    if int(kept.sum()) < 2 or np.ptp(totals[kept]) == 0.0:
        return None
    return int(np.where(kept, totals, -np.inf).argmax()), int(np.where(kept, totals, np.inf).argmin())


def sampled_pairs(totals: Sequence[np.ndarray], kept: Sequence[np.ndarray]) -> SampledPairs:
    """The pairs of a batch from each group's rewards, float64 [G], and samples that may be trained on, bool [G]."""
    rows: list[tuple[int, int, int, float]] = []
    num_ties, num_single, start = 0, 0, 0
    for g, (rewards, mask) in enumerate(zip(totals, kept, strict=True)):
        pair = best_and_worst(rewards, mask)
        if pair is not None:
            best, worst = pair
            rows.append((g, start + best, start + worst, float(rewards[best] - rewards[worst])))
        elif int(mask.sum()) < 2:
            num_single += 1
        else:
            num_ties += 1
        start += rewards.size
    groups, chosen, rejected = (np.array([row[k] for row in rows], dtype=np.int64) for k in range(3))
    margins = np.array([row[3] for row in rows], dtype=np.float64)
    return SampledPairs(groups, chosen, rejected, margins, num_ties, num_single)


def pair_gradients(
    policy: tuple[np.ndarray, np.ndarray],
    reference: tuple[np.ndarray, np.ndarray],
    num_tokens: tuple[np.ndarray, np.ndarray],
    settings: PreferenceSettings,
) -> PairGradients:
    """The gradient of the mean loss over N pairs in the log-prob of each of their samples, times N.

    Args:
        policy: of the chosen and of the rejected samples, float64 [N]: log-prob of the whole answer under the weights
            that the gradient is taken at.
        reference: the same under the reference.
        num_tokens: [N] each.
        settings: a loss of pairs that has a reference.

    Raises:
        ValueError: no pair.
    """
    num_pairs = policy[0].size
    if num_pairs == 0:
        raise ValueError("a batch without a pair has no gradient")
    leaves = [torch.tensor(row, dtype=torch.float64, requires_grad=True) for row in policy]
    chosen, rejected = (
        AnswerLogps(leaf, torch.tensor(row, dtype=torch.float64), torch.tensor(count, dtype=torch.float64))
        for leaf, row, count in zip(leaves, reference, num_tokens, strict=True)
    )
    weights = torch.full((num_pairs,), 1.0 / num_pairs, dtype=torch.float64)
    outcome = paired_outcome(chosen, rejected, weights, settings)
    found = torch.autograd.grad(outcome.loss * num_pairs, leaves)
    metrics = {name: float(value) for name, value in outcome.metrics.items()}
    return PairGradients(found[0].numpy(), found[1].numpy(), metrics)
