"""Several scorers as one: reward functions beside any number of reward models.

May import: asyncio, numpy, trainers.{experience, protocols}.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import numpy as np

from trainers.experience import GroupRewards
from trainers.protocols import GeneratedGroup, Scorer


class MixedScorer:
    """One ``Scorer`` of several, asked at the same time.  Their parts must have different names."""

    def __init__(self, scorers: Sequence[Scorer]) -> None:
        self.scorers = tuple(scorers)

    async def score(self, group: GeneratedGroup) -> GroupRewards:
        return merge(await asyncio.gather(*(scorer.score(group) for scorer in self.scorers)))


def merge(scored: Sequence[GroupRewards]) -> GroupRewards:
    """The rewards of one group from all scorers; each total is weighted already, so the totals add up.

    A sample has no total (NaN: it is masked) when some part of it failed or when nothing applies to it.  A scorer
    whose functions all abstained on a sample adds nothing to it.  Parts that are only measured (weight 0) decide
    nothing, nor does a scorer that has no others.

    Raises:
        ValueError: two scorers have a part of one name, or the groups differ.
    """
    first = scored[0]
    names = [name for rewards in scored for name in rewards.parts]
    if len(set(names)) < len(names) or any(rewards.group_id != first.group_id for rewards in scored):
        raise ValueError(f"group {first.group_id}: these rewards do not belong together: {names}")
    failures = sorted((f for rewards in scored for f in rewards.failures), key=lambda f: f[0])
    weighed = [rewards for rewards in scored if set(rewards.parts) - set(rewards.measured)]
    totals, applies = np.zeros(first.totals.size), np.full(first.totals.size, not weighed)
    for rewards in weighed:
        failed = np.zeros(first.totals.size, dtype=bool)
        abstained = failed.copy()
        for i, failure in rewards.failures:
            if failure.reward not in rewards.measured:
                (abstained if failure.kind == "abstained" else failed)[i] = True
        # NaN without a reason is a failure too: only an abstention may be passed over.
        passed_over = abstained & ~failed & ~rewards.valid
        totals += np.where(passed_over, 0.0, rewards.totals)
        applies |= ~passed_over
    totals[~applies] = np.nan
    return GroupRewards(
        group_id=first.group_id,
        totals=totals,
        parts={name: part for rewards in scored for name, part in rewards.parts.items()},
        failures=tuple(failures),
        score_s=max(rewards.score_s for rewards in scored),
        measured=tuple(name for rewards in scored for name in rewards.measured),
    )
