"""A judge of pairs as a reward: how many of the prompt's other samples a sample beats.

    share of i = mean over the other samples j of: 1 where i is better in both orders, 0 where j is, else 1/2

With two samples and online DPO this is direct feedback from a language model (Guo et al. 2024, arXiv:2402.04792): the
better one is chosen, and where the orders disagree there is no pair.  G samples take G (G - 1) questions.
Axes: G samples of one prompt.
May import: numpy, trainers.{experience, judge, verdicts}.
"""

from __future__ import annotations

import asyncio
import itertools
import time

import numpy as np

from trainers.experience import FailureKind, GroupRewards, Prompt, RewardFailure, TrajectoryGroup
from trainers.judge import PairJudge
from trainers.verdicts import IDENTICAL, Judgement

UNREAD: dict[str, FailureKind] = {"no_verdict": "missing"}  # of verdicts, as kinds of marks name it


class WinJudge:
    """Compares the samples of a group in twos; the part ``name`` is the share above, in [0, 1].

    Args:
        weight: of the share in the total reward; 0: it is only measured.
    """

    def __init__(self, judge: PairJudge, name: str, weight: float = 1.0) -> None:
        self._judge, self._name, self._weight = judge, name, weight

    async def score(self, group: TrajectoryGroup) -> GroupRewards:
        """Rewards of one group; a sample of which no comparison could be read is NaN, with a failure of its kind.

        Raises:
            EndpointError: nobody is answered any more.
        """
        started, num_samples = time.monotonic(), len(group.trajectories)
        failures: dict[int, RewardFailure] = {}
        for i, sample in enumerate(group.trajectories):
            if sample.finish_reason == "abort" or not sample.text.strip():
                failures[i] = self._failure("not_a_number", "the sample was aborted or is empty: it is not compared")
        compared = [i for i in range(num_samples) if i not in failures]
        pairs = list(itertools.combinations(compared, 2))
        texts = [sample.text for sample in group.trajectories]
        judged = await asyncio.gather(*(self._compare(group.prompt, texts[i], texts[j]) for i, j in pairs))
        outcomes: dict[int, list[float]] = {i: [] for i in compared}
        for (i, j), judgement in zip(pairs, judged, strict=True):
            if judgement.outcome is not None:
                outcomes[i].append(judgement.outcome)
                outcomes[j].append(1.0 - judgement.outcome)
        shares = np.full(num_samples, np.nan)
        for i, found in outcomes.items():
            if found:
                shares[i] = np.mean(found)
            else:
                failures[i] = self._why(i, dict(zip(pairs, judged, strict=True)))
        totals = self._weight * shares if self._weight else np.zeros(num_samples)
        measured = () if self._weight else (self._name,)
        return GroupRewards(
            group.group_id, totals, {self._name: shares}, tuple(sorted(failures.items(), key=lambda item: item[0])),
            time.monotonic() - started, measured,
        )  # fmt: skip

    async def _compare(self, prompt: Prompt, a: str, b: str) -> Judgement:
        return IDENTICAL if a == b else await self._judge.judge(prompt, a, b)

    def _why(self, sample: int, judged: dict[tuple[int, int], Judgement]) -> RewardFailure:
        """Why none of a sample's comparisons counts: the first reason there is."""
        for pair, judgement in judged.items():
            if sample in pair:
                unread = next((failure for failure in judgement.failures if failure is not None), None)
                kind = judgement.why or UNREAD.get(unread or "", unread) or "missing"
                return self._failure(kind, f"said {judgement.said}"[:120])  # type: ignore[arg-type]
        return self._failure("abstained", "there is no other sample to compare it with")

    def _failure(self, kind: FailureKind, detail: str) -> RewardFailure:
        return RewardFailure(self._name, kind, detail)
