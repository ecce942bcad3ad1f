"""Held-out pairs of an evaluation: reward models score them, judges that mark by a rubric mark both answers.

May import: numpy, rich, actors.scorer_pools, cluster.transport, launch.*, trainers.*.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
from rich.console import Console

from actors.scorer_pools import RewardModelPool, RewardPool
from cluster.transport import put
from launch.eval_config import EvalConfig
from launch.eval_fleet import EvalCluster, Role
from launch.eval_prepare import PreparedEval
from launch.judge_marks import as_group
from launch.lanes import in_lanes
from trainers.comparisons import Comparison
from trainers.experience import (
    GroupRewards,
    Prompt,
    Trajectory,
    TrajectoryGroup,
    VersionSpan,
    WeightVersion,
    encode_group,
    summarize,
)
from trainers.protocols import GeneratedGroup

SCORED_AT_ONCE = 64  # groups in flight for each scoring worker: enough to fill its packs


async def judge_reward_models(
    config: EvalConfig, prepared: PreparedEval, cluster: EvalCluster, roles: Sequence[Role], console: Console
) -> dict[str, list[np.ndarray]]:
    """Of each reward model: the scores, float64 [K], of the answers of every held-out comparison."""
    started, found = time.perf_counter(), {}
    for model, role in zip(config.reward_models, roles, strict=True):
        async with cluster.stage([role]) as groups:
            pool = RewardModelPool(groups[role.name], model.deadline_s, model.token_budget)
            payloads = [as_payload(_as_group(c, f"pair-{i}")) for i, c in enumerate(prepared.pairs[model.name])]
            rewards = await in_lanes(SCORED_AT_ONCE * model.num_workers, payloads, pool.score)
            found[model.name] = [r.parts[model.name] for r in rewards]
    console.print(f"pairs: {time.perf_counter() - started:.1f} s", markup=False, highlight=False)
    return found


async def mark_labelled(
    config: EvalConfig, prepared: PreparedEval, cluster: EvalCluster, roles: Sequence[Role]
) -> dict[str, list[GroupRewards]]:
    """Of each rubric judge: its marks of both answers of every pair that people labelled."""
    found = {}
    for judge, role in zip(config.judges, roles, strict=True):
        async with cluster.stage([role]) as groups:
            pool = RewardPool(groups[role.name], judge.deadline_s, room=judge.room)
            payloads = [as_payload(as_group(pair, f"labelled-{i}")) for i, pair in enumerate(prepared.labelled)]
            found[role.name] = await in_lanes(judge.room, payloads, pool.score)
    return found


def _as_group(comparison: Comparison, group_id: str) -> TrajectoryGroup:
    """Written answers in the form that reward models score."""
    span = WeightVersion(0, 0)
    answers = tuple(
        Trajectory(i, 0, ids, np.zeros(len(ids), np.float32), "", "stop", (VersionSpan(span, len(ids)),))
        for i, ids in enumerate(comparison.completion_ids)
    )
    return TrajectoryGroup(group_id, Prompt(comparison.prompt_id, comparison.prompt_ids, ""), answers)


def as_payload(group: TrajectoryGroup) -> GeneratedGroup:
    return GeneratedGroup(summarize(group, "eval", 0.0), put(encode_group(group)))
