"""Labellers at work: a group of candidates in, Labels out.  Scores by functions, a function of pairs, a judge.

May import: actors.{dispatch, fleet}, cluster.{transport, worker_group}, trainers.*, launch.{judging, label_config}.
"""

from __future__ import annotations

import asyncio
import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Protocol

from actors.dispatch import Dispatcher
from cluster.transport import put
from cluster.worker_group import WorkerGroup
from launch.judging import PairJudge
from launch.label_config import JudgeSettings, LabelConfig
from trainers.experience import RewardFailure, TrajectoryGroup, encode_group, summarize
from trainers.labellers import (
    Labels,
    Outcome,
    Pair,
    candidate_masks,
    combine_verdicts,
    from_outcomes,
    from_scores,
    label_seed,
    pairs_to_compare,
    parse_verdict,
)
from trainers.protocols import GeneratedGroup, Generator, Scorer

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
    """By a language model that is asked in both orders."""

    def __init__(
        self, config: LabelConfig, judge: JudgeSettings, generator: Generator, tokenizer: Any, max_length: int
    ) -> None:
        super().__init__(config)
        self._judge = PairJudge(judge, generator, tokenizer, max_length, "label.judge")

    async def label(self, group: TrajectoryGroup, turn: int) -> tuple[Labels, Notes]:
        _, pairs, dropped = self.pairs(group, turn)
        judged = await asyncio.gather(*(self._compare(group, i, j) for i, j in pairs))
        labels = from_outcomes(len(group.trajectories), [outcome for outcome, _ in judged], dropped)
        said = [[o.first, o.second, *texts] for o, texts in judged if texts is not None]
        return labels, {"verdicts": said} if said else {}

    async def _compare(self, group: TrajectoryGroup, i: int, j: int) -> tuple[Outcome, tuple[str, str] | None]:
        a, b = group.trajectories[i].text, group.trajectories[j].text
        texts = await self._judge.ask(group.prompt, a, b, f"{group.group_id}-{i}-{j}")
        if texts is None:
            return Outcome(i, j, None, "too_long"), None
        value, reason = combine_verdicts(*(parse_verdict(text) for text in texts))
        return Outcome(i, j, value, reason), texts


def merge(groups: list[tuple[list[int], TrajectoryGroup]], group_id: str, num_candidates: int) -> TrajectoryGroup:
    """One group of groups that were sampled at different temperatures, each with the indices of its candidates."""
    found = {
        index: dataclasses.replace(trajectory, sample_index=index)
        for indices, group in groups
        for index, trajectory in zip(indices, group.trajectories, strict=True)
    }
    return TrajectoryGroup(group_id, groups[0][1].prompt, tuple(found[i] for i in range(num_candidates)))
