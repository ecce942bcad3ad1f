"""What evaluations of one comparison measured, put on the same prompts: rewards, lengths, KL, who won.

Axes: N held-out prompts, G answers to each, S seeds.
May import: numpy, pyarrow, trainers.{calibration, crossed, kl_from_base, win_rate}.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from trainers.calibration import Estimate, unless_certain
from trainers.crossed import crossed_mean
from trainers.kl_from_base import best_of_n_kl_of
from trainers.win_rate import Comparison, WinRate, compare, win_rate

COLUMNS = ["model", "completion_ids", "reward", "policy_logprobs", "base_logprobs"]


@dataclass(frozen=True, slots=True)
class Answers:
    """Of one policy; NaN where a reward failed, or a KL was not measured."""

    reward: np.ndarray  # float64 [N, G]
    length: np.ndarray  # float64 [N, G], tokens
    kl: np.ndarray  # float64 [N, G], nats: log-prob under the policy - under the base, of the whole answer (k1)
    base_reward: np.ndarray  # [N, G] of the base's answers under the same seeds
    base_length: np.ndarray  # [N, G]
    gold: np.ndarray | None = None  # float64 [N, G]: the reward that stands for the truth, where there is one


def read_answers(samples: Path, per_prompt: int, gold: str | None = None) -> Answers:
    """Of an evaluation with a base; without one the policy is the base.  ``gold``: that reward's name."""
    file = pq.ParquetFile(samples)
    columns = [*COLUMNS, *([] if gold is None else [f"rewards/{gold}"])]
    table = file.read(columns=[name for name in columns if name in file.schema_arrow.names])
    models = table.column("model").to_pylist()
    policy = [i for i, who in enumerate(models) if who == "policy"]
    base = [i for i, who in enumerate(models) if who == "base"] or policy

    def grid(values: np.ndarray, rows: list[int]) -> np.ndarray:
        return values[rows].reshape(-1, per_prompt)

    reward = np.array(table.column("reward").to_pylist(), dtype=np.float64)  # null becomes NaN
    length = pc.list_value_length(table.column("completion_ids")).to_numpy().astype(np.float64)
    kl = np.full(len(models), np.nan)
    if "policy_logprobs" in table.column_names:
        kl = _sums(table.column("policy_logprobs")) - _sums(table.column("base_logprobs"))
    truth = None
    if gold is not None:
        truth = grid(np.array(table.column(f"rewards/{gold}").to_pylist(), dtype=np.float64), policy)
    return Answers(
        grid(reward, policy), grid(length, policy), grid(kl, policy), grid(reward, base), grid(length, base), truth
    )


def _sums(column: pa.ChunkedArray) -> np.ndarray:
    return np.array([np.nan if row is None else float(np.sum(row)) for row in column.to_pylist()])


def best_of(drawn: Answers, num_answers: int, n: int) -> Answers:
    """The best of ``n`` by reward, ``num_answers`` times for each prompt.

    ``drawn``: of the base model, its first ``num_answers`` answers are what the others are compared with, so none of
    them is among those that are chosen from.  Equal rewards: the first.  KL: estimated from all rewards of a prompt.
    """


    def pools(grid: np.ndarray) -> np.ndarray:
        return grid[:, num_answers:].reshape(len(grid), num_answers, -1)[:, :, :n]

    rewards = pools(drawn.reward)
    chosen = np.where(np.isfinite(rewards), rewards, -np.inf).argmax(axis=2)[:, :, None]
    grids = [drawn.reward, drawn.length, *([] if drawn.gold is None else [drawn.gold])]
    reward, length, *gold = (np.take_along_axis(pools(grid), chosen, axis=2)[:, :, 0] for grid in grids)
    kl = np.array([best_of_n_kl_of(row, n) for row in drawn.base_reward])[:, None]
    base = drawn.base_reward[:, :num_answers], drawn.base_length[:, :num_answers]
    return Answers(reward, length, np.broadcast_to(kl, reward.shape), *base, gold[0] if gold else None)


def against_itself(base: Answers) -> Answers:
    """The base model as a policy: it has not moved."""
    return replace(base, kl=np.zeros_like(base.reward))


@dataclass(frozen=True, slots=True)
class Measures:
    """Of one algorithm, over seeds and prompts."""

    reward: Estimate
    kl: Estimate
    length: Estimate
    win_rate: Estimate  # against the base's answers, ties as half
    pairs: WinRate  # the same with length taken into account; its intervals are over prompts alone
    gold: Estimate | None = None  # of the reward that stands for the truth


def measure(seeds: Sequence[Answers]) -> Measures:
    """``seeds``: the same prompts answered by the policy of each seed.  ValueError for none."""
    if not seeds:
        raise ValueError("no evaluation to measure")
    comparisons = [
        [Comparison(f"{i}", int(a.length[i, g]), int(a.base_length[i, g]),
                    (float(a.reward[i, g]), float(a.base_reward[i, g])))
         for i, g in np.ndindex(*a.reward.shape)]
        for a in seeds
    ]  # fmt: skip
    outcomes = [
        np.array([np.nan if c.outcome is None else c.outcome for c in of_seed]).reshape(a.reward.shape)
        for a, of_seed in zip(seeds, comparisons, strict=True)
    ]
    everything = [c for of_seed in comparisons for c in of_seed]
    return Measures(
        reward=_reward([a.reward for a in seeds]),
        kl=_over([a.kl for a in seeds]),
        length=_over([a.length for a in seeds]),
        win_rate=_rate(outcomes, everything),
        pairs=compare(everything),
        gold=_reward(truths) if (truths := [a.gold for a in seeds if a.gold is not None]) else None,
    )


def _reward(grids: Sequence[np.ndarray]) -> Estimate:
    """Where all answers are right, or all wrong, the interval is that of as many trials as there are prompts."""
    return unless_certain(_over(grids), len(grids[0]))


def _over(grids: Sequence[np.ndarray]) -> Estimate:
    """Over seeds and prompts; the answers to one prompt are one observation."""
    there = [np.isfinite(grid) for grid in grids]
    means = [
        np.where(t, grid, 0.0).sum(axis=1) / np.where(t.any(axis=1), t.sum(axis=1), np.nan)
        for grid, t in zip(grids, there, strict=True)
    ]
    return crossed_mean(np.stack(means))


def _rate(outcomes: Sequence[np.ndarray], comparisons: Sequence[Comparison]) -> Estimate:
    """A share: its interval stays in [0, 1], and where all outcomes agree it is that of a proportion."""
    found = _over(outcomes)
    if found.low == found.high:
        return win_rate([c.outcome for c in comparisons], [c.prompt_id for c in comparisons])
    return Estimate(found.value, max(0.0, found.low), min(1.0, found.high), found.n)
