"""The judge of an evaluation: each sample of the policy against the base's of the same seed, in both orders.

May import: actors.generator_fleet, trainers.*, launch.{eval_config, eval_fleet, eval_prepare, judging, lanes}.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from actors.generator_fleet import GeneratorFleet
from launch.eval_config import EvalConfig
from launch.eval_fleet import GENERATOR, EvalCluster, Role
from launch.eval_prepare import PreparedEval
from launch.judging import make_respondent, pair_judge
from launch.lanes import in_lanes
from trainers.experience import Trajectory, TrajectoryGroup
from trainers.judge import PairJudge
from trainers.verdicts import IDENTICAL, Judgement


def judge_role(config: EvalConfig, prepared: PreparedEval, cluster: EvalCluster) -> Role | None:
    """The judge's engines; None where there is no judge, or others serve it."""
    judge = config.eval.judge
    if judge is None or prepared.judge is None or judge.endpoint is not None:
        return None
    return cluster.engines("judge", prepared.judge.path, prepared.judge.max_length, judge.generator)


@asynccontextmanager
async def open_judge(
    config: EvalConfig, prepared: PreparedEval, cluster: EvalCluster, role: Role | None
) -> AsyncIterator[tuple[PairJudge, int]]:
    """(the judge, how many pairs to ask about at once); its engines are gone when the block ends."""
    settings, found = config.eval.judge, prepared.judge
    assert settings is not None and found is not None
    run_folder = Path(config.run.directory) / config.run.name
    if settings.endpoint is not None:
        respondent = make_respondent(settings, found, "eval.judge", run_folder, None)
        try:
            yield pair_judge(settings, respondent), settings.endpoint.num_at_once
        finally:
            await respondent.close()
        return
    assert role is not None
    async with cluster.stage([role]) as workers:
        generator = GeneratorFleet(workers[GENERATOR], settings.generator.group_deadline_s)
        respondent = make_respondent(settings, found, "eval.judge", run_folder, generator)
        yield pair_judge(settings, respondent), settings.generator.max_num_seqs * settings.generator.num_workers


async def judge_pairs(
    judge: PairJudge, policy: Sequence[TrajectoryGroup], base: Sequence[TrajectoryGroup], num_at_once: int
) -> list[Judgement]:
    """[N * G].  Equal texts tie without a question: no judge tells a text from itself."""
    pairs = [
        (ours, a, b)
        for ours, theirs in zip(policy, base, strict=True)
        for a, b in zip(ours.trajectories, theirs.trajectories, strict=True)
    ]

    async def one(pair: tuple[TrajectoryGroup, Trajectory, Trajectory]) -> Judgement:
        group, a, b = pair
        return IDENTICAL if a.text == b.text else await judge.judge(group.prompt, a.text, b.text)

    return await in_lanes(num_at_once, pairs, one)


def judge_rows(policy: Sequence[TrajectoryGroup], judgements: Sequence[Judgement]) -> list[dict[str, Any]]:
    """A row a pair of samples, for the record."""
    samples = [(g.prompt.prompt_id, t.sample_index) for g in policy for t in g.trajectories]
    return [
        {
            "prompt_id": prompt_id, "sample_index": index, "outcome": j.outcome, "why": j.why,
            "policy_first": j.said and j.said[0], "base_first": j.said and j.said[1],
            "unread": [kind for kind in j.failures if kind is not None],
        }
        for (prompt_id, index), j in zip(samples, judgements, strict=True)
    ]  # fmt: skip
