"""From groups to the arrays a learner rank computes on.

Rewards, lengths and group ids are small and every rank has all of them, so each rank computes all
advantages, all token weights and the whole packing plan by itself and opens only the payloads of the
samples it was dealt.
May import: numpy, trainers.*, cluster.transport.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from cluster.transport import fetch
from trainers.advantages import group_relative
from trainers.algorithms import AlgorithmSettings
from trainers.batch_advantages import reward_to_go, scaled_over_batch
from trainers.batching import SampleShape
from trainers.experience import decode_group, decode_logprobs, may_train
from trainers.losses import token_weights
from trainers.protocols import LearnerGroup


@dataclass(frozen=True, slots=True)
class SampleTokens:
    """One sample's token-sized columns."""

    prompt_ids: np.ndarray  # int32 [P]
    completion_ids: np.ndarray  # int32 [T]
    behavior_logprobs: np.ndarray  # float32 [T]
    reference_logprobs: np.ndarray | None  # float32 [T]
    values: np.ndarray | None = None  # float32 [T], by the critic


class ExperienceBatch:
    """All samples of one lap, with lazily opened tokens."""

    def __init__(self, groups: Sequence[LearnerGroup], algorithm: AlgorithmSettings, max_tokens: int) -> None:
        self.groups, self.algorithm, self.max_tokens = tuple(groups), algorithm, max_tokens
        self.shapes: list[SampleShape] = []
        for g, group in enumerate(self.groups):
            summary = group.summary
            self.shapes += [
                SampleShape(g, s, summary.num_prompt_tokens, t) for s, t in enumerate(summary.num_completion_tokens)
            ]
        self._opened: dict[int, list[SampleTokens]] = {}

    @property
    def num_samples(self) -> int:
        return len(self.shapes)

    def trainable(self) -> np.ndarray:
        """bool [samples]: has a reward, has tokens, and was not cut off where that masks a sample."""
        mask = self.algorithm.mask_truncated
        return np.concatenate([may_train(g.summary, g.rewards, mask) for g in self.groups])

    def advantages(self, penalties: np.ndarray | None = None) -> np.ndarray:
        """float64 [samples], NaN where a sample has no reward or was aborted: it is no part of its group's baseline.

        ``penalties``, float64 [samples], is subtracted from the rewards first (a KL penalty in the reward).
        """
        parts, start = [], 0
        for group in self.groups:
            rewards = group.rewards.totals
            if penalties is not None:
                rewards = rewards - penalties[start : start + rewards.size]
            finished = np.array([reason != "abort" for reason in group.summary.finish_reasons])
            parts.append(
                group_relative(
                    rewards,
                    group.rewards.valid & finished,
                    "leave_one_out" if self.algorithm.baseline == "leave_one_out" else "group_mean",
                    "std" if self.algorithm.scale == "std" else "none",
                )
            )
            start += rewards.size
        return np.concatenate(parts)

    def token_advantages(self, penalties: Sequence[np.ndarray] | None = None) -> list[np.ndarray]:
        """float32 [T] of each sample, NaN where it may not be trained on; of an algorithm with token advantages.

        ``penalties``, float64 [T] of each sample, is the KL penalty in the reward.

        Raises:
            ValueError: the baseline is a greedy completion's reward, and a group came without it.
        """
        kept, grouped = self.trainable(), self.algorithm.needs_group
        if grouped:
            totals = None if penalties is None else np.array([row.sum() for row in penalties])
            advantages, penalties = self.advantages(totals), None
        else:
            advantages = np.concatenate([g.rewards.totals - self._baseline(g) for g in self.groups])
        rows = [
            reward_to_go(
                float(advantages[i]) if kept[i] else np.nan, None if penalties is None else penalties[i],
                shape.num_completion,
            )
            for i, shape in enumerate(self.shapes)
        ]  # fmt: skip
        if self.algorithm.scale == "batch":
            rows = scaled_over_batch(rows, [bool(k) for k in kept], has_baseline=grouped or self.algorithm.needs_greedy)
        return [row.astype(np.float32) for row in rows]

    def _baseline(self, group: LearnerGroup) -> float:
        if not self.algorithm.needs_greedy:
            return 0.0
        if group.greedy_reward is None:
            raise ValueError(f"group {group.summary.group_id} came without the reward of its greedy completion")
        return group.greedy_reward

    def minibatches(self) -> list[list[int]]:
        """Sample indices of each optimizer step of one epoch; whole groups stay together."""
        n = self.algorithm.num_minibatches
        return [[i for i, s in enumerate(self.shapes) if s.group * n // len(self.groups) == m] for m in range(n)]

    def weights(self, members: Sequence[int], trainable: np.ndarray) -> np.ndarray:
        """Token weights of one minibatch, float64 [members]."""
        return token_weights(
            [self.shapes[i].num_completion for i in members],
            [bool(trainable[i]) for i in members],
            self.algorithm.aggregation,
            self.max_tokens,
        )

    def tokens(self, index: int, deadline_s: float) -> SampleTokens:
        """The tokens of sample ``index``; fetches its group's payload the first time."""
        shape = self.shapes[index]
        if shape.group not in self._opened:
            group = self.groups[shape.group]
            decoded = decode_group(fetch(group.payload, deadline_s))
            absent: list[np.ndarray | None] = [None] * len(decoded.trajectories)
            references, values = (
                absent if payload is None else decode_logprobs(fetch(payload, deadline_s))
                for payload in (group.reference_payload, group.values_payload)
            )
            self._opened[shape.group] = [
                SampleTokens(decoded.prompt.token_ids, t.completion_ids, t.behavior_logprobs, r, v)
                for t, r, v in zip(decoded.trajectories, references, values, strict=True)
            ]
        return self._opened[shape.group][shape.sample]

    def by_group(self, values: np.ndarray) -> dict[str, np.ndarray]:
        """Per-sample values, cut into groups by id."""
        out, start = {}, 0
        for group in self.groups:
            out[group.summary.group_id] = values[start : start + group.summary.num_samples]
            start += group.summary.num_samples
        return out


def contributing(
    members: Iterable[int], weights: np.ndarray, advantages: np.ndarray, algorithm: AlgorithmSettings
) -> list[int]:
    """The members whose gradient can be nonzero; all that have a weight where a KL is to be measured.

    A sample without an advantage still has KL and entropy terms; without those it has no gradient at
    all, and skipping it changes nothing because the denominators were fixed before.
    """
    in_loss = (algorithm.kl_coef > 0 and algorithm.kl_placement == "loss") or algorithm.entropy_coef > 0
    keep_all = in_loss or algorithm.measure_kl
    return [i for k, i in enumerate(members) if weights[k] > 0 and (keep_all or advantages[i] != 0.0)]
