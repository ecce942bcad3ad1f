"""ReMax's baseline: every prompt is answered once more, greedily, and that answer's reward is what samples are
compared with (arXiv:2310.10505, algorithm 1).

The greedy answer is sampled beside its group, scored by the same rewards and never trained on: it has no place in
a batch, so nothing counts it as a sample.  Any number that does not look at the samples is a baseline without bias;
this one follows the policy.  Without the number there is no advantage: the samples of a group whose greedy answer
has no reward are masked, like samples without a reward of their own.
May import: asyncio, numpy, trainers.{experience, protocols}.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from dataclasses import replace
from typing import TypeVar

import numpy as np

from trainers.experience import GroupRewards, RewardFailure
from trainers.protocols import GeneratedGroup, GroupRequest

First = TypeVar("First")
Second = TypeVar("Second")


def greedy_request(request: GroupRequest) -> GroupRequest:
    """One greedy completion of the prompt of ``request``; at temperature 0 a seed decides nothing."""
    return replace(
        request, group_id=f"{request.group_id}/greedy", num_samples=1, seeds=request.seeds[:1], greedy=True
    )


def greedy_reward(generated: GeneratedGroup, rewards: GroupRewards) -> float:
    """The reward of the greedy completion; NaN where it has none or was aborted."""
    aborted = generated.summary.finish_reasons[0] == "abort"
    return float("nan") if aborted else float(rewards.totals[0])


def masked_without(baseline: float, greedy: GroupRewards, rewards: GroupRewards) -> GroupRewards:
    """``rewards`` of the group as they are, or with every sample masked where the baseline is NaN.

    What went wrong with the greedy completion stands beside the group's own failures, at its first sample.
    """
    if np.isfinite(baseline):
        return rewards
    found = [f for _, f in greedy.failures if f.reward not in greedy.measured]
    told = tuple((0, RewardFailure(f.reward, f.kind, f"of the greedy completion: {f.detail}")) for f in found)
    failures = tuple(sorted((*rewards.failures, *told), key=lambda failure: failure[0]))
    return replace(rewards, totals=np.full_like(rewards.totals, np.nan), failures=failures)


async def together(first: Awaitable[First], second: Awaitable[Second]) -> tuple[First, Second]:
    """Both results; when one fails, or the caller is cancelled, the other is cancelled and has ended on return."""
    tasks = (asyncio.ensure_future(first), asyncio.ensure_future(second))
    try:
        return await asyncio.gather(*tasks)
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise
