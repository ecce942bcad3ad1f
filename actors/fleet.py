"""Groups of workers as the loop's protocols see them: one Generator, one Scorer, one Learner ...

Thin: dispatch, deadlines and nothing else.
May import: actors.*, trainers.protocols, cluster.worker_group.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from actors.call_batches import CallBatches
from actors.dispatch import Dispatcher
from actors.state_saving import SaveBegun, SaveOutcome
from cluster.worker_group import WorkerGroup
from trainers.experience import GroupRewards
from trainers.protocols import (
    CriticReport,
    GeneratedGroup,
    GroupRequest,
    LearnerGroup,
    Payload,
    PreparedBatch,
    UpdateReport,
)


class GeneratorFleet:
    """All generators as one ``Generator``."""

    def __init__(self, workers: WorkerGroup, group_deadline_s: float) -> None:
        self.workers, self.group_deadline_s = workers, group_deadline_s
        self._dispatcher = Dispatcher(len(workers))

    async def generate(self, request: GroupRequest) -> GeneratedGroup:
        cost = int(request.prompt.token_ids.shape[0]) + request.num_samples * request.max_tokens
        worker = self._dispatcher.assign(cost, request.prompt.prompt_id)
        try:
            summary, payload = await self.workers.call_split(
                worker, "generate", request, deadline_s=self.group_deadline_s
            )
        finally:
            self._dispatcher.done(worker, cost)
        return GeneratedGroup(summary, payload)


class RewardPool:
    """All reward workers, which run functions, as one ``Scorer``."""

    def __init__(self, workers: WorkerGroup, deadline_s: float) -> None:
        self.workers, self.deadline_s = workers, deadline_s
        self._dispatcher = Dispatcher(len(workers))

    async def score(self, group: GeneratedGroup) -> GroupRewards:
        worker = self._dispatcher.assign(group.summary.num_samples)
        try:
            # Not awaited inside the payload's own argument slot: the reference travels in a list, so that
            # Ray leaves it to the worker to fetch it, with a deadline.
            rewards: GroupRewards = await self.workers.call(
                worker, "score", [group.payload], self.deadline_s, deadline_s=self.deadline_s
            )
        finally:
            self._dispatcher.done(worker, group.summary.num_samples)
        return rewards


def num_scored_tokens(group: GeneratedGroup) -> int:
    """What a forward pass over the group costs: its prompt with each completion."""
    summary = group.summary
    return summary.num_samples * summary.num_prompt_tokens + sum(summary.num_completion_tokens)


class RewardModelPool:
    """All replicas of one reward model as one ``Scorer``; waiting groups share a call up to ``token_budget``."""

    def __init__(self, workers: WorkerGroup, deadline_s: float, token_budget: int) -> None:
        self.workers, self.deadline_s = workers, deadline_s
        self._calls = CallBatches(len(workers), token_budget, self._call)

    async def score(self, group: GeneratedGroup) -> GroupRewards:
        return await self._calls.submit(group, num_scored_tokens(group))

    async def _call(self, worker: int, groups: list[GeneratedGroup]) -> Sequence[GroupRewards]:
        rewards: list[GroupRewards] = await self.workers.call(
            worker, "score", [g.payload for g in groups], self.deadline_s, deadline_s=self.deadline_s
        )
        return rewards


class ReferencePool:
    """All reference replicas as one ``Reference``; waiting groups share a call up to ``token_budget``."""

    def __init__(self, workers: WorkerGroup, deadline_s: float, token_budget: int) -> None:
        self.workers, self.deadline_s = workers, deadline_s
        self._calls = CallBatches(len(workers), token_budget, self._call)

    async def logprobs(self, group: GeneratedGroup) -> Payload:
        return await self._calls.submit(group, num_scored_tokens(group))

    async def _call(self, worker: int, groups: list[GeneratedGroup]) -> Sequence[Payload]:
        _, *payloads = await self.workers.call_split(
            worker, "logprobs", [g.payload for g in groups], self.deadline_s, deadline_s=self.deadline_s,
            num_payloads=len(groups),
        )  # fmt: skip
        return payloads


class Gang:
    """All ranks of one trained model; every call is made on all of them at once."""

    def __init__(self, workers: WorkerGroup, deadline_s: float) -> None:
        self.workers, self.deadline_s = workers, deadline_s

    async def _first_with_payloads(self, num_payloads: int, method: str, *args: Any) -> tuple[Any, ...]:
        """``call_split`` on rank 0 while the others, who have no result, make the same call."""
        workers, deadline_s = self.workers, self.deadline_s
        found: tuple[Any, ...]
        found, *_ = await asyncio.gather(
            workers.call_split(0, method, *args, deadline_s=deadline_s, num_payloads=num_payloads),
            *(workers.call(rank, method, *args, deadline_s=deadline_s) for rank in range(1, len(workers))),
        )
        return found

    async def begin_save(self, directory: str) -> list[SaveBegun]:
        """Of each rank; returns when all have a copy of their state and are free to train."""
        begun: list[SaveBegun] = await self.workers.call_all("begin_save", directory, deadline_s=self.deadline_s)
        return begun

    async def save_outcome(self, rank: int) -> SaveOutcome | None:
        """What came of ``begin_save`` on one rank; None while it writes.  Answered between two other calls."""
        outcome: SaveOutcome | None = await self.workers.call(rank, "save_outcome", deadline_s=self.deadline_s)
        return outcome

    async def load(self, directory: str) -> None:
        await self.workers.call_all("load", directory, deadline_s=self.deadline_s)


class LearnerGang(Gang):
    """All learner ranks as one ``Learner``, and one ``PolicyLearner``."""

    async def prepare(
        self, groups: Sequence[LearnerGroup], scores: Sequence[np.ndarray], kl_coef: float
    ) -> PreparedBatch:
        prepared, payload = await self._first_with_payloads(1, "prepare", list(groups), list(scores), kl_coef)
        found: PreparedBatch = replace(prepared, payload=payload)
        return found

    async def update(
        self, groups: Sequence[LearnerGroup], step: int, targets: Payload | None = None, kl_coef: float | None = None
    ) -> UpdateReport:
        reports = await self.workers.call_all(
            "update", list(groups), step, None if targets is None else [targets], kl_coef, deadline_s=self.deadline_s
        )
        first: UpdateReport = reports[0]
        return first

    async def export(self, directory: str) -> None:
        await self.workers.call_all("export", directory, deadline_s=self.deadline_s)


class CriticGang(Gang):
    """All critic ranks as one ``Critic``."""

    def __init__(self, workers: WorkerGroup, deadline_s: float, token_budget: int) -> None:
        """``token_budget``: of each rank; waiting groups share a call up to that of all ranks."""
        super().__init__(workers, deadline_s)
        # One batch at a time, as of one worker: a forward pass may be a collective, and every rank has to see the
        # same calls in the same order.
        self._calls = CallBatches(1, token_budget * len(workers), self._values)

    async def values(self, group: GeneratedGroup) -> Payload:
        return await self._calls.submit(group, num_scored_tokens(group))

    async def _values(self, _: int, groups: list[GeneratedGroup]) -> Sequence[Payload]:
        payloads = [g.payload for g in groups]
        _, *values = await self._first_with_payloads(len(groups), "values", payloads, self.deadline_s)
        return values

    async def update(self, groups: Sequence[LearnerGroup], step: int, targets: Payload) -> CriticReport:
        reports = await self.workers.call_all("update", list(groups), step, [targets], deadline_s=self.deadline_s)
        first: CriticReport = reports[0]
        return first
