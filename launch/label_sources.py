"""Labellers at work: a group of candidates in, Labels out.  Scores by functions, a function of pairs, a judge.

May import: actors.{dispatch, fleet}, cluster.{transport, worker_group}, trainers.*, launch.label_config.
"""

from __future__ import annotations

import asyncio
import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from actors.dispatch import Dispatcher
from cluster.transport import put
from cluster.worker_group import WorkerGroup
from launch.label_config import LabelConfig
from trainers.constitution import Principle
from trainers.experience import RewardFailure, TrajectoryGroup, encode_group, summarize
from trainers.judge import PairJudge
from trainers.labellers import (
    Labels,
    Outcome,
    Pair,
    candidate_masks,
    from_outcomes,
    from_scores,
    label_seed,
    pairs_to_compare,
)
from trainers.protocols import GeneratedGroup, Scorer
from trainers.verdicts import Judgement, combine

Notes = Mapping[str, Any]


class Labeller(Protocol):
    """Labels the candidates of one prompt; a failure is a reason in the labels, never an exception."""

    async def label(self, group: TrajectoryGroup, turn: int) -> tuple[Labels, Notes]:
        """(labels, what else was said, for the record).  ``turn``: how often the prompt came before."""
        ...


class _Compares:
    """What all labellers share: which candidates and pairs there are to label."""

    def __init__(self, config: LabelConfig) -> None:
        self.keep, self.seed = config.keep, config.run.seed

    def pairs(self, group: TrajectoryGroup, turn: int) -> tuple[list[str | None], list[Pair], dict[str, int]]:
        """(reason for each masked candidate, pairs to compare, reasons of the other ones)."""
        texts = [t.text for t in group.trajectories]
        masks = candidate_masks(texts, [t.finish_reason for t in group.trajectories])
        seed = label_seed(self.seed, group.prompt.prompt_id, turn, "pair")
        return masks, *pairs_to_compare(texts, masks, self.keep.pairs, self.keep.drop_identical, seed)


class ScoreLabeller(_Compares):
    """By a scorer: reward functions or a reward model."""

    def __init__(self, config: LabelConfig, scorer: Scorer) -> None:
        super().__init__(config)
        self._scorer = scorer

    async def label(self, group: TrajectoryGroup, turn: int) -> tuple[Labels, Notes]:
        masks, pairs, dropped = self.pairs(group, turn)
        rewards = await self._scorer.score(GeneratedGroup(summarize(group, "label", 0.0), put(encode_group(group))))
        kinds: dict[int, set[str]] = {}
        for i, failure in rewards.failures:
            kinds.setdefault(i, set()).add(failure.kind)
        for i, total in enumerate(rewards.totals):
            if math.isnan(total) and masks[i] is None:
                masks[i] = "abstained" if kinds.get(i, set()) == {"abstained"} else "failed"
        notes: dict[str, Any] = {}
        if len(rewards.parts) > 1:
            notes["parts"] = {n: [None if math.isnan(v) else float(v) for v in p] for n, p in rewards.parts.items()}
        if failed := [[i, f.reward, f.kind, f.detail] for i, f in rewards.failures if f.kind != "abstained"]:
            notes["failures"] = failed
        return from_scores(rewards.totals.tolist(), masks, pairs, dropped), notes


class PairLabeller(_Compares):
    """By a function that compares, in workers (actors/pair_worker.py)."""

    def __init__(self, config: LabelConfig, workers: WorkerGroup, deadline_s: float) -> None:
        super().__init__(config)
        self._workers, self._deadline_s = workers, deadline_s
        self._dispatcher = Dispatcher(len(workers))

    async def label(self, group: TrajectoryGroup, turn: int) -> tuple[Labels, Notes]:
        _, pairs, dropped = self.pairs(group, turn)
        num_candidates = len(group.trajectories)
        if not pairs:
            return from_outcomes(num_candidates, [], dropped), {}
        seeds = [label_seed(self.seed, group.prompt.prompt_id, turn, i, j) for i, j in pairs]
        answers = [(group.trajectories[i], group.trajectories[j]) for i, j in pairs]
        worker = self._dispatcher.assign(len(pairs))
        try:
            values = await self._workers.call(
                worker, "compare", group.prompt, answers, seeds, deadline_s=self._deadline_s
            )
        finally:
            self._dispatcher.done(worker, len(pairs))
        outcomes, failed = [], []
        for (i, j), value in zip(pairs, values, strict=True):
            if isinstance(value, RewardFailure):
                outcomes.append(Outcome(i, j, None, "failed"))
                failed.append([i, j, value.kind, value.detail])
            else:
                outcomes.append(Outcome(i, j, value, "abstained" if value is None else None))
        return from_outcomes(num_candidates, outcomes, dropped), {"failures": failed} if failed else {}


class JudgeLabeller(_Compares):
    """By a language model that is asked in both orders; where it changes its mind with the order the pair is masked.

    Args:
        principles: one of them, drawn by seed and prompt, is what the pairs of a prompt are judged by
            (arXiv:2212.08073, section 4); none: the template alone.
    """

    def __init__(self, config: LabelConfig, judge: PairJudge, principles: Sequence[Principle] = ()) -> None:
        super().__init__(config)
        self._judge, self._principles = judge, tuple(principles)

    async def label(self, group: TrajectoryGroup, turn: int) -> tuple[Labels, Notes]:
        _, pairs, dropped = self.pairs(group, turn)
        principle = self._principle(group, turn)
        asked = "" if principle is None else principle.judge
        judged = await asyncio.gather(*(self._compare(group, i, j, asked) for i, j in pairs))
        labels = from_outcomes(len(group.trajectories), [outcome for outcome, _ in judged], dropped)
        notes: dict[str, Any] = {} if principle is None else {"principle": principle.judge}
        if said := [[o.first, o.second, *j.said] for o, j in judged if j.said is not None]:
            notes["verdicts"] = said
        if unread := [[o.first, o.second, *j.failures] for o, j in judged if j.failures != (None, None)]:
            notes["unread"] = unread
        return labels, notes

    def _principle(self, group: TrajectoryGroup, turn: int) -> Principle | None:
        if not self._principles:
            return None
        number = label_seed(self.seed, group.prompt.prompt_id, turn, "principle")
        return self._principles[number % len(self._principles)]

    async def _compare(self, group: TrajectoryGroup, i: int, j: int, principle: str) -> tuple[Outcome, Judgement]:
        a, b = group.trajectories[i].text, group.trajectories[j].text
        judgement = await self._judge.judge(group.prompt, a, b, principle)
        value, reason = combine(*judgement.verdicts, "masked")
        return Outcome(i, j, value, judgement.why or reason), judgement


def merge(groups: list[tuple[list[int], TrajectoryGroup]], group_id: str, num_candidates: int) -> TrajectoryGroup:
    """One group of groups that were sampled at different temperatures, each with the indices of its candidates."""
    found = {
        index: dataclasses.replace(trajectory, sample_index=index)
        for indices, group in groups
        for index, trajectory in zip(indices, group.trajectories, strict=True)
    }
    return TrajectoryGroup(group_id, groups[0][1].prompt, tuple(found[i] for i in range(num_candidates)))
